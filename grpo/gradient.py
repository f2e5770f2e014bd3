"""The gradient of a batch, and the log-probs of its tokens, one micro-batch at a time.

The weights of the loss are fixed for the whole update, so the gradients of the micro-batches add up to that
of the batch, wherever it is cut. The ranks of a sharded policy gather its weights together: so all run the
same number of micro-batches, each with a picture.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from data.types import Prompt
from grpo.batch import Batch, Cut, MicroBatch
from grpo.exactness import sum_dtype, sum_in_float64
from grpo.logprobs import completion_logprobs
from grpo.objective import LossStats
from grpo.parallel.ranks import gather_objects, rank
from grpo.sampling import Truncation
from grpo.timing import timed
from models.lora import adapters_off
from models.qwen_vl import QwenVL

# tokens; no smaller budget is tried
MIN_BUDGET = 256
Result = TypeVar("Result")
# of a micro-batch: the loss, its stats, log-probs and entropies (b, c)
LossOf = Callable[[MicroBatch], tuple[Tensor, LossStats, Tensor, Tensor]]


class OutOfMemory(RuntimeError):
    """A micro-batch did not fit into a GPU's memory, and no smaller one can be tried."""


@dataclass
class TokenBudget:
    """What one forward may take. tokens: the most of a micro-batch, halved when memory is short. chunk: how
    many tokens' logits exist at once (`grpo/logprobs.py:chunk_of`). device: where micro-batches run."""

    tokens: int
    chunk: int
    device: torch.device


@dataclass
class UpdateStats:
    """Sums over the tokens of this rank that an update learned from. entropy: in nats."""

    loss: LossStats = field(default_factory=LossStats.zero)
    entropy: float = 0.0

    def __add__(self, other: UpdateStats) -> UpdateStats:
        return UpdateStats(self.loss + other.loss, self.entropy + other.entropy)


@timed("learn")
def accumulate_gradient(
    loss_of: LossOf, policy: QwenVL, batch: Batch, budget: TokenBudget, part: list[int] | None = None
) -> UpdateStats:
    """Replace the policy's gradients by this rank's part of the batch's gradient. part: learn from these
    groups only, one of `Batch.minibatches` (None: from all). -> the sums of this update and of the latest one
    of every other part. The first update of a batch writes `batch.logp`. Raises OutOfMemory."""
    whole = list(range(len(batch.prompts)))
    part = whole if part is None else part
    groups = [group for group in batch.teaching if group in part]

    def one_pass() -> tuple[UpdateStats, Tensor]:
        stats = UpdateStats()
        logp_now = torch.zeros(batch.mask.shape)  # (B, C)
        for micro, cut in passes(policy, batch, budget, groups):
            loss, micro_stats, logp, entropy = loss_of(micro)
            loss.backward()
            stats.loss = stats.loss + micro_stats.to("cpu")
            stats.entropy += float(entropy.sum())
            batch.write_back(logp_now, logp.detach(), cut)
        return stats, logp_now

    stats, logp = retry_with_less_memory(one_pass, policy, budget)
    if not batch.stats:
        # a later part's log-probs are those of a policy that has moved
        batch.logp = logp if part == whole or batch.logp_old is None else batch.logp_old
    batch.stats[tuple(part)] = stats
    return reduce(add, batch.stats.values())


@timed("reference")
@torch.no_grad()
def score_tokens(
    policy: QwenVL,
    batch: Batch,
    temperature: float,
    budget: TokenBudget,
    truncation: Truncation | None = None,
) -> Tensor:
    """The log-probs of a batch's completions under a policy that is not trained here. -> (B, C) on the CPU, 0
    outside the mask. Raises OutOfMemory."""

    def one_pass() -> Tensor:
        logps = torch.zeros(batch.mask.shape)  # (B, C)
        for part, cut in passes(policy, batch, budget, list(range(len(batch.prompts)))):
            how = {"temperature": temperature, "chunk": budget.chunk, "truncation": truncation}
            logp, _ = completion_logprobs(policy, part, **how)
            batch.write_back(logps, logp, cut)
        return logps

    with on_device(policy, budget.device):
        return retry_with_less_memory(one_pass, policy, budget)


