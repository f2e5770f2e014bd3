"""One step's groups: `Groups` while they are drawn, `Batch` while they are learned from, `MicroBatch` on the
policy's device.

Padding is on the right. Masks come from lengths, never from token values. A group is an axis: tokens are
(P, G, C); tensors of rows are (B, ...) with B = P * G and row b = p * G + g.

Dynamic sampling (DAPO, arXiv 2503.14476, Sec. 3.2; GPG, arXiv 2504.02546) drops a group whose completions all
earned the same, because its advantage is 0, and asks another question instead. All ranks ask in the same
attempts, and keep the groups that one rank alone would have kept; a rank keeps only rows that it has drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.parallel.rows import Share
from grpo.rollout import Rollout
from models.mrope import mrope_positions
from models.qwen_vl import PromptBatch

# rewards closer than this are equal, as in `group_advantages`
EQUAL = 1e-6
# what `Groups` holds as lists of one item a group
LISTS = ("questions", "prompts", "texts")


def collate_prompts(prompts, *, image_token: int, merge: int = 2) -> PromptBatch:
    """Pad prompts on the right, and number the features of their pictures.

    prompts: P objects with `uid`, `tokens` (S_p,), `patches` (N_p, patch size) and `grid` (I_p, 3).
    image_token: the id of the picture placeholder. merge: patches along each side of a feature.
    Raises ValueError, naming the prompt, where placeholders and pictures do not match.
    """
    length = torch.tensor([len(p.tokens) for p in prompts])
    tokens = torch.zeros(len(prompts), int(length.max()), dtype=torch.long)
    slot = torch.full_like(tokens, -1)
    positions = torch.zeros(len(prompts), 3, tokens.shape[1], dtype=torch.long)
    following = torch.zeros_like(length)
    grids = [torch.as_tensor(p.grid).view(-1, 3) for p in prompts]
    features = 0
    for p, (prompt, grid) in enumerate(zip(prompts, grids)):
        ids = torch.as_tensor(prompt.tokens)
        placeholders = (ids == image_token).nonzero().flatten()
        merged = int(grid.prod(-1).sum()) // merge**2
        if len(placeholders) != merged:
            what = f"{len(placeholders)} picture placeholders, but its pictures have {merged} features"
            raise ValueError(f"prompt {prompt.uid}: {what}")
        tokens[p, : len(ids)] = ids
        slot[p, placeholders] = torch.arange(features, features + merged)
        positions[p, :, : len(ids)], following[p] = mrope_positions(ids, grid, image_token, merge)
        features += merged
    patches = torch.cat([torch.as_tensor(p.patches) for p in prompts])
    return PromptBatch(tokens, length, positions, following, slot, patches, torch.cat(grids))


def _mask(rows) -> Tensor:
    """(B, C) bool: the real tokens, the stop token among them."""
    place = torch.arange(rows.tokens.shape[-1], device=rows.length.device)
    return place < rows.length.flatten().unsqueeze(-1)


@dataclass
class Groups:
    """P questions that this rank asked in a step, with G scored completions each. P may be 0. Of a group that
    is split over ranks each has some rows; the others have length 0 here, and no tokens.

    texts: P lists of G. reward: (P, G) of the groups of all ranks. parts: each tensor (P, G) of this rank's
    groups. skipped: questions that could not be asked. share: which groups and rows are here.
    """

    questions: list
    prompts: list
    rollout: Rollout
    texts: list[list[str]]
    reward: Tensor
    parts: dict[str, Tensor]
    skipped: int
    share: Share

    @property
    def tokens(self) -> Tensor:
        """(P, G, C) int64: the completions."""
        return self.rollout.tokens

    @property
    def length(self) -> Tensor:
        """(P, G) int64: the tokens of each completion, the stop token included."""
        return self.rollout.length

    mask = property(_mask)

    @property
    def differing(self) -> list[int]:
        """The groups of all ranks whose rewards differ, by place. Only these have an advantage."""
        return (self.reward.amax(1) - self.reward.amin(1) >= EQUAL).nonzero().flatten().tolist()

    def enough_differ(self, share: float) -> bool:
        """Whether the groups that differ are, over all ranks, at least `share` of the first attempt's."""
        return len(self.differing) >= ceil(share * self.share.drawn[0])

    def extend(self, more: Groups) -> Groups:
        """These groups, then those of one more attempt."""
        longest = max(self.tokens.shape[-1], more.tokens.shape[-1])

        def join(a: Tensor, b: Tensor) -> Tensor:
            # (P, G, C): the padding of rollouts is 0
            if a.dim() == 3:
                a, b = (F.pad(x, (0, longest - x.shape[-1])) for x in (a, b))
            return torch.cat([a, b])

        return Groups(
            **{name: getattr(self, name) + getattr(more, name) for name in (*LISTS, "skipped")},
            rollout=Rollout(*map(join, vars(self.rollout).values(), vars(more.rollout).values())),
            reward=join(self.reward, more.reward),
            parts={name: join(part, more.parts[name]) for name, part in self.parts.items()},
            share=self.share.extend(more.share),
        )

    def keep(self, places: list[int]) -> Groups:
        """The groups of all ranks with these places, in this order, cut to the longest completion."""
        share, groups = self.share.keep(places)
        index = torch.tensor(groups, dtype=torch.long)
        longest = int(self.length[index].max()) if groups else 1
        pick = lambda x: x[index][..., :longest] if x.dim() == 3 else x[index]
        return replace(
            self,
            **{name: [getattr(self, name)[group] for group in groups] for name in LISTS},
            rollout=Rollout(*map(pick, vars(self.rollout).values())),
            reward=self.reward[places],
            parts={name: pick(part) for name, part in self.parts.items()},
            share=share,
        )

    def batch(self, dynamic: bool, sections: int) -> Batch:
        """The batch of a step. All ranks decide alike, because all have the rewards of all.

        dynamic: over all ranks, keep as many groups as the first attempt drew. The groups that differ come
        first, in the order in which they were drawn, and the loss is an average over them alone (GPG's factor
        B / (B - M) for M idle groups of B). If they are too few, idle groups fill the places and weigh
        nothing. sections: 0 makes every group a section of its own.
        """
        differing = set(self.differing)
        idle = [dynamic and place not in differing for place in range(len(self.reward))]
        kept = sorted(range(len(idle)), key=lambda place: idle[place])[: self.share.drawn[0]]
        mine = self.keep(kept)
        if sections == 0:
            mine = replace(mine, share=mine.share.apart())
        counted = torch.tensor([not idle[kept[place]] for place in mine.share.places], dtype=torch.bool)
        length = mine.length[mine.share.here & counted[:, None]]
        left_out = set(range(len(idle))).difference(kept)
        asked = [
            len(self.prompts[p].tokens)
            for p, (place, first) in enumerate(zip(self.share.places, self.share.first_here))
            if first and place in left_out
        ]
        return Batch(
            **vars(mine),
            counts=torch.tensor([length.sum(), length.numel()]),
            dropped=len(left_out),
            dropped_tokens=int(self.length.sum() - mine.length.sum()) + sum(asked),
        )


