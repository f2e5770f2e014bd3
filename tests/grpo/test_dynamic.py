"""The groups of a step: rewards alone decide which of them dynamic sampling keeps, and what is left out is
counted."""

import functools
import operator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data.order import indices_at
from data.types import BadExample
from grpo.batch import Groups
from grpo.objective import group_advantages, policy_loss, token_weights
from grpo.parallel.ranks import Ranks
from grpo.rollout import Rollout
from grpo.run.questions import chosen_prompts
from grpo.variants import reinforce, undivided

EVEN, MIXED = [1.0, 1.0], [2.0, 0.0]


def drawn(rewards, first=0, lengths=None, skipped=0):
    """One round: a group of two for each pair of rewards; group i asks question `first + i`, and its
    tokens are all that number."""
    reward = torch.tensor(rewards)
    count = len(rewards)
    length = torch.tensor(lengths or [[1 + (first + i) % 3, 2] for i in range(count)])
    uid = torch.arange(first, first + count)
    mask = torch.arange(int(length.max())) < length[..., None]
    tokens = torch.where(mask, uid[:, None, None], 0)
    examples = [SimpleNamespace(uid=str(i)) for i in uid.tolist()]
    prompts = [SimpleNamespace(uid=str(i), tokens=range(10)) for i in uid.tolist()]
    return Groups(
        examples,
        prompts,
        Rollout(tokens, length, length > 1, -tokens.float()),
        [[f"{i}a", f"{i}b"] for i in uid.tolist()],
        reward,
        {"accuracy": reward / 2},
        skipped,
        [0] * count,
    )


def fixed(groups):
    """The batch of a step without dynamic sampling."""
    return groups.batch(dynamic=False, sections=0)


def dynamic(rounds, most, enough):
    """The batch of a step of the loop, whose attempts draw these rounds, and how many of them it drew."""
    groups = rounds[0]
    drawn = 1
    for attempt in range(1, most):
        if groups.enough_differ(enough):
            break
        more = rounds[attempt]
        groups = groups.extend(replace(more, attempt=[attempt] * len(more.prompts)))
        drawn += 1
    return groups.batch(dynamic=True, sections=0), drawn


def uids(found):
    return [p.uid for p in found.prompts]


def test_without_dynamic_sampling_all_groups_are_kept_in_order():
    found = fixed(drawn([EVEN, MIXED, EVEN]))
    assert uids(found) == ["0", "1", "2"] and found.places == [0, 1, 2] and found.own == slice(0, 3)
    assert found.counts.tolist() == [int(found.length.sum()), 6]
    assert (found.attempts, found.dropped, found.dropped_tokens) == (1, 0, 0)


@pytest.mark.parametrize(
    "sections, wanted", [(0, [0, 1, 2, 3]), (1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (3, [0, 0, 1, 2])]
)
def test_sections_are_shares_of_the_step(sections, wanted):
    assert drawn([MIXED] * 4).batch(dynamic=False, sections=sections).section == wanted


def test_idle_groups_give_their_places_to_further_ones():
    rounds = [drawn([EVEN, MIXED, EVEN]), drawn([EVEN, MIXED, EVEN], 10), drawn([MIXED, MIXED, EVEN], 20)]
    found, asked = dynamic(rounds, 5, 1.0)
    assert asked == 3 and uids(found) == ["1", "11", "20"] == [e.uid for e in found.questions]
    assert (
        found.texts == [["1a", "1b"], ["11a", "11b"], ["20a", "20b"]] and found.reward.tolist() == [MIXED] * 3
    )
    assert found.parts["accuracy"].tolist() == [[1.0, 0.0]] * 3
    assert (found.attempts, found.dropped) == (3, 6)
    assert found.counts.tolist() == [int(found.length.sum()), 6]
    for group, uid in enumerate((1, 11, 20)):
        for row, n in enumerate(found.rollout.length[group].tolist()):
            assert found.rollout.tokens[group, row].tolist() == [uid] * n + [0] * (
                found.rollout.tokens.shape[-1] - n
            )
            assert torch.equal(found.rollout.logp[group, row], -found.rollout.tokens[group, row].float())
    assert found.rollout.tokens.shape[-1] == int(found.rollout.length.max())


def test_where_all_groups_differ_dynamic_sampling_changes_nothing():
    for rewards in ([MIXED] * 3, [[0.0, 1e-5], [3.0, 1.0], MIXED]):
        one = fixed(drawn(rewards))
        other, asked = dynamic([drawn(rewards)], 4, 1.0)
        assert uids(one) == uids(other) and torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.counts, other.counts) and one.places == other.places
        assert other.dropped == other.dropped_tokens == 0 and asked == other.attempts == 1


