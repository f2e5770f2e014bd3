"""The state of a run after a step, as this rank writes it: on the CPU, and copied if training goes on."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grpo.optim import Optimizer
from grpo.storage import adapter, sharded
from models.qwen_vl import QwenVL


@dataclass
class Snapshot:
    """What one of `ranks` ranks writes of a checkpoint."""

    rank: int
    ranks: int
    # tensors on the CPU; those that another rank writes are on the meta device
    policy: QwenVL | adapter.Adapter
    # "model.norm.weight/exp_avg": this rank's shard, on the CPU
    optimizer: dict[str, Tensor]
    # the optimizer's own tensors of these names: they know the place of a shard, and go on changing
    tensors: dict[str, Tensor]
    # of all ranks' tensors
    bytes: int


def take(policy: QwenVL, optimizer: Optimizer, memory: dict[str, Tensor] | None = None) -> Snapshot:
    """The current state. Every rank calls it. memory: buffers for the copies, made by the first call
    (page-locked for tensors of a GPU). None: tensors on the CPU are not copied."""
    rank, ranks = sharded.ranks()

    def onto_cpu(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if memory is None:
            return tensor.cpu().contiguous()
        if name not in memory:
            memory[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return memory[name].copy_(tensor, non_blocking=True)

    copy = adapter.copy(policy, rank, ranks, onto_cpu)
    states = {name: optimizer.state(p) for name, p in policy.named_parameters()}
    tensors = {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    shard = {name: onto_cpu(name, tensor) for name, tensor in local.items()}
    if any(tensor.is_cuda for tensor in tensors.values()):
        # until the copies are complete
        torch.cuda.synchronize()
    size = sum(tensor.nbytes for tensor in (*copy.state_dict().values(), *tensors.values()))
    return Snapshot(rank, ranks, copy, shard, tensors, size)
