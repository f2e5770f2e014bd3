"""The variants: closed forms of each, and properties that every row of a table must have.

The property tests run over the tables, so a variant that is added tomorrow is tested without a new line here.
Each test takes the modules as the fixtures `objective` and `variants`, so that test_mutants.py can pass
broken ones. Tolerance 1e-6 relative unless said (see test_objective.py).
"""

import math
from typing import get_args, get_type_hints

import pytest
import torch
from test_objective import close, objective, one, toy_update  # noqa: F401

import grpo.variants
from grpo.config.settings import Config, Loss
from grpo.names import choose


@pytest.fixture
def variants():
    return grpo.variants


# ---- Closed forms: surrogates


def test_gspo_takes_one_ratio_per_completion(objective, variants):
    """s = exp(mean log-ratio over the tokens inside); d loss / d logp_c = -(sum of w) s A / length, and 0
    for the whole row if clipped."""
    logp_old = torch.full((2, 3), -1.0)
    # 9.0 stands outside the mask
    logp = (logp_old + torch.tensor([[0.1, 0.3, 9.0], [0.5, 0.5, 0.5]])).requires_grad_()
    weight = torch.tensor([[0.25, 0.25, 0.0], [0.1, 0.2, 0.2]])
    loss, stats = objective.policy_loss(
        logp, logp_old, None, torch.tensor([2.0, 1.0]), weight, clip_high=0.4, surrogate=variants.gspo
    )
    loss.backward()
    s = math.exp(0.2)
    close(loss, -(0.5 * s * 2.0 + 0.5 * 1.4 * 1.0))
    close(logp.grad, [[-0.5 * s * 2.0 / 2] * 2 + [0.0], [0.0] * 3])
    close(stats.clip_high, 0.5)


def test_cispo_clips_the_weight_and_silences_no_token(objective, variants):
    logp_old = one([-1.0, -2.0, -3.0])
    logp = (logp_old + torch.log(one([3.0, 1.1, 0.1]))).requires_grad_()
    weight, bounds = one([0.2, 0.3, 0.5]), dict(clip_low=0.4, clip_high=0.5)
    loss, _ = objective.policy_loss(
        logp, logp_old, None, torch.tensor([-1.5]), weight, **bounds, surrogate=variants.cispo
    )
    loss.backward()
    close(logp.grad, [[0.2 * 1.5 * 1.5, 0.3 * 1.1 * 1.5, 0.5 * 0.6 * 1.5]])
    close(loss, (logp.grad * logp).sum().item())


def test_reinforce_is_the_policy_gradient_wherever_the_policy_has_gone(objective, variants):
    """GPG: L = -sum of w A log pi. Its gradient is -w A at every token, however far the ratio is outside
    any clip, and nothing counts as clipped."""
    logp_old = torch.full((2, 3), -1.0)
    logp = (logp_old + torch.tensor([[2.0, 0.0, -2.0], [2.0, -2.0, 9.0]])).requires_grad_()
    weight = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.3, 0.0]])
    loss, stats = objective.policy_loss(
        logp, logp_old, None, torch.tensor([0.75, -0.25]), weight, surrogate=variants.reinforce
    )
    loss.backward()
    close(logp.grad, [[-0.075, -0.15, -0.225], [0.025, 0.075, 0.0]])
    close(loss, -(0.75 * (0.1 * 1.0 + 0.2 * -1.0 + 0.3 * -3.0) - 0.25 * (0.1 * 1.0 + 0.3 * -3.0)))
    assert stats.clip_low == stats.clip_high == 0
    close(stats.ratio, 1.0)


