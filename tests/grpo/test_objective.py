"""The objective against closed forms: every value *and gradient* that can be worked out by hand.

Each test takes the module under test as the fixture `objective`, so that test_mutants.py can pass a broken
one. No expected value comes from the implementation. Tolerance 1e-6 relative unless said: float32 has 1.2e-7,
and nothing here sums more than 40 terms.
"""

import math

import numpy as np
import pytest
import torch

import grpo.objective


@pytest.fixture
def objective():
    return grpo.objective


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(
        actual,
        torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual),
        rtol=tolerance,
        atol=tolerance,
    )


def one(x):
    """A loss over one row of tokens: everything (1, C)."""
    return torch.tensor([x], dtype=torch.float32)


# ---- Eq. 3: advantages


def test_advantages_are_measured_in_sample_standard_deviations(objective):
    reward = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]])
    # sample variances: 4 * 0.25 / 3 and (3 * 0.25 + 2.25) / 3 = 1
    a, b = (0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (1 + 1e-4))
    close(objective.group_advantages(reward), [[-a, -a, a, a], [-0.5 * b, -0.5 * b, -0.5 * b, 1.5 * b]])


def test_spread_threshold(objective):
    """Rewards 2e-7 apart around 0.1 are equal; with a bare division they would be far from 0."""
    assert (objective.group_advantages(torch.tensor([[0.1, 0.1 + 2e-7]]), eps=0.0) == 0).all()
    # 1 / sqrt(2)
    assert (objective.group_advantages(torch.tensor([[0.1, 0.1 + 1e-3]]), eps=0.0).abs() > 0.7).all()


def test_a_completion_alone_has_no_group():
    for bad in (torch.ones(3, 1), torch.ones(4)):
        with pytest.raises(ValueError, match="group"):
            grpo.objective.group_advantages(bad)


@pytest.mark.parametrize(
    "reward",
    [
        [[0, 1], [2.0, 5.0]],
        ((0, 1), (2, 5)),
        np.array([[0, 1], [2, 5]]),
        np.array([[0, 1], [2, 5]], dtype=np.float64),
        torch.tensor([[0, 1], [2, 5]]),
    ],
    ids=lambda reward: type(reward).__name__,
)
def test_lists_arrays_and_integers_are_rewards(reward):
    """The first three lines of a notebook."""
    advantage = grpo.objective.group_advantages(reward, eps=0.0)
    close(advantage, [[-(0.5**0.5), 0.5**0.5]] * 2)
    assert advantage.dtype == torch.float32


@pytest.mark.parametrize(
    "reward, message",
    [
        ([[1, 2], [3]], "P rows of G numbers"),
        ([["right", "wrong"]], "P rows of G numbers"),
        (None, "P rows of G numbers"),
        ([1, 2, 3], r"shape \(3,\), expected \(P, G\)"),
        (np.ones((3, 1)), r"shape \(3, 1\), expected \(P, G\)"),
        ([], r"shape \(0,\), expected"),
    ],
)
def test_what_is_no_table_of_rewards_is_an_error(reward, message):
    with pytest.raises(ValueError, match=f"group_advantages: .*{message}"):
        grpo.objective.group_advantages(reward)


# ---- Eq. 4, 5: ratio and clip


def test_gradient_of_every_clip_case(objective):
    """Six regions: d min(r A, clip(r) A) / d logp = r A, but 0 where good and already likelier, or bad and
    already rarer."""
    # unequal, so that confusing them shows
    low, high = 0.2, 0.3
    for ratio in (0.5, 0.79, 0.81, 1.0, 1.25, 1.31, 2.0):
        for advantage in (1.5, -0.7):
            logp_old = one([-1.3])
            logp = (logp_old + math.log(ratio)).requires_grad_()
            loss, _ = objective.policy_loss(
                logp, logp_old, None, torch.tensor([advantage]), one([1.0]), clip_low=low, clip_high=high
            )
            loss.backward()
            silent = ratio > 1 + high if advantage > 0 else ratio < 1 - low
            value = (1 + high if advantage > 0 else 1 - low) * advantage if silent else ratio * advantage
            close(loss, -value)
            close(logp.grad, 0.0 if silent else -ratio * advantage)


def test_default_bounds_are_the_papers(objective):
    for ratio, silent in ((1.19, False), (1.21, True)):
        logp = one([math.log(ratio)]).requires_grad_()
        objective.policy_loss(logp, one([0.0]), None, torch.tensor([1.0]), one([1.0]))[0].backward()
        assert (logp.grad == 0).item() == silent


def test_loss_is_zero_and_gradient_is_not_when_on_policy(objective):
    """The most-asked question of the field: advantages of a group sum to 0, so the loss starts at 0; its
    gradient is -w A."""
    logp = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    loss, stats = objective.policy_loss(
        logp, None, None, torch.tensor([1.0, -1.0]), torch.tensor([[0.5], [0.5]])
    )
    loss.backward()
    close(loss, 0.0)
    close(stats.ratio, 1.0)
    close(logp.grad, [[-0.5], [0.5]])


