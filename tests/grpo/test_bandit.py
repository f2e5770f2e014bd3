"""A learning test that is a theorem: one prompt, eight words, one token each.

For this softmax bandit the expected GRPO update is a sum over all V^G groups, so the test has no noise. With
`scale=undivided` and a KL estimator that has the gradient of KL(policy || ref), the fixed point is known:

    policy*(v)  is proportional to  ref(v) * exp((1 - 1/G) * reward(v) / kl_coef)

The factor 1 - 1/G is there because the group's mean contains the completion itself.
"""

import itertools

import torch

from grpo.objective import group_advantages, policy_loss
from grpo.sampling import sample, uniforms
from grpo.variants import k1, k2, k3, k3_is, undivided

V = 8
REWARD = torch.tensor([0.0, 1.0, 0.3, 0.0, 0.7, 0.1, 0.5, 0.2])
REF = torch.log_softmax(torch.tensor([0.5, -1.0, 0.2, 1.0, -0.3, 0.0, 0.4, -0.6]), dim=-1)


def descend(G, kl_coef, kl, steps=1500, lr=0.5):
    """Plain gradient descent on the expected loss: every possible group, weighted by its probability."""
    # (P, G) with P = V^G
    groups = torch.tensor(list(itertools.product(range(V), repeat=G)))
    advantage = group_advantages(REWARD[groups], scale=undivided).flatten()
    theta = REF.clone()
    for _ in range(steps):
        leaf = theta.requires_grad_()
        logp = torch.log_softmax(leaf, dim=-1)
        # probability of the group, shared by its rows
        weight = logp.detach()[groups].sum(dim=1).exp().repeat_interleave(G) / G
        logp_ref = REF[groups].reshape(-1, 1)
        loss, _ = policy_loss(
            logp[groups].reshape(-1, 1), None, logp_ref, advantage, weight[:, None], kl_coef=kl_coef, kl=kl
        )
        theta = (theta - lr * torch.autograd.grad(loss, leaf)[0]).detach()
    return torch.softmax(theta, dim=-1)


def tilted(G, kl_coef, factor=None):
    return torch.softmax(REF + (1 - 1 / G if factor is None else factor) * REWARD / kl_coef, dim=-1)


def test_fixed_point():
    """It converges to the closed form. Without the 1/G, or with k3, it would end elsewhere."""
    for G, kl_coef in ((2, 0.5), (3, 0.4)):
        found = descend(G, kl_coef, k3_is)
        away = lambda other: (found - other).abs().max().item()
        # found 6e-7
        assert away(tilted(G, kl_coef)) < 1e-5
        assert away(tilted(G, kl_coef, factor=1.0)) > 0.05
        assert away(REF.exp()) > 0.05
    # the same gradient as k3_is, on policy
    assert (descend(2, 0.5, k2) - tilted(2, 0.5)).abs().max() < 1e-5
    # another divergence, another fixed point
    assert (descend(2, 0.5, k3) - tilted(2, 0.5)).abs().max() > 0.02


def test_k1_is_no_penalty_at_all():
    """With k1 as a loss the policy leaves the reference as if kl_coef were 0."""
    torch.testing.assert_close(
        descend(2, 0.5, k1, steps=100), descend(2, 0.0, k1, steps=100), rtol=1e-4, atol=1e-5
    )


def test_sampled_bandit_learns():
    """The real thing: rollouts by `sample` at addressed uniforms, binary reward, no KL. From chance (1/8)
    to > 0.95."""
    P, G = 4, 8
    right, theta, history = 5, torch.zeros(V), []
    for step in range(250):
        leaf = theta.requires_grad_()
        logp = torch.log_softmax(leaf, dim=-1)
        tokens, sampled = sample(
            leaf.detach().expand(P, G, V), uniforms(0, step, list(range(P)), G, 1)[..., 0], 1.0
        )
        reward = (tokens == right).float()
        advantage = group_advantages(reward).flatten()
        loss, stats = policy_loss(
            logp[tokens].reshape(-1, 1),
            sampled.reshape(-1, 1),
            None,
            advantage,
            torch.full((P * G, 1), 1 / (P * G)),
        )
        theta = (theta - 0.5 * torch.autograd.grad(loss, leaf)[0]).detach()
        history.append(reward.mean().item())
        # one update per rollout
        assert abs(stats.ratio.item() - 1) < 1e-5
    assert sum(history[:5]) / 5 < 0.3 and sum(history[-20:]) / 20 > 0.95
    assert torch.softmax(theta, -1)[right] > 0.95
