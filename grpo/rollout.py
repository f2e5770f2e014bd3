"""Sample G completions for each prompt: prefill once, decode the group together, stop row by row, compact.

The prompt's keys and values are computed once per group and read once per group (`models.cache.KVCache`). Rows decode in lock step; a row that has stopped is
carried until fewer than about half of the rows are alive, and then the cache is compacted, so that no more than a logarithmic number of copies is ever made.
Which token a row draws depends on (seed, step, prompt uid, g, t) and on its own logits, so neither compaction nor the company a prompt keeps changes a completion.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.sampling import sample, uniforms

COMPACT_AT = 0.6        # compact when this share of the rows, or less, would be left
FEWEST = 4, 4           # rows kept if there are as many: 4 + 4 a thread. A product of fewer adds up in another order on a CPU, and log-probs would differ by a rounding


@dataclass
class Rollout:
    """G completions for each of P prompts.

    tokens (P, G, C) int64, zero after the end · length (P, G) int64, the stop token included · stopped (P, G) bool, False where the cap cut it off ·
    logp (P, G, C) float32, of each token under the distribution it was drawn from, zero after the end.
    """
    tokens: Tensor
    length: Tensor
    stopped: Tensor
    logp: Tensor

    @classmethod
    def none(cls, group: int) -> "Rollout":
        """What a rank without a prompt has: no groups."""
        empty = torch.zeros(0, group, 1)
        return cls(empty.long(), empty[..., 0].long(), empty[..., 0].bool(), empty)

    def to(self, device) -> "Rollout":
        """The same on a device."""
        return Rollout(self.tokens.to(device), self.length.to(device), self.stopped.to(device), self.logp.to(device))


@torch.no_grad()
def generate(policy, prompts, *, group: int, cap: int, temperature: float, stop_ids: Sequence[int], address: tuple[int, int, Sequence[int]],
             banned: Sequence[int] = ()) -> Rollout:
    """Let the policy complete each prompt `group` times, at most `cap` tokens each.

    prompts: PromptBatch of P prompts, on the policy's device.  temperature: divides the logits; 0 is greedy.  stop_ids: any of them ends a row and belongs to it.
    address: (seed, step, uid of each prompt as an integer); the same address gives the same completions.  banned: ids that may not be drawn.
    """
    device, count = prompts.tokens.device, len(prompts.tokens)
    cache = policy.prefill(prompts, group, cap)
    chance = uniforms(*address, group, cap).to(device).flatten(0, 1)                         # (B, C)
    stops = torch.tensor(list(stop_ids), device=device)
    tokens = torch.zeros(count * group, cap, dtype=torch.long, device=device)                # (B, C)
    logp = torch.zeros(count * group, cap, device=device)
    length = torch.full((count * group,), cap, device=device)
    stopped = torch.zeros(count * group, dtype=torch.bool, device=device)

    rows = torch.arange(count * group, device=device).view(count, group)                     # which completion each row of the cache is
    alive = torch.ones_like(rows, dtype=torch.bool)
    last = prompts.tokens.gather(1, prompts.length.unsqueeze(1) - 1).expand(count, group)    # the fork: the prompt's last token, once per row
    for t in range(cap):
        logits = policy.logits(policy.step(last, cache))
        if banned:
            logits[..., list(banned)] = torch.finfo(logits.dtype).min
        last, drawn_logp = sample(logits, chance[rows, t], temperature)                      # (P', G')
        living = rows[alive]
        tokens[living, t], logp[living, t] = last[alive], drawn_logp[alive]
        ended = torch.isin(last, stops) & alive
        length[rows[ended]], stopped[rows[ended]] = t + 1, True
        alive = alive & ~ended
        if not alive.any():
            break
        if (kept := _compaction(alive)) is not None:
            cache = cache.compact(kept)
            rows, alive, last = rows.flatten()[kept], alive.flatten()[kept], last.flatten()[kept]
    longest = int(length.max())
    shape = (count, group)
    return Rollout(tokens[:, :longest].view(*shape, longest), length.view(shape), stopped.view(shape), logp[:, :longest].view(*shape, longest))


def _compaction(alive: Tensor) -> Tensor | None:
    """Which rows to keep, (P', G') numbers into the flat rows, or None while compacting would save too little. Living rows come first in each line."""
    prompts = alive.any(1).nonzero().flatten()
    fewest = FEWEST[0] + FEWEST[1] * torch.get_num_threads()
    width = min(max(int(alive.sum(1).max()), -(-fewest // len(prompts))), alive.shape[1])
    if len(prompts) * width > COMPACT_AT * alive.numel():
        return None
    order = alive[prompts].int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return prompts.unsqueeze(1) * alive.shape[1] + order
