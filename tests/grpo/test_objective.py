"""The objective against closed forms: every value *and gradient* that can be worked out by hand is.

Each test takes the module under test as the fixture `objective`, so that test_mutants.py can hand it a broken
one. Nothing here calls the implementation to get an expected value. Tolerance 1e-6 relative unless said:
float32 has 1.2e-7, and nothing here sums more than 40 terms.
"""

import math

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
# ----------------------------------------------------------------------


def test_advantages_are_measured_in_sample_standard_deviations(objective):
    reward = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]])
    # sample variances: 4 * 0.25 / 3 and (3 * 0.25 + 2.25) / 3 = 1
    a, b = (0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (1 + 1e-4))
    close(objective.group_advantages(reward), [[-a, -a, a, a], [-0.5 * b, -0.5 * b, -0.5 * b, 1.5 * b]])


def test_advantage_scales(objective):
    reward = torch.tensor([[0.0, 1.0], [1.0, 4.0]])
    close(objective.group_advantages(reward, scale="none"), [[-0.5, 0.5], [-1.5, 1.5]])
    # of 0, 1, 1, 4 around 1.5
    std = math.sqrt((1.5**2 + 0.5**2 + 0.5**2 + 2.5**2) / 3)
    close(
        objective.group_advantages(reward, scale="batch", eps=0.0),
        [[-0.5 / std, 0.5 / std], [-1.5 / std, 1.5 / std]],
    )


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_a_group_without_spread_gets_exactly_zero(scale):
    # 3e-7: rounding of a sum of parts, not a difference
    reward = torch.tensor([[0.7, 0.7, 0.7], [1.0, 1.0 + 3e-7, 1.0], [0.0, 1.0, 0.0]])
    advantage = grpo.objective.group_advantages(reward, scale=scale, eps=1e-8)
    assert (advantage[:2] == 0).all() and (advantage[2] != 0).all()


def test_spread_threshold(objective):
    """Rewards 2e-7 apart around 0.1 are equal; with a bare division they would be far from 0."""
    assert (objective.group_advantages(torch.tensor([[0.1, 0.1 + 2e-7]]), eps=0.0) == 0).all()
    # 1 / sqrt(2)
    assert (objective.group_advantages(torch.tensor([[0.1, 0.1 + 1e-3]]), eps=0.0).abs() > 0.7).all()


def test_a_completion_alone_has_no_group():
    for bad in (torch.ones(3, 1), torch.ones(4)):
        with pytest.raises(ValueError, match="group"):
            grpo.objective.group_advantages(bad)


def test_integer_rewards_are_welcome():
    close(grpo.objective.group_advantages(torch.tensor([[0, 1]]), scale="none"), [[-0.5, 0.5]])


# ---- Eq. 4, 5: ratio and clip
# ----------------------------------------------------------------------


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


def test_gspo_takes_one_ratio_per_completion(objective):
    """s = exp(mean log-ratio over the tokens inside); d loss / d logp_c = -(sum of w) s A / length, and 0
    for the whole row if clipped."""
    logp_old = torch.full((2, 3), -1.0)
    # 9.0 stands outside the mask
    logp = (logp_old + torch.tensor([[0.1, 0.3, 9.0], [0.5, 0.5, 0.5]])).requires_grad_()
    weight = torch.tensor([[0.25, 0.25, 0.0], [0.1, 0.2, 0.2]])
    loss, stats = objective.policy_loss(
        logp, logp_old, None, torch.tensor([2.0, 1.0]), weight, clip_high=0.4, surrogate="gspo"
    )
    loss.backward()
    s = math.exp(0.2)
    close(loss, -(0.5 * s * 2.0 + 0.5 * 1.4 * 1.0))
    close(logp.grad, [[-0.5 * s * 2.0 / 2] * 2 + [0.0], [0.0] * 3])
    close(stats.clip_high, 0.5)


def test_cispo_clips_the_weight_and_silences_no_token(objective):
    logp_old = one([-1.0, -2.0, -3.0])
    logp = (logp_old + torch.log(one([3.0, 1.1, 0.1]))).requires_grad_()
    weight, bounds = one([0.2, 0.3, 0.5]), dict(clip_low=0.4, clip_high=0.5)
    loss, _ = objective.policy_loss(
        logp, logp_old, None, torch.tensor([-1.5]), weight, **bounds, surrogate="cispo"
    )
    loss.backward()
    close(logp.grad, [[0.2 * 1.5 * 1.5, 0.3 * 1.1 * 1.5, 0.5 * 0.6 * 1.5]])
    close(loss, (logp.grad * logp).sum().item())


