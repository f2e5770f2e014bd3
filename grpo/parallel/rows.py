"""Which rank gets which rows of a step: a pure function of what the prompts and rows are expected to cost.

The P·G rows of a step are numbered b = p·G + g and cut into neighbouring pieces. So what the ranks have, one
after the other, is in the order that one rank would have. A group may be split: then each rank that has a row
of it computes its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

# A group costs its prompt once more where it is split. So groups stay whole where that makes the costliest
# piece at most an eighth costlier.
WHOLE = 9 / 8


def cut_rows(prompts: Sequence[int], rows: Sequence[int], group: int, pieces: int) -> list[range]:
    """Cut the rows of P groups into `pieces` neighbouring ranges; the costliest is as cheap as possible.

    prompts, rows (P,): the cost of each prompt, paid once in every piece that has a row of it, and of each of
    its `group` rows, in tokens. No range is empty, unless there are fewer rows than pieces.
    """
    count = group * len(rows)
    if count < pieces:
        return [range(min(b, count), min(b + 1, count)) for b in range(pieces)]
    low = max((prompt + row for prompt, row in zip(prompts, rows)), default=0)
    high = sum(prompts) + group * sum(rows)
    while low < high:
        limit = (low + high) // 2
        if _fill(prompts, rows, group, pieces, limit)[-1].stop == count:
            high = limit
        else:
            low = limit + 1
    return _fill(prompts, rows, group, pieces, low)


def _fill(prompts, rows, group: int, pieces: int, limit: int) -> list[range]:
    """Fill one piece after another up to `limit`, with a row left for each of the pieces that follow."""
    count = group * len(rows)
    found = []
    b = 0
    for later in reversed(range(pieces)):
        first = b
        cost = 0
        while b < count - later:
            p, g = divmod(b, group)
            cost += rows[p] + (prompts[p] if g == 0 or b == first else 0)
            if cost > limit:
                break
            b += 1
        found.append(range(first, b))
    return found


def cut_groups(count: int, group: int, pieces: int) -> list[range]:
    """Cut the rows of `count` groups into `pieces` neighbouring ranges of whole groups; the longest has one
    group more than the shortest, or as many."""
    ends = [group * -(-piece * count // pieces) for piece in range(pieces + 1)]
    return [range(first, end) for first, end in pairwise(ends)]


def cost_of(piece: range, prompts: Sequence[int], rows: Sequence[int], group: int) -> int:
    """The cost of a piece: its rows, and each of their prompts once."""
    groups = range(piece.start // group, -(-piece.stop // group)) if piece else ()
    return sum(prompts[p] for p in groups) + sum(rows[b // group] for b in piece)


def share_rows(
    prompts: Sequence[int], rows: Sequence[int], group: int, sections: int, ranks: int
) -> list[list[range]]:
    """The rows of every rank, cut into sections. Arguments as for `cut_rows`.

    A number of ranks that divides `sections` shares out whole sections. So these are the same ranges on any
    such number of ranks, and so are their gradients (grpo/exactness.py). On another number of ranks, each has
    one section. sections=0: every group is a section, unless there are fewer groups than ranks.
    """
    count = len(rows)
    if sections == 0 and count >= ranks:
        alone = cut_groups(count, group, count)
        return [[alone[p] for p in part] for part in cut_groups(count, 1, ranks)]
    pieces = sections if sections and sections % ranks == 0 else ranks
    found = cut_rows(prompts, rows, group, pieces)
    whole = cut_groups(count, group, pieces)
    costliest = lambda cut: max(cost_of(piece, prompts, rows, group) for piece in cut)
    if count >= pieces and costliest(whole) <= WHOLE * costliest(found):
        found = whole
    each = pieces // ranks
    return [found[first : first + each] for first in range(0, pieces, each)]


@dataclass(frozen=True)
class Share:
    """What one rank has of a step: P groups, and which rows of them.

    places: P numbers among the groups of all ranks.  section (P, G): the number of each row's section, -1 if
    the row is on another rank.  drawn: how many groups all ranks have, of each attempt of dynamic sampling.
    """

    places: list[int]
    section: Tensor
    drawn: list[int]

    @classmethod
    def of(cls, shared: list[list[range]], rank: int, count: int, group: int) -> Share:
        """The share of one rank. shared: from `share_rows`, for `count` groups of `group` rows."""
        before = sum(map(len, shared[:rank]))
        section = torch.full((count, group), -1)
        for number, piece in enumerate(shared[rank], before):
            section.view(-1)[piece.start : piece.stop] = number
        places = (section >= 0).any(1).nonzero().flatten().tolist()
        return cls(places, section[places], [count])

    @classmethod
    def whole(cls, count: int, group: int) -> Share:
        """All rows of `count` groups, in one section."""
        return cls(list(range(count)), torch.zeros(count, group, dtype=torch.long), [count])

    @property
    def here(self) -> Tensor:
        """(P, G) bool: the rows that are on this rank."""
        return self.section >= 0

    @property
    def rows(self) -> range:
        """The rows of an attempt among the P·G ones of this rank's groups."""
        numbers = self.here.flatten().nonzero().flatten().tolist()
        return range(numbers[0], numbers[-1] + 1) if numbers else range(0)

    @property
    def first_here(self) -> list[bool]:
        """For each group, whether its first row is here: what counts once a group is counted there."""
        return self.here[:, 0].tolist()

    def among_all(self, values: Tensor) -> Tensor:
        """Values (P, G), as those of all ranks' groups; 0 where a row is on another rank. So the sum over the
        ranks has the values of all."""
        found = values.new_zeros(sum(self.drawn), self.section.shape[1])
        found[self.places] = torch.where(self.here, values, 0)
        return found

    def apart(self) -> Share:
        """The same, with every group as a section of its own."""
        section = torch.tensor(self.places, dtype=torch.long)[:, None]
        return replace(self, section=torch.where(self.here, section, -1))

    def extend(self, more: Share) -> Share:
        """These groups, then those of one more attempt."""
        places = self.places + [sum(self.drawn) + place for place in more.places]
        return Share(places, torch.cat([self.section, more.section]), self.drawn + more.drawn)

    def keep(self, kept: list[int]) -> tuple[Share, list[int]]:
        """Of all ranks' groups those with the places `kept`, in this order. -> the share, and the number that
        each of this rank's groups had."""
        number = {place: p for p, place in enumerate(self.places)}
        found = [(place, number[old]) for place, old in enumerate(kept) if old in number]
        groups = [p for _, p in found]
        return Share([place for place, _ in found], self.section[groups], self.drawn), groups
