"""How long OpenMP's threads wait awake for each other. Every program here imports this.

PyTorch splits an operation over OpenMP's threads. A thread that is ready first waits for the others: with
libgomp (PyTorch's wheels for Linux) it runs an empty loop for milliseconds, and only then sleeps. On a quiet
machine that is fastest. If other programs run, the thread it waits for may need that very core. Then two runs
on two cores take many times as long as one (docs/ranks.md).

libgomp itself sleeps at once while a process has more of its threads than processors (`do_spin` in its
config/linux/wait.h). `watch_cores` gives the process such threads, asleep, while other programs hold the
cores. It asks the kernel how long the main thread has waited for a core. No result of an operation changes,
because its number of threads stays.
"""

import ctypes
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

# Seconds between two looks, in the background.
PERIOD = 0.25
# Other programs hold the cores if the main thread has waited for one for this share of the time, and no
# longer if it was less than CALM for CALM_LOOKS looks.
CROWDED = 0.1
CALM = 0.03
CALM_LOOKS = 8


@dataclass
class Crowding:
    """Whether other programs hold the cores. calm: looks in a row at which they did not."""

    crowded: bool = False
    calm: int = 0

    def look(self, share: float) -> bool:
        """share: of the time since the last look, in which the main thread waited for a core."""
        self.calm = self.calm + 1 if share < CALM else 0
        self.crowded = share > CROWDED or (self.crowded and self.calm < CALM_LOOKS)
        return self.crowded


def watch_cores() -> threading.Thread | None:
    """Watch from now on, in a thread that ends with the process. None: the kernel does not say how long a
    thread waits, or the person has said how OpenMP's wait (GOMP_SPINCOUNT, OMP_WAIT_POLICY)."""
    if waited() is None or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return None
    thread = threading.Thread(target=_watch, name="watch_cores", daemon=True)
    thread.start()
    return thread


def libgomp() -> ctypes.CDLL | None:
    """The library, if this process has loaded it."""
    maps = Path("/proc/self/maps")
    found = re.search(r"/\S*libgomp[^/\s]*$", maps.read_text(), re.M) if maps.is_file() else None
    return ctypes.CDLL(found.group()) if found else None


def waited() -> float | None:
    """Seconds that the main thread has been ready to run and had no core; None if the kernel does not say."""
    try:
        return int(Path(f"/proc/self/task/{os.getpid()}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


def _watch() -> None:
    crowding = Crowding()
    calm: threading.Event | None = None
    before, at = waited(), time.monotonic()
    while True:
        time.sleep(PERIOD)
        now, then = waited(), time.monotonic()
        if before is None or now is None:
            return
        crowded = crowding.look((now - before) / (then - at))
        before, at = now, then
        # one thread waits for no other
        if crowded and calm is None and os.environ.get("OMP_NUM_THREADS") != "1" and (library := libgomp()):
            calm = threading.Event()
            threading.Thread(target=sleep_short, args=(library, calm), daemon=True).start()
        elif not crowded and calm is not None:
            calm.set()
            calm = None


def sleep_short(library: ctypes.CDLL, calm: threading.Event) -> None:
    """Have one OpenMP thread more than processors, asleep, until it is calm: they belong to this thread, and
    end with it. Until then libgomp's threads hardly wait awake."""
    count = len(os.sched_getaffinity(0)) + 1
    # They have to be given something to do: a function of the C library without an effect.
    nothing = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p)
    library.GOMP_parallel(nothing, None, ctypes.c_uint(count), ctypes.c_uint(0))
    calm.wait()


WATCH = watch_cores()