def test_reinforce_is_the_policy_gradient_wherever_the_policy_has_gone(objective):
    """GPG: L = -sum of w A log pi. Its gradient is -w A at every token, however far the ratio is outside
    any clip, and nothing counts as clipped."""
    logp_old = torch.full((2, 3), -1.0)
    logp = (logp_old + torch.tensor([[2.0, 0.0, -2.0], [2.0, -2.0, 9.0]])).requires_grad_()
    weight = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.3, 0.0]])
    loss, stats = objective.policy_loss(
        logp, logp_old, None, torch.tensor([0.75, -0.25]), weight, surrogate="reinforce"
    )
    loss.backward()
    close(logp.grad, [[-0.075, -0.15, -0.225], [0.025, 0.075, 0.0]])
    close(loss, -(0.75 * (0.1 * 1.0 + 0.2 * -1.0 + 0.3 * -3.0) - 0.25 * (0.1 * 1.0 + 0.3 * -3.0)))
    assert stats.clip_low == stats.clip_high == 0
    close(stats.ratio, 1.0)


def test_gpg_as_a_whole(objective):
    """A = r - mean, L = -(sum of A log pi) / (tokens of the groups that teach): groups without spread
    neither pull nor count."""
    reward = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    advantage = objective.group_advantages(reward, scale="none")
    close(advantage, [[0.5, -0.5], [0.0, 0.0], [1.0, -1.0]])
    mask = torch.arange(3) < torch.tensor([3, 1, 3, 3, 2, 2])[:, None]
    logp = torch.linspace(-3, -0.5, 18).view(6, 3).requires_grad_()
    weight = objective.token_weights(mask, "token", tokens=3 + 1 + 2 + 2, completions=4, cap=3)
    objective.policy_loss(logp, None, None, advantage.flatten(), weight, surrogate="reinforce")[0].backward()
    close(
        logp.grad, [[-0.0625] * 3, [0.0625, 0, 0], [0] * 3, [0] * 3, [-0.125, -0.125, 0], [0.125, 0.125, 0]]
    )


# ---- Eq. 6: KL
# ----------------------------------------------------------------------


def test_kl_values(objective):
    """d = ref - logp = ln 2: k1 = -ln 2, k2 = (ln 2)^2 / 2, k3 = 2 - ln 2 - 1, and k3_is = k3 * ratio."""
    logp, ref, old, d = one([-2.0]), one([-2.0 + math.log(2)]), one([-2.0 - math.log(1.1)]), math.log(2)
    for name, value in {"k1": -d, "k2": d * d / 2, "k3": 1 - d, "k3_is": 1.1 * (1 - d)}.items():
        loss, stats = objective.policy_loss(logp, old, ref, torch.zeros(1), one([1.0]), kl_coef=0.5, kl=name)
        close(stats.kl, value)
        close(loss, 0.5 * value)


def expected_kl_gradient(objective, name, theta, ref):
    """The exact expectation over a vocabulary: every word is a row with C = 1, weighted by its
    probability."""
    leaf = theta.clone().requires_grad_()
    logp = torch.log_softmax(leaf, dim=-1)
    weight = logp.detach().exp()[:, None]
    loss, stats = objective.policy_loss(
        logp[:, None], None, ref[:, None], torch.zeros(len(theta)), weight, kl_coef=1.0, kl=name
    )
    return torch.autograd.grad(loss, leaf)[0], stats.kl


def test_kl_gradient_table(objective):
    """docs/06 and T2: which divergence each estimator descends. Exact over five words."""
    theta = torch.tensor([0.3, -0.5, 1.2, 0.0, -1.0])
    ref = torch.log_softmax(torch.tensor([-0.4, 1.6, 0.1, 0.9, -2.0]), dim=-1)
    leaf = theta.clone().requires_grad_()
    logp = torch.log_softmax(leaf, dim=-1)
    # KL(policy || ref)
    forward = (logp.exp() * (logp - ref)).sum()
    # KL(ref || policy)
    backward = (ref.exp() * (ref - logp)).sum()
    to_ref, from_ref = (torch.autograd.grad(kl, leaf, retain_graph=True)[0] for kl in (forward, backward))
    # or the table could not tell them apart
    assert (to_ref - from_ref).abs().max() > 0.05
    for name, gradient, unbiased in (
        ("k1", torch.zeros(5), True),
        ("k2", to_ref, False),
        ("k3", from_ref, True),
        ("k3_is", to_ref, True),
    ):
        found, value = expected_kl_gradient(objective, name, theta, ref)
        close(found, gradient)
        assert torch.isclose(value, forward, rtol=1e-5).item() == unbiased, name


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
# ----------------------------------------------------------------------


def test_token_weights(objective):
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    # of an update of which these two rows are a part
    totals = dict(tokens=10, completions=4, cap=8)
    close(objective.token_weights(mask, "token", **totals), mask.float() / 10)
    close(objective.token_weights(mask, "completion", **totals), [[1 / 16] * 4, [1 / 4, 0, 0, 0]])
    close(objective.token_weights(mask, "constant", **totals), mask.float() / 32)
    close(
        objective.token_weights(mask, "token", tokens=torch.tensor(10), completions=torch.tensor(4), cap=8),
        mask.float() / 10,
    )


