"""Dynamic sampling: which groups are kept is decided by their rewards and by nothing else, and what is
left out is counted."""

import functools
import operator
from types import SimpleNamespace

import pytest
import torch

from data.order import indices_at
from data.types import BadExample
from grpo.dynamic import SAMPLING, Drawn, dynamic, fixed
from grpo.objective import group_advantages, policy_loss, token_weights
from grpo.parallel.ranks import Ranks
from grpo.rollout import Rollout
from grpo.run.setup import chosen_prompts
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
    return Drawn(
        examples,
        prompts,
        Rollout(tokens, length, length > 1, -tokens.float()),
        [[f"{i}a", f"{i}b"] for i in uid.tolist()],
        reward,
        {"accuracy": reward / 2},
        skipped,
        {"prompts": 1.0, "rollout": 2.0, "score": 3.0},
    )


def rounds_of(*rounds):
    """A `draw` that gives these rounds, and a list of the rounds it was asked for."""
    asked = []

    def draw(round):
        asked.append(round)
        return rounds[round]

    return draw, asked


def uids(found):
    return [p.uid for p in found.prompts]


def test_the_table():
    assert {"fixed": fixed, "dynamic": dynamic} == SAMPLING


def test_fixed_is_one_round_whatever_it_earned():
    draw, asked = rounds_of(drawn([EVEN, EVEN]))
    found = fixed(draw, 9, 1.0)
    assert (
        asked == [0]
        and uids(found) == ["0", "1"]
        and found.totals.tolist() == [2 + 2 + 1 + 2, 4]
        and (found.rounds, found.dropped) == (1, 0)
    )


def test_idle_groups_give_their_places_to_further_ones():
    draw, asked = rounds_of(
        drawn([EVEN, MIXED, EVEN]), drawn([EVEN, MIXED, EVEN], 10), drawn([MIXED, MIXED, EVEN], 20)
    )
    found = dynamic(draw, 5, 1.0)
    assert asked == [0, 1, 2] and uids(found) == ["1", "11", "20"] == [e.uid for e in found.examples]
    assert (
        found.texts == [["1a", "1b"], ["11a", "11b"], ["20a", "20b"]] and found.reward.tolist() == [MIXED] * 3
    )
    assert found.parts["accuracy"].tolist() == [[1.0, 0.0]] * 3
    assert (found.rounds, found.dropped, found.averaged) == (3, 6, [0, 1, 2])
    assert found.seconds == {"prompts": 3.0, "rollout": 6.0, "score": 9.0}
    assert found.clock(100.0) == {"start": 100.0, "prompts": 103.0, "rollout": 109.0, "score": 118.0}
    for group, uid in enumerate((1, 11, 20)):
        for row, n in enumerate(found.rollout.length[group].tolist()):
            assert found.rollout.tokens[group, row].tolist() == [uid] * n + [0] * (
                found.rollout.tokens.shape[-1] - n
            )
            assert torch.equal(found.rollout.logp[group, row], -found.rollout.tokens[group, row].float())
    assert found.rollout.tokens.shape[-1] == int(found.rollout.length.max())


def test_where_all_can_teach_dynamic_is_fixed():
    for rewards in ([MIXED] * 3, [[0.0, 1e-5], [3.0, 1.0], MIXED]):
        one, other = (
            fixed(rounds_of(drawn(rewards))[0], 4, 1.0),
            dynamic(rounds_of(drawn(rewards))[0], 4, 1.0),
        )
        assert (
            uids(one) == uids(other)
            and torch.equal(one.rollout.tokens, other.rollout.tokens)
            and torch.equal(one.totals, other.totals)
        )
        assert other.dropped == other.dropped_tokens == 0 and other.rounds == 1


def test_idle_groups_fill_up_and_weigh_nothing():
    """Two rounds, three places, two groups that can teach: the third is idle, keeps the shape, and is not
    in the average."""
    draw, asked = rounds_of(drawn([EVEN, EVEN, MIXED]), drawn([EVEN, MIXED, EVEN], 10))
    found = dynamic(draw, 2, 1.0)
    assert asked == [0, 1] and uids(found) == ["2", "11", "0"] and found.averaged == [0, 1]
    assert found.totals.tolist() == [int(found.rollout.length[:2].sum()), 4]
    # questions 1, 10 and 12
    assert found.dropped == 3 and found.dropped_tokens == 3 * 10 + (2 + 2) + (2 + 2) + (1 + 2)


def test_nothing_can_teach():
    found = dynamic(rounds_of(drawn([EVEN, EVEN]), drawn([EVEN, EVEN], 10))[0], 2, 1.0)
    assert uids(found) == ["0", "1"] and found.averaged == [] and found.totals.tolist() == [1, 1]
    assert group_advantages(found.reward).eq(0).all()


@pytest.mark.parametrize("enough, rounds", [(1.0, 3), (0.7, 3), (0.5, 2), (0.25, 1)])
def test_enough_is_a_share_of_the_step(enough, rounds):
    draw, asked = rounds_of(
        drawn([EVEN, MIXED, EVEN, EVEN]),
        drawn([MIXED, EVEN, EVEN, EVEN], 10),
        drawn([MIXED, MIXED, EVEN, EVEN], 20),
    )
    found = dynamic(draw, 3, enough)
    assert len(asked) == rounds == found.rounds and len(found.prompts) == 4


def test_a_round_without_new_questions_is_empty():
    nothing = Drawn(
        [],
        [],
        Rollout.none(2),
        [],
        torch.zeros(0, 2),
        {"accuracy": torch.zeros(0, 2)},
        0,
        {"prompts": 0.0, "rollout": 0.0, "score": 0.0},
    )
    draw, asked = rounds_of(drawn([EVEN, MIXED], skipped=1), nothing, drawn([MIXED, MIXED], 20, skipped=2))
    found = dynamic(draw, 3, 1.0)
    assert asked == [0, 1, 2] and uids(found) == ["1", "20"] and found.skipped == 3


def test_the_gradient_is_gpgs():
    """1/B of all groups times B / (B - M) is the average over the B - M that can teach: idle groups change
    no gradient."""
    found = dynamic(rounds_of(drawn([EVEN, MIXED, EVEN], lengths=[[3, 3], [1, 3], [2, 2]]))[0], 1, 1.0)
    mask = torch.arange(3) < found.rollout.length.flatten()[:, None]
    tokens, completions = found.totals
    logp = torch.full(mask.shape, -1.0, requires_grad=True)
    advantage = group_advantages(found.reward, scale=undivided).flatten()
    weight = token_weights(mask, tokens=tokens, completions=completions, cap=3)
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
