"""The groups of a step: rewards alone decide which of them dynamic sampling keeps, and what is left out is
counted."""

from types import SimpleNamespace

import pytest
import torch

from data.order import indices_at
from data.types import BadExample
from grpo.batch import Groups
from grpo.monitor.step_metrics import whole_groups
from grpo.objective import group_advantages, policy_loss, token_weights
from grpo.parallel.ranks import Ranks
from grpo.parallel.rows import Share
from grpo.rollout import Rollout
from grpo.run import questions
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
        Share.whole(count, 2),
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
        groups = groups.extend(rounds[attempt])
        drawn += 1
    return groups.batch(dynamic=True, sections=0), drawn


def uids(found):
    return [p.uid for p in found.prompts]


def test_without_dynamic_sampling_all_groups_are_kept_in_order():
    found = fixed(drawn([EVEN, MIXED, EVEN]))
    assert uids(found) == ["0", "1", "2"] and found.share.places == [0, 1, 2]
    assert found.counts.tolist() == [int(found.length.sum()), 6]
    assert (found.share.drawn, found.dropped, found.dropped_tokens) == ([3], 0, 0)


@pytest.mark.parametrize("sections, wanted", [(0, [[0, 0], [1, 1]]), (1, [[0, 0], [0, 0]])])
def test_without_sections_every_group_is_one(sections, wanted):
    assert drawn([MIXED] * 2).batch(dynamic=False, sections=sections).share.section.tolist() == wanted


def test_idle_groups_give_their_places_to_further_ones():
    rounds = [drawn([EVEN, MIXED, EVEN]), drawn([EVEN, MIXED, EVEN], 10), drawn([MIXED, MIXED, EVEN], 20)]
    found, asked = dynamic(rounds, 5, 1.0)
    assert asked == 3 and uids(found) == ["1", "11", "20"] == [e.uid for e in found.questions]
    assert (
        found.texts == [["1a", "1b"], ["11a", "11b"], ["20a", "20b"]] and found.reward.tolist() == [MIXED] * 3
    )
    assert found.parts["accuracy"].tolist() == [[1.0, 0.0]] * 3
    assert (found.share.drawn, found.dropped) == ([3, 3, 3], 6)
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
        assert torch.equal(one.counts, other.counts) and one.share.places == other.share.places
        assert other.dropped == other.dropped_tokens == 0 and asked == len(other.share.drawn) == 1


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
    assert asked == rounds == len(found.share.drawn) and len(found.prompts) == 4


def test_a_round_without_new_questions_is_empty():
    none = torch.zeros(0, 2)
    nothing = Groups([], [], Rollout.none(2), [], none, {"accuracy": none}, 0, Share.whole(0, 2))
    rounds = [drawn([EVEN, MIXED], skipped=1), nothing, drawn([MIXED, MIXED], 20, skipped=2)]
    found, asked = dynamic(rounds, 3, 1.0)
    assert asked == 3 and uids(found) == ["1", "20"] and found.skipped == 3
    assert found.share.drawn == [2, 0, 2]


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


class Gathered(Exception):
    """What a rank gives to the others."""


def asked_in(round, rank=0, size=1, *, count=20, prompts=6, group=2, bad=()):
    """What a rank asks in a round of step 3. The prompt of question i has 10 + i tokens."""

    def prompt(example, blind):
        if example in bad:
            raise BadExample(f"example {example}")
        return SimpleNamespace(uid=example, tokens=range(10 + example))

    run = SimpleNamespace(examples=list(range(count)), chat=SimpleNamespace(prompt=prompt))
    cfg = SimpleNamespace(prompts=prompts, seed=4, blind=False, loss=SimpleNamespace(sections=4))
    stage = SimpleNamespace(group=group, cap=9)

    def choose(rank, gather):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(questions, "gather_objects", gather)
            return chosen_prompts(run, cfg, Ranks(rank, size, torch.device("cpu")), 3, stage, round)

    def give(rows):
        raise Gathered(rows)

    given = []
    for other in range(size):
        with pytest.raises(Gathered) as found:
            choose(other, give)
        given += found.value.args[0]
    return choose(rank, lambda rows: given)


