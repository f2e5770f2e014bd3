"""The state of a run after a step, as this rank will write it: on the CPU, and if training is to go on
meanwhile, in memory of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo.optim import Optimizer
from grpo.storage import sharded
from models import weights


@dataclass
class Snapshot:
    """What one of `ranks` ranks writes of a checkpoint."""

    rank: int
    ranks: int
    # its tensors are on the CPU; those that another rank writes, on the meta device
    policy: nn.Module
    # "model.norm.weight/exp_avg": this rank's shard, on the CPU
    optimizer: dict[str, Tensor]
    # the same as the optimizer has them: they say where in the whole a shard belongs, and go on changing
    tensors: dict[str, Tensor]
    # of all ranks' tensors
    bytes: int


def take(policy: nn.Module, optimizer: Optimizer, memory: dict[str, Tensor] | None = None) -> Snapshot:
    """The state as it is now. Every rank calls it.

    memory: copies are made there, and made there again the next time; page-locked, if they come from a GPU.
    None: what is on the CPU already is not copied.
    """
    rank, ranks = sharded.ranks()

    def onto_cpu(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if memory is None:
            return tensor.cpu().contiguous()
        if name not in memory:
            memory[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return memory[name].copy_(tensor, non_blocking=True)

    copy = weights.rank_copy(policy, rank, ranks, onto_cpu)
    tensors = {
        f"{name}/{key}": value
        for name, p in policy.named_parameters()
        for key, value in optimizer.state(p).items()
    }
    shard = {
        name: onto_cpu(name, tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        for name, tensor in tensors.items()
    }
    if any(tensor.is_cuda for tensor in tensors.values()):
        # the copies have arrived
        torch.cuda.synchronize()
    return Snapshot(
        rank,
        ranks,
        copy,
        shard,
        tensors,
        sum(tensor.nbytes for tensor in (*copy.state_dict().values(), *tensors.values())),
    )