def test_gpg_as_a_whole(objective, variants):
    """A = r - mean, L = -(sum of A log pi) / (tokens of the groups that teach): groups without spread
    neither pull nor count."""
    reward = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    advantage = objective.group_advantages(reward, scale=variants.undivided)
    close(advantage, [[0.5, -0.5], [0.0, 0.0], [1.0, -1.0]])
    mask = torch.arange(3) < torch.tensor([3, 1, 3, 3, 2, 2])[:, None]
    logp = torch.linspace(-3, -0.5, 18).view(6, 3).requires_grad_()
    weight = objective.token_weights(mask, variants.token_mean, tokens=3 + 1 + 2 + 2, completions=4, cap=3)
    objective.policy_loss(logp, None, None, advantage.flatten(), weight, surrogate=variants.reinforce)[
        0
    ].backward()
    close(
        logp.grad, [[-0.0625] * 3, [0.0625, 0, 0], [0] * 3, [0] * 3, [-0.125, -0.125, 0], [0.125, 0.125, 0]]
    )


# ---- Closed forms: KL estimators


def test_kl_values(objective, variants):
    """d = ref - logp = ln 2: k1 = -ln 2, k2 = (ln 2)^2 / 2, k3 = 2 - ln 2 - 1, and k3_is = k3 * ratio."""
    logp, ref, old, d = one([-2.0]), one([-2.0 + math.log(2)]), one([-2.0 - math.log(1.1)]), math.log(2)
    for name, value in {"k1": -d, "k2": d * d / 2, "k3": 1 - d, "k3_is": 1.1 * (1 - d)}.items():
        loss, stats = objective.policy_loss(
            logp, old, ref, torch.zeros(1), one([1.0]), kl_coef=0.5, kl=variants.KL_ESTIMATORS[name]
        )
        close(stats.kl, value)
        close(loss, 0.5 * value)


def expected_kl_gradient(objective, estimator, theta, ref):
    """The exact expectation over a vocabulary: every word is a row with C = 1, weighted by its
    probability."""
    leaf = theta.clone().requires_grad_()
    logp = torch.log_softmax(leaf, dim=-1)
    weight = logp.detach().exp()[:, None]
    loss, stats = objective.policy_loss(
        logp[:, None], None, ref[:, None], torch.zeros(len(theta)), weight, kl_coef=1.0, kl=estimator
    )
    return torch.autograd.grad(loss, leaf)[0], stats.kl


def test_kl_gradient_table(objective, variants):
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
        found, value = expected_kl_gradient(objective, variants.KL_ESTIMATORS[name], theta, ref)
        close(found, gradient)
        assert torch.isclose(value, forward, rtol=1e-5).item() == unbiased, name


# ---- Closed forms: advantage scales and token weightings


def test_advantage_scales(objective, variants):
    reward = torch.tensor([[0.0, 1.0], [1.0, 4.0]])
    close(objective.group_advantages(reward, scale=variants.undivided), [[-0.5, 0.5], [-1.5, 1.5]])
    # of 0, 1, 1, 4 around 1.5
    std = math.sqrt((1.5**2 + 0.5**2 + 0.5**2 + 2.5**2) / 3)
    close(
        objective.group_advantages(reward, scale=variants.batch_std, eps=0.0),
        [[-0.5 / std, 0.5 / std], [-1.5 / std, 1.5 / std]],
    )
    found = objective.group_advantages(reward, scale=variants.batch_std, eps=1.0)
    close(found[0], [-0.5 / (std + 1), 0.5 / (std + 1)])


def test_token_weights(objective, variants):
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    # of an update that these two rows belong to
    totals = dict(tokens=10, completions=4, cap=8)
    close(objective.token_weights(mask, variants.token_mean, **totals), mask.float() / 10)
    close(objective.token_weights(mask, **totals), [[1 / 16] * 4, [1 / 4, 0, 0, 0]])
    close(objective.token_weights(mask, variants.constant, **totals), mask.float() / 32)
    close(
        objective.token_weights(
            mask, variants.token_mean, tokens=torch.tensor(10), completions=torch.tensor(4), cap=8
        ),
        mask.float() / 10,
    )