def score_reference(reference: QwenVL, batch: Batch, temperature: float, budget: TokenBudget) -> Tensor:
    """As `score_tokens`, under the reference. With LoRA it is the policy without its adapters."""
    with adapters_off(reference):
        return score_tokens(reference, batch, temperature, budget)


def passes(
    policy: QwenVL, batch: Batch, budget: TokenBudget, groups: list[int]
) -> Iterator[tuple[MicroBatch, Cut]]:
    """The micro-batches of these groups, for a forward each, and a backward each if gradients are on. Then
    the policy's gradients are reset first.

    Of a sharded policy, every rank gets as many as the rank with most, and a micro-batch without a picture
    gets an empty group with one. In float32 on a CPU micro-batches hold one section each, and gradients add
    up in float64: so their sum does not depend on which rank has which section.
    """
    learning = torch.is_grad_enabled()
    sharded: FSDPModule | None = policy if isinstance(policy, FSDPModule) else None
    exactly = sum_dtype(budget.device) == torch.float64
    sizes = {"image_token": policy.config.image_token_id, "merge": policy.config.vision.spatial_merge_size}
    cuts = list(batch.cuts(budget.tokens, groups, apart=exactly))
    if learning:
        policy.zero_grad(set_to_none=True)
        if exactly:
            sum_in_float64(policy)
    count = max(gather_objects([len(cuts)])) if sharded else len(cuts)
    for number in range(count):
        if sharded and learning and exactly:
            # until the last one they add up in float64 on each rank, and are rounded once
            sharded.set_requires_gradient_sync(number == count - 1)
        cut = cuts[number] if number < len(cuts) else Cut([], slice(None))
        pictures = any(len(batch.prompts[group].patches) for group in cut.groups)
        append = empty_prompt(policy) if sharded and not pictures else None
        yield batch.micro_batch(cut, **sizes, device=budget.device, append=append), cut
    if sharded and not learning:
        # after a forward the root stays gathered, for a backward
        sharded.reshard()


def empty_prompt(policy: QwenVL) -> Prompt:
    """A prompt of one grey picture: two image tokens and no words."""
    vision = policy.config.vision
    side = vision.spatial_merge_size
    patches = np.zeros((2 * side**2, vision.patch_dim), np.float32)
    return Prompt("", "", np.full(2, policy.config.image_token_id), patches, np.array([[1, side, 2 * side]]))


def retry_with_less_memory(work: Callable[[], Result], policy: nn.Module, budget: TokenBudget) -> Result:
    """Run `work()`. After a GPU's out-of-memory error, halve `budget.tokens`, print a line and run it again.

    The gradient is that of one whole pass, with any budget: `work` begins by resetting it. With several ranks
    there is no second try, because the others wait for this rank's part of the weights. Raises OutOfMemory.
    """
    while True:
        try:
            return work()
        except torch.OutOfMemoryError as error:
            several = dist.is_initialized() and dist.get_world_size() > 1
            if several or budget.tokens // 2 < MIN_BUDGET:
                what = ". ".join(str(error).rstrip(".").split(". ")[:2])
                raise OutOfMemory(
                    f"rank {rank()} is out of memory with loss.micro_tokens={budget.tokens} ({what}). Set "
                    f"loss.micro_tokens={budget.tokens // 2} or less, and start again"
                ) from None
        # not in the except clause: the exception holds the tensors of the failed pass
        policy.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        budget.tokens //= 2
        same = "the gradient is the same, a step takes longer"
        tqdm.write(f"out of memory: going on with loss.micro_tokens={budget.tokens}; {same}", file=sys.stderr)


@contextmanager
def on_device(policy: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep the policy on a device; copies of parameters that are elsewhere are dropped at the end."""
    home = {p: p.data for p in policy.parameters() if p.device.type != device.type}
    for parameter, data in home.items():
        parameter.data = data.to(device)
    try:
        yield
    finally:
        for parameter, data in home.items():
            parameter.data = data
