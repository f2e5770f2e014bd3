"""Log-probabilities and entropy of completions, without ever holding their logits.

A (tokens, V) tensor of float32 logits is the largest thing a naive trainer makes: 594 MiB for 1,024 tokens of a 151,936-word vocabulary.
Three habits avoid it: hidden states of completion tokens only (never the prompt's, never padding's), the vocabulary head applied to a chunk
of tokens at a time, and each chunk *recomputed* in the backward pass. The last one is what counts: chunks alone save nothing, since
autograd keeps them all. The backward pass is written out (Eq. 8), because autograd would make a gradient of the whole head, V * D numbers,
for every chunk before it adds it to the others; here each chunk adds to the one sum that is needed in any case.

The price is a fourth matrix product beside full logits' three. It can't be spared where the head is trained and the loss stands by itself: the
head's gradient needs each token's slope of the loss, and that is known only after all log-probs are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.sampling import log_distribution

LOGITS_MIB = {"cpu": 115.0, "cuda": 512.0}  # of a chunk, where no setting says it: a GPU needs more tokens for a product to be worth reading the head
LOWEST = torch.finfo(torch.float32).min / 2  # a log-prob below is that of a banned word, whose logit is a constant


def chunk_of(vocabulary: int, mib: float | None, device: str) -> int:
    """How many tokens' float32 logits take `mib` MiB (None: as LOGITS_MIB says for a device, "cpu" or "cuda"); at least one, and of more than 16 a multiple of 16."""
    tokens = max(1, int((LOGITS_MIB[device] if mib is None else mib) * 2**20 / (4 * vocabulary)))
    return tokens - tokens % 16 if tokens > 16 else tokens  # products of other sizes take a tenth longer


def completion_logprobs(policy, batch, *, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
    """Score the completions of a batch under a policy.

    policy  callable (prompts, tokens (P, G, C), length (P, G)) -> hidden (P, G, C, D), with .head_weight (V, D) and
            .logits(hidden (..., D), head) -> (..., V) float32, linear in both, or the lowest number for words that can't be drawn
    batch   .prompts, .tokens (P, G, C) long, .length (P, G) long, .mask (B, C) bool with B = P*G
    temperature  > 0, the one the tokens were sampled at (greedy evaluation is scored at 1)
    chunk   tokens per application of the vocabulary head (`chunk_of`); about 2 * chunk * V floats are alive at once

    -> logp (B, C) float32 of each completion token, with gradient if the policy has one; entropy (B, C) float32 in nats, detached.
    Both are 0 outside the mask. The result does not depend on chunk.
    """
    if temperature <= 0 or chunk < 1:
        raise ValueError(f"completion_logprobs: temperature {temperature} and chunk {chunk} must both be positive.")
    mask = batch.mask
    hidden = policy(batch.prompts, batch.tokens, batch.length)  # (P, G, C, D)
    hidden = hidden.reshape(*mask.shape, -1)  # (B, C, D)
    return masked_logprobs(policy, hidden, batch.tokens.reshape(mask.shape), mask, temperature=temperature, chunk=chunk)


def masked_logprobs(policy, hidden: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of `tokens` (...), which `hidden` (..., D) predicts, where `mask` (...) holds; 0 elsewhere. → two tensors (...)."""
    logp, entropy = _Score.apply(hidden[mask], policy.head_weight, tokens[mask], policy.logits, temperature, chunk)  # (T,): real tokens only
    empty = torch.zeros(mask.shape, device=logp.device)
    return empty.masked_scatter(mask, logp), empty.masked_scatter(mask, entropy)


class _Score(torch.autograd.Function):
    """hidden (T, D), head (V, D), tokens (T,) -> log-prob of each token and entropy of its distribution, (T,) float32. One chunk's (c, V) exists at a time."""

    @staticmethod
    def forward(ctx, hidden, head, tokens, logits_of, temperature, chunk):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype  # of the matrix products
        ctx.logits_of, ctx.temperature, ctx.chunk = logits_of, temperature, chunk
        rows, weight = hidden.to(ctx.dtype), head.to(ctx.dtype)  # once for all chunks
        logp, entropy = (torch.zeros(len(tokens), device=hidden.device) for _ in range(2))
        kept = []
        for part in _parts(len(tokens), chunk):
            all_logp = log_distribution(logits_of(rows[part], weight), temperature)  # (c, V)
            logp[part] = all_logp.gather(-1, tokens[part, None]).squeeze(-1)
            probability = all_logp.exp()
            entropy[part] = torch.special.entr(probability, out=probability).sum(dim=-1)  # entr(0) = 0, where -p * log(p) would be NaN
            if len(tokens) <= chunk:
                kept.append(all_logp)  # a single chunk would be recomputed the moment it was freed
            del all_logp, probability  # before the next chunk's are made
        ctx.save_for_backward(hidden, head, tokens, *kept)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        hidden, head, tokens, *kept = ctx.saved_tensors
        rows, weight = hidden.to(ctx.dtype), head.to(ctx.dtype)
        of_hidden, of_head = (torch.zeros_like(x) if needed else None for x, needed in zip((hidden, head), ctx.needs_input_grad))
        with torch.autocast(hidden.device.type, enabled=False):  # dtypes are explicit here
            for part in _parts(len(tokens), ctx.chunk):
                all_logp = kept[0].clone() if kept else log_distribution(ctx.logits_of(rows[part], weight), ctx.temperature)
                slope = _logit_slope(all_logp, tokens[part, None], upstream[part, None], ctx.temperature).to(ctx.dtype)
                if of_hidden is not None:
                    of_hidden[part] = slope @ weight
                if of_head is not None:
                    _add_product(of_head, slope.T, rows[part])
                del all_logp, slope  # before the next chunk's are made
        return of_hidden, of_head, None, None, None, None


def _parts(count: int, chunk: int) -> Iterator[slice]:
    return (slice(first, first + chunk) for first in range(0, count, chunk))


# [Eq. 8]
def _logit_slope(logp: Tensor, tokens: Tensor, upstream: Tensor, temperature: float) -> Tensor:
    """Gradient of the loss in the logits: upstream · (1[this is the chosen word] - probability) / temperature.

    logp (c, V) of all words, which the result overwrites; tokens (c, 1), the chosen ones; upstream (c, 1), the loss's gradient in their log-probs. → (c, V).
    """
    of_chosen = torch.where(logp.gather(-1, tokens) > LOWEST, upstream / temperature, 0.0)
    return logp.exp_().mul_(-upstream / temperature).scatter_add_(-1, tokens, of_chosen)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (V, D) += a (V, c) @ b (c, D), in place. Where total is of more digits than the products, a few words at a time: no second (V, D)."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    words = max(1, a.numel() // b.shape[1])
    for some, of_some in zip(total.split(words), a.split(words)):
        some.add_(of_some @ b)
