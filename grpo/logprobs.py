"""Log-probabilities and entropy of completions, without holding their logits.

A (tokens, V) tensor of float32 logits is the largest tensor of a naive trainer: 594 MiB for 1,024 tokens and
151,936 words. Three habits avoid it. Only the hidden states of completion tokens are used. The vocabulary
head is applied to a chunk of tokens at a time. The backward pass *recomputes* the logits. The last habit is
what counts: chunks alone save nothing, because autograd keeps them all.

The backward pass is written by hand (Eq. 8), for blocks of words and many tokens. Chunk by chunk, autograd
would make a gradient of the whole head, V * D numbers, for each; block by block, it is written in place.

The price is a fourth matrix product; full logits need three. The head's gradient needs each token's slope of
the loss, which is known only after all log-probs are.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.sampling import Truncation, least_kept, log_distribution
from models.layers import linear_in_float32

# MiB of a chunk's logits, unless a setting gives them. A GPU needs more tokens per product, because each
# product reads the whole head.
LOGITS_MIB = {"cpu": 115.0, "cuda": 512.0}
# Tokens that one block of words serves in the backward pass. The block's size does not depend on the rest of
# the batch, so neither does a token's gradient.
TOKENS_PER_BLOCK = 2048
# A logit below this is that of a banned word: a constant without a gradient.
LOWEST = torch.finfo(torch.float32).min / 2
# exp of it is 0 in float32, and 0 times it is 0
LOG_OF_ZERO = -200.0


def chunk_of(vocabulary: int, mib: float | None, device: str) -> int:
    """How many tokens' float32 logits take `mib` MiB (None: LOGITS_MIB of the device, "cpu" or "cuda"). At
    least one; above 16, a multiple of 16."""
    tokens = max(1, int((LOGITS_MIB[device] if mib is None else mib) * 2**20 / (4 * vocabulary)))
    # Products of other sizes take a tenth longer.
    return tokens - tokens % 16 if tokens > 16 else tokens


def completion_logprobs(
    policy,
    batch,
    *,
    temperature: float,
    chunk: int,
    truncation: Truncation | None = None,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Score the completions of a batch under a policy.

    policy: callable (prompts, tokens (P, G, C), length (P, G)) -> hidden (P, G, C, D), with .head_weight
    (V, D) and .logits(hidden (..., D), head) -> (..., V) float32. The logits are linear in both, or the
    lowest number for words that can't be drawn.
    batch: .prompts, .tokens (P, G, C) long, .length (P, G) long, .mask (B, C) bool with B = P*G.
    temperature: > 0, the one that sampled the tokens (greedy evaluation is scored at 1).
    chunk: tokens per application of the vocabulary head (`chunk_of`). About 2 * chunk * V floats exist at
    once, 3 if the temperature is not 1.
    truncation: log-probs are of the distribution without the words that it leaves out. A token that would be
    left out itself, after an update, stays, with the words that are likelier.
    entropy_grad: the entropy has a gradient, too. Its backward pass needs chunk * V floats more.

    -> logp (B, C) float32 of each completion token, with gradient if the policy has one; entropy (B, C)
    float32 in nats, detached unless entropy_grad. Both are 0 outside the mask. The result does not depend on
    chunk. Raises ValueError if temperature or chunk is not positive.
    """
    if temperature <= 0 or chunk < 1:
        raise ValueError(
            f"completion_logprobs: temperature {temperature} and chunk {chunk} must both be positive."
        )
    mask = batch.mask
    hidden = policy(batch.prompts, batch.tokens, batch.length).reshape(*mask.shape, -1)  # (B, C, D)
    tokens = batch.tokens.reshape(mask.shape)
    how = {"truncation": truncation, "entropy_grad": entropy_grad}
    return masked_logprobs(policy, hidden, tokens, mask, temperature=temperature, chunk=chunk, **how)


