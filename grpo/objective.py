"""Every equation of the loss, from rewards to one scalar. Pure: tensors in, tensors out; no model, no config,
no in-place write.

The defaults are the GRPO paper's (DeepSeekMath, arXiv 2402.03300, Eq. 3-4), as used by VisualThinker-R1-Zero.
Where we depart from it:

* the standard deviation of a group is the sample one (n - 1), as in every public implementation, and a group
without spread gets exactly 0;
* the normaliser is not hidden in a `mean()`: `token_weights` makes it a tensor, decided once per update over
all ranks, and the loss of
  any micro-batch is a weighted sum. How rows are cut into micro-batches cannot change a gradient;
* exponents are clamped at +20, and the share of clamped tokens is counted.

Rows: b = p * G + g.  Everything is computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches

import torch
from torch import Tensor

# e^20 = 4.9e8: far beyond any useful ratio, far below the end of float32
MAX_EXPONENT = 20.0


# [Eq. 3]
def group_advantages(reward: Tensor, *, scale: str = "std", eps: float = 1e-4) -> Tensor:
    """How much better each completion did than its own group: A = (r - mean(group)) / (std + eps).

    reward (P, G) -> advantage (P, G), float32.

    scale  "std"    divide by the group's sample standard deviation (GRPO)
           "batch"  divide by the standard deviation of all P*G rewards given; on several ranks, gather them
           first (REINFORCE++) "none"   do not divide: every group counts by its spread (Dr. GRPO, arXiv
           2503.20783)

    A group whose rewards differ by less than 1e-6 gets exactly 0: its spread is rounding, and dividing by it
    would make that rounding loud. Raises ValueError if G < 2: a completion alone in its group is its own
    baseline and can teach nothing.
    """
    if reward.ndim != 2 or reward.shape[1] < 2:
        raise ValueError(
            f"group_advantages: reward has shape {tuple(reward.shape)}, expected (P, G) with G >= 2: an "
            "advantage compares "
            "a completion with others of its group. Set group to 2 or more."
        )
    reward = reward.float()
    centred = reward - reward.mean(dim=1, keepdim=True)
    spread = reward.amax(dim=1, keepdim=True) - reward.amin(dim=1, keepdim=True)
    divisor = choose(
        "scale",
        scale,
        {
            "std": reward.std(dim=1, keepdim=True, correction=1) + eps,
            "batch": reward.std(correction=1) + eps,
            "none": torch.ones_like(spread),
        },
    )
    return torch.where(spread < 1e-6, 0.0, centred / divisor)  # (P, G)


# [Eq. 4]
def token_ratio(logp: Tensor, logp_old: Tensor) -> Tensor:
    """How much likelier a token became since the rollout: r = exp(logp - logp_old).  (B, C), (B, C) -> (B,
    C).

    With one update per rollout logp_old *is* logp, so r is exactly 1 while its gradient, r * d(logp), is not
    zero.
    """
    return torch.exp(torch.clamp(logp - logp_old, max=MAX_EXPONENT))


def sequence_ratio(logp: Tensor, logp_old: Tensor, inside: Tensor) -> Tensor:
    """The ratio of a whole completion, as the geometric mean of its tokens' ratios (GSPO, arXiv 2507.18071,
    Eq. 7).

    logp, logp_old (B, C), inside (B, C) bool -> (B, C), the same value at every token of a row.
    """
    length = inside.sum(dim=1, keepdim=True).clamp(min=1)
    mean_log_ratio = torch.where(inside, logp - logp_old, 0.0).sum(dim=1, keepdim=True) / length  # (B, 1)
    return torch.exp(torch.clamp(mean_log_ratio, max=MAX_EXPONENT)).expand_as(logp)


# [Eq. 5]
def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """What to maximise per token: min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, arXiv 1707.06347,
    Eq. 7).

    ratio (B, C), advantage (B, 1) -> (B, C).  Six cases, and two of them stop learning:

        d/d logp      r < 1 - low     within      r > 1 + high
        A > 0             r A           r A            0          good and already likelier: enough
        A < 0              0            r A           r A         bad and already rarer: enough

    clip_high > clip_low is DAPO's clip-higher (arXiv 2503.14476): it lets rare tokens grow.
    """
    return torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - clip_low, 1 + clip_high) * advantage)


def clip_cases(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """The two silent cases of the table above, as masks (low, high): (B, C), (B, 1) -> 2 x (B, C) bool."""
    return (ratio < 1 - clip_low) & (advantage < 0), (ratio > 1 + clip_high) & (advantage > 0)


# Each surrogate: (logp, logp_old, advantage (B, 1), inside (B, C), clip_low, clip_high) -> what to maximise,
# its ratio, both (B, C).


def clip(logp, logp_old, advantage, inside, clip_low, clip_high):
    """PPO's and GRPO's: one ratio per token, clipped."""
    ratio = token_ratio(logp, logp_old)
    return clipped_surrogate(ratio, advantage, clip_low, clip_high), ratio


def gspo(logp, logp_old, advantage, inside, clip_low, clip_high):
    """GSPO: one ratio per completion, clipped as a whole. Its clip bounds are a thousand times tighter
    (the paper: 3e-4, 4e-4)."""
    ratio = sequence_ratio(logp, logp_old, inside)
    return clipped_surrogate(ratio, advantage, clip_low, clip_high), ratio


def cispo(logp, logp_old, advantage, inside, clip_low, clip_high):
    """CISPO (MiniMax-M1, arXiv 2506.13585, Eq. 4): clip the *weight* of a token and detach it, so that no
    token is ever silent.

    The bounds are 1 - clip_low and 1 + clip_high as in the paper and verl; TRL takes its epsilon_high for the
    absolute upper bound.
    """
    ratio = token_ratio(logp, logp_old)
    return torch.clamp(ratio, 1 - clip_low, 1 + clip_high).detach() * advantage * logp, ratio


def reinforce(logp, logp_old, advantage, inside, clip_low, clip_high):
    """GPG's (arXiv 2504.02546): the policy gradient itself, A log pi. It knows no old policy, so its ratio
    is 1 and nothing is ever clipped."""
    return advantage * logp, torch.ones_like(logp)


SURROGATES = {"clip": clip, "gspo": gspo, "cispo": cispo, "reinforce": reinforce}


# Each KL estimator: (logp, logp_ref, ratio), all (B, C) -> (B, C).  Its mean value is one thing, its mean
# gradient another (docs/06, T2):
#
#            value = KL(policy || ref)?     expected gradient
#   k1              yes                     0: it does nothing as a loss
#   k2              no                      that of KL(policy || ref)
#   k3              yes                     that of KL(ref || policy)
#   k3_is           yes                     that of KL(policy || ref)


def k1(logp, logp_ref, ratio):
    """logp - ref: right on average as a number, useless as a loss (its gradient doesn't know the
    reference)."""
    return logp - logp_ref


def k2(logp, logp_ref, ratio):
    """(logp - ref)^2 / 2: a biased number with the unbiased gradient of KL(policy || ref)."""
    return 0.5 * (logp - logp_ref) ** 2


# [Eq. 6]
def k3(logp, logp_ref, ratio):
    """The GRPO paper's estimator: e^d - d - 1 with d = ref - logp; never negative, unbiased as a number
    (joschu.net/blog/kl-approx.html).

    d as a whole is clamped at +20, so a clamped token feels no pull. (Clamping only the exponent would leave
    the gradient of -d alone, which pushes the token *away* from the reference.)
    """
    d = torch.clamp(logp_ref - logp, max=MAX_EXPONENT)
    return torch.exp(d) - d - 1


def k3_is(logp, logp_ref, ratio):
    """k3 times the ratio, gradient through both (DeepSeek-V3.2, arXiv 2512.02556): k3's number with the
    gradient of KL(policy || ref)."""
    return ratio * k3(logp, logp_ref, ratio)


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "k3_is": k3_is}


def token_weights(mask: Tensor, how: str, *, tokens, completions, cap) -> Tensor:
    """The weight w of every token in Equation 7: the whole question of "what is averaged over what", as one
    tensor.

    mask (B, C) bool -> weight (B, C) float32, 0 outside the mask.

    how  "token"       1 / tokens                   every token counts the same: long completions weigh more
    (DAPO)
         "completion"  1 / (length_b * completions) every completion counts the same: its tokens share (the
         GRPO paper) "constant"    1 / (cap * completions)      a token's weight depends on nothing that was
         sampled (Dr. GRPO)

    tokens, completions: totals of the whole update, over all micro-batches and all ranks; cap: the most
    tokens a completion may have.
    """
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    divisor = choose(
        "token weighting",
        how,
        {"token": tokens, "completion": length * completions, "constant": cap * completions},
    )
    return mask.float() / divisor


@dataclass
class LossStats:
    """What happened in a loss: detached scalars, each a sum over tokens with the loss's own weights.

    So the stats of micro-batches and ranks add up (`a + b`, or one all-reduce of `vector()` and
    `LossStats(*vector)`), and `averages()` is taken once, at the end. A mean of means would depend on how the
    rows were cut.
    """

    # sum w * (kl_coef * kl - surrogate)
    loss: Tensor
    # sum w * -surrogate
    policy: Tensor
    # sum w * kl, without kl_coef; 0 without a reference
    kl: Tensor
    # sum w * ratio
    ratio: Tensor
    # sum w * [r < 1 - clip_low and A < 0]
    clip_low: Tensor
    # sum w * [r > 1 + clip_high and A > 0]
    clip_high: Tensor
    # sum w * [ref - logp > 20]
    kl_clamped: Tensor
    # sum w: 1 over a whole update for "token" and "completion", less for "constant"
    weight: Tensor

    @classmethod
    def zero(cls) -> LossStats:
        """The stats of nothing, to add to."""
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
        """Per-token averages under the metrics' names; the loss and its policy term are the sums that were
        minimised."""
        loss, policy, kl, ratio, low, high, clamped, weight = self.vector().tolist()
        # an update of nothing but padding
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


# [Eq. 7]
def policy_loss(
    logp: Tensor,
    logp_old: Tensor | None,
    logp_ref: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl: str = "k3",
    surrogate: str = "clip",
) -> tuple[Tensor, LossStats]:
    """The loss of some rows: sum over tokens of weight * (kl_coef * KL - surrogate).

    logp      (B, C)  log-probs under the policy, with gradient
    logp_old  (B, C)  those at the time of the rollout; None: the policy has not moved since, take logp itself
    logp_ref  (B, C)  those of the frozen reference; None: no KL term
    advantage (B,)    one number per completion: a rule judges the whole text, so every token of it gets the
    same weight    (B, C)  from `token_weights`. Where it is 0 nothing is read: logp may hold anything there,
    NaN included

    -> (loss, a scalar to call backward() on; LossStats).
    Raises ValueError for kl_coef != 0 without logp_ref, and for an unknown name.
    """
    if logp_ref is None and kl_coef != 0:
        raise ValueError(
            f"policy_loss: kl_coef is {kl_coef} but logp_ref is None. Score the completions with the "
            "reference, "
            "or set kl_coef to 0."
        )
    inside = weight != 0
    logp = torch.where(inside, logp.float(), 0.0)
    logp_old = logp.detach() if logp_old is None else torch.where(inside, logp_old.detach().float(), 0.0)
    advantage = advantage.float()[:, None]  # (B, 1)

    gain, ratio = choose("surrogate", surrogate, SURROGATES)(
        logp, logp_old, advantage, inside, clip_low, clip_high
    )
    estimator = choose("KL estimator", kl, KL_ESTIMATORS)
    if logp_ref is None:
        distance = clamped = torch.zeros_like(logp)
    else:
        logp_ref = torch.where(inside, logp_ref.detach().float(), 0.0)
        distance = estimator(logp, logp_ref, token_ratio(logp, logp_old))
        clamped = logp_ref - logp > MAX_EXPONENT
    loss = (weight * (kl_coef * distance - gain)).sum()

    low, high = clip_cases(ratio, advantage, clip_low, clip_high)
    total = lambda x: (weight * x).sum().detach()
    return loss, LossStats(
        loss=loss.detach(),
        policy=total(-gain),
        kl=total(distance),
        ratio=total(ratio),
        clip_low=total(low),
        clip_high=total(high),
        kl_clamped=total(clamped),
        weight=weight.sum().detach(),
    )


def gradient_weight(
    logp: Tensor,
    logp_old: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    surrogate: str = "clip",
) -> Tensor:
    """How hard the policy term pulls each token up (> 0) or down (< 0): -d loss / d logp, 0 where clipped.
    (B, C), detached.

    For "clip" this is weight * ratio * advantage outside the silent cases. It asks autograd instead of
    repeating the cases, so what the report shows is what training did. Arguments as for `policy_loss`.
    """
    with torch.enable_grad():
        leaf = logp.detach().float().requires_grad_()
        old = leaf.detach() if logp_old is None else logp_old
        loss, _ = policy_loss(
            leaf, old, None, advantage, weight, clip_low=clip_low, clip_high=clip_high, surrogate=surrogate
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
    return -gradient


def choose(what: str, name: str, table: dict):
    """The entry of a table of named variants; an unknown name is a ValueError that lists them and names
    the nearest."""
    if name not in table:
        near = get_close_matches(str(name), table, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {what} {name!r}.{hint} Known: {', '.join(table)}.")
    return table[name]
