"""One policy over many ranks: FSDP2 (`fully_shard`) cuts its matrices, and everything that follows from that
is here.

A rank holds its part of every matrix, of its gradient and of its moments, in float32. A block's matrices are
gathered when the block runs, forward and backward, in the dtype of its products (so what is gathered is what
autocast would have made of them), and its gradients are reduced in float32, *summed*: the weights of the loss
were decided over all ranks. Vectors (norms and biases, one parameter in three thousand) stay whole on every
rank; a norm in bfloat16 would be another norm.

Gathering a block is something that all ranks do together. So all run the same number of micro-batches, each
with a picture (`passes`), and rollouts, which take as long as they take, run on a policy that was gathered
before (`whole_weights`). With one rank there is nothing to cut, and nothing here does anything.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data.types import Prompt
from grpo.batch import TrainBatch
from grpo.parallel.ranks import Ranks, gather_objects, meeting
from models.layers import to_attention_dtype
from models.qwen_vl import QwenVL

# of which nobody here writes into
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
EMBEDDING = "model.embed_tokens.weight"
# renamed in PyTorch 2.13
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Counter:
    """Where a policy is in its passes: collectives done in this one, those of them that are not to be done
    again, passes left after it."""

    done: int = 0
    skip: int = 0
    left: int = 0


class Counted:
    """A collective of FSDP2 that counts itself, and that is left out where this rank did it before it
    broke the pass off (`catch_up`)."""

    def __init__(self, counter: Counter, collective: Callable):
        self.counter, self.collective = counter, collective

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The memory for what is sent or received."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, **how):
        self.counter.done += 1
        if self.counter.done <= self.counter.skip:
            output_tensor.zero_()
            return None
        with meeting("the other ranks' part of a block"):
            return self.collective(output_tensor, input_tensor, **how)


def shard(policy: QwenVL, ranks: Ranks, use_bfloat16: bool) -> None:
    """Cut the policy's matrices over all ranks, in place. use_bfloat16: products are in it."""
    mesh, counter = init_device_mesh(ranks.device.type, (ranks.size,)), Counter()
    vectors = {p for p in policy.parameters() if p.dim() < 2}
    sums = torch.float32 if use_bfloat16 else to_attention_dtype(torch.empty(0, device=ranks.device)).dtype
    # the root last: embedding, merger, head, in float32
    for module in (*policy.visual.blocks, *policy.model.layers, policy):
        products = torch.bfloat16 if use_bfloat16 and module is not policy else None
        fully_shard(
            module,
            mesh=mesh,
            ignored_params=vectors,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=products, reduce_dtype=sums, cast_forward_inputs=False
            ),
        )
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_custom_all_gather(Counted(counter, ALL_GATHER))
        module.set_custom_reduce_scatter(Counted(counter, REDUCE_SCATTER))
    policy.counter = counter


@contextmanager
def whole_weights(policy: QwenVL) -> Iterator[QwenVL]:
    """A plain policy with all weights, in the dtypes in which they are used, for as long as the context
    lasts. Inside, no rank waits for another.

    In bfloat16 its matrices are cast once, as a product would cast them for every token anew; the embedding
    stays as it is, and a tied head becomes a copy of it.
    """
    products = next(
        (torch.get_autocast_dtype(device) for device in ("cuda", "cpu") if torch.is_autocast_enabled(device)),
        None,
    )
    if not isinstance(policy, FSDPModule) and products is None:
        yield policy
        return
    # the blocks and the root; none of a policy that is not cut
    parts = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        with torch.device("meta"):
            plain = QwenVL(replace(policy.config, tie_word_embeddings=False))
        named = dict(policy.named_parameters())
        for name, parameter in {"lm_head.weight": named[EMBEDDING], **named}.items():
            module, _, leaf = name.rpartition(".")
            # the gathered tensor, not a copy
            used = parameter.detach()
            if products and parameter.dim() > 1 and name != EMBEDDING:
                used = used.to(products)
            setattr(plain.get_submodule(module), leaf, nn.Parameter(used, requires_grad=False))
        yield plain
    finally:
        for part in parts:
            part.reshard()


