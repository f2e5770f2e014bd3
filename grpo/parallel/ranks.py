"""Ranks: who this process is, and the few sums that a step needs from all of them.

Everything here is right for one process too, so the algorithm has no `if world_size > 1`. Each rank takes its
stretch of the global batch (`share`), so what is gathered from all ranks is in the order in which one would
have it. A loss is a sum with weights that were decided over all ranks (docs/06): so gradients are *summed*,
never averaged.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo.parallel.watch import Watch

# timeouts after which the process group itself gives up, whatever the watch has seen
PATIENCE = 20
_watch: Watch | None = None


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Rank 0 writes files and talks to the person."""
        return self.rank == 0

    def share(self, items: list) -> list:
        """This rank's stretch of what all ranks share; some ranks have none where there are fewer items
        than ranks."""
        first, end = (-(-rank * len(items) // self.size) for rank in (self.rank, self.rank + 1))
        return items[first:end]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, elementwise, on every rank."""
        return sum_over_ranks(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors, (n, ...) each, concatenated along dim 0, on every rank. The ranks may hold
        different n."""
        return torch.cat(_every_tensor(tensor)) if self.size > 1 else tensor


def join_ranks(device: str = "auto", timeout: float = 600.0) -> Ranks:
    """Join the process group that torchrun announces, if any. device: auto, cpu or cuda. timeout: seconds
    after which a rank that others wait for is lost (watch.py)."""
    global _watch
    rank, size, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU here; use device=auto or device=cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    else:
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # torchrun sets it to 1 for several processes; else it is the person's
        if beside > 1 or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // beside))
    if size > 1 and not dist.is_initialized():
        patience = timedelta(seconds=PATIENCE * timeout)
        store = (
            {"store": fresh_store(rank, patience), "rank": rank, "world_size": size}
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            else {}
        )
        # gradients are on the GPU, counts on the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience, **store)
        _watch = Watch(rank, size, timeout)
    return Ranks(rank, size, torch.device("cuda", local) if cuda else torch.device("cpu"))


def fresh_store(rank: int, timeout: timedelta) -> dist.Store:
    """A store of rank 0's own, where ranks find each other. torchrun's is shared by all starts of a run,
    and after a restart ranks would find in it the addresses of dead ones (pytorch/pytorch#135712); of this
    one only the port stands there, and where nobody listens at it, it is an old one. Raises OSError."""
    host, until = os.environ["MASTER_ADDR"], time.monotonic() + timeout.total_seconds()
    shared = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        shared.set("glimpse/port", str(store.port))
        return store
    while True:
        port = int(shared.get("glimpse/port"))
        try:
            # asked here, because TCPStore would complain at length
            socket.create_connection((host, port), 1).close()
            return dist.TCPStore(host, port, is_master=False, timeout=timeout)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def use_bfloat16(ranks: Ranks, dtype: str) -> bool:
    """Whether matrix products run in bfloat16. dtype: auto (on a GPU they do), float32 or bfloat16."""
    return dtype == "bfloat16" or (dtype == "auto" and ranks.device.type == "cuda")


def precision(ranks: Ranks, dtype: str) -> torch.autocast:
    """A context in which matrix products run as `use_bfloat16` says. Weights, norms, log-probs, loss and
    optimizer stay in float32."""
    # a cached cast would outlive the update
    return torch.autocast(
        ranks.device.type, dtype=torch.bfloat16, enabled=use_bfloat16(ranks, dtype), cache_enabled=False
    )


def leave_ranks(error: BaseException | None = None) -> None:
    """Leave the process group. error: what this rank ends with; the others are told. A second call does
    nothing."""
    global _watch
    if _watch is not None:
        _watch.leave(error)
        _watch = None
    if dist.is_initialized():
        dist.destroy_process_group()


def announce(step: str) -> None:
    """Where this rank is ("step 7"), for the others to say should it be lost."""
    if _watch is not None:
        _watch.step = step


def meeting(name: str) -> AbstractContextManager:
    """Around everything that waits for other ranks, by a name for people: so that a rank that does not
    come is named, instead of waited for. Nothing on one rank."""
    return nullcontext() if _watch is None else _watch.meeting(name)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over ranks, elementwise."""
    if dist.is_initialized():
        values = values.clone()
        with meeting("a sum over all ranks"):
            dist.all_reduce(values)
    return values


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_objects(rows: list) -> list:
    """The lists of all ranks, one after the other, on every rank. For small plain values."""
    if not dist.is_initialized():
        return rows
    lists: list = [None] * dist.get_world_size()
    with meeting("gathering small values"):
        dist.all_gather_object(lists, rows)
    return [row for rank in lists for row in rank]


def _every_tensor(rows: Tensor) -> list[Tensor]:
    """The tensors of all ranks, by rank."""
    found: list = [None] * dist.get_world_size()
    with meeting("gathering a tensor"):
        dist.all_gather_object(found, rows)
    return found


def gather_and_apply(rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of the rows of all ranks (it keeps their number) -> this rank's rows of the result."""
    if not dist.is_initialized():
        return function(rows)
    everyone = _every_tensor(rows)
    return function(torch.cat(everyone)).split([len(r) for r in everyone])[dist.get_rank()]


def sum_gradients(policy: nn.Module) -> None:
    """Add the gradients of all ranks, in one message, and round them to the parameters' dtype. Those of
    sharded matrices are both already (grpo/parallel/fsdp.py).

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
        with meeting("the sum of the gradients"):
            dist.all_reduce(flat)
        found = flat.split([g.numel() for g in found])
    for p, g in zip(here, found):
        p.grad = g.view_as(p).to(p.dtype)


def wait_for_all() -> None:
    """Every rank reaches this line before any goes on."""
    if dist.is_initialized():
        with meeting("waiting for all"):
            dist.barrier()
