"""Does this tree compute what a commit computed?    python tests/bench/same.py COMMIT [--only CASE ...]

Each case is a run of a few steps with the built-in model, in float32 on the CPU with one thread a process. It
runs twice at the same time: by COMMIT, checked out into a temporary git worktree, and by this tree. Then two
things are compared:

    metrics: every value of metrics.jsonl, exactly. Seconds are left out; RENAMED and CHANGED list what
    differs on purpose.

    weights: every tensor of every checkpoint (policy and optimizer), bit for bit.

Prints a table and the first differences of each case. Exit status 1 if there is one, or if a run fails.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SMALL = """shapes seed=1 steps=4 prompts=4 group=4 cap=40 optim.lr=1e-3 optim.warmup=0 limit=400 eval.items=16
eval.every=2 eval.cap=40 save.every=2 save.keep=0 report.every=2 report.prompts=1 device=cpu""".split()
DYNAMIC = "loss.kl_coef=0 group=2 sampling=dynamic max_rounds=3"


@dataclass(frozen=True)
class Case:
    """A run: what it adds to SMALL, and how it is started."""

    arguments: str = ""
    ranks: int = 1
    resumed: bool = False
    """Run, delete the last checkpoint, run again."""


CASES = {
    "main recipe": Case(),
    "two updates": Case("loss.updates=2"),
    "dynamic sampling": Case(DYNAMIC),
    "batch-scaled": Case("advantage=batch"),
    "sft": Case("method=sft task=documents cap=128 eval.items=0"),
    "two ranks": Case(ranks=2),
    "two ranks, dynamic": Case(DYNAMIC, ranks=2),
    "resumed": Case(resumed=True),
}
"""Every kind of run that the redesign must not change."""

SETTINGS = [("  sampling=", "sampling=dynamic ", "")]
"""Settings that a tree may lack: (the words of --help that show it is there, its text in a case, what stands
in its place where it is not)."""

SECONDS = ("time/", "step_time", "eval/seconds", "save/")
"""Beginnings of the names of metrics that are times."""

RENAMED: dict[str, str] = {}
"""Metrics that have another name in this tree: {before: now}."""

CHANGED = {
    r"eval/(\w+/)?first_look_right": "new: the task's own measurement of a completion, in evaluations too",
    r"eval/(\w+/)?(wrong_to_right|right_to_wrong)": "a share of the completions, as in training; was a count",
    r"eval/(\w+/)?questions(/.+)?": "new: how many questions a score is about",
    "chance|completions/unthought_ratio": "new, for the guards",
    "guard/(kl_grows|format_only|no_thinking|shrinking|no_progress)": "new guards",
}
"""Metrics whose value or presence differs on purpose: {regular expression of the whole name: why}."""


@dataclass
class Found:
    """What a comparison found in one case."""

    steps: int = 0
    values: int = 0
    tensors: int = 0
    seconds: float = 0.0
    intended: set[str] = field(default_factory=set)
    differences: list[str] = field(default_factory=list)


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """`commit` in a temporary worktree, which is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="same-")) / "tree"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)
        shutil.rmtree(folder.parent)


def environment(tree: Path) -> dict[str, str]:
    """One thread, and every import from `tree`, wherever the package is installed from."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def help_of(tree: Path) -> str:
    """What `train.py --help` prints in a tree. Raises RuntimeError where grpo is imported from elsewhere."""
    code = "import sys, grpo, train; print(grpo.__path__[0]); sys.exit(train.main(['--help']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=environment(tree),
        capture_output=True,
        text=True,
        check=True,
    )
    place, _, text = done.stdout.partition("\n")
    if Path(place).resolve() != (tree / "grpo").resolve():
        raise RuntimeError(f"{tree}: grpo is imported from {place}")
    return text


def command(case: Case, help_text: str, out: Path) -> list[str]:
    """How a tree with this --help starts the case."""
    arguments = case.arguments
    for known, text, otherwise in SETTINGS:
        if known not in help_text:
            arguments = arguments.replace(text, otherwise)
    start = [sys.executable]
    if case.ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    return [*start, "train.py", *SMALL, *arguments.split(), f"out={out}"]


def run_both(commands: dict[Path, list[str]]) -> None:
    """Run one command in each tree, all at the same time. Raises RuntimeError with the output of one that
    fails."""
    running = {
        tree: subprocess.Popen(
            words,
            cwd=tree,
            env=environment(tree),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for tree, words in commands.items()
    }
    outputs = {tree: process.communicate()[0] for tree, process in running.items()}
    for tree, process in running.items():
        if process.returncode:
            where = "this tree" if tree == ROOT else "the commit"
            lines = outputs[tree].splitlines()
            said = [line for line in lines if line.startswith("train.py: ")] or lines[-20:]
            raise RuntimeError("\n".join([f"{where}: exit status {process.returncode}", *said]))


def rows(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without seconds."""
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(SECONDS)}
        for line in lines
    ]


