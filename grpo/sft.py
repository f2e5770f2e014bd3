"""Supervised fine-tuning with the very same forward, batch and log-probs: imitate documents instead of
learning from rewards.

The loss is -sum of weight * logp over the tokens of the documents, the stop token included; over those of the
prompt as well with `loss_on: prompt_and_answer`, which is what VisualThinker-R1-Zero's baseline was trained
with. Several documents of one prompt are a group, so the prompt and its picture are computed once for all of
them, as in GRPO. This is how the built-in base model was made (`torchrun train.py tiny_base`), and the cold
start of Vision-R1.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from grpo.batch import TrainBatch
from grpo.logprobs import completion_logprobs, masked_logprobs
from grpo.objective import token_weights
from grpo.parallel.fsdp import passes
from grpo.variants import WEIGHTINGS


def encode_documents(chat, documents: list[tuple[str, ...]], cap: int) -> tuple[Tensor, Tensor]:
    """P tuples of G texts → tokens (P, G, C), length (P, G), the stop token included. Raises ValueError
    for a document longer than `cap` tokens."""
    # a rank may have none
    if not documents:
        return torch.zeros(0, 1, 1, dtype=torch.long), torch.zeros(0, 1, dtype=torch.long)
    ids = [[[*chat.encode(text), chat.stop_ids[0]] for text in group] for group in documents]
    length = torch.tensor([[len(x) for x in group] for group in ids])
    longest = int(length.max())
    if longest > cap:
        text = next(text for group in documents for text in group if len(chat.encode(text)) + 1 == longest)
        raise ValueError(f"a document has {longest} tokens, but cap is {cap}: {text[:80]!r}")
    return torch.tensor([[x + [0] * (longest - len(x)) for x in group] for group in ids]), length


def totals(batch: TrainBatch, loss_on: str, placeholders: Sequence[int]) -> Tensor:
    """(2,) int64: the tokens that the loss is an average over, and the documents. With its prompt a
    document is that much longer."""
    tokens, (prompts, group) = batch.length.sum(), batch.length.shape
    if loss_on == "prompt_and_answer":
        tokens = tokens + group * sum(
            int((~np.isin(prompt.tokens[1:], placeholders)).sum()) for prompt in batch.sources
        )
    return torch.stack([tokens, torch.tensor(prompts * group)])


# Each choice of what is imitated: (policy, part of a batch on the device, weights of a mask, head chunk) ->
# negative log-likelihood, logp (b, c) of the answers, sum of weights.


def answer(policy, part: TrainBatch, weigh, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The documents behind the prompts, stop token included."""
    logp, _ = completion_logprobs(policy, part, temperature=1.0, chunk=chunk)
    weight = weigh(part.mask)
    return -(weight * logp).sum(), logp, weight.sum()


def prompt_and_answer(policy, part: TrainBatch, weigh, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The prompt's words too, from the second token on, as if each document had a copy of its prompt; the
    places of pictures are not predicted."""
    prompts, (P, G, C) = part.prompts, part.tokens.shape
    # (P, G, C, D), (P, S - 1, D)
    said, asked = policy(prompts, part.tokens, part.length, whole=True)
    places = torch.arange(1, prompts.tokens.shape[1], device=said.device)
    words = (places < prompts.length[:, None]) & ~torch.isin(
        prompts.tokens[:, 1:], torch.tensor(policy.config.placeholder_ids, device=said.device)
    )
    weight = weigh(torch.cat([words.repeat_interleave(G, 0), part.mask], 1))  # (b, S - 1 + C)
    logp, _ = masked_logprobs(
        policy, said.flatten(0, 1), part.tokens.flatten(0, 1), part.mask, temperature=1.0, chunk=chunk
    )
    logp_words, _ = masked_logprobs(policy, asked, prompts.tokens[:, 1:], words, temperature=1.0, chunk=chunk)
    # a group's documents share one prompt
    shared = weight[:, :-C].view(P, G, -1).sum(1)
    return -(weight[:, -C:] * logp).sum() - (shared * logp_words).sum(), logp, weight.sum()


LOSS_ON = {"answer": answer, "prompt_and_answer": prompt_and_answer}


def imitate(
    policy,
    batch: TrainBatch,
    *,
    loss_on: str,
    weighting: str,
    tokens: Tensor,
    completions: Tensor,
    cap: int,
    micro_tokens: int,
    chunk: int,
    collate,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulate the gradient of the documents' negative log-likelihood. → (loss, its sum of weights, logp
    (B, C)), detached; the caller steps.

    tokens, completions: `totals` over all ranks.  collate: puts a micro-batch's prompts on the device.
    """
    weigh = partial(
        token_weights, weighting=WEIGHTINGS[weighting], tokens=tokens, completions=completions, cap=cap
    )
    scored, loss, weight = torch.zeros(batch.mask.shape), torch.zeros(()), torch.zeros(())
    # one by one, a document or two would take twice the time
    for part, prompts, rows in passes(policy, batch, micro_tokens, apart=False):
        nll, logp, share = LOSS_ON[loss_on](policy, collate(part), weigh, chunk)
        nll.backward()
        loss, weight = loss + nll.detach().cpu(), weight + share.cpu()
        batch.put_back(scored, logp.detach(), prompts, rows)
    return loss, weight, scored