def masked_logprobs(
    policy,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    chunk: int,
    truncation: Truncation | None = None,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of `tokens` (...), which `hidden` (..., D) predicts; 0 outside `mask` (...).
    -> two tensors (...)."""
    real = (hidden[mask], policy.head_weight, tokens[mask])
    how = _How(temperature, chunk, truncation, entropy_grad)
    logp, entropy = _Score.apply(*real, policy.logits, how)  # (T,) each
    empty = torch.zeros(mask.shape, device=logp.device)
    return empty.masked_scatter(mask, logp), empty.masked_scatter(mask, entropy)


class _How(NamedTuple):
    """Settings of `masked_logprobs`."""

    temperature: float
    chunk: int
    truncation: Truncation | None
    entropy_grad: bool


class _Score(torch.autograd.Function):
    """hidden (T, D), head (V, D), tokens (T,) -> log-prob of each token and entropy of its distribution, (T,)
    float32. Forward, one chunk's (c, V) exists at a time. Backward computes the logits again (unless one
    chunk was all): for TOKENS_PER_BLOCK tokens and a block of words at a time, as many numbers as a chunk."""

    @staticmethod
    def forward(ctx, hidden, head, tokens, logits_of, how):
        temperature, chunk, truncation, entropy_grad = ctx.how = how
        device = hidden.device.type
        # Of the matrix products.
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        rows, weight = hidden.to(ctx.dtype), head.to(ctx.dtype)
        logp, entropy = (torch.zeros(len(tokens), device=hidden.device) for _ in range(2))
        normaliser = logp.double()
        banned = torch.zeros(len(head), dtype=torch.bool, device=head.device)
        # each token's smallest logit that counts
        least = torch.zeros_like(logp)
        kept = []
        for part in _parts(len(tokens), chunk):
            logits = logits_of(rows[part], weight)  # (c, V)
            banned = logits[0] < LOWEST
            # The normaliser is read off one word that is not banned: the chosen one, if it is not.
            some = torch.where(banned[tokens[part]], banned.long().argmin(), tokens[part])[:, None]
            scaled = logits.gather(-1, some) / temperature
            if truncation is not None:
                logits = logits / temperature
                # midway to the next word below it, as in least_kept
                below = torch.where(logits < scaled, logits, -torch.inf).amax(dim=-1, keepdim=True)
                own = torch.maximum((scaled + below) / 2, below)
                least[part] = torch.minimum(least_kept(logits, truncation), own).squeeze(-1)
                logits.masked_fill_(logits < least[part, None], -torch.inf)
            all_logp = log_distribution(logits, temperature if truncation is None else 1.0)
            del logits
            logp[part] = all_logp.gather(-1, tokens[part, None]).squeeze(-1)
            normaliser[part] = (scaled.double() - all_logp.gather(-1, some)).squeeze(-1)
            probability = all_logp.exp()
            # entr(0) = 0, where -p * log(p) would be NaN.
            entropy[part] = torch.special.entr(probability, out=probability).sum(dim=-1)
            if len(tokens) <= chunk:
                # The backward pass would recompute a single chunk right after it was freed.
                kept.append(all_logp)
            # Free them before the next chunk's exist.
            del all_logp, probability
        ctx.least = None if truncation is None else least
        ctx.save_for_backward(hidden, head, tokens, normaliser, entropy, banned, *kept)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyrefly: ignore[bad-override]
        hidden, head, tokens, normaliser, entropy, banned, *kept = ctx.saved_tensors
        temperature = ctx.how.temperature
        rows = hidden.to(ctx.dtype)
        slope, entropy_slope = (each / temperature for each in grad_outputs)
        of_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # The first tokens write it.
        make = torch.empty_like if len(tokens) else torch.zeros_like
        of_head = make(head) if ctx.needs_input_grad[1] else None
        each = TOKENS_PER_BLOCK
        block = max(1, ctx.how.chunk * len(head) // each)
        if kept:
            # Log-probs are logits at temperature 1 whose exponentials add up to 1.
            normaliser = torch.zeros_like(normaliser)
            each, block = len(tokens), len(head)
        # Dtypes are explicit here.
        with torch.autocast(hidden.device.type, enabled=False):
            for part, words in product(_parts(len(tokens), each), _parts(len(head), block)):
                weight = head[words].to(ctx.dtype)
                logits = kept[0].clone() if kept else linear_in_float32(rows[part], weight).float()
                if temperature != 1 and not kept:
                    logits.div_(temperature)
                if ctx.least is not None and not kept:
                    logits.masked_fill_(logits < ctx.least[part, None], -torch.inf)
                of_token = (tokens[part], slope[part], normaliser[part])
                bonus = (entropy_slope[part], entropy[part]) if ctx.how.entropy_grad else None
                of_logits = _logit_slope(logits, words.start, *of_token, banned[words], bonus).to(ctx.dtype)
                if of_hidden is not None:
                    of_hidden[part] += of_logits @ weight
                if of_head is not None:
                    of_words = of_logits.T @ rows[part]
                    of_head[words] = of_words if part.start == 0 else of_head[words].add_(of_words)
                    del of_words
                # Free them before the next block's exist.
                del weight, logits, of_logits
        return of_hidden, of_head, None, None, None


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
    of_entropy: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Gradient of the loss in the logits of some words: slope · (1[this is the chosen word] - probability),
    and the entropy's part, -probability · (log probability + entropy) · its slope.

    logits (T, w): of w words from number `first` on, over the temperature; overwritten by the result (T, w).
    tokens (T,): the chosen ones. slope (T,): the loss's gradient in the log-prob, over the temperature.
    normaliser (T,) float64: log of the sum over all words of exp(logit / temperature). banned (w,) bool:
    words whose logits are constants. of_entropy: the loss's gradient in the entropy, over the temperature,
    and the entropy, (T,) each; None: the entropy is not in the loss.
    """
    near = normaliser.float()
    # Corrects for rounding the normaliser to float32, which shifts every probability by the same 1e-6.
    rest = (near - normaliser).exp().float()
    logp = logits.sub_(near[:, None])
    if of_entropy is None:
        of_logits = logp.exp_().mul_((-slope * rest)[:, None])
    else:
        entropy_slope, entropy = of_entropy
        probability = logp.exp().mul_(rest[:, None])
        pulls = logp.clamp_(min=LOG_OF_ZERO).add_(entropy[:, None]).mul_(entropy_slope[:, None])
        of_logits = pulls.add_(slope[:, None]).mul_(probability).neg_()
    place = tokens - first
    here = (place >= 0) & (place < logits.shape[1])
    place = place.clamp(0, logits.shape[1] - 1)[:, None]
    of_logits.scatter_add_(1, place, torch.where(here, slope, 0.0)[:, None])
    of_logits[:, banned] = 0.0
    return of_logits