def test_what_is_asked_is_a_function_of_seed_step_and_round():
    """A step asks nothing twice; the first round is the step of a run without rounds."""
    rounds = [asked_in(round).questions for round in range(4)]
    assert rounds[0] == indices_at(3, 20, 6, 4)
    flat = [question for asked in rounds for question in asked]
    assert len(flat) == len(set(flat)) and 0 < len(rounds[1]) <= 6
    assert asked_in(1).questions == asked_in(1).questions


@pytest.mark.parametrize("size", [1, 2, 4, 7, 12, 64])
@pytest.mark.parametrize("group", [1, 5])
def test_ranks_have_all_rows_of_a_round_between_them(size, group):
    """Each row once, the rows in the order of one rank, also where a question is skipped; a rank has the
    prompts of its rows and no other."""
    one = asked_in(1, group=group, bad=asked_in(1).questions[1:2])
    found = [asked_in(1, rank, size, group=group, bad=asked_in(1).questions[1:2]) for rank in range(size)]
    rows = []
    for asked in found:
        here = asked.share.here.nonzero().tolist()
        assert asked.share.drawn == [len(one.questions)] and {p for p, _ in here} == set(
            range(len(asked.questions))
        )
        assert [prompt.uid for prompt in asked.prompts] == asked.questions
        rows += [(asked.questions[p], g) for p, g in here]
    assert rows == [(question, g) for question in one.questions for g in range(group)]
    assert sum(asked.skipped for asked in found) == 1
    if size in (1, 2, 4):
        # a section is on one rank, and is the same there
        sections = [asked.share.section[asked.share.here].tolist() for asked in found]
        assert [s for each in sections for s in each] == one.share.section.flatten().tolist()


def test_when_all_was_asked_there_is_nothing_left(capsys):
    nothing = asked_in(1, count=6)
    assert nothing.questions == nothing.prompts == [] and nothing.share.drawn == [0]
    further = asked_in(1).questions
    # all of it skipped, and no other step's questions instead
    nothing = asked_in(1, bad=further)
    assert nothing.questions == [] and nothing.skipped == len(further)
    assert "step 4: skipped" in capsys.readouterr().err


def test_two_ranks_keep_what_one_would(rewards=([EVEN, MIXED, EVEN], [MIXED, EVEN, MIXED])):
    """Of two rounds of three groups, each split in the middle of the second group: the same groups at the
    same places, each row on the rank that drew it, and the same counts between them."""
    rounds = [drawn(each, 10 * round) for round, each in enumerate(rewards)]
    one = rounds[0].extend(rounds[1]).batch(dynamic=True, sections=4)
    parts = []
    for groups, section in ((slice(0, 2), [[0, 0], [0, -1]]), (slice(1, 3), [[-1, 1], [1, 1]])):
        part = []
        for each in rounds:
            share = Share(list(range(3))[groups], torch.tensor(section), [3])
            length = each.length[groups] * share.here
            rollout = Rollout(each.tokens[groups], length, length > 1, each.rollout.logp[groups])
            lists = (each.questions[groups], each.prompts[groups], rollout, each.texts[groups])
            accuracy = each.parts["accuracy"][groups]
            part.append(Groups(*lists, each.reward, {"accuracy": accuracy}, 0, share))
        parts.append(part[0].extend(part[1]).batch(dynamic=True, sections=4))
    assert torch.equal(parts[0].reward, one.reward) and torch.equal(parts[1].reward, one.reward)
    assert torch.equal(parts[0].counts + parts[1].counts, one.counts)
    assert parts[0].dropped == parts[1].dropped == one.dropped == 3
    assert parts[0].dropped_tokens + parts[1].dropped_tokens == one.dropped_tokens
    found = {}
    for part in parts:
        for p, place in enumerate(part.share.places):
            assert part.questions[p].uid == one.questions[place].uid
            for g in part.share.here[p].nonzero().flatten().tolist():
                assert (place, g) not in found
                found[place, g] = int(part.length[p, g])
    assert found == {(p, g): int(one.length[p, g]) for p in range(3) for g in range(2)}
    groups = [list(zip(part.share.places, completion_texts(part))) for part in parts]
    assert whole_groups(groups[0] + groups[1]) == one.texts


def completion_texts(part):
    """The texts of the rows of each group that are here."""
    return [
        [text for text, here in zip(texts, row) if here]
        for texts, row in zip(part.texts, part.share.here.tolist())
    ]