def test_weightings_are_the_means_they_stand_for(objective, variants):
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
            objective.policy_loss(
                old, None, None, advantage, objective.token_weights(mask, variants.WEIGHTINGS[how], **totals)
            )[0],
            -value,
        )


def test_names(objective, variants):
    """What a recipe's word stands for."""
    v, o = variants, objective
    assert [v.SURROGATES[name] for name in ("clip", "gspo", "cispo", "reinforce")] == [
        o.clipped_surrogate,
        v.gspo,
        v.cispo,
        v.reinforce,
    ]
    assert [v.KL_ESTIMATORS[name] for name in ("k1", "k2", "k3", "k3_is")] == [v.k1, v.k2, o.k3, v.k3_is]
    assert [v.ADVANTAGE_SCALES[name] for name in ("std", "none", "batch")] == [
        o.group_std,
        v.undivided,
        v.batch_std,
    ]
    assert [v.WEIGHTINGS[name] for name in ("token", "completion", "constant")] == [
        v.token_mean,
        o.completion_mean,
        v.constant,
    ]


# ---- Properties of every row of the tables
#
# A new estimator has value 0 and slope 0 at the reference. One that has another slope is listed here.
SLOPE_AT_REFERENCE = {"k1": 1.0}


def row_weights(objective, mask):
    """Weights of an update of these rows: the paper's."""
    return objective.token_weights(mask, tokens=mask.sum(), completions=len(mask), cap=mask.shape[1])


def test_every_surrogate_has_the_policy_gradient_on_policy(objective, variants):
    """d loss / d logp = -weight * advantage where the policy has not moved, for good and bad completions."""
    _, _, mask, logp, _, advantage = toy_update()
    weight = row_weights(objective, mask)
    for old in (None, logp):
        for name, surrogate in variants.SURROGATES.items():
            leaf = logp.clone().requires_grad_()
            loss, stats = objective.policy_loss(leaf, old, None, advantage, weight, surrogate=surrogate)
            loss.backward()
            wanted = -weight * advantage[:, None]
            assert torch.allclose(leaf.grad, wanted, rtol=1e-5, atol=1e-7), f"{name}: wrong gradient"
            assert abs(stats.ratio - stats.weight) < 1e-6, f"{name}: the ratio is not 1 on policy"


def test_every_surrogate_is_finite_far_from_the_old_policy(objective, variants):
    for name, surrogate in variants.SURROGATES.items():
        for advantage in (1.0, -1.0):
            for old in (-300.0, 0.0):
                leaf = one([-100.0, -100.0]).requires_grad_()
                args = (one([old, old]), None, torch.tensor([advantage]), one([0.5, 0.5]))
                loss, _ = objective.policy_loss(leaf, *args, surrogate=surrogate)
                loss.backward()
                assert loss.isfinite() and leaf.grad.isfinite().all(), name


def test_every_estimator_is_zero_and_flat_at_the_reference(objective, variants):
    """A penalty has its minimum at the reference; near it, it pulls back with the distance (curvature 1)."""
    near = one([-0.01, 0.0, 0.01])
    for name, estimator in variants.KL_ESTIMATORS.items():
        leaf = (one([-2.0, -2.0, -2.0]) + near).requires_grad_()
        weight, reference = one([1.0, 1.0, 1.0]), one([-2.0, -2.0, -2.0])
        loss, _ = objective.policy_loss(
            leaf, None, reference, torch.zeros(1), weight, kl_coef=1.0, kl=estimator
        )
        (slope,) = torch.autograd.grad(loss, leaf)
        value = estimator(reference, reference, torch.ones(1, 3))
        assert (value == 0).all(), f"{name}: not 0 at the reference"
        if name in SLOPE_AT_REFERENCE:
            close(slope, SLOPE_AT_REFERENCE[name])
            continue
        assert abs(slope[0, 1]) < 1e-6, f"{name}: slope {slope[0, 1]} at the reference"
        assert torch.allclose(slope, near, rtol=0.02, atol=1e-6), f"{name}: pulls {slope} at {near}"


