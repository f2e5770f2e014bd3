"""Several ranks in a test: forked, so that nothing is imported again, and joined over gloo."""

import os
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def together(count: int, work, *, seconds: float = 100) -> list[str]:
    """Call work(rank) on `count` ranks. -> for each "" or what it raised; "killed" for one that a signal
    ended, or time."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [os.fork() or _rank(Path(folder), rank, count, work) for rank in range(count)]
        said, until = [], time.monotonic() + seconds
        for rank, process in enumerate(processes):
            while not (done := os.waitpid(process, os.WNOHANG))[0]:
                if time.monotonic() > until:
                    os.kill(process, signal.SIGKILL)
                time.sleep(0.01)
            report = Path(folder) / str(rank)
            said.append(
                "killed" if os.WIFSIGNALED(done[1]) else report.read_text() if report.exists() else ""
            )
    return said


def _rank(folder: Path, rank: int, count: int, work) -> None:
    """What a forked process does. Never returns."""
    try:
        # the parent's other threads are not here
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=60),
        )
        work(rank)
    except BaseException:
        (folder / str(rank)).write_text(traceback.format_exc())
    finally:
        sys.stderr.flush()
        os._exit(0)
