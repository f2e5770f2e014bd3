"""The other choices of an objective, each one a function, and the tables that give every choice its name.

`objective.py` holds the paper's choice of each. A new variant is one function here, its row in a table, a
recipe and a test. The settings take their allowed names from these tables, and the property tests of
`tests/grpo/test_variants.py` run over every row (docs/your-own-variant.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.objective import MAX_EXPONENT, clipped_surrogate, completion_mean, group_std, k3, token_ratio

# ---- Surrogates: (logp, logp_old, advantage (B, 1), inside, clip_low, clip_high) -> (value to maximise,
# ratio). Tensors are (B, C) unless said; `inside` is True at the tokens that count.


def gspo(logp, logp_old, advantage, inside, clip_low: float, clip_high: float):
    """GSPO (arXiv 2507.18071, Eq. 5-7): one ratio per completion, clipped as a whole.

    The ratio is the geometric mean of the tokens' ratios. It varies little, so the paper's clip bounds are a
    thousand times tighter than PPO's: 3e-4 and 4e-4.
    """
    length = inside.sum(dim=1, keepdim=True).clamp(min=1)
    mean_log_ratio = torch.where(inside, logp - logp_old, 0.0).sum(dim=1, keepdim=True) / length  # (B, 1)
    ratio = torch.exp(torch.clamp(mean_log_ratio, max=MAX_EXPONENT)).expand_as(logp)
    clipped = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantage, clipped * advantage), ratio


def cispo(logp, logp_old, advantage, inside, clip_low: float, clip_high: float):
    """CISPO (MiniMax-M1, arXiv 2506.13585, Eq. 4): the clipped ratio is a constant weight of A log pi.

    So no token ever loses its gradient. The bounds are 1 - clip_low and 1 + clip_high, as in the paper and
    in verl. TRL reads its epsilon_high as the absolute upper bound.
    """
    ratio = token_ratio(logp, logp_old)
    return torch.clamp(ratio, 1 - clip_low, 1 + clip_high).detach() * advantage * logp, ratio


def reinforce(logp, logp_old, advantage, inside, clip_low: float, clip_high: float):
    """GPG (arXiv 2504.02546): the plain policy gradient, A log pi. Its ratio is 1, and nothing is clipped."""
    return advantage * logp, torch.ones_like(logp)


SURROGATES = {"clip": clipped_surrogate, "gspo": gspo, "cispo": cispo, "reinforce": reinforce}


# ---- KL estimators: (logp, logp_ref, ratio) -> estimate, all (B, C). The mean of an estimate is one thing,
# the mean of its gradient is another (docs/06):
#
#            value = KL(policy || ref)?     expected gradient
#   k1              yes                     0: it does nothing as a loss
#   k2              no                      that of KL(policy || ref)
#   k3              yes                     that of KL(ref || policy)
#   k3_is           yes                     that of KL(policy || ref)


def k1(logp: Tensor, logp_ref: Tensor, ratio: Tensor) -> Tensor:
    """logp - logp_ref: right on average as a number. Its gradient does not depend on the reference."""
    return logp - logp_ref


def k2(logp: Tensor, logp_ref: Tensor, ratio: Tensor) -> Tensor:
    """(logp - logp_ref)^2 / 2: a biased number with the unbiased gradient of KL(policy || ref)."""
    return 0.5 * (logp - logp_ref) ** 2


def k3_is(logp: Tensor, logp_ref: Tensor, ratio: Tensor) -> Tensor:
    """k3 times the ratio, with gradient through both (DeepSeek-V3.2, arXiv 2512.02556).

    It has the number of k3 and the gradient of KL(policy || ref).
    """
    return ratio * k3(logp, logp_ref, ratio)


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "k3_is": k3_is}


# ---- Advantage scales: (reward (P, G), eps) -> what the centred reward is divided by, (P, 1) or a scalar.


def undivided(reward: Tensor, eps: float) -> Tensor:
    """1: a group counts by its spread (Dr. GRPO, arXiv 2503.20783)."""
    return torch.ones_like(reward[:, :1])


def batch_std(reward: Tensor, eps: float) -> Tensor:
    """The standard deviation of all P*G rewards, plus eps (REINFORCE++). With several ranks, gather first."""
    return reward.std(correction=1) + eps


ADVANTAGE_SCALES = {"std": group_std, "none": undivided, "batch": batch_std}


# ---- Token weightings: (length (B, 1), tokens, completions, cap) -> the divisor of a token's weight.


def token_mean(length, tokens, completions, cap):
    """Every token counts the same, so long completions count more (DAPO): 1 / tokens."""
    return tokens


def constant(length, tokens, completions, cap):
    """A token's weight depends on nothing that was sampled (Dr. GRPO): 1 / (cap * completions)."""
    return cap * completions


WEIGHTINGS = {"token": token_mean, "completion": completion_mean, "constant": constant}
