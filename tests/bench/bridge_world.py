"""Why Vision-R1 asks for a pseudo-chain, on the built-in world:  python tests/bench/bridge_world.py
[--questions 2000] [--seed 0] [--out runs/bridge_world]

The built-in base describes its pictures by our own rollout, a text-only reasoner thinks over the text, and
filters keep the right chains. This is done twice: with a caption of everything ("Describe the picture."), and
with one that has colours and shapes only ("List the shapes."), which lacks what three of the four tasks ask
for. Prints the kept share of each task with its 95 % interval (Wilson), beside chance; the last line is one
JSON object. The folder has the replies, the results and report.html of both. What is there already is read.
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


def bridge(folder: Path, prompt: str, questions: int, seed: int) -> float:
    """Run the bridge. -> seconds. Raises SystemExit where it fails."""
    start = time.perf_counter()
    settings = [f"out={folder}", f"describe.prompt={prompt}", f"limit={questions}", f"seed={seed}"]
    with contextlib.redirect_stdout(sys.stderr):
        if status := program.main(["shapes", *settings]):
            raise SystemExit(status)
    return time.perf_counter() - start


def kept_by_task(folder: Path) -> Counter[str]:
    """The chains in train.jsonl."""
    return Counter(json.loads(line)["task"] for line in (folder / "train.jsonl").read_text().splitlines())


def share(kept: int, asked: int) -> dict:
    """A kept share with its interval."""
    return {"kept": kept, "asked": asked, "share": kept / asked, "interval": wilson(kept, asked)}


def main(arguments: list[str] | None = None) -> dict:
    """Measure and print. -> the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bridge_world")
    args = parser.parse_args(arguments)
    # the tasks take turns
    each = args.questions // len(TASKS)
    found: dict[str, dict] = {}
    seconds = {}
    for name, prompt in CAPTIONS.items():
        folder = args.out / f"{name}_{args.questions}_{args.seed}"
        seconds[name] = round(bridge(folder, prompt, each * len(TASKS), args.seed), 1)
        kept = kept_by_task(folder)
        found[name] = {task: share(kept[task], each) for task in TASKS}
        found[name]["all"] = share(kept.total(), each * len(TASKS))
    chance = CHANCE | {"all": sum(CHANCE.values()) / len(CHANCE)}
    text = lambda row: "{share:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]".format(**row)
    rows = [
        [
            task,
            str(found["listed"][task]["asked"]),
            f"{chance[task]:.1%}",
            *(text(found[name][task]) for name in CAPTIONS),
        ]
        for task in (*TASKS, "all")
    ]
    print(table(["task", "questions", "chance", "kept, described", "kept, listed"], rows))
    measured = {"kept": found, "chance": chance, "seconds": seconds, "seed": args.seed, "about": about()}
    print(json.dumps(measured))
    return measured


if __name__ == "__main__":
    main()
