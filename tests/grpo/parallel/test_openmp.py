"""Threads wait briefly: what is set, what the person has set, and that it is set before torch is loaded."""

import ast
import sys
from pathlib import Path

from grpo.parallel.openmp import SPIN_COUNT, wait_briefly

import pytest

ROOT = Path(__file__).resolve().parents[3]
MODULE = "grpo.parallel.openmp"
OWN = {"grpo", "models"}


SHORT = {"GOMP_SPINCOUNT": SPIN_COUNT}


@pytest.mark.parametrize(
    "own, added",
    [
        ({}, SHORT),
        ({"OMP_NUM_THREADS": "4", "KMP_BLOCKTIME": "0"}, SHORT),
        ({"GOMP_SPINCOUNT": "infinity"}, {}),
        ({"OMP_WAIT_POLICY": "active"}, {}),
        ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "7"}, {}),
    ],
)
def test_what_a_person_has_set_stays(own, added):
    environment = dict(own)
    wait_briefly(environment)
    assert environment == own | added


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
def test_every_program_sets_it_before_it_loads_torch(path):
    assert imports_of(path)[0] == MODULE


def test_benchmarks_are_found():
    assert len(BENCHMARKS) >= 10


def test_it_loads_no_torch_itself():
    """Nor does a package above it."""
    for file in ("grpo/__init__.py", "grpo/parallel/__init__.py", "grpo/parallel/openmp.py"):
        assert not imports_of(ROOT / file)
