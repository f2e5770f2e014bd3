"""The paper's GRPO, from rewards to one loss: compare, take the ratio, clip it, penalise the KL, average.

Pure functions: tensors in, tensors out. There is no model, no configuration and no in-place write.
Source: DeepSeekMath (GRPO, arXiv 2402.03300), Eq. 3-4, as VisualThinker-R1-Zero uses it. Other surrogates, KL
estimators, advantage scales and token weightings are in `variants.py`, and are passed here as functions.

How this departs from the paper:

* The standard deviation of a group is the sample one (n - 1), as in every public implementation. A group
  without spread gets exactly 0.
* The normaliser is a tensor, from `token_weights`. It is fixed once per update, over all ranks. The loss of a
  micro-batch is a weighted sum, so the cut into micro-batches cannot change the gradient.
* Exponents are clamped at +20. The share of clamped tokens is counted.

Rows: b = p * G + g. All computation is in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Scale = Callable[[Tensor, float], Tensor]
Surrogate = Callable[..., tuple[Tensor, Tensor]]
Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]
# e^20 = 4.9e8: larger than any useful ratio, far from overflow in float32
MAX_EXPONENT = 20.0


def group_std(reward: Tensor, eps: float) -> Tensor:
    """The sample standard deviation of each group, plus eps (GRPO).  (P, G) -> (P, 1)."""
    return reward.std(dim=1, keepdim=True, correction=1) + eps


# [Eq. 3]
def group_advantages(reward, *, scale: Scale = group_std, eps: float = 1e-4) -> Tensor:
    """How much better each completion did than its group: A = (r - mean(group)) / (std(group) + eps).

    reward (P, G): a tensor, a numpy array or P lists of G numbers -> advantage (P, G), float32.
    scale: (reward, eps) -> the divisor, (P, 1) or a scalar. `variants.ADVANTAGE_SCALES` has others.

    A group whose rewards differ by less than 1e-6 gets exactly 0. Such a spread is rounding, and the
    division would enlarge it. Raises ValueError if G < 2, because there is nothing to compare with.
    """
    try:
        reward = torch.as_tensor(reward, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"group_advantages: expected P rows of G numbers each: {error}") from error
    if reward.ndim != 2 or reward.shape[1] < 2:
        raise ValueError(
            f"group_advantages: reward has shape {tuple(reward.shape)}, expected (P, G) with G >= 2: an "
            "advantage compares a completion with others of its group. Set group to 2 or more."
        )
    centred = reward - reward.mean(dim=1, keepdim=True)
    spread = reward.amax(dim=1, keepdim=True) - reward.amin(dim=1, keepdim=True)
    return torch.where(spread < 1e-6, 0.0, centred / scale(reward, eps))  # (P, G)


# [Eq. 4]
def token_ratio(logp: Tensor, logp_old: Tensor) -> Tensor:
    """How much likelier a token became since the rollout: r = exp(logp - logp_old).

    logp, logp_old (B, C) -> (B, C). With one update per rollout logp_old *is* logp. Then r is exactly 1, but
    its gradient, r * d(logp), is not 0.
    """
    return torch.exp(torch.clamp(logp - logp_old, max=MAX_EXPONENT))


# [Eq. 5]
def clipped_surrogate(logp, logp_old, advantage, inside, clip_low: float, clip_high: float):
    """What to maximise per token: min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    logp, logp_old (B, C), advantage (B, 1), inside (B, C) bool: the tokens that count -> (value, r), both
    (B, C). Source: PPO (arXiv 1707.06347), Eq. 7. There are six cases; in two of them learning stops:

        d/d logp      r < 1 - low     within      r > 1 + high
        A > 0             r A           r A            0          good and already likelier: enough
        A < 0              0            r A           r A         bad and already rarer: enough

    clip_high > clip_low is DAPO's clip-higher (arXiv 2503.14476): it lets rare tokens grow.
    """
    ratio = token_ratio(logp, logp_old)
    clipped = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantage, clipped * advantage), ratio


# [Eq. 6]
def k3(logp: Tensor, logp_ref: Tensor, ratio: Tensor) -> Tensor:
    """The paper's KL estimator: e^d - d - 1 with d = logp_ref - logp.  (B, C) x 3 -> (B, C).

    It is never negative, and its mean is the KL (joschu.net/blog/kl-approx.html). d as a whole is clamped at
    +20, so a clamped token has no gradient. If only the exponent were clamped, the gradient of -d would
    remain and push the token *away* from the reference.
    """
    d = torch.clamp(logp_ref - logp, max=MAX_EXPONENT)
    return torch.exp(d) - d - 1


def completion_mean(length, tokens, completions, cap):
    """Every completion counts the same, and its tokens share its weight: 1 / (length_b * completions)."""
    return length * completions


def token_weights(
    mask: Tensor, weighting: Callable = completion_mean, *, tokens, completions, cap: int
) -> Tensor:
    """The weight w of every token in Equation 7. It decides what is averaged over what.

    mask (B, C) bool -> weight (B, C) float32, 0 outside the mask.
    weighting: (length (B, 1), tokens, completions, cap) -> the divisor, (B, 1) or a scalar. The default is
    the paper's; `variants.WEIGHTINGS` has others.
    tokens, completions: totals of the whole update, over all micro-batches and all ranks.
    cap: the most tokens a completion may have.
    """
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    return mask.float() / weighting(length, tokens, completions, cap)


# [Eq. 7]
def policy_loss(
    logp: Tensor,
    logp_old: Tensor | None,
    logp_ref: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    *,
    surrogate: Surrogate = clipped_surrogate,
    kl: Estimator = k3,
    kl_coef: float = 0.0,
    **clip: float,
) -> tuple[Tensor, LossStats]:
    """The loss of some rows: the sum over tokens of weight * (kl_coef * KL - surrogate).

    logp      (B, C)  log-probs under the policy, with gradient
    logp_old  (B, C)  log-probs at the time of the rollout; None: the policy has not moved since, take logp
    logp_ref  (B, C)  log-probs of the frozen reference; None: no KL term
    advantage (B,)    one number per completion; every token of it gets the same
    weight    (B, C)  from `token_weights`. Where it is 0 nothing is read, so logp may be NaN there
    clip              clip_low and clip_high, 0.2 each by default

    -> (loss, a scalar with gradient; LossStats). Raises ValueError for kl_coef != 0 without logp_ref.
    """
    if logp_ref is None and kl_coef != 0:
        raise ValueError(
            f"policy_loss: kl_coef is {kl_coef} but logp_ref is None. Score the completions with the "
            "reference, or set kl_coef to 0."
        )
    clip = {"clip_low": 0.2, "clip_high": 0.2, **clip}
    inside = weight != 0
    logp = torch.where(inside, logp.float(), 0.0)
    logp_old = logp.detach() if logp_old is None else torch.where(inside, logp_old.detach().float(), 0.0)
    advantage = advantage.float()[:, None]  # (B, 1)

    gain, ratio = surrogate(logp, logp_old, advantage, inside, **clip)
    distance = clamped = torch.zeros_like(logp)
    if logp_ref is not None:
        logp_ref = torch.where(inside, logp_ref.detach().float(), 0.0)
        distance = kl(logp, logp_ref, token_ratio(logp, logp_old))
        clamped = logp_ref - logp > MAX_EXPONENT
    loss = (weight * (kl_coef * distance - gain)).sum()

    def total(x: Tensor) -> Tensor:
        return (weight * x).sum().detach()

    return loss, LossStats(
        loss=loss.detach(),
        policy=total(-gain),
        kl=total(distance),
        ratio=total(ratio),
        clip_low=total((ratio < 1 - clip["clip_low"]) & (advantage < 0)),
        clip_high=total((ratio > 1 + clip["clip_high"]) & (advantage > 0)),
        kl_clamped=total(clamped),
        weight=weight.sum().detach(),
    )


# [Eq. 10]
def entropy_bonus(entropy: Tensor, weight: Tensor, coef: float) -> Tensor:
    """What the loss is lowered by: coef times the weighted sum of the policy's entropies. -> a scalar.

    entropy (B, C) in nats, with gradient; weight (B, C) as in `policy_loss`: where it is 0 nothing is read.
    Source: A3C (arXiv 1602.01783), section 4. EasyR1 had it until March 2025, with 0.001.
    """
    return coef * (weight * torch.where(weight != 0, entropy.float(), 0.0)).sum()


@dataclass
class LossStats:
    """What happened in a loss: sums over its tokens, each with the token's weight w. Detached scalars.

    loss: kl_coef * kl - surrogate, minus the entropy bonus.  policy: -surrogate.  kl: without kl_coef; 0
    without a reference.  ratio.
    clip_low: 1 where r < 1 - clip_low and A < 0.  clip_high: 1 where r > 1 + clip_high and A > 0.
    kl_clamped: 1 where logp_ref - logp > 20.  weight: 1, so w itself; over a whole update the sum is 1 for
    "token" and "completion", and less for "constant".

    So the stats of micro-batches and ranks add up: `a + b`, or one all-reduce of `vector()`. Take
    `averages()` once, at the end: a mean of means would depend on how the rows were cut.
    """

    loss: Tensor
    policy: Tensor
    kl: Tensor
    ratio: Tensor
    clip_low: Tensor
    clip_high: Tensor
    kl_clamped: Tensor
    weight: Tensor

    @classmethod
    def zero(cls) -> LossStats:
        """All zeros, to start a sum with."""
        return cls(*torch.zeros(len(fields(cls))))

    def to(self, device) -> LossStats:
        """The same on a device."""
        return LossStats(*self.vector().to(device))

    def __add__(self, other: LossStats) -> LossStats:
        return LossStats(*(self.vector() + other.vector()))

    def vector(self) -> Tensor:
        """The fields in order, as one float32 tensor (8,), for a reduction over ranks."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])

    def averages(self) -> dict[str, float]:
        """Averages per token, under the metrics' names. `loss` and `policy_loss` are the sums themselves."""
        loss, policy, kl, ratio, low, high, clamped, weight = self.vector().tolist()
        # an update may hold nothing but padding
        weight = max(weight, 1e-12)
        return {
            "loss": loss,
            "policy_loss": policy,
            "kl": kl / weight,
            "kl_clamped": clamped / weight,
            "ratio": ratio / weight,
            "clip_ratio/low_mean": low / weight,
            "clip_ratio/high_mean": high / weight,
            "clip_ratio/region_mean": (low + high) / weight,
        }


def gradient_weight(
    logp: Tensor, logp_old: Tensor | None, advantage: Tensor, weight: Tensor, **how
) -> Tensor:
    """How hard the policy term pulls each token up (> 0) or down (< 0): -d loss / d logp.  -> (B, C).

    For `clipped_surrogate` this is weight * ratio * advantage, and 0 where clipped. Autograd computes it from
    the loss itself, so the report shows what training did. Arguments, `how` included, as for `policy_loss`.
    """
    with torch.enable_grad():
        leaf = logp.detach().float().requires_grad_()
        loss, _ = policy_loss(leaf, logp_old, None, advantage, weight, **how)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return -gradient
