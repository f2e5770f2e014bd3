"""Log-probabilities and entropy of completions, without ever holding their logits.

A (tokens, V) tensor of float32 logits is the largest thing a naive trainer makes: 594 MiB for 1,024 tokens of
a 151,936-word vocabulary.
Three habits avoid it: hidden states of completion tokens only (never the prompt's, never padding's), the
vocabulary head applied to a chunk of tokens at a time, and all of it *recomputed* in the backward pass. The
last one is what counts: chunks alone save nothing, since autograd keeps them all. The backward pass is
written out (Eq. 8) and takes blocks of words, each for many tokens: chunk by chunk, autograd would make a
gradient of the whole head, V * D numbers, again and again; block by block, it is written in place.

The price is a fourth matrix product beside full logits' three. It can't be spared where the head is trained
and the loss stands by itself: the head's gradient needs each token's slope of the loss, and that is known
only after all log-probs are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.sampling import log_distribution

# of a chunk, where no setting says it: a GPU needs more tokens for a product to be worth reading the head
LOGITS_MIB = {"cpu": 115.0, "cuda": 512.0}
# tokens that go through a block of words together, at most; so a block is as large whatever else is in the
# batch, and a token's gradient the same
SPAN = 2048
# a logit below is that of a banned word, a constant
LOWEST = torch.finfo(torch.float32).min / 2


def chunk_of(vocabulary: int, mib: float | None, device: str) -> int:
    """How many tokens' float32 logits take `mib` MiB (None: as LOGITS_MIB says for a device, "cpu" or
    "cuda"); at least one, and of more than 16 a multiple of 16."""
    tokens = max(1, int((LOGITS_MIB[device] if mib is None else mib) * 2**20 / (4 * vocabulary)))
    # products of other sizes take a tenth longer
    return tokens - tokens % 16 if tokens > 16 else tokens


def completion_logprobs(policy, batch, *, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
    """Score the completions of a batch under a policy.

    policy  callable (prompts, tokens (P, G, C), length (P, G)) -> hidden (P, G, C, D), with .head_weight (V,
    D) and
            .logits(hidden (..., D), head) -> (..., V) float32, linear in both, or the lowest number for words
            that can't be drawn
    batch   .prompts, .tokens (P, G, C) long, .length (P, G) long, .mask (B, C) bool with B = P*G
    temperature  > 0, the one the tokens were sampled at (greedy evaluation is scored at 1)
    chunk   tokens per application of the vocabulary head (`chunk_of`); about 2 * chunk * V floats are alive
    at once, 3 at a temperature that is not 1

    -> logp (B, C) float32 of each completion token, with gradient if the policy has one; entropy (B, C)
    float32 in nats, detached. Both are 0 outside the mask. The result does not depend on chunk.
    """
    if temperature <= 0 or chunk < 1:
        raise ValueError(
            f"completion_logprobs: temperature {temperature} and chunk {chunk} must both be positive."
        )
    mask = batch.mask
    hidden = policy(batch.prompts, batch.tokens, batch.length)  # (P, G, C, D)
    hidden = hidden.reshape(*mask.shape, -1)  # (B, C, D)
    return masked_logprobs(
        policy, hidden, batch.tokens.reshape(mask.shape), mask, temperature=temperature, chunk=chunk
    )


def masked_logprobs(
    policy, hidden: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of `tokens` (...), which `hidden` (..., D) predicts, where `mask` (...) holds;
    0 elsewhere. → two tensors (...)."""
    # (T,): real tokens only
    logp, entropy = _Score.apply(
        hidden[mask], policy.head_weight, tokens[mask], policy.logits, temperature, chunk
    )
    empty = torch.zeros(mask.shape, device=logp.device)
    return empty.masked_scatter(mask, logp), empty.masked_scatter(mask, entropy)


