"""Sample G completions for each prompt: prefill once, decode all rows together, stop row by row, give the
slot to a waiting row, compact.

The prompt's keys and values are computed once per group and read once per group (`models.cache.KVCache`).
Rows decode side by side, one to a slot. Where memory is short there are fewer slots than rows, and a waiting
row gets the slot of one that has stopped; when none waits, the slots of the stopped are closed. Which token a
row draws depends on (seed, step, prompt uid, g, t) and on its own logits, so neither its slot nor the company
a prompt keeps changes a completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from grpo.cuda_graphs import Repeat
from grpo.sampling import sample, uniforms
from models.cache import KVCache

# slots are closed when this share of them, or less, would be left
CLOSE_AT = 0.8
# slots kept if there are as many: 4 + 4 a thread. A product of fewer adds up in another order on a CPU, and
# log-probs would differ by a rounding
FEWEST = (4, 4)

# tokens between two looks at who has stopped; elsewhere 16, because a look waits for the device
LOOK = {"cpu": 1}


@dataclass
class Rollout:
    """G completions for each of P prompts.

    tokens (P, G, C) int64, zero after the end · length (P, G) int64, the stop token included · stopped (P, G)
    bool, False where the cap cut it off · logp (P, G, C) float32, of each token under the distribution it was
    drawn from, zero after the end.
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
        return Rollout(
            self.tokens.to(device), self.length.to(device), self.stopped.to(device), self.logp.to(device)
        )


@dataclass
class Slots:
    """The rows being written, one to a slot, and all that was written so far.

    row, last (slots,) int64, alive (slots,) bool: which row is in a slot, the token it drew last, whether it
    goes on. tokens, logp, chance (B, C + 1): what stopped rows draw goes to the last place, which is cut off
    in the end.
    """

    cache: KVCache
    row: Tensor
    last: Tensor
    alive: Tensor
    chance: Tensor
    tokens: Tensor
    logp: Tensor

    def draw(self, policy, stops: Tensor, banned: Tensor, temperature: float) -> None:
        """One more token in every slot. All of it in place, in shapes that are known before, and nothing
        waits for the device: so it can be recorded and compiled."""
        self.choose(policy.logits(policy.step(self.last, self.cache)), stops, banned, temperature)

    def choose(self, logits: Tensor, stops: Tensor, banned: Tensor, temperature: float) -> None:
        """The token of every slot for which the cache has just grown, from its logits (slots, V)."""
        cap = self.tokens.shape[1] - 1
        place = torch.where(self.alive, self.cache.filled - 1, cap)
        if len(banned):
            logits.index_fill_(-1, banned, torch.finfo(torch.float32).min)
        drawn, logp = sample(logits, self.chance[self.row, place], temperature)  # (slots,)
        self.tokens[self.row, place], self.logp[self.row, place] = drawn, logp
        self.alive &= ~torch.isin(drawn, stops) & (self.cache.filled < cap)
        # who has stopped writes at the first place, and never runs out of room
        self.cache.filled *= self.alive
        self.last.copy_(drawn)

    def written(self, shape: tuple[int, int], stops: Tensor) -> Rollout:
        """All that was drawn, for P prompts of G rows: shape (P, G). A row ends with its first stop token,
        or with the cap."""
        # tensors that autograd may keep, unlike those made here
        with torch.inference_mode(False):
            tokens, logp = self.tokens[:, :-1].clone(), self.logp[:, :-1].clone()
            ends = torch.isin(tokens, stops)
            stopped = ends.any(1)
            length = torch.where(stopped, ends.long().argmax(1) + 1, tokens.shape[1])
            longest = int(length.max())
            return Rollout(
                *(
                    x.view(*shape, *x.shape[1:])
                    for x in (tokens[:, :longest], length, stopped, logp[:, :longest])
                )
            )

    def begin(self, slots: Tensor, row: Tensor, prompt: Tensor, first: Tensor) -> None:
        """Give `slots` (n,) to other rows: `row`, completions of `prompt`, which begin with the prompts'
        last tokens `first`, all (n,)."""
        self.row[slots], self.last[slots], self.alive[slots] = row, first, True
        self.cache.begin(slots, prompt)

    def close(self, most: int) -> None:
        """Go on with `most` slots, those of all living rows among them."""
        kept = self.cache.keep(self.alive, most)
        self.row, self.last, self.alive = self.row[kept], self.last[kept], self.alive[kept]


