"""From prompts and rollouts to what a training step takes: padded prompts, and batches that split without
changing a gradient.

Padding is on the right and masks come from lengths, never from token values. A group stays an axis
throughout: tokens are (P, G, C); per-row tensors are (B, ...) with B = P*G and row b = p*G + g.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.mrope import mrope_positions
from models.qwen_vl import PromptBatch


def collate_prompts(prompts, *, image_token: int, merge: int = 2) -> PromptBatch:
    """Pad prompts on the right and say where each picture's features go.

    prompts: P objects with `uid`, `tokens` (S_p,), `patches` (N_p, patch size) and `grid` (I_p, 3).
    image_token: id of the picture placeholder.  → PromptBatch. Raises ValueError, naming the prompt, where
    placeholders and pictures do not match.
    """
    count, longest = len(prompts), max(len(p.tokens) for p in prompts)
    tokens = torch.zeros(count, longest, dtype=torch.long)
    slot = torch.full((count, longest), -1, dtype=torch.long)
    positions = torch.zeros(count, 3, longest, dtype=torch.long)
    length, following, features = (
        torch.zeros(count, dtype=torch.long),
        torch.zeros(count, dtype=torch.long),
        0,
    )
    for p, prompt in enumerate(prompts):
        ids, grid = torch.as_tensor(prompt.tokens), torch.as_tensor(prompt.grid).view(-1, 3)
        placeholders, merged = (ids == image_token).nonzero().flatten(), int(grid.prod(-1).sum()) // merge**2
        if len(placeholders) != merged:
            raise ValueError(
                f"prompt {prompt.uid}: {len(placeholders)} picture placeholders, but its pictures have "
                f"{merged} features"
            )
        length[p] = len(ids)
        tokens[p, : len(ids)] = ids
        slot[p, placeholders] = torch.arange(features, features + merged)
        positions[p, :, : len(ids)], following[p] = mrope_positions(ids, grid, image_token, merge)
        features += merged
    patches = torch.cat([torch.as_tensor(p.patches) for p in prompts])
    grids = torch.cat([torch.as_tensor(p.grid).view(-1, 3) for p in prompts])
    return PromptBatch(
        tokens=tokens,
        length=length,
        positions=positions,
        next_position=following,
        image_slot=slot,
        patches=patches,
        grid=grids,
    )


@dataclass
class TrainBatch:
    """What one update learns from, or one micro-batch of it. Optional tensors are None where the objective
    does not need them.

    sources: the P prompts (uid, tokens, patches, grid).  prompts: the same, collated; set in micro-batches
    only. tokens (P, G, C) int64, length (P, G) int64 with the stop token counted, advantage (B,), and
    logp_old, logp_ref, weight (B, C), all float32.
    stretch: the number of the stretch in which each prompt stands, for micro-batches that do not mix them.
    """

    sources: list
    tokens: Tensor
    length: Tensor
    advantage: Tensor | None = None
    weight: Tensor | None = None
    logp_old: Tensor | None = None
    logp_ref: Tensor | None = None
    prompts: PromptBatch | None = None
    stretch: list[int] | None = None

    @property
    def mask(self) -> Tensor:
        """(B, C) bool: the real tokens, the stop token among them."""
        return torch.arange(
            self.tokens.shape[-1], device=self.length.device
        ) < self.length.flatten().unsqueeze(-1)

    def select(self, prompts: list[int], rows: slice = slice(None)) -> "TrainBatch":
        """The part with these prompts and these rows of each group, cut to its longest completion."""
        groups, group = self.length.shape
        index = torch.tensor(prompts)
        length = self.length[index][:, rows]
        longest = max(int(length.max()), 1)

        def part(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x.view(groups, group, *x.shape[1:])[index][:, rows].flatten(0, 1)
            return x[:, :longest] if x.dim() == 2 else x

        return TrainBatch(
            [self.sources[p] for p in prompts],
            self.tokens[index][:, rows, :longest],
            length,
            part(self.advantage),
            part(self.weight),
            part(self.logp_old),
            part(self.logp_ref),
        )

    def micro_batches(
        self, budget: int, among: list[int] | None = None, *, apart: bool = False
    ) -> Iterator[tuple["TrainBatch", list[int], slice]]:
        """Split into parts of at most `budget` tokens (prompts once, completions, padding), groups of like
        length together. A group over the budget is split by rows; a row over it goes alone. `among`: only
        these prompts. `apart`: no two stretches together.

        Yields (part, its prompts' numbers, its rows). With weights fixed for the whole update, the parts'
        gradients add up to the whole one's exactly.
        """
        among = list(range(len(self.sources)) if among is None else among)
        if apart and self.stretch is not None:
            for stretch in sorted({self.stretch[p] for p in among}):
                yield from self.micro_batches(budget, [p for p in among if self.stretch[p] == stretch])
            return
        group = self.length.shape[1]
        longest = self.length.max(dim=1).values.tolist()
        waiting: list[int] = []

        def cost(prompts: list[int]) -> int:
            return len(prompts) * (
                max(len(self.sources[p].tokens) for p in prompts) + group * max(longest[p] for p in prompts)
            )

        for p in sorted(among, key=lambda p: -longest[p]):
            if waiting and cost([*waiting, p]) > budget:
                yield self.select(waiting), waiting, slice(None)
                waiting = []
            if cost([p]) > budget:
                step = max(1, (budget - len(self.sources[p].tokens)) // max(longest[p], 1))
                for first in range(0, group, step):
                    yield self.select([p], slice(first, first + step)), [p], slice(first, first + step)
            else:
                waiting.append(p)
        if waiting:
            yield self.select(waiting), waiting, slice(None)

    def silent(self, prompt) -> "TrainBatch":
        """Another prompt with a group as large as those here, whose completions have no tokens."""
        group = self.length.shape[1]

        def empty(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.new_zeros(group, *([1] * (x.dim() - 1)))

        return TrainBatch(
            [prompt],
            self.tokens.new_zeros(1, group, 1),
            self.length.new_zeros(1, group),
            empty(self.advantage),
            empty(self.weight),
            empty(self.logp_old),
            empty(self.logp_ref),
        )

    def beside(self, other: "TrainBatch") -> "TrainBatch":
        """Both, with this one's groups first. The other's completions are no longer than these."""

        def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return (
                None
                if a is None
                else torch.cat([a, F.pad(b, (0, a.shape[-1] - b.shape[-1])) if a.dim() > 1 else b])
            )

        return TrainBatch(
            self.sources + other.sources,
            both(self.tokens, other.tokens),
            torch.cat([self.length, other.length]),
            both(self.advantage, other.advantage),
            both(self.weight, other.weight),
            both(self.logp_old, other.logp_old),
            both(self.logp_ref, other.logp_ref),
        )

    def collated(self, *, image_token: int, merge: int, device: torch.device | str) -> "TrainBatch":
        """The same part with its prompts padded, on a device."""

        def put(x):
            return None if x is None else x.to(device)

        return replace(
            self,
            prompts=collate_prompts(self.sources, image_token=image_token, merge=merge).to(device),
            tokens=put(self.tokens),
            length=put(self.length),
            advantage=put(self.advantage),
            weight=put(self.weight),
            logp_old=put(self.logp_old),
            logp_ref=put(self.logp_ref),
        )

    def put_back(self, whole: Tensor, value: Tensor, prompts: list[int], rows: slice) -> None:
        """Write a micro-batch's (b, c) result into its place in `whole` (B, C), on the CPU. Rows behind
        those of `prompts` are nobody's (`grpo/parallel/fsdp.py`)."""
        groups, group = self.length.shape
        whole, value, count = whole.view(groups, group, whole.shape[-1]), value.cpu(), len(range(group)[rows])
        for at, p in enumerate(prompts):
            whole[p, rows, : value.shape[-1]] = value[at * count : (at + 1) * count]


def learnable(batch: TrainBatch) -> list[int]:
    """The prompts whose groups have an advantage that is not zero. The others teach nothing, unless there
    is a KL penalty."""
    return batch.advantage.view(batch.length.shape).ne(0).any(dim=1).nonzero().flatten().tolist()