def compare_metrics(before: Path, now: Path, found: Found) -> None:
    """Every value of two files of metrics."""
    old_rows = rows(before)
    new_rows = rows(now)
    found.steps = len(new_rows)
    if len(old_rows) != len(new_rows):
        found.differences.append(f"metrics.jsonl: {len(old_rows)} lines before, {len(new_rows)} now")
    for old, new in zip(old_rows, new_rows):
        renamed = {RENAMED[name]: name for name in old if name in RENAMED and name not in new}
        for name in sorted(({*old} - {*renamed.values()}) | {*new}):
            if why := [text for pattern, text in CHANGED.items() if re.fullmatch(pattern, name)]:
                found.intended.add(f"{name}: {why[0]}")
                continue
            was = old.get(renamed.get(name, name), "nothing")
            value = new.get(name, "nothing")
            found.values += 1
            if was != value:
                found.differences.append(f"step {new['step']}, {name}: {was} before, {value} now")


def compare_weights(before: Path, now: Path, found: Found) -> None:
    """Every tensor of all checkpoints of two runs."""
    files = [{str(file.relative_to(out)) for file in out.rglob("*.safetensors")} for out in (before, now)]
    for name in sorted(files[0] ^ files[1]):
        found.differences.append(f"{name}: only {'before' if name in files[0] else 'now'}")
    if not files[0] & files[1]:
        found.differences.append("no checkpoint in common")
    for name in sorted(files[0] & files[1]):
        old = load_file(before / name)
        new = load_file(now / name)
        found.tensors += len(new)
        if names := sorted({*old} ^ {*new}):
            found.differences.append(f"{name}: tensors that only one has: {', '.join(names[:3])}")
        for key in sorted({*old} & {*new}):
            if old[key].dtype != new[key].dtype or not torch.equal(old[key], new[key]):
                found.differences.append(f"{name}: {key}")


def compare(case: Case, helps: dict[Path, str], folder: Path) -> Found:
    """Run a case in both trees; the first is the commit's."""
    start = time.perf_counter()
    found = Found()
    outs = {tree: folder / str(number) for number, tree in enumerate(helps)}
    commands = {tree: command(case, text, outs[tree]) for tree, text in helps.items()}
    run_both(commands)
    if case.resumed:
        deleted = [max((out / "checkpoints").iterdir()) for out in outs.values()]
        for checkpoint in deleted:
            shutil.rmtree(checkpoint)
        run_both(commands)
        if not all(checkpoint.exists() for checkpoint in deleted):
            found.differences.append("a run did not go on from its checkpoint")
    before, now = outs.values()
    compare_metrics(before, now, found)
    compare_weights(before, now, found)
    found.seconds = time.perf_counter() - start
    return found


def main(argv: list[str] | None = None) -> int:
    """Compare, print the table. -> exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", help="what this tree is compared with")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="these cases only")
    parser.add_argument("--shown", type=int, default=5, help="differences printed of a case")
    asked = parser.parse_args(argv)
    results: dict[str, Found] = {}
    with checked_out(asked.commit) as tree, tempfile.TemporaryDirectory() as folder:
        helps = {place: help_of(place) for place in (tree, ROOT)}
        print(f"{'case':<20}{'lines':>6}{'values':>8}{'tensors':>9}{'different':>11}{'seconds':>9}")
        for name in asked.only:
            try:
                found = compare(CASES[name], helps, Path(folder) / name)
            except RuntimeError as error:
                found = Found(differences=[str(error)])
            results[name] = found
            counts = f"{found.steps:>6}{found.values:>8}{found.tensors:>9}{len(found.differences):>11}"
            print(f"{name:<20}{counts}{found.seconds:>9.0f}", flush=True)
    for name, found in results.items():
        for line in found.differences[: asked.shown]:
            print(f"{name}: {line}")
    for name in sorted(set().union(*(found.intended for found in results.values()))):
        print(f"not compared: {name}")
    return int(any(found.differences for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
