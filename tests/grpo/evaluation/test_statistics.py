"""grpo/evaluation/statistics.py against closed forms, published figures and brute force."""

import itertools
import math
import random

import pytest

from grpo.evaluation.statistics import Z, maj_at_k, mcnemar, paired_difference, pass_at_k, wilson

# ---- wilson


def test_wilson_published():
    """Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: 81/263, 15/148, 0/20, 1/29."""
    for correct, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_equation():
    """The ends are the p whose own standard error puts the observed share exactly z away."""
    for end in wilson(37, 50):
        assert abs(37 / 50 - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / 50), rel=1e-12)


def test_wilson_edges():
    assert wilson(0, 7)[0] == 0.0 and 0 < wilson(0, 7)[1] < 1
    assert wilson(7, 7)[1] == 1.0 and 0 < wilson(7, 7)[0] < 1
    assert wilson(0, 0) == (0.0, 1.0)
    # a sum of fractions is welcome
    assert wilson(2.5, 5)[0] == pytest.approx(1 - wilson(2.5, 5)[1])
    for correct, n in ((-1, 5), (6, 5)):
        with pytest.raises(ValueError):
            wilson(correct, n)


# ---- pass@k and maj@k


@pytest.mark.parametrize("n, c", [(6, 0), (6, 1), (6, 4), (6, 6)])
def test_pass_at_k_counts_draws(n, c):
    right = [i < c for i in range(n)]
    for k in range(1, n + 1):
        draws = list(itertools.combinations(right, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_closed_forms():
    assert pass_at_k(64, 16, 1) == 0.25
    assert pass_at_k(64, 1, 64) == 1.0
    # C(2000, 1000) is no float
    assert pass_at_k(2000, 1, 1000) == 0.5
    for n, c, k in ((4, 5, 1), (4, 2, 5), (4, 2, 0), (4, -1, 1)):
        with pytest.raises(ValueError):
            pass_at_k(n, c, k)


def vote(draw, gold):
    """The definition: shared ties, silent completions vote for nothing."""
    counts = {answer: draw.count(answer) for answer in set(draw) - {None}}
    most = max(counts.values(), default=0)
    winners = [answer for answer, count in counts.items() if count == most]
    return 1 / len(winners) if gold in winners else 0.0


@pytest.mark.parametrize(
    "votes", ["AAABBC__", "AABBCCDD", "ABCDEFG_", "BBBB____", "A_______", "AAAAAAAA", "________", "ABBBBBCC"]
)
def test_maj_at_k_equals_brute_force(votes):
    votes = [None if letter == "_" else letter for letter in votes]
    for k in range(1, len(votes) + 1):
        draws = list(itertools.combinations(votes, k))
        assert maj_at_k(votes, "A", k) == pytest.approx(
            sum(vote(d, "A") for d in draws) / len(draws), abs=1e-12
        )


def test_maj_at_k_shares_ties_and_ignores_order():
    assert maj_at_k(["A", "B"], "A", 2) == 0.5
    assert maj_at_k(["A", "B", "C", None], "A", 4) == pytest.approx(1 / 3)
    assert maj_at_k([None, None], "A", 2) == 0.0
    votes = ["A"] * 20 + ["B"] * 22 + ["C"] * 10 + ["D"] * 8 + [None] * 4
    mixed = random.Random(0).sample(votes, len(votes))
    assert maj_at_k(votes, "A", 1) == pytest.approx(20 / 64)
    assert maj_at_k(votes, "A", 64) == 0.0 and maj_at_k(votes, "B", 64) == 1.0
    assert maj_at_k(votes, "A", 32) == maj_at_k(mixed, "A", 32)
    # somebody wins, ties are shared
    assert sum(maj_at_k(votes, answer, 32) for answer in "ABCD") == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError):
        maj_at_k(["A"], "A", 2)


# ---- comparisons


def test_mcnemar_closed_forms():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 2**5
    # 2·P(X <= 3) is above 1
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    # 2^-1200 is no float
    assert 0 < mcnemar(900, 300) < 1e-60
    with pytest.raises(ValueError):
        mcnemar(-1, 2)


def test_paired_difference():
    a = [True] * 60 + [True] * 25 + [False] * 5 + [False] * 10
    b = [True] * 60 + [False] * 25 + [True] * 5 + [False] * 10
    found = paired_difference(a, b)
    assert (found.n, found.only_a, found.only_b, found.difference) == (100, 25, 5, 0.2)
    assert found.p == mcnemar(25, 5)
    # Agresti & Min, written out
    centre, half = 20 / 102, Z * math.sqrt(25.5 + 5.5 - 20**2 / 102) / 102
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), rel=1e-12)
    other = paired_difference(b, a)
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low))


def test_paired_difference_keeps_a_width():
    same = paired_difference([True] * 10, [True] * 10)
    assert same.low < 0 == same.difference < same.high and same.p == 1.0
    assert paired_difference([True], [False]).high == 1.0
    for a, b in (([], []), ([True], [])):
        with pytest.raises(ValueError):
            paired_difference(a, b)
