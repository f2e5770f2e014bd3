"""Which groups a step learns from: those of its prompts (`fixed`), or of further prompts in the place of
groups that can teach nothing (`dynamic`).

A group whose completions all earned the same has advantage 0 throughout: it was paid for and moves nothing.
Dynamic sampling (DAPO, arXiv 2503.14476, Sec. 3.2; GPG, arXiv 2504.02546) drops it and asks another question.
What is asked in a round is a function of (seed, step, round), so nothing has to be saved for a resume.

All ranks ask the same rounds and keep the groups that one rank alone would have kept, each those that it has
drawn itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.parallel.ranks import gather_objects, rank, sum_over_ranks
from grpo.rollout import Rollout

# rewards closer than this are the same, as in `group_advantages`
EVEN = 1e-6


@dataclass
class Drawn:
    """What this rank asked and what it got: P prompts (there may be none) with a group of G scored
    completions each.

    texts: P lists of G.  reward and every part (P, G).  seconds: {phase: time it took}.  averaged: the groups
    that the loss is an average over (None: all).
    places: where each group stands among the `count` groups of all ranks.  rounds: rollouts that it took.
    dropped, dropped_tokens: groups of them that were left out, and their tokens, prompts and completions.
    """

    examples: list
    prompts: list
    rollout: Rollout
    texts: list[list[str]]
    reward: Tensor
    parts: dict[str, Tensor]
    skipped: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    averaged: list[int] | None = None
    places: list[int] = field(default_factory=list)
    count: int = 0
    rounds: int = 1
    dropped: int = 0
    dropped_tokens: int = 0

    @property
    def uneven(self) -> list[int]:
        """The groups whose rewards differ: those that can teach."""
        return (self.reward.amax(1) - self.reward.amin(1) >= EVEN).nonzero().flatten().tolist()

    @property
    def totals(self) -> Tensor:
        """(2,) int64: tokens and completions that the loss is an average over, of all ranks; at least 1,
        or it would be divided by 0."""
        length = self.rollout.length if self.averaged is None else self.rollout.length[self.averaged]
        return sum_over_ranks(torch.tensor([length.sum(), length.numel()])).clamp(min=1)

    def stretches(self, number: int) -> list[int]:
        """In which of `number` stretches of all ranks' groups each group stands; 0: each in one of its
        own."""
        return [place * number // self.count for place in self.places] if number else self.places

    def clock(self, start: float) -> dict[str, float]:
        """The moments at which the phases ended, had each of them been one stretch of time, the first from
        `start` on."""
        return dict(zip(["start", *self.seconds], accumulate(self.seconds.values(), initial=start)))

    def __add__(self, other: "Drawn") -> "Drawn":
        """Both, this one's groups first."""
        longest = max(self.rollout.tokens.shape[-1], other.rollout.tokens.shape[-1])

        def both(a: Tensor, b: Tensor) -> Tensor:
            # (P, G, C): the padding is 0 in rollouts
            if a.dim() == 3:
                a, b = (F.pad(x, (0, longest - x.shape[-1])) for x in (a, b))
            return torch.cat([a, b])

        rollout = Rollout(
            *(
                both(getattr(self.rollout, name), getattr(other.rollout, name))
                for name in ("tokens", "length", "stopped", "logp")
            )
        )
        return Drawn(
            self.examples + other.examples,
            self.prompts + other.prompts,
            rollout,
            self.texts + other.texts,
            both(self.reward, other.reward),
            {name: both(part, other.parts[name]) for name, part in self.parts.items()},
            self.skipped + other.skipped,
            {name: self.seconds[name] + other.seconds[name] for name in self.seconds},
        )

    def keep(self, groups: list[int]) -> "Drawn":
        """These groups, in this order; the others are counted as dropped."""
        index, r = torch.tensor(groups, dtype=torch.long), self.rollout
        longest = int(r.length[index].max()) if groups else 1
        rollout = Rollout(
            r.tokens[index][..., :longest], r.length[index], r.stopped[index], r.logp[index][..., :longest]
        )
        pick = lambda items: [items[i] for i in groups]
        left = [p for i, p in enumerate(self.prompts) if i not in set(groups)]
        return replace(
            self,
            examples=pick(self.examples),
            prompts=pick(self.prompts),
            rollout=rollout,
            texts=pick(self.texts),
            reward=self.reward[index],
            parts={name: part[index] for name, part in self.parts.items()},
            dropped=len(left),
            dropped_tokens=int(r.length.sum() - rollout.length.sum()) + sum(len(p.tokens) for p in left),
        )


def fixed(draw: Callable[[int], Drawn], rounds: int, enough: float) -> Drawn:
    """One round, and all of it."""
    drawn = draw(0)
    counts = gather_objects([len(drawn.prompts)])
    before = sum(counts[: rank()])
    return replace(drawn, places=list(range(before, before + len(drawn.prompts))), count=sum(counts))


def dynamic(draw: Callable[[int], Drawn], rounds: int, enough: float) -> Drawn:
    """Rounds until `enough` of the first one's number of groups can teach, `rounds` at most; then that number
    of groups, as in one round, over all ranks.

    Groups that can teach come first, in the order in which they were drawn, and the loss is an average over
    them alone (GPG's factor B / (B - M) for M idle groups of B).
    Where there are too few, idle ones fill the places: they keep the step's shape and weigh nothing.
    draw(round) has no groups where nothing new is left to ask.
    """
    drawn = draw(0)
    # in which round each group did
    came = [0] * len(drawn.prompts)
    share, took = sum(gather_objects([len(came)])), 1
    for round in range(1, rounds):
        if sum(gather_objects([len(drawn.uneven)])) >= ceil(enough * share):
            break
        drawn = drawn + (more := draw(round))
        came += [round] * len(more.prompts)
        took += any(gather_objects([bool(more.prompts)]))
    uneven = set(drawn.uneven)
    everyone = gather_objects(
        [[(group not in uneven, round, rank(), group) for group, round in enumerate(came)]]
    )
    kept = sorted(entry for entries in everyone for entry in entries)[:share]
    mine = {group: place for place, (_, _, owner, group) in enumerate(kept) if owner == rank()}
    return replace(
        drawn.keep(list(mine)),
        averaged=[at for at, group in enumerate(mine) if group in uneven],
        places=list(mine.values()),
        count=len(kept),
        rounds=took,
    )


SAMPLING = {"fixed": fixed, "dynamic": dynamic}