class Cut(NamedTuple):
    """What a micro-batch holds: of some groups the same rows; if there is a section, only what is in it."""

    groups: list[int]
    rows: slice
    section: int | None = None


@dataclass
class Batch(Groups):
    """What one update learns from: this rank's groups of a step, and what the loss needs of them.

    counts: (2,) int64, the tokens and completions on this rank over which the loss is an average.
    dropped: the groups of all ranks that dynamic sampling left out; dropped_tokens: the prompt and completion
    tokens of this rank's ones.
    advantage: (B,), and weight: (B, C), float32, 0 until they are set.
    logp, logp_old, logp_ref: (B, C) float32, log-probs under the policy that sampled, the old policy and the
    reference, by the training forward. `accumulate_gradient` writes logp in the first update.
    all_teach: a term of the loss has a gradient even where all advantages are 0.
    stats: the `UpdateStats` of the latest update from each mini-batch, by the mini-batch's groups.
    """

    counts: Tensor = field(kw_only=True)
    dropped: int = 0
    dropped_tokens: int = 0
    advantage: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    logp: Tensor = field(init=False)
    logp_old: Tensor | None = None
    logp_ref: Tensor | None = None
    all_teach: bool = False
    stats: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.advantage = torch.zeros(self.length.numel())
        self.weight = torch.zeros(self.mask.shape)
        self.logp = torch.zeros(self.mask.shape)

    @classmethod
    def of_documents(
        cls, questions: list, prompts: list, tokens: Tensor, length: Tensor, skipped: int = 0
    ) -> Batch:
        """Documents to imitate, tokens (P, G, C) and length (P, G; 0: none): every advantage is 1."""
        share = Share.whole(*length.shape)
        rollout = Rollout(tokens, length, stopped=length > 0, logp=torch.zeros(tokens.shape))
        counts = torch.tensor([length.sum(), (length > 0).sum()])
        batch = cls(
            questions, prompts, rollout, [], torch.ones(length.shape), {}, skipped, share, counts=counts
        )
        batch.advantage = torch.ones(length.numel())
        return batch

    @property
    def teaching(self) -> list[int]:
        """The groups that have a gradient: with a KL penalty or an entropy bonus all, else those with a
        nonzero advantage."""
        if self.all_teach or self.logp_ref is not None:
            return list(range(len(self.prompts)))
        return self.advantage.view(self.length.shape).ne(0).any(dim=1).nonzero().flatten().tolist()

    def minibatches(self, count: int) -> list[list[int]]:
        """This rank's groups in each of `count` disjoint parts of the step's groups. Neighbours are in
        different parts, so a rank with at least `count` groups has some of each part."""
        places = self.share.places
        return [[p for p, place in enumerate(places) if place % count == n] for n in range(count)]

    def inside(self, section: int | None) -> Tensor:
        """(P, G) bool: the rows of a section on this rank; None: all on this rank."""
        return self.share.here if section is None else self.share.section == section

    def cuts(self, budget: int, groups: list[int], *, apart: bool = False) -> Iterator[Cut]:
        """Cut these groups into micro-batches of at most `budget` tokens: prompts once, completions, padding.

        Groups of similar length go together. A group over the budget is cut by rows; a row over it goes
        alone. apart: no two sections together.
        """
        found = self.share.section[groups]
        for section in found[found >= 0].unique().tolist() if apart else [None]:
            yield from self._cuts(budget, groups, section)

    def _cuts(self, budget: int, groups: list[int], section: int | None) -> Iterator[Cut]:
        inside = self.inside(section)
        longest = (self.length * inside).amax(1).tolist()
        spans = {p: inside[p].nonzero().flatten().tolist() for p in groups}
        waiting: list[int] = []

        def rows(groups: list[int]) -> slice:
            return slice(min(spans[p][0] for p in groups), max(spans[p][-1] for p in groups) + 1)

        def cost(groups: list[int]) -> int:
            prompt = max(len(self.prompts[p].tokens) for p in groups)
            of_rows = (rows(groups).stop - rows(groups).start) * max(longest[p] for p in groups)
            return len(groups) * (prompt + of_rows)

        for p in sorted(filter(spans.get, groups), key=lambda p: -longest[p]):
            if waiting and cost([*waiting, p]) > budget:
                yield Cut(waiting, rows(waiting), section)
                waiting = []
            if cost([p]) <= budget:
                waiting.append(p)
                continue
            step = max(1, (budget - len(self.prompts[p].tokens)) // max(longest[p], 1))
            first, end = rows([p]).start, rows([p]).stop
            for row in range(first, end, step):
                yield Cut([p], slice(row, min(row + step, end)), section)
        if waiting:
            yield Cut(waiting, rows(waiting), section)

    def micro_batch(
        self, cut: Cut, *, image_token: int, merge: int, device: torch.device | str, append=None
    ) -> MicroBatch:
        """These groups and rows on a device, cut to their longest completion. append: a prompt whose group of
        empty completions goes behind them (`grpo/gradient.py:empty_prompt`)."""
        groups = torch.tensor(cut.groups, dtype=torch.long)
        length = self.length * self.inside(cut.section)
        longest = max([1, *length[groups][:, cut.rows].flatten().tolist()])

        def part(x: Tensor) -> Tensor:
            x = x.view(*self.length.shape, *x.shape[1:])[groups][:, cut.rows]
            x = x[..., :longest] if x.dim() == 3 else x
            # an empty group is one of zeros
            x = x if append is None else F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1))
            return x.to(device)

        rows = lambda x: part(x).flatten(0, 1)
        weight = self.weight * self.inside(cut.section).flatten()[:, None]
        prompts = [self.prompts[p] for p in cut.groups] + ([] if append is None else [append])
        return MicroBatch(
            collate_prompts(prompts, image_token=image_token, merge=merge).to(device),
            part(self.tokens.flatten(0, 1)),
            part(length.flatten()),
            rows(self.advantage),
            rows(weight),
            None if self.logp_old is None else rows(self.logp_old),
            None if self.logp_ref is None else rows(self.logp_ref),
        )

    def write_back(self, whole: Tensor, value: Tensor, cut: Cut) -> None:
        """Write a micro-batch's values (b, c), 0 outside its mask, into the zeros of `whole` (B, C). An
        appended group's are left out."""
        whole = whole.view(*self.length.shape, whole.shape[-1])
        rows = len(range(self.length.shape[1])[cut.rows])
        for at, p in enumerate(cut.groups):
            whole[p, cut.rows, : value.shape[-1]] += value[at * rows : (at + 1) * rows].cpu()


@dataclass
class MicroBatch:
    """Some groups of a batch, or some rows of one group, on the policy's device.

    tokens (p, g, c), length (p, g), advantage (b,), the others (b, c). logp_old and logp_ref are None where
    the objective does not need them.
    """

    prompts: PromptBatch
    tokens: Tensor
    length: Tensor
    advantage: Tensor
    weight: Tensor
    logp_old: Tensor | None
    logp_ref: Tensor | None

    mask = property(_mask)
