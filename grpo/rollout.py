"""Sample G completions for each of P prompts.

Each prompt is read once, and its keys and values are stored once for its group (`models.cache.KVCache`). All
rows decode together, one token at a time, each in its own slot of the cache. A row ends at a stop token or at
the cap. A waiting row takes the slot of a finished one. When no row waits, finished rows' slots are closed.

Which token a row draws depends on (seed, step, prompt uid, g, t) and on the row's own logits. So neither its
slot nor the other rows in the batch change a completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from grpo.cuda_graphs import Repeat
from grpo.sampling import Truncation, sample, uniforms
from models.cache import KVCache

# Close slots when at most this share of them would be left.
CLOSE_AT = 0.8
# On a CPU keep at least 4 + 4 x threads rows. With fewer, its matrix product sums in another order and
# log-probs differ in the last bit.
MIN_ROWS = (4, 4)
# On a GPU fewer rows save next to no time: a step reads all weights.
MIN_ROWS_ON_GPU = 8
# Tokens between two checks for finished rows: a check waits for the device. 16 on other devices.
TOKENS_BETWEEN_CHECKS = {"cpu": 1}


@dataclass
class Rollout:
    """G completions for each of P prompts. tokens (P, G, C) int64, zero after the end. length (P, G) int64,
    counts the stop token, 0 for a row that was not asked for. stopped (P, G) bool, False where the cap ended
    the row. logp (P, G, C) float32, each token's under the distribution it was drawn from, zero after the
    end."""

    tokens: Tensor
    length: Tensor
    stopped: Tensor
    logp: Tensor

    @classmethod
    def none(cls, group: int) -> "Rollout":
        """The rollout of a rank that has no row: no groups."""
        empty = torch.zeros(0, group, 1)
        return cls(empty.long(), empty[..., 0].long(), empty[..., 0].bool(), empty)

    def to(self, device) -> "Rollout":
        """The same on a device."""
        return Rollout(*(x.to(device) for x in (self.tokens, self.length, self.stopped, self.logp)))


@dataclass(frozen=True)
class DecodeOptions:
    """How `generate` decodes. banned: ids that may not be drawn. max_rows: at most this many rows at the same
    time (None: all). recorded: replay decode steps as CUDA graphs (grpo/cuda_graphs.py). truncation, logp_of:
    see `sample`. rows: only these of the P·group rows (None: all); each prompt has one of them."""

    banned: Sequence[int] = ()
    max_rows: int | None = None
    recorded: bool = False
    truncation: Truncation | None = None
    logp_of: str = "sampled"
    rows: range | None = None


@dataclass
class DecodingRows:
    """The rows being decoded, one per slot, and everything that was drawn so far.

    row, last (slots,) int64: the row in each slot, and its last token. running (slots,) bool. uniform,
    tokens, logp (B, C + 1), of all rows: finished rows write to the last place, which is cut off in the end.
    stops, banned: ids.
    """

    cache: KVCache
    row: Tensor
    last: Tensor
    running: Tensor
    uniform: Tensor
    tokens: Tensor
    logp: Tensor
    stops: Tensor
    banned: Tensor
    temperature: float
    options: DecodeOptions

    def decode_one(self, policy) -> None:
        """Decode one more token in every slot. It works in place, in fixed shapes, and never waits for the
        device, so it can be recorded and compiled."""
        self.draw(policy.logits(policy.decode(self.last, self.cache)))

    def draw(self, logits: Tensor) -> None:
        """Draw the token of every slot from its logits (slots, V), after the cache has grown by one."""
        cap = self.tokens.shape[1] - 1
        place = torch.where(self.running, self.cache.filled - 1, cap)
        if len(self.banned):
            logits.index_fill_(-1, self.banned, torch.finfo(torch.float32).min)
        how = (self.temperature, self.options.truncation, self.options.logp_of)
        drawn, logp = sample(logits, self.uniform[self.row, place], *how)  # (slots,)
        self.tokens[self.row, place] = drawn
        self.logp[self.row, place] = logp
        self.running &= ~torch.isin(drawn, self.stops) & (self.cache.filled < cap)
        # A finished row writes at its first place again, so it never runs out of room.
        self.cache.filled *= self.running
        self.last.copy_(drawn)

    def begin(self, slots: Tensor, row: Tensor, prompt: Tensor, first: Tensor) -> None:
        """Give `slots` to the rows `row` of the prompts `prompt`, whose last tokens are `first`. All (n,)."""
        self.row[slots] = row
        self.last[slots] = first
        self.running[slots] = True
        self.cache.begin(slots, prompt)

    def close(self, most: int) -> None:
        """Keep `most` slots, which hold all running rows."""
        kept = self.cache.keep(self.running, most)
        self.row, self.last, self.running = self.row[kept], self.last[kept], self.running[kept]

    def rollout(self, group: int) -> Rollout:
        """All that was drawn, in groups. A row ends with its first stop token, or with the cap."""
        asked = self.options.rows or range(len(self.tokens))
        # Autograd may save these tensors, unlike those made in inference mode.
        with torch.inference_mode(False):
            tokens, logp = self.tokens[:, :-1].clone(), self.logp[:, :-1].clone()
            ends = torch.isin(tokens, self.stops)
            stopped = ends.any(1)
            length = torch.where(stopped, ends.long().argmax(1) + 1, tokens.shape[1])
            for rows in (slice(0, asked.start), slice(asked.stop, None)):
                length[rows] = 0
                stopped[rows] = False
            longest = int(length.max())
            found = (tokens[:, :longest], length, stopped, logp[:, :longest])
            return Rollout(*(x.unflatten(0, (-1, group)) for x in found))


def least_rows(device: str) -> int:
    """How many rows are kept at least, so that their products do not get too small. device: "cpu" or
    "cuda"."""
    return MIN_ROWS[0] + MIN_ROWS[1] * torch.get_num_threads() if device == "cpu" else MIN_ROWS_ON_GPU


def start_rows(policy, prompts, group: int, cap: int, rows: range, least: int) -> tuple[KVCache, Tensor]:
    """Read the prompts, and decode the first token of some rows. -> the cache, and hidden states (rows, D)
    that predict the first completion tokens.

    All rows of a prompt start with its last token (see the fork in models/qwen_vl.py). So this step runs once
    per prompt (or for `least` rows in all), and the result is copied.
    """
    slot = torch.arange(len(rows), device=prompts.tokens.device)
    prompt = (rows.start + slot) // group
    rows_per_prompt = -(-least // len(prompts.tokens))
    if rows_per_prompt >= group or rows_per_prompt * len(prompts.tokens) > len(rows):
        cache = policy.prefill(prompts, group, cap, len(rows))
        if rows.start:
            cache.begin(slot, prompt)
        return cache, policy.decode(prompts.last[prompt], cache)
    cache = policy.prefill(prompts, rows_per_prompt, cap)
    hidden = policy.decode(prompts.last.repeat_interleave(rows_per_prompt), cache)
    source = prompt * rows_per_prompt
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
    address: tuple[int, int, list[int]],
    options: DecodeOptions | None = None,
) -> Rollout:
    """Complete each prompt `group` times, with at most `cap` tokens each.

    prompts: PromptBatch of P prompts, on the policy's device. temperature: divides the logits; 0 is greedy.
    stop_ids: any of them ends a row and is part of it. address: (seed, step, uid of each prompt as an
    integer); the same address gives the same completions.
    """
    options = options or DecodeOptions()
    device = prompts.tokens.device
    count = len(prompts.tokens) * group
    asked = options.rows or range(count)
    least = least_rows(device.type)
    # The first row without a slot.
    waiting = asked.start + min(len(asked), options.max_rows or count)
    cache, hidden = start_rows(policy, prompts, group, cap, range(asked.start, waiting), least)
    row = torch.arange(asked.start, waiting, device=device)
    slots = (row, torch.zeros_like(row), torch.ones_like(row, dtype=torch.bool))
    uniform = uniforms(*address, group, cap + 1).to(device).flatten(0, 1)
    drawn = (row.new_zeros(count, cap + 1), torch.zeros(count, cap + 1, device=device))
    stops, banned = (
        torch.tensor(x, dtype=torch.long, device=device) for x in ([*stop_ids], [*options.banned])
    )
    rows = DecodingRows(cache, *slots, uniform, *drawn, stops, banned, temperature, options)
    rows.draw(policy.logits(hidden))
    decode_one = Repeat(partial(rows.decode_one, policy), options.recorded)
    while True:
        running = int(rows.running.sum())
        finished = (~rows.running).nonzero().flatten()[: asked.stop - waiting]
        if len(finished):
            new = torch.arange(waiting, waiting + len(finished), device=device)
            rows.begin(finished, new, new // group, prompts.last[new // group])
            waiting += len(finished)
            decode_one.forget()
        elif not running:
            return rows.rollout(group)
        elif (most := max(running, min(least, len(rows.row)))) <= CLOSE_AT * len(rows.row):
            rows.close(most)
            decode_one.forget()
        decode_one(cache.reach(TOKENS_BETWEEN_CHECKS.get(device.type, 16), decode_one.multiple), cache.span)