def test_every_scale_keeps_sum_and_order(objective, variants):
    """The advantages of a group sum to 0 and rise with the reward; a constant added to it changes nothing."""
    reward = torch.tensor([[0.0, 1.0, 2.0, 5.0], [3.0, 1.0, 1.5, 0.5], [0.2, 0.3, 0.9, 0.1]])
    for name, scale in variants.ADVANTAGE_SCALES.items():
        advantage = objective.group_advantages(reward, scale=scale)
        assert advantage.shape == reward.shape and advantage.sum(dim=1).abs().max() < 1e-5, f"{name}: sum"
        assert torch.equal(advantage.argsort(dim=1), reward.argsort(dim=1)), f"{name}: order"
        assert (advantage.sort(dim=1).values.diff(dim=1) > 0).all(), f"{name}: order"
        assert torch.allclose(objective.group_advantages(reward + 1, scale=scale), advantage, atol=1e-5), name


def test_every_scale_gives_exactly_zero_without_spread(objective, variants):
    # 3e-7: rounding of a sum of parts, not a difference
    reward = torch.tensor([[0.7, 0.7, 0.7], [1.0, 1.0 + 3e-7, 1.0], [0.0, 1.0, 0.0]])
    for name, scale in variants.ADVANTAGE_SCALES.items():
        advantage = objective.group_advantages(reward, scale=scale, eps=1e-8)
        assert (advantage[:2] == 0).all() and (advantage[2] != 0).all(), name


def test_every_weighting_is_positive_inside_and_zero_outside(objective, variants):
    """And of one value in a completion, because a rule judges the whole; and the weights sum to 1 at most."""
    _, _, mask, *_ = toy_update()
    totals = dict(tokens=int(mask.sum()), completions=len(mask), cap=mask.shape[1])
    for name, weighting in variants.WEIGHTINGS.items():
        weight = objective.token_weights(mask, weighting, **totals)
        assert torch.equal(weight > 0, mask), f"{name}: the mask"
        assert torch.equal(weight, mask * weight[:, :1]), f"{name}: tokens of a completion differ"
        assert 0 < weight.sum() < 1 + 1e-6, f"{name}: sum"


def test_nothing_is_read_where_the_weight_is_zero(objective, variants):
    """Padding may hold anything: float32's minimum, NaN. Neither loss nor gradient nor statistics see it,
    for any surrogate or KL."""
    weight = one([0.5, 0.5, 0.0, 0.0])
    good = [one([-1.0, -0.5, 0.0, 0.0]), one([-1.1, -0.4, 0.0, 0.0]), one([-0.9, -0.7, 0.0, 0.0])]
    for garbage in (float("nan"), torch.finfo(torch.float32).min, 50.0):
        bad = [torch.where(weight != 0, x, garbage) for x in good]
        for name, surrogate in variants.SURROGATES.items():
            for estimator, kl in variants.KL_ESTIMATORS.items():
                results = []
                for logp, old, ref in (good, bad):
                    leaf = logp.clone().requires_grad_()
                    loss, stats = objective.policy_loss(
                        leaf, old, ref, torch.tensor([0.7]), weight, kl_coef=0.1, kl=kl, surrogate=surrogate
                    )
                    results.append((loss.detach(), *torch.autograd.grad(loss, leaf), stats.vector()))
                for clean, dirty in zip(*results):
                    assert torch.equal(clean, dirty), (garbage, name, estimator)
                assert (results[0][1][0, 2:] == 0).all() and (results[0][1][0, :2] != 0).all()


def test_gradient_invariant_to_microbatches_and_ranks(objective, variants):
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
    for how in variants.WEIGHTINGS.values():
        for surrogate in variants.SURROGATES.values():
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


# ---- The properties can fail, and the settings know the tables


