"""Why Vision-R1 asks for a pseudo-chain, on the built-in world:  python tests/bench/bridge_world.py
[--questions 1200] [--seeds 0] [--out runs/bridge_world]

The built-in base describes its pictures by our own rollout, a text-only reasoner thinks over the text, and
filters keep the right chains. This is done twice: with a caption of everything ("Describe the picture."), and
with one that has colours and shapes only ("List the shapes."), which lacks what three of the four tasks ask
for. Prints the kept share of each task with its 95 % interval (Wilson), beside chance; the last line is one
JSON object, which is also written to measured.json there (docs/results/bridge/ has the recorded one). The
folder has the replies, the results and report.html of both. A bridge that is there already is read.
"""

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import grpo.parallel.openmp

from data.shapes.world import CHANCE, TASKS
from grpo.bridge import __main__ as program
from grpo.evaluation.statistics import wilson
from grpo.evaluation.tables import table
from tests.bench.about import about

CAPTIONS = {"described": "describe_picture", "listed": "list_shapes"}
HEAD = ["task", "seed", "questions", "chance", "kept, everything described", "kept, shapes listed"]


def bridge(folder: Path, prompt: str, questions: int, seed: int) -> float:
    """Run the bridge, unless it is there. -> seconds. Raises SystemExit where it fails."""
    file = folder / "seconds.json"
    if not file.exists():
        start = time.perf_counter()
        settings = [f"out={folder}", f"describe.prompt={prompt}", f"limit={questions}", f"seed={seed}"]
        with contextlib.redirect_stdout(sys.stderr):
            status = program.main(["shapes", *settings])
        # a caption that does not end is parked, and its chain is not kept
        if status not in (program.DONE, program.LEFT):
            raise SystemExit(status)
        file.write_text(json.dumps(round(time.perf_counter() - start, 1)))
    return json.loads(file.read_text())


def kept_by_task(folder: Path) -> Counter[str]:
    """The chains in train.jsonl."""
    return Counter(json.loads(line)["task"] for line in (folder / "train.jsonl").read_text().splitlines())


def share(kept: int, asked: int) -> dict:
    """A kept share with its interval, under the names of an accuracy."""
    return {"kept": kept, "asked": asked, "accuracy": kept / asked, "interval": wilson(kept, asked)}


def measure(out: Path, each: int, seed: int) -> dict:
    """Both bridges of a seed. each: questions of a task. -> {caption: {task: share}} and seconds."""
    found: dict = {"seconds": {}}
    for name, prompt in CAPTIONS.items():
        folder = out / f"{name}_{each}_{seed}"
        # the tasks take turns
        found["seconds"][name] = bridge(folder, prompt, each * len(TASKS), seed)
        kept = kept_by_task(folder)
        found[name] = {task: share(kept[task], each) for task in TASKS}
        found[name]["all"] = share(sum(kept.values()), each * len(TASKS))
    return found


def main(arguments: list[str] | None = None) -> dict:
    """Measure and print. -> the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=1200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bridge_world")
    args = parser.parse_args(arguments)
    each = args.questions // len(TASKS)
    found = {f"seed{seed}": measure(args.out, each, seed) for seed in args.seeds}
    if len(found) > 1:
        found["seeds together"] = together([*found.values()])
    measured = {**found, "chance": CHANCE | {"all": sum(CHANCE.values()) / len(CHANCE)}, "about": about()}
    print(table(HEAD, rows(measured)))
    (args.out / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(json.dumps(measured))
    return measured


def together(runs: list[dict]) -> dict:
    """The shares of several seeds as one."""
    return {
        caption: {
            task: share(*(sum(run[caption][task][name] for run in runs) for name in ("kept", "asked")))
            for task in runs[0][caption]
        }
        for caption in CAPTIONS
    }


def rows(measured: dict) -> list[list[str]]:
    """The table of what `main` measured, a row for each task and seed."""
    text = "{accuracy:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]".format_map
    return [
        [
            task,
            name.removeprefix("seed").removeprefix("s "),
            str(found["listed"][task]["asked"]),
            f"{chance:.1%}",
        ]
        + [text(found[caption][task]) for caption in CAPTIONS]
        for task, chance in measured["chance"].items()
        for name, found in measured.items()
        if name.startswith("seed")
    ]


if __name__ == "__main__":
    main()