def first_step(policy, prompts, group: int, cap: int, slots: int, fewest: int) -> tuple[KVCache, Tensor]:
    """Read the prompts and take the first step of the rows that get a slot. → the cache, and hidden states
    (slots, D) that predict their first tokens.

    That step's input is the prompt's last token (the fork), so it is the same for all rows of a prompt: it is
    taken for as many as make `fewest`, and the others get a copy.
    """
    # rows of a prompt
    each = -(-fewest // len(prompts.tokens))
    if each >= group or each * len(prompts.tokens) > slots:
        cache = policy.prefill(prompts, group, cap, slots)
        return cache, policy.step(prompts.last.repeat_interleave(group)[:slots], cache)
    cache = policy.prefill(prompts, each, cap)
    hidden = policy.step(prompts.last.repeat_interleave(each), cache)
    source = torch.arange(slots, device=hidden.device) // group * each
    cache.spread(source)
    return cache, hidden[source]


@torch.inference_mode()
def generate(
    policy,
    prompts,
    *,
    group: int,
    cap: int,
    temperature: float,
    stop_ids: Sequence[int],
    address: tuple[int, int, Sequence[int]],
    banned: Sequence[int] = (),
    slots: int | None = None,
    recorded: bool = False,
) -> Rollout:
    """Let the policy complete each prompt `group` times, at most `cap` tokens each.

    prompts: PromptBatch of P prompts, on the policy's device.  temperature: divides the logits; 0 is greedy.
    stop_ids: any of them ends a row and belongs to it.
    address: (seed, step, uid of each prompt as an integer); the same address gives the same completions.
    banned: ids that may not be drawn.
    slots: rows decoded at the same time, at most (None: all).  recorded: draw by CUDA graphs
    (grpo/cuda_graphs.py).
    """
    device, P = prompts.tokens.device, len(prompts.tokens)
    # B rows in all
    count, fewest = P * group, FEWEST[0] + FEWEST[1] * torch.get_num_threads()
    # the first row without a slot
    waiting = min(count, slots or count)
    cache, hidden = first_step(policy, prompts, group, cap, waiting, fewest)
    row = torch.arange(waiting, device=device)
    rows = Slots(
        cache,
        row,
        last=torch.zeros_like(row),
        alive=torch.ones_like(row, dtype=torch.bool),
        chance=uniforms(*address, group, cap + 1).to(device).flatten(0, 1),
        tokens=row.new_zeros(count, cap + 1),
        logp=torch.zeros(count, cap + 1, device=device),
    )
    stops, forbidden = (
        torch.tensor(list(ids), dtype=torch.long, device=device) for ids in (stop_ids, banned)
    )
    rows.choose(policy.logits(hidden), stops, forbidden, temperature)
    run = Repeat(partial(rows.draw, policy, stops, forbidden, temperature), recorded)
    while True:
        living, free = int(rows.alive.sum()), (~rows.alive).nonzero().flatten()[: count - waiting]
        if len(free):
            new = torch.arange(waiting, waiting + len(free), device=device)
            rows.begin(free, new, new // group, prompts.last[new // group])
            waiting += len(free)
            run.forget()
        elif not living:
            break
        elif (most := max(living, min(fewest, len(rows.row)))) <= CLOSE_AT * len(rows.row):
            rows.close(most)
            run.forget()
        run(cache.reach(LOOK.get(device.type, 16), run.multiple), cache.span)
    return rows.written((P, group), stops)
