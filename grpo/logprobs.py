"""Log-probabilities and entropy of completions, without ever holding their logits.

A (tokens, V) tensor of float32 logits is the largest thing a naive trainer makes: 594 MiB for 1,024 tokens of a 151,936-word vocabulary.
Three habits avoid it: hidden states of completion tokens only (never the prompt's, never padding's), the vocabulary head applied to a chunk
of tokens at a time, and each chunk *recomputed* in the backward pass. The last one is what counts: chunks alone save nothing, since
autograd keeps them all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo.sampling import log_distribution


def completion_logprobs(policy, batch, *, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
    """Score the completions of a batch under a policy.

    policy  callable (prompts, tokens (P, G, C), length (P, G)) -> hidden (P, G, C, D), with .logits(hidden (..., D)) -> (..., V) float32
    batch   .prompts, .tokens (P, G, C) long, .length (P, G) long, .mask (B, C) bool with B = P*G
    temperature  > 0, the one the tokens were sampled at (greedy evaluation is scored at 1)
    chunk   tokens per application of the vocabulary head; about 4 * chunk * V floats are alive at once

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
    hidden, tokens = hidden[mask], tokens[mask]  # (T, D), (T,): real tokens only

    # One chunk would be recomputed the moment it was freed, and without gradients there is no backward: both skip it.
    recompute = torch.is_grad_enabled() and len(tokens) > chunk
    scores = []
    for h, t in zip(hidden.split(chunk), tokens.split(chunk)):
        args = (policy, h, t, temperature)
        scores.append(checkpoint(_score, *args, use_reentrant=False, preserve_rng_state=False) if recompute else _score(*args))
    logp, entropy = (torch.cat(parts) for parts in zip(*scores))
    empty = torch.zeros(mask.shape, device=logp.device)
    return empty.masked_scatter(mask, logp), empty.masked_scatter(mask, entropy)


def _score(policy, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """hidden (c, D), tokens (c,) -> log-prob of each token (c,), entropy of its distribution (c,) detached."""
    logp = log_distribution(policy.logits(hidden), temperature)  # (c, V)
    chosen = logp.gather(-1, tokens[:, None]).squeeze(-1)  # before the entropy: the recomputation stops after the last thing backward needs
    with torch.no_grad():
        entropy = torch.special.entr(logp.exp()).sum(dim=-1)  # entr(0) = 0, where -p * log(p) would be NaN
    return chosen, entropy