def passes(
    policy: QwenVL, batch: TrainBatch, budget: int, among: list[int] | None = None, *, apart: bool = True
) -> Iterator[tuple[TrainBatch, list[int], slice]]:
    """The micro-batches of `TrainBatch.micro_batches`, for a forward and (with gradients) a backward each.
    What was in the gradients is forgotten first.

    Of a sharded policy, every rank gets as many as the rank that has most, and each holds a picture: a ghost
    fills in, which has no completion tokens and weighs nothing. In float32 on a CPU no two stretches go
    together (`apart`) and gradients add up in float64: so it makes no difference to their sum which rank has
    which stretch.
    """
    learning, sums = torch.is_grad_enabled(), _sums(policy)
    found = list(batch.micro_batches(budget, among, apart=apart and sums == torch.float64))
    if learning:
        policy.zero_grad(set_to_none=True)
        for parameter in policy.parameters():
            if sums == torch.float64 and parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.grad_dtype, parameter.grad = None, torch.zeros_like(parameter, dtype=sums)
    if not isinstance(policy, FSDPModule):
        yield from found
        return
    count = max(gather_objects([len(found)]))
    for number in range(count):
        if learning and sums == torch.float64:
            # till then they add up whole, and are rounded once
            policy.set_requires_gradient_sync(number == count - 1)
        policy.counter.done, policy.counter.left = 0, count - number - 1
        part, prompts, rows = (
            found[number] if number < len(found) else (batch.silent(ghost(policy)), [], slice(None))
        )
        yield (
            (
                part
                if any(len(prompt.patches) for prompt in part.sources)
                else part.beside(part.silent(ghost(policy)))
            ),
            prompts,
            rows,
        )
    if not learning:
        # the root stays gathered after a forward, for a backward
        policy.reshard()


def catch_up(policy: QwenVL) -> None:
    """Take part in what is left of a try that this rank broke off in a training pass: the rest of that pass
    and the passes behind it, with ghosts.

    The other ranks wait in the middle of a pass for this one's part of the weights. What comes of it is worth
    nothing, on any rank: all try again. Raises torch.OutOfMemoryError where PyTorch cannot do that yet.
    """
    if not isinstance(policy, FSDPModule):
        return
    if not hasattr(policy, "reset_iter_state"):
        raise torch.OutOfMemoryError(
            f"PyTorch {torch.__version__} cannot take up a broken pass of a sharded policy; halve "
            "loss.micro_tokens and start again"
        )
    counter, batch = (
        policy.counter,
        TrainBatch(
            [ghost(policy)], torch.zeros(1, 1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
        ),
    )
    policy.reset_iter_state()
    counter.skip = counter.done
    for left in reversed(range(counter.left + 1)):
        counter.done = 0
        policy.set_requires_gradient_sync(left == 0 or _sums(policy) != torch.float64)
        part = batch.collated(
            image_token=policy.config.image_token_id,
            merge=policy.config.vision.spatial_merge_size,
            device=next(policy.parameters()).device,
        )
        policy.logits(policy(part.prompts, part.tokens, part.length)).sum().backward()
        counter.skip = 0


def _sums(policy: QwenVL) -> torch.dtype:
    """In which the gradients of micro-batches add up."""
    return to_attention_dtype(torch.empty(0, device=next(policy.parameters()).device)).dtype


def ghost(policy: QwenVL) -> Prompt:
    """A prompt that is a grey picture, of two tokens, and nothing else."""
    vision, side = policy.config.vision, policy.config.vision.spatial_merge_size
    return Prompt(
        uid="",
        text="",
        tokens=np.full(2, policy.config.image_token_id),
        patches=np.zeros((2 * side**2, vision.patch_dim), np.float32),
        grid=np.array([[1, side, 2 * side]]),
    )
