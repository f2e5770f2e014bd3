"""How sure a score is, and whether two scores differ. In closed form: no resampling, so no seed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, sqrt

# a standard normal variable stays within ±Z 95 % of the time
Z = 1.959963984540054


def wilson(correct: float, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval for `correct` of `n`: (low, high). Unlike p ± z·sd it stays within [0, 1], and
    it has a width at 0 and at n. n = 0 gives (0, 1). Raises ValueError. (Wilson 1927.)

    `correct` may also be the sum of n values in [0, 1], such as one pass@k a question. Then the interval is
    too wide rather than too narrow: among all values with that mean, 0 and 1 have the largest variance.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"wilson: {correct} correct of {n}")
    if n == 0:
        return 0.0, 1.0
    p, shrink = correct / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == n else min(1.0, centre + half)
    return low, high


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n completions, drawn without replacement, hold one of the c right ones: 1 -
    C(n-c, k) / C(n, k). Raises ValueError. (Chen et al. 2021, arXiv 2107.03374, Eq. 1.)

    It is an unbiased estimate of the chance that k fresh completions hold a right one, with less variance
    than the first k completions give.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} completions, {c} of them right: need 0 <= c <= n and 1 <= k <= n")
    return 1 - comb(n - c, k) / comb(n, k)


def maj_at_k(votes: Sequence[Hashable], gold: Hashable, k: int) -> float:
    """The expected score of a majority vote among k of n completions, drawn without replacement. It is
    exact: all C(n, k) draws are counted. Raises ValueError.

    votes: the answer of each completion. None (no answer could be read) takes one of the k places and votes
    for nothing. When m answers tie with the most votes, and the right one is among them, the score is 1/m.
    Without any vote it is 0.
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"maj@{k} of {len(votes)} completions: need 1 <= k <= n")
    counts = Counter(votes)
    silent, right = counts.pop(None, 0), counts.pop(gold, 0)
    return _majority(right, tuple(sorted(counts.values())), silent, k)


@lru_cache(maxsize=1 << 16)
def _majority(right: int, rivals: tuple[int, ...], silent: int, k: int) -> float:
    """`maj_at_k` for numbers of completions: with the right answer, with each wrong answer, with none."""
    subsets = comb(right + sum(rivals) + silent, k)
    score = 0.0
    for won in range(1, min(right, k) + 1):
        # {(rivals that tie with `won` votes, completions drawn): number of ways}; no rival has more votes
        ways = {(0, won): 1}
        for size in rivals:
            more: dict[tuple[int, int], int] = defaultdict(int)
            for (tied, drawn), count in ways.items():
                for got in range(min(size, won, k - drawn) + 1):
                    more[tied + (got == won), drawn + got] += count * comb(size, got)
            ways = more
        # completions without an answer fill the other places
        for (tied, drawn), count in ways.items():
            score += comb(right, won) * count * comb(silent, k - drawn) / ((tied + 1) * subsets)
    return score


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of McNemar's test. If A and B were equally good, each question that only
    one of them got right would be a coin toss. Raises ValueError.

    only_a, only_b: the number of questions that only A, only B got right. If both are 0, p is 1.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"mcnemar: counts can't be negative: {only_a}, {only_b}")
    tosses = only_a + only_b
    return min(1.0, 2 * sum(comb(tosses, i) for i in range(min(only_a, only_b) + 1)) / 2**tosses)


def difference_interval(n: int, total: float, squares: float, z: float = Z) -> tuple[float, float]:
    """The interval (low, high) of a mean of n differences, each in [-1, 1], from their sum and the sum of
    their squares.

    Agresti & Min's (Statistics in Medicine 24:729, 2005), for differences of -1, 0 and 1: half a question is
    added to each of the four outcomes (right or wrong, twice). So it has a width even when the two never
    differ.
    """
    centre, square = total / (n + 2), (squares + 1) / (n + 2)
    half = z * sqrt((square - centre**2) / (n + 2))
    return max(-1.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Paired:
    """Two models on the same n questions: A's accuracy minus B's with its interval, and McNemar's p."""

    n: int
    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p: float


def paired_difference(a: Sequence[bool], b: Sequence[bool], z: float = Z) -> Paired:
    """Compare two models question by question: a[i] and b[i] say whether each was right about question i.
    The interval is `difference_interval`'s. Raises ValueError."""
    if len(a) != len(b) or not a:
        need = "need as many of both, and at least one"
        raise ValueError(f"paired_difference: {len(a)} and {len(b)} answers; {need}")
    n = len(a)
    only_a = sum(x and not y for x, y in zip(a, b))
    only_b = sum(y and not x for x, y in zip(a, b))
    low, high = difference_interval(n, only_a - only_b, only_a + only_b, z)
    return Paired(n, only_a, only_b, (only_a - only_b) / n, low, high, mcnemar(only_a, only_b))
