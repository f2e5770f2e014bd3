"""How a step's rows are shared out, for any number of ranks, without starting any."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.parallel.rows import Share, cost_of, cut_groups, cut_rows, share_rows

COSTS = st.lists(st.tuples(st.integers(0, 900), st.integers(1, 400)), min_size=1, max_size=12)
GROUPS = st.integers(1, 9)
RANKS = st.integers(1, 64)


def cost(piece, prompts, rows, group):
    """What a rank pays for a piece: its rows, and each of their prompts once."""
    return sum(rows[b // group] for b in piece) + sum(prompts[p] for p in {b // group for b in piece})


@settings(max_examples=200, deadline=None)
@given(costs=COSTS, group=GROUPS, ranks=RANKS, sections=st.integers(0, 16))
def test_every_row_is_on_one_rank_and_no_rank_idles(costs, group, ranks, sections):
    prompts, rows = zip(*costs)
    shared = share_rows(prompts, rows, group, sections, ranks)
    assert len(shared) == ranks
    assert [b for pieces in shared for piece in pieces for b in piece] == list(range(group * len(rows)))
    if group * len(rows) >= max(ranks, sections):
        assert all(len(piece) for pieces in shared for piece in pieces)


@pytest.mark.parametrize("ranks", range(1, 65))
def test_eight_prompts_of_eight_completions_leave_no_rank_idle(ranks):
    """Whole groups on whole ranks left 56 of 64 without a row."""
    shared = share_rows([600] * 8, [700] * 8, 8, 4, ranks)
    sizes = [sum(map(len, pieces)) for pieces in shared]
    assert min(sizes) >= 1 and sum(sizes) == 64
    # no rank has more work than it must, rows and prompts counted
    assert max(sizes) <= -(-64 // ranks) + 3


@settings(max_examples=100, deadline=None)
@given(costs=COSTS, group=GROUPS, sections=st.sampled_from([1, 2, 4, 6, 12]))
def test_ranks_that_divide_the_sections_have_the_same_sections(costs, group, sections):
    prompts, rows = zip(*costs)
    alone = share_rows(prompts, rows, group, sections, 1)[0]
    assert all(cost_of(piece, prompts, rows, group) == cost(piece, prompts, rows, group) for piece in alone)
    for ranks in range(1, sections + 1):
        if sections % ranks == 0:
            shared = share_rows(prompts, rows, group, sections, ranks)
            assert [piece for pieces in shared for piece in pieces] == alone
            assert {len(pieces) for pieces in shared} == {sections // ranks}


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=4),
    group=st.integers(1, 3),
    pieces=st.integers(1, 4),
)
def test_the_costliest_piece_is_as_cheap_as_any_cut_makes_it(costs, group, pieces):
    """Against all cuts."""
    prompts, rows = zip(*costs)
    count = group * len(rows)
    if count < pieces:
        return
    most = lambda cut: max(cost(piece, prompts, rows, group) for piece in cut)
    every = (
        [range(a, b) for a, b in zip((0, *ends), (*ends, count))]
        for ends in combinations(range(1, count), pieces - 1)
    )
    assert most(cut_rows(prompts, rows, group, pieces)) == min(map(most, every))


@settings(max_examples=100, deadline=None)
@given(costs=COSTS, group=GROUPS, ranks=RANKS)
def test_few_groups_are_split(costs, group, ranks):
    prompts, rows = zip(*costs)
    pieces = cut_rows(prompts, rows, group, ranks)
    computed = sum(len({b // group for b in piece}) for piece in pieces)
    assert computed - len(rows) <= ranks - 1


@settings(max_examples=200, deadline=None)
@given(costs=COSTS, group=GROUPS, ranks=RANKS, sections=st.integers(0, 16))
def test_groups_stay_whole_where_that_costs_little(costs, group, ranks, sections):
    """Whole groups are the pieces, or the best cut by rows is by more than an eighth cheaper."""
    prompts, rows = zip(*costs)
    shared = [piece for pieces in share_rows(prompts, rows, group, sections, ranks) for piece in pieces]
    count, pieces = len(rows), len(shared)
    if sections == 0 and count >= ranks:
        assert shared == cut_groups(count, group, count)
        return
    most = lambda cut: max(cost(piece, prompts, rows, group) for piece in cut)
    whole, best = cut_groups(count, group, pieces), cut_rows(prompts, rows, group, pieces)
    cheap = count >= pieces and most(whole) <= most(best) * 9 / 8
    assert shared == (whole if cheap else best)


def test_the_main_jobs_groups_stay_whole():
    """18 prompts of 12 completions: five or four groups are an eighth more than four and a half at most."""
    [[*pieces]] = share_rows([60] * 18, [96] * 18, 12, 4, 1)
    assert [len(piece) // 12 for piece in pieces] == [5, 4, 5, 4]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 64])
def test_a_share_is_what_a_rank_has(ranks):
    """Of five groups of four; the sections are numbered through."""
    shared = share_rows([10, 30, 20, 10, 90], [50] * 5, 4, 4, ranks)
    shares = [Share.of(shared, rank, 5, 4) for rank in range(ranks)]
    values = torch.arange(20.0).view(5, 4) + 1
    summed = torch.zeros(5, 4)
    firsts = 0
    for share, pieces in zip(shares, shared):
        b = [b for piece in pieces for b in piece]
        assert share.places == sorted({each // 4 for each in b}) and share.drawn == [5]
        here = share.here.nonzero().tolist()
        assert [share.places[p] * 4 + g for p, g in here] == b
        assert len(share.rows) == len(b) and [divmod(row, 4) for row in share.rows] == [
            tuple(x) for x in here
        ]
        summed += share.among_all(values[share.places])
        firsts += sum(share.first_here)
    assert summed.equal(values) and firsts == 5
    numbers = [number for share in shares for number in share.section[share.here].unique().tolist()]
    assert numbers == list(range(min(max(4, ranks), 20) if ranks != 3 else 3))
