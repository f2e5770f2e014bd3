"""One policy over many ranks: FSDP2 (`fully_shard`) cuts its matrices, and everything that follows from that is here.

A rank holds its part of every matrix, of its gradient and of its moments, in float32. A block's matrices are gathered when the block runs, forward and backward, in
the dtype of its products (so what is gathered is what autocast would have made of them), and its gradients are reduced in float32, *summed*: the weights of the loss
were decided over all ranks. Vectors (norms and biases, one parameter in three thousand) stay whole on every rank; a norm in bfloat16 would be another norm.

Gathering a block is something that all ranks do together. So all run the same number of micro-batches, each with a picture (`passes`), and rollouts, which take as long
as they take, run on a policy that was gathered before (`whole`). With one rank there is nothing to cut, and nothing here does anything.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data.types import Prompt
from grpo.batch import TrainBatch
from grpo.distributed import World, gathered
from grpo.optim import Optimizer
from models.layers import exact
from models.qwen_vl import QwenVL


def shard(policy: QwenVL, world: World, low: bool) -> None:
    """Cut the policy's matrices over all ranks, in place. low: products are in bfloat16."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    vectors = {p for p in policy.parameters() if p.dim() < 2}
    sums = torch.float32 if low else exact(torch.empty(0, device=world.device)).dtype
    for module in (*policy.visual.blocks, *policy.model.layers, policy):            # the root last: embedding, merger, head, in float32
        products = torch.bfloat16 if low and module is not policy else None
        fully_shard(module, mesh=mesh, ignored_params=vectors,
                    mp_policy=MixedPrecisionPolicy(param_dtype=products, reduce_dtype=sums, cast_forward_inputs=False))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def groups(policy: nn.Module) -> list[FSDPModule]:
    """The parts that are gathered one at a time: the blocks and the root; none of a policy that is not sharded."""
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole(policy: QwenVL) -> Iterator[QwenVL]:
    """A plain policy with all weights, in the dtypes in which they are used, for as long as the context lasts. Inside, no rank waits for another."""
    if not (parts := groups(policy)):
        yield policy
        return
    for part in parts:
        part.unshard()
    try:
        with torch.device("meta"):
            plain = QwenVL(policy.config)
        for name, parameter in policy.named_parameters():
            module, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(module), leaf, nn.Parameter(parameter.detach(), requires_grad=False))       # the gathered tensor, not a copy
        yield plain
    finally:
        for part in parts:
            part.reshard()


def passes(policy: QwenVL, batch: TrainBatch, budget: int, among: list[int] | None = None) -> Iterator[tuple[TrainBatch, list[int], slice]]:
    """The micro-batches of `TrainBatch.micro_batches`, for a forward and (with gradients) a backward each. What was in the gradients is forgotten first.

    Of a sharded policy, every rank gets as many as the rank that has most, and each holds a picture: a ghost fills in, which has no completion tokens and weighs nothing.
    In float32 on a CPU each group goes alone and gradients add up in float64: so it makes no difference to their sum which rank has which group.
    """
    learning, parts = torch.is_grad_enabled(), groups(policy)
    sums = exact(torch.empty(0, device=next(policy.parameters()).device)).dtype
    found = list(batch.micro_batches(budget, among, apart=sums == torch.float64))
    if learning:
        policy.zero_grad(set_to_none=True)
        for parameter in policy.parameters():
            if sums == torch.float64 and parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.grad_dtype, parameter.grad = None, torch.zeros_like(parameter, dtype=sums)
    if not parts:
        yield from found
        return
    count = max(gathered([len(found)]))
    for number in range(count):
        if learning and sums == torch.float64:
            policy.set_requires_gradient_sync(number == count - 1)        # till then they add up whole, and are rounded once
        part, prompts, rows = found[number] if number < len(found) else (batch.silent(ghost(policy)), [], slice(None))
        yield (part if any(len(prompt.patches) for prompt in part.sources) else part.beside(part.silent(ghost(policy)))), prompts, rows
    if not learning:
        policy.reshard()                                                  # the root stays gathered after a forward, for a backward


def ghost(policy: QwenVL) -> Prompt:
    """A prompt that is a grey picture, of two tokens, and nothing else."""
    vision, side = policy.config.vision, policy.config.vision.spatial_merge_size
    return Prompt(uid="", text="", tokens=np.full(2, policy.config.image_token_id), patches=np.zeros((2 * side**2, vision.patch_dim), np.float32),
                  grid=np.array([[1, side, 2 * side]]))


def unsharded(policy: QwenVL, optimizer: Optimizer) -> tuple[QwenVL, SimpleNamespace]:
    """Policy and optimizer as one rank alone would hold them, on the CPU, to be saved. All ranks call it."""
    if not groups(policy):
        return policy, optimizer
    with torch.device("meta"):
        plain = QwenVL(policy.config)
    states = {}
    for name, parameter in policy.named_parameters():
        module, _, leaf = name.rpartition(".")
        copy = nn.Parameter(full(parameter.detach()), requires_grad=False)
        setattr(plain.get_submodule(module), leaf, copy)
        states[copy] = {key: full(value) for key, value in optimizer.state(parameter).items()}
    return plain, SimpleNamespace(state=states.__getitem__)


def full(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded, on the CPU. All ranks call it."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
