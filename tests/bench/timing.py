"""What the benchmarks of speed share: taking turns, measuring memory, printing a table, writing a record.

Two programs are compared by running them in turns in one process, so that other load on the machine slows
both. The figure is the median of the turns. A speedup is the median over the rounds of the ratio within a
round.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.about import about

PROCESS_STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
RECORDED = Path(__file__).resolve().parents[2] / "docs" / "results" / "speed" / "measured.json"


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all of them have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"turns that each takes (default {rounds})")
    made.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="processor: of this process alone, for a machine that is shared (set OMP_NUM_THREADS=1)",
    )
    made.add_argument("--quick", action="store_true", help="small sizes, one round: does it run at all?")
    made.add_argument(
        "--keep", action="store_true", help="put the result into docs/results/speed/measured.json as well"
    )
    return made


def sized(options: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options, with the sizes of a rollout among them."""
    for name, default in (("--prompts", 16), ("--group", 12), ("--cap", 40)):
        options.add_argument(name, type=int, default=default)
    return options


def sizes(args: argparse.Namespace) -> tuple[int, int, int, int]:
    """(prompts, group, cap, rounds), small ones with --quick."""
    return (2, 2, 4, 1) if args.quick else (args.prompts, args.group, args.cap, args.rounds)


def take_turns(
    works: dict[str, Callable[[], object]], rounds: int, clock: str = "wall"
) -> dict[str, list[float]]:
    """Run each work once untimed, then `rounds` times in turns, every second round in reversed order. ->
    seconds of each, by a clock of CLOCKS."""
    now = CLOCKS[clock]
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works)[:: -1 if number % 2 else 1]:
            start = now()
            works[name]()
            seconds[name].append(now() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times longer the first takes: the median over the rounds."""
    return round(median(a / b for a, b in zip(slow, fast, strict=True)), 3)


def attended(q: torch.Size, k: torch.Size, causal: bool) -> int:
    """Operations of one product of attention: as many multiplications and additions as queries see keys,
    times the size of a head. q (..., queries, E), k (..., keys, E)."""
    return 2 * q.numel() * k[-2] // (2 if causal else 1)


# Kernels whose operations PyTorch's counter does not know, from the shapes of what they are given.
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flash(q, k, v, dropout=0.0, causal=False, **_):
    return 2 * attended(q, k, causal)


def _flash_backward(g, q, k, v, out, lse, dropout, causal, **_):
    return 5 * attended(q, k, causal)


OPERATIONS = {
    torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a.numel() * b[-1],
    _FLASH: _flash,
    _FLASH_BACKWARD: _flash_backward,
}


def operations(work: Callable[[], object]) -> tuple[int, int]:
    """Floating-point operations of a work, counted by PyTorch where they run: of its linear layers, and of
    attention (batched products are attention's alone)."""
    with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
        work()
    count = {str(kernel): flops for kernel, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for kernel, flops in count.items() if "attention" in kernel or "bmm" in kernel)
    return sum(count.values()) - attention, attention


def resident(what: str) -> int:
    """Bytes of this process, VmRSS: now, or VmHWM: at most since the last reset. Elsewhere than on Linux
    the peak of its whole life."""
    if PROCESS_STATUS.is_file():
        return 1024 * int(
            next(line.split()[1] for line in PROCESS_STATUS.read_text().splitlines() if line.startswith(what))
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def extra_memory(work: Callable[[], object]) -> int:
    """Bytes by which this process grew, at its peak, while it did a work. Ask it in a process that has
    done nothing larger before."""
    if RESET_PEAK.is_file():
        # the peak is counted from here
        RESET_PEAK.write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


class PeakBytes(TorchDispatchMode):
    """A context that counts the bytes of all tensors made inside: `now` of those that still exist, `peak` of
    the most that existed at the same time. Fake tensors count like real ones."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self._note((arguments, keywords), mine=False)
        found = operator(*arguments, **(keywords or {}))
        self._note(found, mine=True)
        return found

    def _note(self, tensors, mine: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            # a storage's Python object lives as long as the storage
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = size = storage.nbytes() if mine else 0
                weakref.finalize(storage, self._free, storage._cdata)
                self.now += size
                self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def kept_for_backward(policy: torch.nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps of a forward, each storage once, without the parameters."""
    parameters, kept, alive = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # an address must not be given away before all are counted
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def child(script: str, *args: str) -> dict:
    """Run a script as a process of its own. -> the JSON object of its last line."""
    # glibc raises its threshold for what it gives back to the system as large pieces are freed; set, it stays
    # where it is, and a peak is what was alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, script, *args], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def finish(name: str, head: list[str], rows: list[list], found: dict, args: argparse.Namespace) -> dict:
    """Print the table and, as the last line, the JSON object; with --keep, put both under `name` into
    measured.json. -> the object."""
    cells = [head, *([shown(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    for line in cells:
        print(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
        )
    command = f"python tests/bench/{name}.py " + " ".join(word for word in sys.argv[1:] if word != "--keep")
    where = about() | {"load": round(os.getloadavg()[0], 1), "clock": args.clock, "command": command.strip()}
    found = {"bench": name, **found, "about": where}
    # A record of its own beside the exact one.
    name = f"{name}_fast" if getattr(args, "exact", "on") == "off" else name
    if args.keep:
        RECORDED.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(RECORDED.read_text("utf-8")) if RECORDED.exists() else {}
        kept[name] = found | {"table": cells}
        RECORDED.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    print(json.dumps(found))
    return found


def shown(cell: object) -> str:
    """A cell of a table: three digits of a float, all of a larger one."""
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
