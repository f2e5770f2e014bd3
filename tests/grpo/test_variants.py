"""Properties that every row of the tables of variants.py must have.

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
