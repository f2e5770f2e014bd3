"""Choosing the next token: a distribution, a uniform number, an inverse CDF. Pure.

Randomness is *addressed*, not consumed: the uniform number of a token is a hash of its address (seed, step,
prompt, completion, position). So a completion does not depend on the rest of its batch, on the order, on the
number of ranks, or on an interruption of the run.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


def _signed(x: int) -> int:
    """The int64 with the same 64 bits as x modulo 2^64 (torch has no uint64 arithmetic)."""
    return (x + 2**63) % 2**64 - 2**63


# splitmix64 (Steele, Lea, Flood 2014): the golden-ratio step and the two multipliers of its finaliser.
_STEP, _MUL1, _MUL2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Truncation(NamedTuple):
    """Draw from the likeliest words only. top_k: from that many (None: from all). top_p: of these, from the
    fewest whose probabilities, which then add up to 1, reach top_p."""

    top_k: int | None = None
    top_p: float = 1.0


def least_kept(logits: Tensor, truncation: Truncation) -> Tensor:
    """The logit below which a word is left out, (..., V) -> (..., 1).  logits: over the temperature.

    As in transformers, top-k comes first, and words as likely as the last one stay. The result is midway
    between the last logit that stays and the next one, so that another rounding of the logits keeps the same
    words.
    """
    words = logits.shape[-1]
    top_k = min(truncation.top_k or words, words)
    # one more, for the first that is left out
    values = logits.topk(min(top_k + 1, words)).values
    p = torch.softmax(values[..., :top_k], dim=-1)
    # a word stays if the words before it do not reach top_p; sums reach 1 before the last word, by rounding
    stays = (p.cumsum(dim=-1) - p < truncation.top_p) | (truncation.top_p == 1)
    count = stays.sum(dim=-1, keepdim=True).clamp(min=1)
    last = values.gather(-1, count - 1)
    after = values.gather(-1, count.clamp(max=values.shape[-1] - 1))
    middle = (last + after) / 2
    return torch.where(middle > after, middle, last)


# [Eq. 1]
def log_distribution(logits: Tensor, temperature: float, truncation: Truncation | None = None) -> Tensor:
    """log softmax(logits / temperature), in float32: the policy. (..., V) -> (..., V). Rollouts draw from it,
    and the loss scores with it. So the policy that samples is the policy that learns. truncation: words that
    it leaves out have -inf."""
    logits = logits.float()
    if temperature != 1:
        # a division by 1 would need one more (..., V) of memory
        logits = logits / temperature
    if truncation is not None:
        logits = logits.masked_fill(logits < least_kept(logits, truncation), -torch.inf)
    return torch.log_softmax(logits, dim=-1)


def sample(
    logits: Tensor,
    u: Tensor | None,
    temperature: float,
    truncation: Truncation | None = None,
    logp_of: str = "sampled",
) -> tuple[Tensor, Tensor]:
    """One token per distribution: the first whose cumulative probability exceeds u.

    logits (..., V), u (...) float32 in [0, 1), temperature >= 0 -> tokens (...) long, logp (...) float32
    under `log_distribution`, with the truncation (logp_of "sampled") or without ("full"). Temperature 0 is
    greedy: it takes the likeliest token, ignores u (which may be None), and reports logp at temperature 1. A
    token of probability 0 is never returned. Raises ValueError for a temperature above 0 without u.
    """
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
        return tokens, _at(log_distribution(logits, 1.0), tokens)
    if u is None:
        raise ValueError(f"sample: temperature {temperature} needs u, a uniform number per distribution")
    logp = log_distribution(logits, temperature, truncation)
    p = logp.exp()
    # The sum of float32 probabilities is only nearly 1, and a parallel scan is only nearly monotone. So the
    # entry of an impossible token becomes 0, which no threshold >= 0 is below, and u is scaled by the largest
    # sum instead of by 1.
    cumulative = p.cumsum(dim=-1) * (p > 0)
    # below the maximum, because u <= 1 - 2^-24
    threshold = u.unsqueeze(-1) * cumulative.amax(dim=-1, keepdim=True)
    # argmax returns the first maximum
    tokens = (cumulative > threshold).view(torch.uint8).argmax(dim=-1)
    if truncation is not None and logp_of == "full":
        logp = log_distribution(logits, temperature)
    return tokens, _at(logp, tokens)


def _at(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def uniforms(seed: int, step: int, uids: list[int], group: int, cap: int, *, device="cpu") -> Tensor:
    """The uniform number of every token that a step may sample.  -> (P, group, cap) float32, 0 < u < 1.

    uids: one 64-bit integer per prompt (`uid_hash`). Equal uids get equal numbers, and so equal completions.
    u[p, g, t] depends only on (seed, step, uids[p], g, t), not on P, group, cap or the order of the prompts.
    """
    uid = torch.tensor([_signed(u) for u in uids], dtype=torch.int64)[:, None, None]
    g = torch.arange(group, dtype=torch.int64)[None, :, None]
    t = torch.arange(cap, dtype=torch.int64)[None, None, :]
    state = address_hash(seed, step, uid, g, t)
    # the top 24 bits: all that a float32 in [0, 1) can hold evenly
    u = shift_right(state, 40).float() * 2.0**-24
    # One token in 16 million would get u = 0, which selects the first word with a probability above 0, even
    # one of 1e-30. So the first cell, [0, 2^-24), is represented by its middle.
    return u.clamp(min=2.0**-25).to(device)


def address_hash(*address: int | Tensor) -> Tensor:
    """64 pseudo-random bits (int64) of an address: whole numbers, or int64 tensors that broadcast."""
    state = torch.zeros((), dtype=torch.int64)
    for word in address:
        state = _mix((state ^ (_signed(word) if isinstance(word, int) else word)) + _STEP)
    return state


def uid_hash(uid: str) -> int:
    """A stable signed 64-bit integer for a name. (Python's own hash() differs between processes.)"""
    return int.from_bytes(hashlib.blake2b(uid.encode("utf-8"), digest_size=8).digest(), "little", signed=True)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: a bijection of 64 bits. Every input bit changes every output bit."""
    x = (x ^ shift_right(x, 30)) * _MUL1
    x = (x ^ shift_right(x, 27)) * _MUL2
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift. (>> on int64 copies the sign bit.)"""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