def test_old_none_is_the_policy_itself(objective):
    logp = torch.tensor([[-1.0, -0.3]], requires_grad=True)
    args = (None, torch.tensor([0.8]), torch.full((1, 2), 0.5))
    # not detached: old is a constant all the same
    none, given = (objective.policy_loss(logp, old, *args)[0] for old in (None, logp))
    close(*torch.autograd.grad(none, logp), torch.autograd.grad(given, logp)[0])
    close(none, given.detach())


def test_the_ratio_is_against_the_old_policy_not_the_reference(objective):
    for ref in (one([-1.0]), one([-3.0])):
        logp = one([-1.0]).requires_grad_()
        loss, stats = objective.policy_loss(logp, one([-1.1]), ref, torch.tensor([2.0]), one([1.0]))
        close(loss, -2 * math.exp(0.1))
        close(stats.ratio, math.exp(0.1))


def test_a_huge_ratio_stays_finite(objective):
    for advantage in (1.0, -1.0):
        logp = one([0.0]).requires_grad_()
        loss, _ = objective.policy_loss(logp, one([-200.0]), None, torch.tensor([advantage]), one([1.0]))
        loss.backward()
        assert loss.isfinite() and logp.grad.isfinite().all()


# ---- Eq. 6: KL


def test_kl_gradient_sees_the_reference(objective):
    """Per token: d k3 / d logp = 1 - e^(ref - logp): down when likelier than the reference, up when rarer."""
    logp = one([-1.0, -1.0]).requires_grad_()
    loss, _ = objective.policy_loss(
        logp, None, one([-0.5, -2.0]), torch.zeros(1), one([1.0, 1.0]), kl_coef=0.1
    )
    loss.backward()
    close(logp.grad, [[0.1 * (1 - math.exp(0.5)), 0.1 * (1 - math.exp(-1.0))]])


def test_kl_exponent_is_clamped_and_counted(objective):
    """e^100 is infinite in float32. A clamped token gets no gradient: +1, from clamping the exponent only,
    would push it further away."""
    logp = one([-100.0, -1.0]).requires_grad_()
    loss, stats = objective.policy_loss(
        logp, None, one([0.0, -1.0]), torch.zeros(1), one([0.25, 0.75]), kl_coef=1.0
    )
    loss.backward()
    close(loss, 0.25 * (math.exp(20) - 21))
    assert (logp.grad == 0).all()
    close(stats.kl_clamped, 0.25)


def test_kl_is_a_penalty_beside_the_clip(objective):
    """Clipping silences the policy term, not the KL; kl_coef 0 reports the KL without paying it."""
    logp = one([math.log(0.9)]).requires_grad_()
    args = (one([math.log(0.3)]), one([math.log(0.45)]), torch.tensor([1.0]), one([1.0]))
    loss, stats = objective.policy_loss(logp, *args, kl_coef=0.04)
    loss.backward()
    close(logp.grad, 0.04 * (1 - 0.5))
    close(loss, -1.2 + 0.04 * (0.5 - math.log(0.5) - 1))
    close(stats.policy, -1.2)
    free, stats = objective.policy_loss(logp, *args)
    close(free, -1.2)
    close(stats.kl, 0.5 - math.log(0.5) - 1)


# ---- Eq. 7: weights and the loss


def toy_update(seed=0, rows=7, cap=6, vocab=5):
    """Rows of very different lengths scored by one parameter vector, so that micro-batches must add up in
    one gradient."""
    g = torch.Generator().manual_seed(seed)
    length = torch.tensor([6, 1, 3, 2, 6, 5, 1])[:rows]
    mask = torch.arange(cap)[None] < length[:, None]
    tokens = torch.randint(vocab, (rows, cap), generator=g)
    bias = torch.randn(rows, cap, vocab, generator=g)
    draw = lambda: torch.randn(rows, cap, generator=g) * 0.3
    theta = torch.randn(vocab, generator=g)
    score = lambda theta, rows: (
        torch.log_softmax(bias[rows] + theta, -1).gather(-1, tokens[rows][..., None]).squeeze(-1)
    )
    base = score(theta, slice(None))
    return theta, score, mask, base + draw(), base + draw(), torch.randn(rows, generator=g)