def test_nothing_is_read_where_the_weight_is_zero(objective):
    """Padding may hold anything: float32's minimum, NaN. Neither loss nor gradient nor statistics see it,
    for any surrogate or KL."""
    weight = one([0.5, 0.5, 0.0, 0.0])
    good = [one([-1.0, -0.5, 0.0, 0.0]), one([-1.1, -0.4, 0.0, 0.0]), one([-0.9, -0.7, 0.0, 0.0])]
    for garbage in (float("nan"), torch.finfo(torch.float32).min, 50.0):
        bad = [torch.where(weight != 0, x, garbage) for x in good]
        for surrogate in ("clip", "gspo", "cispo", "reinforce"):
            for kl in ("k1", "k2", "k3", "k3_is"):
                results = []
                for logp, old, ref in (good, bad):
                    leaf = logp.clone().requires_grad_()
                    loss, stats = objective.policy_loss(
                        leaf, old, ref, torch.tensor([0.7]), weight, kl_coef=0.1, kl=kl, surrogate=surrogate
                    )
                    results.append((loss.detach(), *torch.autograd.grad(loss, leaf), stats.vector()))
                for clean, dirty in zip(*results):
                    assert torch.equal(clean, dirty), (garbage, surrogate, kl)
                assert (results[0][1][0, 2:] == 0).all() and (results[0][1][0, :2] != 0).all()


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


def test_gradient_invariant_to_microbatches_and_ranks(objective):
    """One rank or two with unequal token counts, micro-batches of 1, 2, 5 or all rows, any order: one
    gradient, one set of statistics."""
    theta, score, mask, old, ref, advantage = toy_update()
    totals = dict(tokens=int(mask.sum()), completions=len(mask), cap=mask.shape[1])
    cuts = [
        [range(7)],
        [[i] for i in range(7)],
        [[6, 0], [3, 1], [5, 2], [4]],
        [[4, 2, 0, 5, 1], [3, 6]],
        [[0], [1, 2, 3, 4, 5, 6]],
    ]
    for how in ("token", "completion", "constant"):
        for surrogate in ("clip", "gspo", "cispo", "reinforce"):
            found = []
            for cut in cuts:
                leaf, sums = theta.clone().requires_grad_(), objective.LossStats.zero()
                for rows in map(list, cut):
                    weight = objective.token_weights(mask[rows], how, **totals)
                    loss, stats = objective.policy_loss(
                        score(leaf, rows),
                        old[rows],
                        ref[rows],
                        advantage[rows],
                        weight,
                        kl_coef=0.1,
                        surrogate=surrogate,
                    )
                    loss.backward()
                    sums = sums + stats
                found.append((leaf.grad, sums.vector()))
            for gradient, sums in found[1:]:
                close(gradient, found[0][0])
                close(sums, found[0][1])
            assert found[0][0].abs().max() > 1e-3


def test_weightings_are_the_means_they_stand_for(objective):
    """Against plain loops over rows: DAPO, the GRPO paper, Dr. GRPO. The policy term alone, on policy, so
    the loss is -mean of A."""
    _, _, mask, old, _, advantage = toy_update()
    lengths = mask.sum(1).tolist()
    totals = dict(tokens=sum(lengths), completions=len(mask), cap=6)
    expected = {
        "token": sum(a * n for a, n in zip(advantage.tolist(), lengths)) / sum(lengths),
        "completion": sum(advantage.tolist()) / len(mask),
        "constant": sum(a * n for a, n in zip(advantage.tolist(), lengths)) / (6 * len(mask)),
    }
    for how, value in expected.items():
        close(
            objective.policy_loss(old, None, None, advantage, objective.token_weights(mask, how, **totals))[
                0
            ],
            -value,
        )


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


def test_wrong_names_and_a_missing_reference_are_errors():
    x, a, o = torch.zeros(1, 1), torch.zeros(1), grpo.objective
    for call, message in (
        (lambda: o.policy_loss(x, None, None, a, x, kl_coef=0.1), "logp_ref is None"),
        (lambda: o.policy_loss(x, None, None, a, x, kl="k4"), "'k4'.*Known: k1, k2, k3, k3_is"),
        (lambda: o.policy_loss(x, None, None, a, x, surrogate="cispi"), "Did you mean 'cispo'"),
        (lambda: o.token_weights(x.bool(), "tokens", tokens=1, completions=1, cap=1), "Did you mean 'token'"),
        (lambda: o.group_advantages(torch.zeros(1, 2), scale="mad"), "Known: std, batch, none"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
