"""The variants against closed forms: every value and gradient that can be worked out by hand.

Each test takes the modules as the fixtures `objective` and `variants`, so that test_mutants.py can pass
broken ones. Tolerance 1e-6 relative unless said (see test_objective.py).
"""

import math

import torch
from test_objective import close, objective, one, toy_update  # noqa: F401
from test_variants import variants  # noqa: F401

# ---- Surrogates


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


# ---- KL estimators


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


# ---- Advantage scales and token weightings


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