def test_statistics_are_weighted_sums(objective):
    ratio = one([0.5, 0.9, 1.4, 1.4]).repeat(2, 1)
    old, advantage = torch.full((2, 4), -1.0), torch.tensor([1.0, -1.0])
    weight = torch.tensor([[0.1, 0.1, 0.2, 0.0], [0.1, 0.1, 0.1, 0.1]])
    _, stats = objective.policy_loss(
        old + ratio.log(), old, None, advantage, weight, clip_low=0.2, clip_high=0.3
    )
    # r = 1.4 with A > 0
    close(stats.clip_high, 0.2)
    # r = 0.5 with A < 0
    close(stats.clip_low, 0.1)
    close(stats.weight, 0.8)
    close(stats.ratio, (weight * ratio).sum().item())
    close(stats.kl, 0.0)
    means = stats.averages()
    assert means["clip_ratio/low_mean"] == pytest.approx(0.1 / 0.8) and means[
        "clip_ratio/high_mean"
    ] == pytest.approx(0.2 / 0.8)
    assert means["clip_ratio/region_mean"] == pytest.approx(0.3 / 0.8) and means["loss"] == pytest.approx(
        stats.policy.item()
    )


def test_gradient_weight_is_what_training_did(objective):
    """For the report: weight * ratio * advantage per token, 0 in the silent cases, whatever the
    surrounding grad mode."""
    old = torch.full((2, 3), -1.0)
    ratio = torch.tensor([[0.5, 1.1, 1.5], [0.5, 1.1, 1.5]])
    weight = torch.tensor([[0.2, 0.3, 0.0], [0.1, 0.1, 0.4]])
    with torch.no_grad():
        found = objective.gradient_weight(old + ratio.log(), old, torch.tensor([2.0, -1.0]), weight)
    close(found, [[0.2 * 0.5 * 2, 0.3 * 1.1 * 2, 0.0], [0.0, -0.1 * 1.1, -0.4 * 1.5]])
    assert not found.requires_grad
    close(
        objective.gradient_weight(old, None, torch.tensor([2.0, -1.0]), weight),
        weight * torch.tensor([[2.0], [-1.0]]),
    )
    # with the bounds of the loss: r = 1.5 is no longer clipped
    found = objective.gradient_weight(
        old + ratio.log(), old, torch.tensor([2.0, -1.0]), 0.1 + 0 * weight, clip_high=0.6
    )
    close(found[0], [0.1 * 0.5 * 2, 0.1 * 1.1 * 2, 0.1 * 1.5 * 2])


def test_bfloat16_is_lifted_to_float32(objective):
    logp = one([-1.0]).bfloat16().requires_grad_()
    loss, stats = objective.policy_loss(
        logp, one([-1.5]).bfloat16(), None, torch.tensor([1.0]).bfloat16(), one([1.0]), clip_high=1.0
    )
    assert loss.dtype == stats.loss.dtype == torch.float32
    close(loss, -math.exp(0.5))


def test_a_batch_of_weight_zero_gives_zero_gradients_not_none(objective):
    """Ranks pad their micro-batches with such batches: every rank must run a backward pass."""
    logp = one([-1.0, -2.0]).requires_grad_()
    objective.policy_loss(logp, None, one([0.0, 0.0]), torch.tensor([1.0]), one([0.0, 0.0]), kl_coef=0.1)[
        0
    ].backward()
    assert (logp.grad == 0).all()


def test_a_missing_reference_is_an_error():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="logp_ref is None"):
        grpo.objective.policy_loss(x, None, None, torch.zeros(1), x, kl_coef=0.1)


def test_a_misspelt_bound_is_an_error():
    x = torch.zeros(1, 1)
    with pytest.raises(TypeError, match="clip_hihg"):
        grpo.objective.policy_loss(x, None, None, torch.zeros(1), x, clip_hihg=0.3)


# ---- Eq. 10: the entropy bonus


def test_the_entropy_bonus_is_a_weighted_sum_and_its_gradient_the_weight(objective):
    """d bonus / d H = coef * w. Where the weight is 0 nothing is read, not even NaN."""
    weight = torch.tensor([[0.25, 0.5, 0.0], [0.125, 0.0, 0.0]])
    entropy = torch.tensor([[2.0, 1.0, math.nan], [4.0, math.nan, math.inf]], requires_grad=True)
    bonus = objective.entropy_bonus(entropy, weight, 0.1)
    close(bonus, 0.1 * (0.5 + 0.5 + 0.5))
    bonus.backward()
    close(entropy.grad, 0.1 * weight)


def test_entropy_bonuses_of_micro_batches_add_up(objective):
    """However the rows are cut: the weights are those of the whole update."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 5, generator=g) < 0.6
    entropy = torch.rand(6, 5, generator=g)
    weight = objective.token_weights(mask, tokens=mask.sum(), completions=6, cap=5)
    whole = objective.entropy_bonus(entropy, weight, 0.3)
    parts = [objective.entropy_bonus(entropy[rows], weight[rows], 0.3) for rows in ([0, 3], [1, 2, 4, 5])]
    close(sum(parts), whole)
    # equal entropies: the bonus is coef times the entropy, for weights whose sum is 1
    close(objective.entropy_bonus(torch.full((6, 5), 0.7), weight / weight.sum(), 0.3), 0.21)