def wrong_sign(logp, logp_old, advantage, inside, clip_low, clip_high):
    ratio = (logp - logp_old).exp()
    return -ratio * advantage, ratio


def seven_times(logp, logp_old, advantage, inside, clip_low, clip_high):
    ratio = (logp - logp_old).exp()
    return 7 * ratio * advantage, ratio


def reads_padding(logp, logp_old, advantage, inside, clip_low, clip_high):
    ratio = (logp - logp_old).exp()
    return ratio * advantage / inside.shape[1] * inside.sum(1, keepdim=True), ratio


BAD = [
    ("SURROGATES", wrong_sign, test_every_surrogate_has_the_policy_gradient_on_policy),
    ("SURROGATES", seven_times, test_every_surrogate_has_the_policy_gradient_on_policy),
    ("SURROGATES", reads_padding, test_every_surrogate_has_the_policy_gradient_on_policy),
    ("SURROGATES", wrong_sign, test_every_surrogate_is_finite_far_from_the_old_policy),
    ("KL_ESTIMATORS", lambda p, ref, r: ref - p, test_every_estimator_is_zero_and_flat_at_the_reference),
    (
        "KL_ESTIMATORS",
        lambda p, ref, r: -((p - ref) ** 2) / 2,
        test_every_estimator_is_zero_and_flat_at_the_reference,
    ),
    (
        "KL_ESTIMATORS",
        lambda p, ref, r: 3.5 * (p - ref) ** 2,
        test_every_estimator_is_zero_and_flat_at_the_reference,
    ),
    (
        "KL_ESTIMATORS",
        lambda p, ref, r: (p - ref) ** 2 / 2 + 1,
        test_every_estimator_is_zero_and_flat_at_the_reference,
    ),
    ("ADVANTAGE_SCALES", lambda reward, eps: -reward.std(), test_every_scale_keeps_sum_and_order),
    ("ADVANTAGE_SCALES", lambda reward, eps: reward + 0.1, test_every_scale_keeps_sum_and_order),
    ("ADVANTAGE_SCALES", lambda reward, eps: reward.mean(), test_every_scale_keeps_sum_and_order),
    ("ADVANTAGE_SCALES", lambda reward, eps: math.inf, test_every_scale_gives_exactly_zero_without_spread),
    ("WEIGHTINGS", lambda length, *_: -length, test_every_weighting_is_positive_inside_and_zero_outside),
    ("WEIGHTINGS", lambda length, *_: length, test_every_weighting_is_positive_inside_and_zero_outside),
    (
        "WEIGHTINGS",
        lambda length, *_: length * len(length),
        test_gradient_invariant_to_microbatches_and_ranks,
    ),
]


@pytest.mark.parametrize("table, bad, test", BAD)
def test_a_bad_row_is_caught(table, bad, test, objective, variants, monkeypatch):
    """Once a surrogate with the wrong sign, and one with a factor 7, passed all tests."""
    test(objective, variants)
    monkeypatch.setitem(getattr(variants, table), "bad", bad)
    with pytest.raises(AssertionError):
        test(objective, variants)


def test_the_settings_take_their_names_from_the_tables(variants):
    loss, config = get_type_hints(Loss), get_type_hints(Config)
    assert get_args(loss["surrogate"]) == tuple(variants.SURROGATES)
    assert get_args(loss["kl"]) == tuple(variants.KL_ESTIMATORS)
    assert get_args(loss["weighting"]) == tuple(variants.WEIGHTINGS)
    assert get_args(config["advantage"]) == tuple(variants.ADVANTAGE_SCALES)
    assert Config().advantage in variants.ADVANTAGE_SCALES


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(variants):
    with pytest.raises(
        ValueError, match="unknown surrogate 'cispi'. Did you mean 'cispo'.*Known: clip, gspo"
    ):
        choose("surrogate", "cispi", variants.SURROGATES)
