"""Ranks: who this process is, and the few sums that a step needs from all of them.

Everything here is right for one process too, so the algorithm has no `if world_size > 1`. Each rank takes its stretch of the global batch (`share`), so what is gathered
from all ranks is in the order in which one would have it. A loss is a sum with weights that were decided over all ranks (docs/06): so gradients are *summed*, never averaged.
"""
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class World:
    """This process among all of them."""
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Rank 0 writes files and talks to the person."""
        return self.rank == 0

    def share(self, items: list) -> list:
        """This rank's stretch of what all ranks share; some ranks have none where there are fewer items than ranks."""
        first, end = (-(-rank * len(items) // self.size) for rank in (self.rank, self.rank + 1))
        return items[first:end]


def start(device: str = "auto") -> World:
    """Join the process group that torchrun announces, if any. device: auto, cpu or cuda."""
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU here; use device=auto or device=cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    else:
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if beside > 1 or "OMP_NUM_THREADS" not in os.environ:           # torchrun sets it to 1 for several processes; else it is the person's
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // beside))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")      # gradients are on the GPU, counts on the CPU
    return World(rank, size, torch.device("cuda", local) if cuda else torch.device("cpu"))


def is_low(world: World, dtype: str) -> bool:
    """Whether matrix products run in bfloat16. dtype: auto (on a GPU they do), float32 or bfloat16."""
    return dtype == "bfloat16" or (dtype == "auto" and world.device.type == "cuda")


def precision(world: World, dtype: str) -> torch.autocast:
    """A context in which matrix products run as `is_low` says. Weights, norms, log-probs, loss and optimizer stay in float32."""
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=is_low(world, dtype), cache_enabled=False)     # a cached cast would outlive the update


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(values: Tensor) -> Tensor:
    """Sum over ranks, elementwise."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(rows: list) -> list:
    """The lists of all ranks, one after the other, on every rank. For small plain values."""
    if not dist.is_initialized():
        return rows
    lists: list = [None] * dist.get_world_size()
    dist.all_gather_object(lists, rows)
    return [row for rank in lists for row in rank]


def together(rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of the rows of all ranks (it keeps their number) → this rank's rows of the result."""
    if not dist.is_initialized():
        return function(rows)
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, rows)
    return function(torch.cat(everyone)).split([len(r) for r in everyone])[dist.get_rank()]


def sum_gradients(policy: nn.Module) -> None:
    """Add the gradients of all ranks, in one message, and round them to the parameters' dtype. Those of sharded matrices are both already (grpo/shard.py).

    A parameter that nothing reached has gradient 0, so the optimizer treats it alike on any number of ranks.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    for p in trained:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    here = [p for p in trained if not isinstance(p, DTensor)]
    found = [p.grad for p in here]
    if dist.is_initialized() and here:
        flat = torch.cat([g.flatten() for g in found])
        dist.all_reduce(flat)
        found = flat.split([g.numel() for g in found])
    for p, g in zip(here, found):
        p.grad = g.view_as(p).to(p.dtype)


def wait_for_all() -> None:
    """Every rank reaches this line before any goes on."""
    if dist.is_initialized():
        dist.barrier()
