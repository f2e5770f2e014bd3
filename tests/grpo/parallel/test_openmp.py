"""Whether other programs hold the cores; what is done then, and undone; and that every program watches it."""

import ast
import os
import sys
import threading
import time
from pathlib import Path

from grpo.parallel.openmp import CALM_LOOKS, Crowding, libgomp, sleep_short, waited, watch_cores

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
MODULE = "grpo.parallel.openmp"
OWN = {"grpo", "models"}


def test_crowded_at_once_and_calm_after_a_while():
    """A share between the two limits changes nothing."""
    crowding = Crowding()
    assert [crowding.look(share) for share in (0.0, 0.05, 0.2, 0.05, 0.0)] == [False, False, True, True, True]
    assert [crowding.look(0.0) for _ in range(CALM_LOOKS - 1)] == [True] * (CALM_LOOKS - 2) + [False]
    assert not crowding.look(0.05) and crowding.look(0.9)
    # a look that is not calm begins the count again
    assert all(crowding.look(share) for share in [0.0] * (CALM_LOOKS - 1) + [0.05] + [0.0] * (CALM_LOOKS - 1))
    assert not crowding.look(0.0)


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_a_person_has_set_stays(monkeypatch, name):
    monkeypatch.setenv(name, "7")
    assert watch_cores() is None


linux = pytest.mark.skipif(waited() is None or libgomp() is None, reason="no schedstat, or no libgomp")


@linux
def test_the_main_thread_has_waited():
    before = waited()
    assert before is not None and before >= 0
    time.sleep(0.01)
    assert waited() >= before


@linux
def test_threads_sleep_while_it_is_crowded_and_end_then():
    """As many as processors. A product stays the same, bit for bit."""
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    product = x @ x.T
    threads = lambda: len(os.listdir("/proc/self/task"))
    before = threads()
    calm = threading.Event()
    thread = threading.Thread(target=sleep_short, args=(libgomp(), calm))
    thread.start()
    until = time.monotonic() + 10
    while threads() < before + 1 + len(os.sched_getaffinity(0)) and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() == before + 1 + len(os.sched_getaffinity(0))
    assert torch.equal(x @ x.T, product)
    calm.set()
    thread.join()
    while threads() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() == before


def imports_of(path: Path) -> list[str]:
    """The modules that a file imports at its top level, in order, without the standard library."""
    found = []
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(str(node.module))
    return [name for name in found if name.split(".")[0] not in sys.stdlib_module_names]


def computes(path: Path) -> bool:
    """Whether a benchmark is a program that runs the model in its own process."""
    imported = {name.split(".")[0] for name in imports_of(path)}
    return (
        "__main__" in path.read_text("utf-8") and "torch" in imported and bool(imported & {"grpo", "models"})
    )


PROGRAMS = [ROOT / name for name in ("train.py", "evaluate.py", "docs/minimal.py", "tests/conftest.py")]
BENCHMARKS = [path for path in sorted((ROOT / "tests" / "bench").glob("*.py")) if computes(path)]


@pytest.mark.parametrize("path", [*PROGRAMS, *BENCHMARKS], ids=lambda path: path.stem)
def test_every_program_watches(path):
    assert imports_of(path)[0] == MODULE


def test_benchmarks_are_found():
    assert len(BENCHMARKS) >= 10


def test_it_loads_no_torch_itself():
    """Nor does a package above it."""
    for file in ("grpo/__init__.py", "grpo/parallel/__init__.py", "grpo/parallel/openmp.py"):
        assert not imports_of(ROOT / file)
