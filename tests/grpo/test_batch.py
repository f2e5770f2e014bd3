"""Batches: padding that means nothing, pictures that stay with their prompts, and parts whose gradients
add up to the whole."""

from dataclasses import replace

import pytest
import torch
from small import STOPS, batch_of, micro_batch, small_folder, small_policy

from data.chat import Chat
from data.shapes.world import Shapes
from grpo.batch import collate_prompts
from grpo.logprobs import completion_logprobs
from grpo.objective import entropy_bonus, policy_loss, token_weights
from grpo.parallel.ranks import Ranks
from grpo.parallel.rows import Share
from grpo.variants import WEIGHTINGS
from models.mrope import mrope_positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def image(folder):
    return Chat(folder, template="shapes").image_token


@pytest.fixture(scope="module")
def sources(folder):
    """Four prompts: one with no picture, one with two of different sizes, two with one; all of different
    lengths."""
    chat, world = Chat(folder, template="shapes"), Shapes("train", 100, seed=5)
    wide = world[2].pictures[0]().resize((84, 56))
    return [
        chat.prompt(world[0]),
        chat.prompt(replace(world[1], pictures=())),
        chat.prompt(replace(world[2], pictures=(*world[1].pictures, lambda: wide))),
        chat.prompt(world[3]),
    ]


def numbered(sources, group=3, longest=9, seed=0, lengths=None):
    """A batch of random completions, and numbers that say where they belong."""
    random = torch.Generator().manual_seed(seed)
    shape = (len(sources), group)
    length = (
        torch.randint(1, longest + 1, shape, generator=random) if lengths is None else torch.tensor(lengths)
    )
    length[-1, -1] = longest
    tokens = torch.randint(12, 120, (*shape, longest), generator=random)
    batch = batch_of(sources, tokens, length, advantage=torch.randn(shape, generator=random).flatten())
    rows = shape[0] * group
    number = torch.arange(rows * longest).float().view(rows, longest) + 1
    batch.weight, batch.logp_old, batch.logp_ref = (
        number * batch.mask,
        -number * batch.mask,
        0.5 * number * batch.mask,
    )
    return batch


# ---- prompts


def test_prompts_are_padded_on_the_right(sources, image):
    batch = collate_prompts(sources, image_token=image)
    longest = max(len(p.tokens) for p in sources)
    assert (
        batch.tokens.shape == (4, longest)
        and len(set(batch.length.tolist())) == 4
        and batch.positions.shape == (4, 3, longest)
    )
    for p, prompt in enumerate(sources):
        n = len(prompt.tokens)
        assert batch.length[p] == n and batch.tokens[p, :n].tolist() == prompt.tokens.tolist()
        positions, following = mrope_positions(
            torch.as_tensor(prompt.tokens), torch.as_tensor(prompt.grid), image, 2
        )
        assert torch.equal(batch.positions[p, :, :n], positions) and batch.next_position[p] == following
        assert (batch.image_slot[p, n:] == -1).all()
    assert batch.length.dtype == batch.tokens.dtype == batch.image_slot.dtype == torch.long


