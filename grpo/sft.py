"""Supervised fine-tuning: imitate documents, with the forward, batch and log-probs of GRPO.

The loss is -sum of weight * logp over the tokens of the documents, the stop token included. With `loss_on:
prompt_and_answer` the prompt's words count too; VisualThinker-R1-Zero trained its baseline so. The documents
of one prompt are a group, so the prompt and its picture are computed once for all of them. The built-in base
was made this way (`torchrun train.py tiny_base`), as is Vision-R1's cold start.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from grpo.batch import Batch, MicroBatch
from grpo.logprobs import completion_logprobs, masked_logprobs
from grpo.objective import LossStats


def encode_documents(chat, documents: list[tuple[str, ...]], cap: int) -> tuple[Tensor, Tensor]:
    """P tuples of G texts -> tokens (P, G, C) and length (P, G), the stop token included. P may be 0. Raises
    ValueError for a document of more than `cap` tokens."""
    if not documents:
        return torch.zeros(0, 1, 1, dtype=torch.long), torch.zeros(0, 1, dtype=torch.long)
    ids = [[[*chat.encode(text), chat.stop_ids[0]] for text in group] for group in documents]
    length = torch.tensor([[len(x) for x in group] for group in ids])
    longest = int(length.max())
    if longest > cap:
        text = next(text for group in documents for text in group if len(chat.encode(text)) + 1 == longest)
        raise ValueError(f"a document has {longest} tokens, but cap is {cap}: {text[:80]!r}")
    return torch.tensor([[x + [0] * (longest - len(x)) for x in group] for group in ids]), length


def count_tokens(batch: Batch, loss_on: str, placeholders: Sequence[int]) -> Tensor:
    """(2,) int64: the tokens and the documents over which the loss is an average. With `prompt_and_answer`,
    the prompt's words count as tokens of each document too."""
    if loss_on == "answer":
        return batch.counts
    words = sum(int((~np.isin(prompt.tokens[1:], placeholders)).sum()) for prompt in batch.prompts)
    return batch.counts + torch.tensor([batch.length.shape[1] * words, 0])


# What is imitated: (policy, micro-batch, weights of a mask, head chunk) -> what `LossOf` returns.


def answer(policy, part: MicroBatch, weigh, chunk: int):
    """The documents behind the prompts, stop token included."""
    logp, entropy = completion_logprobs(policy, part, temperature=1.0, chunk=chunk)
    weight = weigh(part.mask)
    return _loss(-(weight * logp).sum(), weight, logp, entropy)


def prompt_and_answer(policy, part: MicroBatch, weigh, chunk: int):
    """The prompt's words too, from the second token on, as if each document had its own copy of the prompt.
    Image tokens are not predicted."""
    prompts = part.prompts
    P, G, C = part.tokens.shape
    # (P, G, C, D), (P, S - 1, D)
    of_answer, of_prompt = policy(prompts, part.tokens, part.length, with_prompts=True)
    place = torch.arange(1, prompts.tokens.shape[1], device=of_answer.device)
    words = (place < prompts.length[:, None]) & ~torch.isin(
        prompts.tokens[:, 1:], torch.tensor(policy.config.placeholder_ids, device=of_answer.device)
    )
    weight = weigh(torch.cat([words.repeat_interleave(G, 0), part.mask], 1))  # (b, S - 1 + C)
    logprobs = partial(masked_logprobs, policy, temperature=1.0, chunk=chunk)
    logp, entropy = logprobs(of_answer.flatten(0, 1), part.tokens.flatten(0, 1), part.mask)
    logp_words, _ = logprobs(of_prompt, prompts.tokens[:, 1:], words)
    # the documents of a group share one prompt
    shared = weight[:, :-C].view(P, G, -1).sum(1)
    return _loss(-(weight[:, -C:] * logp).sum() - (shared * logp_words).sum(), weight, logp, entropy)


def _loss(loss: Tensor, weight: Tensor, logp: Tensor, entropy: Tensor):
    stats = replace(LossStats.zero().to(loss.device), loss=loss.detach(), weight=weight.sum())
    return loss, stats, logp, entropy


LOSS_ON = {"answer": answer, "prompt_and_answer": prompt_and_answer}