def test_idle_groups_fill_up_and_weigh_nothing():
    """Two rounds, three places, two groups that differ: the third is idle, keeps the shape, and is not in the
    average."""
    found, asked = dynamic([drawn([EVEN, EVEN, MIXED]), drawn([EVEN, MIXED, EVEN], 10)], 2, 1.0)
    assert asked == 2 and uids(found) == ["2", "11", "0"]
    assert found.counts.tolist() == [int(found.length[:2].sum()), 4]
    # questions 1, 10 and 12
    assert found.dropped == 3 and found.dropped_tokens == 3 * 10 + (2 + 2) + (2 + 2) + (1 + 2)


def test_no_group_differs():
    found, _ = dynamic([drawn([EVEN, EVEN]), drawn([EVEN, EVEN], 10)], 2, 1.0)
    assert uids(found) == ["0", "1"] and found.counts.tolist() == [0, 0]
    assert group_advantages(found.reward).eq(0).all() and found.teaching == []


@pytest.mark.parametrize("enough, rounds", [(1.0, 3), (0.7, 3), (0.5, 2), (0.25, 1)])
def test_enough_is_a_share_of_the_step(enough, rounds):
    drawn_rounds = [
        drawn([EVEN, MIXED, EVEN, EVEN]),
        drawn([MIXED, EVEN, EVEN, EVEN], 10),
        drawn([MIXED, MIXED, EVEN, EVEN], 20),
    ]
    found, asked = dynamic(drawn_rounds, 3, enough)
    assert asked == rounds == found.attempts and len(found.prompts) == 4


def test_a_round_without_new_questions_is_empty():
    none = torch.zeros(0, 2)
    nothing = Groups([], [], Rollout.none(2), [], none, {"accuracy": none}, 0, [])
    rounds = [drawn([EVEN, MIXED], skipped=1), nothing, drawn([MIXED, MIXED], 20, skipped=2)]
    found, asked = dynamic(rounds, 3, 1.0)
    assert asked == 3 and uids(found) == ["1", "20"] and found.skipped == 3
    # the empty round is no rollout
    assert found.attempts == 2


def test_the_gradient_is_gpgs():
    """1/B of all groups times B / (B - M) is the average over the B - M that differ: idle groups change no
    gradient."""
    found, _ = dynamic([drawn([EVEN, MIXED, EVEN], lengths=[[3, 3], [1, 3], [2, 2]])], 1, 1.0)
    tokens, completions = found.counts
    logp = torch.full(found.mask.shape, -1.0, requires_grad=True)
    advantage = group_advantages(found.reward, scale=undivided).flatten()
    weight = token_weights(found.mask, tokens=tokens, completions=completions, cap=3)
    policy_loss(logp, None, None, advantage, weight, surrogate=reinforce)[0].backward()
    assert uids(found) == ["1", "0", "2"]
    expected = torch.zeros(6, 3)
    # A = 1 over one token, A = -1 over three, two completions
    expected[0, 0], expected[1] = -1 / 2, 1 / 6
    torch.testing.assert_close(logp.grad, expected)


def asked_in(round, rank, size, count=20, prompts=6, bad=()):
    """Numbers of the questions that a rank asks in a round of step 3."""

    def prompt(example, blind):
        if example in bad:
            raise BadExample(f"example {example}")
        return example

    run = SimpleNamespace(examples=list(range(count)), chat=SimpleNamespace(prompt=prompt))
    return chosen_prompts(
        run,
        SimpleNamespace(prompts=prompts, seed=4, blind=False),
        Ranks(rank, size, torch.device("cpu")),
        3,
        round,
    )


def test_what_is_asked_is_a_function_of_seed_step_and_round():
    """A step asks nothing twice, on any rank; ranks share each round as they share a step; the first round
    is the step of a run without rounds."""
    assert asked_in(0, 0, 1)[0] == indices_at(3, 20, 6, 4)
    for size in (1, 2, 4):
        rounds = [
            functools.reduce(operator.iadd, (asked_in(round, rank, size)[0] for rank in range(size)), [])
            for round in range(4)
        ]
        flat = functools.reduce(operator.iadd, rounds, [])
        assert len(flat) == len(set(flat)) and [sorted(r) for r in rounds] == [
            sorted(asked_in(round, 0, 1)[0]) for round in range(4)
        ]
        assert 0 < len(rounds[1]) <= 6
    assert asked_in(1, 0, 1) == asked_in(1, 0, 1)


def test_when_all_was_asked_there_is_nothing_left(capsys):
    assert asked_in(1, 0, 1, count=6) == ([], [], 0)
    further = asked_in(1, 0, 1)[0]
    # all of it skipped, and no other step's questions instead
    assert asked_in(1, 0, 1, bad=further) == ([], [], len(further))
    assert "step 4: skipped" in capsys.readouterr().err
