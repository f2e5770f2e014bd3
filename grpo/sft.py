"""Supervised fine-tuning with the very same forward, batch and log-probs: imitate documents instead of learning from rewards.

The loss is -sum of weight * logp over the tokens of the documents, the stop token included. Several documents of one prompt are a group, so the prompt and its
picture are computed once for all of them, as in GRPO. This is how the built-in base model was made (`torchrun train.py tiny_base`), and the cold start of Vision-R1.
"""
import torch
from torch import Tensor

from grpo.batch import TrainBatch
from grpo.logprobs import completion_logprobs
from grpo.objective import token_weights


def encode_documents(chat, documents: list[tuple[str, ...]], cap: int) -> tuple[Tensor, Tensor]:
    """P tuples of G texts → tokens (P, G, C), length (P, G), the stop token included. Raises ValueError for a document longer than `cap` tokens."""
    ids = [[[*chat.encode(text), chat.stop_ids[0]] for text in group] for group in documents]
    length = torch.tensor([[len(x) for x in group] for group in ids])
    longest = int(length.max())
    if longest > cap:
        text = next(text for group in documents for text in group if len(chat.encode(text)) + 1 == longest)
        raise ValueError(f"a document has {longest} tokens, but cap is {cap}: {text[:80]!r}")
    return torch.tensor([[x + [0] * (longest - len(x)) for x in group] for group in ids]), length


def imitate(policy, batch: TrainBatch, *, weighting: str, tokens: Tensor, completions: Tensor, cap: int, micro_tokens: int, chunk: int,
            collate) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of the documents' negative log-likelihood. → (loss, logp (B, C)), detached; the caller steps.

    tokens, completions: totals over all ranks.  collate: puts a micro-batch's prompts on the device.
    """
    batch.weight = token_weights(batch.mask, weighting, tokens=tokens, completions=completions, cap=cap)
    scored, loss = torch.zeros(batch.mask.shape), torch.zeros(())
    for part, prompts, rows in batch.micro_batches(micro_tokens):
        part = collate(part)
        logp, _ = completion_logprobs(policy, part, temperature=1.0, chunk=chunk)
        nll = -(part.weight * logp).sum()
        nll.backward()
        loss += nll.detach().cpu()
        batch.put_back(scored, logp.detach(), prompts, rows)
    return loss, scored
