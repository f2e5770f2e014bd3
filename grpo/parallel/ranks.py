"""Ranks: which of the processes this is, and the few sums and gathers that a step needs from all of them.

Everything here works for one process too, so the algorithm has no `if world_size > 1`. Each rank takes a
contiguous part of the global batch, so what is gathered from all ranks has the order that one rank would
have. The weights of the loss are fixed over all ranks (docs/06), so gradients are *summed*, not averaged.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo.parallel.lost_ranks import LOST, RollCall
from models.layers import attention_sums

T = TypeVar("T")
# how long a rank waits for the others to start, at least
SECONDS_TO_START = 300.0
# how long the other ranks of a machine leave the first one to print an error that all of them have
SECONDS_TO_PRINT = 10.0
_roll: RollCall | None = None


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Rank 0 writes files and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's contiguous part of the items. With fewer items than ranks, some parts are empty."""
        first = -(-self.rank * len(items) // self.size)
        end = -(-(self.rank + 1) * len(items) // self.size)
        return items[first:end]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, elementwise, on every rank."""
        return sum_over_ranks(tensor)


def join_ranks(device: str = "auto", timeout: float = 600.0) -> Ranks:
    """Join the process group that torchrun announces, if any. device: auto, cpu or cuda. timeout: seconds
    after which a collective fails because a rank has not come. Raises ValueError."""
    global _roll
    number = lambda key, default: int(os.environ.get(key, default))
    rank, size, local = number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU here; use device=auto or device=cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    else:
        on_machine = number("LOCAL_WORLD_SIZE", 1)
        # torchrun sets it to 1 for several processes; otherwise the person has set it
        if on_machine > 1 or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_machine))
    if size > 1 and not dist.is_initialized():
        store = _fresh_store(timedelta(seconds=max(timeout, SECONDS_TO_START)))
        _roll = RollCall(store, rank, size, timeout)
        _roll.arrive("the start")
        store.wait([f"reached {r}" for r in range(size)])
        # gradients are on the GPU, counts on the CPU
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        # NCCL connects at once, on this device; else its first barrier would have to guess the device
        where = torch.device("cuda", local) if cuda else None
        seconds = timedelta(seconds=timeout)
        dist.init_process_group(
            backend, timeout=seconds, store=store, rank=rank, world_size=size, device_id=where
        )
    return Ranks(rank, size, torch.device("cuda", local) if cuda else torch.device("cpu"))


def _fresh_store(timeout: timedelta) -> dist.Store:
    """The store of torchrun (or of rank 0) in which the ranks find each other.

    torchrun keeps one store for all restarts of a run, and new ranks would find in it the addresses of ranks
    that have ended (pytorch/pytorch#135712). So on one machine each restart has a prefix. On several machines
    torchrun's counters of restarts differ, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is what helps there.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return dist.PrefixStore(f"start {restart}", store) if one_machine else store


def use_bfloat16(ranks: Ranks, dtype: str) -> bool:
    """Whether matrix products run in bfloat16. dtype: auto (on a GPU they do), float32 or bfloat16."""
    return dtype == "bfloat16" or (dtype == "auto" and ranks.device.type == "cuda")


@contextmanager
def precision(ranks: Ranks, dtype: str, exact: bool = True) -> Iterator[None]:
    """A context in which matrix products run as `use_bfloat16` says. Norms, log-probs and loss stay in
    float32. exact: in float32 on a CPU, attention and gradients add up in float64 (grpo/exactness.py)."""
    on = use_bfloat16(ranks, dtype)
    # a cached cast would outlive the update
    how = {"dtype": torch.bfloat16, "enabled": on, "cache_enabled": False}
    with torch.autocast(ranks.device.type, **how), attention_sums(exact):
        yield


def end_with(error: BaseException, status: int | None) -> int:
    """Print the one line with which a run ends, once on each machine. -> the exit status: `status`, or
    LOST if another rank was lost. Without a status, raises the error again, unless a rank was lost."""
    if _roll is None:
        if status is None:
            raise error
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"\ntrain.py: {error}", file=sys.stderr, flush=True)
        else:
            # torchrun ends this rank as soon as the first one has printed and ended
            time.sleep(SECONDS_TO_PRINT)
        return status
    # torchrun sends it to the other ranks as soon as one has ended
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        lost = _roll.lost(error, expected=status is not None)
    except RuntimeError:
        lost = "rank 0, which holds the store of the process group, has died"
    if lost:
        line = f"on rank {_roll.rank}: {lost}. The same command goes on from the last checkpoint"
        if _roll.prints:
            print(f"\ntrain.py: {line}", file=sys.stderr, flush=True)
        # without torchrun, rank 0 holds the store that the others still read
        time.sleep(1.0 if _roll.rank == 0 else 0.0)
        # a thread or NCCL may still wait for the lost rank
        os._exit(LOST)
    if status is None:
        raise error
    if _roll.prints:
        print(f"\ntrain.py: {error}", file=sys.stderr, flush=True)
    return status


def leave_ranks() -> None:
    """Leave the process group. A second call does nothing."""
    global _roll
    _roll = None
    if dist.is_initialized():
        dist.destroy_process_group()


def arrive(place: str) -> None:
    """Note that this rank has reached a point where it waits for the others. place: its name, for people."""
    if _roll is not None:
        _roll.arrive(place)


def wait_for_main(what: str) -> None:
    """Wait, without a timeout, until rank 0 has reached this line: it downloads first."""
    if _roll is not None and _roll.rank == 0:
        _roll.store.set(what, "done")
    elif _roll is not None:
        _roll.store.wait([what], timedelta(days=7))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of the ranks' tensors, elementwise, on every rank."""
    if dist.is_initialized():
        values = values.clone()
        arrive("a sum over all ranks")
        dist.all_reduce(values)
    return values


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_objects(rows: list[T]) -> list[T]:
    """The lists of all ranks, concatenated, on every rank. For small plain values."""
    if not dist.is_initialized():
        return rows
    lists: list = [None] * dist.get_world_size()
    arrive("gathering small values")
    dist.all_gather_object(lists, rows)
    return [row for rows in lists for row in rows]


def sum_gradients(policy: nn.Module) -> None:
    """Add the gradients of all ranks, in one message, and round them to the parameters' dtype. Those of
    sharded matrices are both already (grpo/parallel/fsdp.py).

    A parameter without a gradient gets 0, so the optimizer treats it alike on any number of ranks.
    """
    whole = [p for p in policy.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    for p in policy.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    gradients: Sequence[Tensor] = [p.grad for p in whole if p.grad is not None]
    if dist.is_initialized() and whole:
        flat = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        gradients = flat.split([p.numel() for p in whole])
    for p, gradient in zip(whole, gradients):
        p.grad = gradient.view_as(p).to(p.dtype)


def wait_for_all() -> None:
    """Every rank reaches this line before any goes on."""
    if dist.is_initialized():
        arrive("a barrier")
        dist.barrier()


def new_group() -> dist.ProcessGroup | None:
    """A second gloo group, for the collectives of another thread. None on one rank."""
    if _roll is None or not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=_roll.timeout))
    return group if isinstance(group, dist.ProcessGroup) else None