def test_each_placeholder_gets_its_own_feature(sources, image):
    """Every feature is used once, in the order of the pictures, by the prompt that its picture belongs to."""
    batch = collate_prompts(sources, image_token=image)
    assert torch.equal(
        batch.image_slot >= 0,
        (batch.tokens == image) & (torch.arange(batch.tokens.shape[1]) < batch.length[:, None]),
    )
    features = batch.image_slot[batch.image_slot >= 0]
    assert features.tolist() == list(range(int(batch.grid.prod(1).sum()) // 4))
    assert [int((row >= 0).sum()) for row in batch.image_slot] == [9, 0, 15, 9]
    assert batch.grid.tolist() == [[1, 6, 6], [1, 6, 6], [1, 4, 6], [1, 6, 6]]
    assert torch.equal(batch.patches, torch.cat([torch.as_tensor(p.patches) for p in sources]))


def test_a_picture_without_its_placeholders_names_the_prompt(sources, image):
    broken = replace(sources[2], tokens=sources[2].tokens[sources[2].tokens != image])
    with pytest.raises(ValueError, match=f"{sources[2].uid}.*0 picture placeholders.*15 features"):
        collate_prompts([sources[0], broken], image_token=image)
    short = replace(sources[0], tokens=sources[0].tokens[1:][sources[0].tokens[1:] != -1][5:])
    with pytest.raises(ValueError, match=sources[0].uid):
        collate_prompts([short], image_token=image)


@torch.no_grad()
def test_a_prompt_means_the_same_in_any_company(sources, image):
    """Hidden states of a completion do not depend on which prompts share the batch, nor on the order."""
    policy = small_policy()
    tokens = torch.randint(12, 120, (4, 2, 5), generator=torch.Generator().manual_seed(1))
    together = policy(collate_prompts(sources, image_token=image), tokens)
    order = [2, 0, 3, 1]
    again = policy(collate_prompts([sources[p] for p in order], image_token=image), tokens[order])
    torch.testing.assert_close(again, together[order], atol=1e-5, rtol=1e-5)
    for p in range(4):
        alone = policy(collate_prompts([sources[p]], image_token=image), tokens[p : p + 1])
        torch.testing.assert_close(alone, together[p : p + 1], atol=1e-5, rtol=1e-5)
    assert (together[0] - together[3]).abs().max() > 0.1


# ---- parts

BUDGETS = (1, 40, 100, 150, 200, 400, 10**9)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("among", [[0, 1, 2, 3], [3, 0]], ids=["all", "some"])
def test_every_row_is_in_one_part(sources, image, budget, among):
    batch = numbered(sources)
    seen, back = torch.zeros(4, 3, dtype=torch.long), torch.zeros(batch.mask.shape)
    for cut in batch.cuts(budget, among):
        prompts, rows, _ = cut
        part = micro_batch(batch, image, cut)
        for p in prompts:
            seen[p, rows] += 1
        assert torch.equal(
            part.prompts.tokens, collate_prompts([sources[p] for p in prompts], image_token=image).tokens
        )
        assert torch.equal(part.length, batch.length[prompts][:, rows])
        # cut to what it holds
        assert part.tokens.shape == (*part.length.shape, int(part.length.max()))
        assert part.weight.shape == part.logp_old.shape == part.logp_ref.shape == part.mask.shape
        assert torch.equal(part.logp_old, -part.weight) and part.advantage.shape == (part.length.numel(),)
        advantage = batch.advantage.view(4, 3)[prompts][:, rows].flatten()
        assert torch.equal(part.advantage, advantage)
        assert torch.equal(part.weight > 0, part.mask)
        batch.write_back(back, part.weight, cut)
    wanted = torch.zeros(4, 3, dtype=torch.long)
    wanted[among] = 1
    assert torch.equal(seen, wanted)
    # write_back is the inverse of micro_batch
    assert torch.equal(back, batch.weight * wanted.view(-1, 1))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("apart", [True, False])
def test_sections_cut_groups(sources, image, budget, apart):
    """The rows of a rank that has neither the first two rows nor the last two: each is learned from once,
    with the rows of its own section only, if they are kept apart."""
    batch = numbered(sources)
    batch.share.section.view(-1)[:] = torch.tensor([-1, -1, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1])
    section, back, seen = batch.share.section, torch.zeros(batch.mask.shape), []
    for cut in batch.cuts(budget, [0, 1, 2, 3], apart=apart):
        part = micro_batch(batch, image, cut)
        inside = section[cut.groups][:, cut.rows]
        taken = inside == cut.section if apart else inside >= 0
        assert torch.equal(part.length, batch.length[cut.groups][:, cut.rows] * taken)
        assert torch.equal(part.weight > 0, part.mask)
        # no row of others at the edges, and no place without a token
        assert taken.any(0)[[0, -1]].all() and part.tokens.shape[-1] == int(part.length.max())
        batch.write_back(back, part.weight, cut)
        seen += [cut.section] if apart else []
    assert torch.equal(back, batch.weight * batch.share.here.view(-1, 1))
    assert set(seen) == ({0, 1, 2} if apart else set())
    if budget == 10**9:
        assert len(seen) == 3 * apart


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_part_keeps_to_the_budget(sources, image, budget):
    """Counted as it is computed: each prompt once, its group padded to the longest completion. One row
    must go even if it is too much."""
    batch = numbered(
        sources, group=4, longest=30, lengths=[[30, 2, 2, 2], [1, 1, 1, 1], [3, 2, 1, 2], [9, 9, 9, 9]]
    )
    for cut in batch.cuts(budget, batch.teaching):
        part = micro_batch(batch, image, cut)
        cost = part.prompts.tokens.numel() + part.tokens.numel()
        assert cost <= budget or part.length.numel() == 1, (cost, cut)


def test_a_large_budget_is_used(sources):
    batch = numbered(sources)
    groups = [0, 1, 2, 3]
    assert len(list(batch.cuts(10**9, groups))) == 1 and len(list(batch.cuts(1, groups))) == 12
    assert list(batch.cuts(100, [])) == []


def test_groups_of_like_length_go_together(sources):
    batch = numbered(sources, group=2, longest=40, lengths=[[40, 39], [1, 1], [38, 40], [2, 1]])
    batch.length[-1, -1] = 1
    one = max(len(s.tokens) for s in sources) + 2 * 40
    assert [sorted(cut.groups) for cut in batch.cuts(2 * one, [0, 1, 2, 3])] == [[0, 2], [1, 3]]


def test_sections_stay_apart(sources):
    batch = batch_of(sources, torch.zeros(4, 2, 3).long(), torch.full((4, 2), 3))
    batch.share.section[:] = torch.tensor([1, 0, 1, 0])[:, None]
    assert [cut.groups for cut in batch.cuts(10**9, [0, 1, 2, 3], apart=True)] == [[1, 3], [0, 2]]
    assert [cut.groups for cut in batch.cuts(10**9, [0, 1, 2, 3])] == [[0, 1, 2, 3]]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mini_batches_are_disjoint_and_the_same_on_any_number_of_ranks(sources, count, ranks):
    """Every place of a step is in one part, and in the same part wherever its group is."""
    places = list(range(10))
    found = [set() for _ in range(count)]
    for rank in range(ranks):
        mine = Ranks(rank, ranks, torch.device("cpu")).share(places)
        batch = batch_of(
            [sources[0]] * len(mine),
            torch.zeros(len(mine), 2, 3).long(),
            torch.full((len(mine), 2), 3),
            share=replace(Share.whole(len(mine), 2), places=list(mine)),
        )
        for part, groups in zip(found, batch.minibatches(count), strict=True):
            part |= {mine[group] for group in groups}
            # no rank waits while the others learn
            assert groups or len(mine) < count
    assert found == [set(places[n::count]) for n in range(count)]


def test_without_a_penalty_only_groups_with_an_advantage_teach(sources):
    batch = numbered(sources)
    assert batch.teaching == [0, 1, 2, 3]
    batch.logp_ref = None
    batch.advantage = torch.tensor([[0.0, 0, 0], [1, -1, 0], [0, 0, 0], [0, 0, 1e-3]]).flatten()
    assert batch.teaching == [1, 3]
    # an entropy bonus moves the others, too
    batch.all_teach = True
    assert batch.teaching == [0, 1, 2, 3]


# ---- masks


def test_masks_come_from_lengths(sources):
    """The pad token is also a stop token here, and a completion may be nothing but stop tokens: only
    lengths say what is real."""
    batch = numbered(sources)
    length = batch.length.flatten()
    for token in (0, STOPS[0]):
        filled = batch_of(sources, torch.full_like(batch.tokens, token), batch.length)
        assert torch.equal(filled.mask, torch.arange(9) < length[:, None])
    assert filled.mask.sum() == length.sum()


def test_what_stands_in_the_padding_changes_nothing(sources, image):
    policy, batch = small_policy(), numbered(sources)
    padding = ~batch.mask.view(batch.tokens.shape)
    found = []
    for fill in (0, STOPS[0], image):
        tokens = batch.tokens.masked_fill(padding, fill)
        policy.zero_grad()
        logp, entropy = completion_logprobs(
            policy, micro_batch(batch_of(sources, tokens, batch.length), image), temperature=1.0, chunk=7
        )
        (logp * torch.arange(logp.numel()).view(logp.shape)).sum().backward()
        found.append((logp, entropy, [p.grad.clone() for p in policy.parameters()]))
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])
        assert all(torch.equal(a, b) for a, b in zip(other[2], found[0][2]))
    assert (found[0][0][batch.mask] < 0).all() and (found[0][0][~batch.mask] == 0).all()


