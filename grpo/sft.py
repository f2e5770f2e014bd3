"""Supervised fine-tuning: imitate documents, with the forward, batch and log-probs of GRPO.

The loss is -sum of weight * logp over the tokens of the documents, the stop token included. With `loss_on:
prompt_and_answer` the prompt's words count too; VisualThinker-R1-Zero trained its baseline so. The documents
of one prompt are a group, so the prompt and its picture are computed once for all of them. The built-in base
was made this way (`torchrun train.py tiny_base`), as is Vision-R1's cold start.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.types import BadExample, Example
from grpo.batch import Batch, MicroBatch
from grpo.logprobs import completion_logprobs, masked_logprobs
from grpo.objective import LossStats


def fit_documents(chat, example: Example, *, cap: int, too_long: str) -> tuple[Example, list[BadExample]]:
    """Encode an example's documents (`Chat.documents`), the stop token included. -> (the example with tokens
    in extra["documents"], an error for each document that is left out).

    too_long: what becomes of a document of more than `cap` tokens: skip, cut (the stop token goes, too) or
    error. Raises BadExample if no document is left, and ValueError for `error`.
    """
    given = example.extra.get("documents") or ()
    if not isinstance(given, (list, tuple)) or not all(isinstance(text, str) for text in given):
        raise BadExample(f"example {example.uid!r}: extra.documents is not a list of texts")
    left_out = []
    kept = []
    for number, text in enumerate(chat.documents(example), start=1):
        ids = [*chat.encode(text), chat.stop_ids[0]]
        if len(ids) > cap:
            what = (
                f"document {number} of {example.uid!r} has {len(ids)} tokens and cap is {cap} ({text[:80]!r})"
            )
            if too_long == "error":
                raise ValueError(f"{what}; raise cap, or set sft.too_long to skip or cut")
            if too_long == "skip":
                left_out.append(BadExample(what))
                continue
            tqdm.write(f"cut: {what}", file=sys.stderr)
        kept.append(ids[:cap])
    if not kept:
        raise left_out[0]
    return replace(example, extra={**example.extra, "documents": kept}), left_out


def pad_documents(documents: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """The tokens of P examples' documents -> tokens (P, G, C) and length (P, G). P may be 0. An example with
    less than G documents gets empty ones."""
    G = max(map(len, documents), default=1)
    length = torch.zeros(len(documents), G, dtype=torch.long)
    for p, group in enumerate(documents):
        length[p, : len(group)] = torch.tensor([len(ids) for ids in group])
    tokens = torch.zeros(len(documents), G, max(1, *length.flatten().tolist(), 1), dtype=torch.long)
    for p, group in enumerate(documents):
        for g, ids in enumerate(group):
            tokens[p, g, : len(ids)] = torch.tensor(ids)
    return tokens, length


def count_tokens(batch: Batch, loss_on: str, placeholders: Sequence[int]) -> Tensor:
    """(2,) int64: the tokens and the documents over which the loss is an average. With `prompt_and_answer`,
    the prompt's words count as tokens of each document too."""
    if loss_on == "answer":
        return batch.counts
    words = [int((~np.isin(prompt.tokens[1:], placeholders)).sum()) for prompt in batch.prompts]
    documents = (batch.length > 0).sum(1).tolist()
    return batch.counts + torch.tensor([sum(w * n for w, n in zip(words, documents)), 0])


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
    # an empty document has no copy of the prompt
    words_of = words.repeat_interleave(G, 0) & (part.length.flatten() > 0).unsqueeze(-1)  # (b, S - 1)
    weight = weigh(torch.cat([words_of, part.mask], 1))  # (b, S - 1 + C)
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