class _Score(torch.autograd.Function):
    """hidden (T, D), head (V, D), tokens (T,) -> log-prob of each token and entropy of its distribution, (T,)
    float32.

    Forward, one chunk's (c, V) exists at a time. Backward, the logits are computed again (unless one chunk
    was all) for SPAN tokens and a block of words at a time,
    as many numbers: so the head is read, and its gradient written, once for so many tokens.
    """

    @staticmethod
    def forward(ctx, hidden, head, tokens, logits_of, temperature, chunk):
        device = hidden.device.type
        # of the matrix products
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        ctx.temperature, ctx.chunk = temperature, chunk
        # once for all chunks
        rows, weight = hidden.to(ctx.dtype), head.to(ctx.dtype)
        logp, entropy = (torch.zeros(len(tokens), device=hidden.device) for _ in range(2))
        normaliser = logp.double()
        banned, kept = torch.zeros(len(head), dtype=torch.bool, device=head.device), []
        for part in _parts(len(tokens), chunk):
            logits = logits_of(rows[part], weight)  # (c, V)
            banned = logits[0] < LOWEST
            # a word whose logit is one: the chosen, if it is
            some = torch.where(banned[tokens[part]], banned.long().argmin(), tokens[part])[:, None]
            scaled = logits.gather(-1, some) / temperature
            all_logp = log_distribution(logits, temperature)
            del logits
            logp[part] = all_logp.gather(-1, tokens[part, None]).squeeze(-1)
            normaliser[part] = (scaled.double() - all_logp.gather(-1, some)).squeeze(-1)
            probability = all_logp.exp()
            # entr(0) = 0, where -p * log(p) would be NaN
            entropy[part] = torch.special.entr(probability, out=probability).sum(dim=-1)
            if len(tokens) <= chunk:
                # a single chunk would be recomputed the moment it was freed
                kept.append(all_logp)
            # before the next chunk's are made
            del all_logp, probability
        ctx.save_for_backward(hidden, head, tokens, normaliser, banned, *kept)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        hidden, head, tokens, normaliser, banned, *kept = ctx.saved_tensors
        rows, slope = hidden.to(ctx.dtype), upstream / ctx.temperature
        of_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # the first span writes it
        of_head = (
            (torch.empty_like if len(tokens) else torch.zeros_like)(head) if ctx.needs_input_grad[1] else None
        )
        block = len(head) if kept else max(1, ctx.chunk * len(head) // SPAN)
        # dtypes are explicit here
        with torch.autocast(hidden.device.type, enabled=False):
            for part, words in product(
                _parts(len(tokens), len(tokens) if kept else SPAN), _parts(len(head), block)
            ):
                weight = head[words].to(ctx.dtype)
                # log-probs are logits whose exponentials add up to 1
                if kept:
                    of_logits = _logit_slope(
                        kept[0].clone(), 0, tokens, slope, torch.zeros_like(normaliser), banned, 1.0
                    )
                else:
                    logits = F.linear(rows[part], weight).float()
                    of_logits = _logit_slope(
                        logits,
                        words.start,
                        tokens[part],
                        slope[part],
                        normaliser[part],
                        banned[words],
                        ctx.temperature,
                    )
                of_logits = of_logits.to(ctx.dtype)
                if of_hidden is not None:
                    of_hidden[part] += of_logits @ weight
                if of_head is not None:
                    of_words = of_logits.T @ rows[part]
                    of_head[words] = of_words if part.start == 0 else of_head[words] + of_words
        return of_hidden, of_head, None, None, None, None


def _parts(count: int, chunk: int) -> Iterator[slice]:
    return (slice(first, first + chunk) for first in range(0, count, chunk))


# [Eq. 8]
def _logit_slope(
    logits: Tensor,
    first: int,
    tokens: Tensor,
    slope: Tensor,
    normaliser: Tensor,
    banned: Tensor,
    temperature: float,
) -> Tensor:
    """Gradient of the loss in the logits of some words: slope · (1[this is the chosen word] - probability),
    slope being the loss's gradient in the log-prob over the temperature.

    logits (T, w) of w words from number `first` on, which the result overwrites; tokens (T,), the chosen
    ones; slope (T,); normaliser (T,), log of the sum over all words of exp(logit / temperature), float64;
    banned (w,) bool, whose logits are constants. → (T, w).
    """
    near = normaliser.float()
    # what rounding it takes from each probability: 1e-6 of a token's, for all words in one direction
    rest = (near - normaliser).exp().float()
    of_logits = (
        (logits if temperature == 1 else logits.div_(temperature))
        .sub_(near[:, None])
        .exp_()
        .mul_((-slope * rest)[:, None])
    )
    place = tokens - first
    here = (place >= 0) & (place < logits.shape[1])
    of_logits.scatter_add_(
        1, place.clamp(0, logits.shape[1] - 1)[:, None], torch.where(here, slope, 0.0)[:, None]
    )
    of_logits[:, banned] = 0.0
    return of_logits
