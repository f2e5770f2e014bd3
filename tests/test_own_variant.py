"""docs/your-own-variant.md, done in a copy of the repository: its functions, rows, recipe and run."""

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "your-own-variant.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# in this order on the page
ROWS, REWARD, RECIPE, COMMANDS = (body for language, body in BLOCKS if not language)
FUNCTIONS = [
    example.source
    for language, body in BLOCKS
    for example in (doctest.DocTestParser().get_examples(body) if language == "python" else ())
    if example.source.startswith("def ")
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with what the page adds."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("grpo", "models", "data", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "evaluate.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    with (folder / "grpo" / "variants.py").open("a") as variants:
        variants.write("\n\n".join(["", *FUNCTIONS, ROWS]))
    (folder / "my_rewards.py").write_text(REWARD)
    (folder / "mine.yaml").write_text(RECIPE)
    return folder


def python(folder, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
    )


def test_the_page_trains(copy):
    assert "train.py mine.yaml" in COMMANDS
    small = (
        "steps=1",
        "prompts=4",
        "group=4",
        "cap=40",
        "eval.items=0",
        "save.every=0",
        "out=run",
        "device=cpu",
    )
    done = python(copy, "train.py", "mine.yaml", *small)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1]
    assert all("rewards/my_rewards.py:brief/mean" in row for row in rows if "loss" in row)


def test_the_page_passes_the_property_tests(copy):
    assert "tests/grpo/test_variants.py" in COMMANDS
    select = ("tests/grpo/test_variants.py", "-k", "every or nothing_is_read or invariant")
    done = python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *select)
    assert done.returncode == 0, done.stdout