# ---- the gradient of a step


def step_gradient(policy, batch, image, micro_tokens, weighting="completion", chunk=1024):
    """Gradient of a whole update as train.py computes it: weights decided once, parts added up."""
    policy.zero_grad()
    batch.weight = token_weights(
        batch.mask, WEIGHTINGS[weighting], tokens=batch.mask.sum(), completions=len(batch.mask), cap=12
    )
    for cut in batch.cuts(micro_tokens, list(range(len(batch.prompts)))):
        part = micro_batch(batch, image, cut)
        part.prompts.patches = part.prompts.patches.double()
        logp, entropy = completion_logprobs(policy, part, temperature=1.0, chunk=chunk, entropy_grad=True)
        loss, _ = policy_loss(logp, part.logp_old, part.logp_ref, part.advantage, part.weight, kl_coef=0.04)
        (loss - entropy_bonus(entropy, part.weight, 0.1)).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("weighting", ["token", "completion", "constant"])
def test_the_gradient_does_not_depend_on_how_the_step_is_cut(sources, image, weighting):
    """Any budget, any order of the prompts, any chunk: the same gradient of every parameter, the vision
    tower's included.

    The policy computes in float64, so what is left is the float32 of the log-probs: 6e-8 a token. A wrong
    normaliser is off by a factor.
    """
    policy, batch = small_policy().double(), numbered(sources)
    batch.logp_old = batch.logp_ref = None
    with torch.no_grad():
        logp, _ = completion_logprobs(policy.float(), micro_batch(batch, image), temperature=1.0, chunk=99)
    batch.logp_old, batch.logp_ref = (
        logp + 0.1 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(3)),
        logp - 0.2,
    )
    policy = policy.double()
    whole = step_gradient(policy, batch, image, 10**9, weighting)
    order = torch.tensor([2, 0, 3, 1])
    rows = (order[:, None] * 3 + torch.arange(3)).flatten()
    shuffled = batch_of(
        [sources[p] for p in order],
        batch.tokens[order],
        batch.length[order],
        advantage=batch.advantage[rows],
        logp_old=batch.logp_old[rows],
        logp_ref=batch.logp_ref[rows],
    )
    for cut in (
        step_gradient(policy, batch, image, 1, weighting),
        step_gradient(policy, batch, image, 130, weighting, chunk=5),
        step_gradient(policy, shuffled, image, 200, weighting),
    ):
        for name, gradient in whole.items():
            error = ((cut[name] - gradient).norm() / gradient.norm()).item()
            assert gradient.norm() > 0 and error <= 1e-6, f"{name}: {error:.1e}"
