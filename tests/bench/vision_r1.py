"""The whole of Vision-R1 on the built-in world:  python tests/bench/vision_r1.py [--out DIR]

    bridge      the built-in base describes pictures; a text-only reasoner thinks about its words; filters
    cold        the base imitates the chains that were kept                    (recipe shapes_cold)
    ptst        RL with a hard reward, 64 tokens x 16, then 128 x 8            (recipe shapes_ptst)
    long        the same from the cold start with 256 x 4, as Vision-R1-Long
    short       with 64 x 16 throughout
    long16      with 256 x 16: four times the samples of `long`
    evaluation  of the base and of each of these, on held-out scenes: greedy, and sampled

Each stage is a command of this repository. Its files and its report stay in --out: a stage that is there is
read, not repeated. Prints a table; the last line is one JSON object with `minutes` (by the clock),
`processor_minutes` and, for each stage:

    kept        of what the stage could learn from: chains that the filters kept (bridge), chains within the
                cap (cold), groups whose rewards differ (RL)
    accuracy    of the reasoner's replies (bridge), else of the policy's sampled answers behind the stage
    length      mean tokens of a completion, sampled; of a chain, in words (bridge)
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.sources.table import open_split
from tests.bench.about import about

# the questions of the bridge are not those of RL
BRIDGE_SEED = 7
ARMS = {
    "ptst": [],
    "long": ["stages=[]", "group=4", "cap=256"],
    "short": ["stages=[]", "group=16", "cap=64"],
    "long16": ["stages=[]", "group=16", "cap=256"],
}
SAMPLED = "sampled"


def processor_seconds() -> float:
    """What the commands so far have used of the processor."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Pipeline:
    """Runs the stages in one folder. found: {stage: its figures}."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = (ROOT / args.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, dict] = {}

    def run(self, stage: str, *command: str) -> None:
        """Run a command of this repository, with its words in OUT/STAGE.log. Its seconds by the clock and of
        the processor are kept in OUT/seconds.json; a stage that is there is not run again."""
        if stage in self.seconds():
            return
        print("$ python " + " ".join(command), flush=True)
        start, used = time.perf_counter(), processor_seconds()
        with open(self.out / f"{stage}.log", "w") as log:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=log, stderr=log)
        took = [round(time.perf_counter() - start, 1), round(processor_seconds() - used, 1)]
        (self.out / "seconds.json").write_text(json.dumps(self.seconds() | {stage: took}))

    def seconds(self) -> dict[str, list[float]]:
        """{stage: seconds that its command took by the clock, and of the processor}."""
        file = self.out / "seconds.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def bridge(self) -> Path:
        """-> the file of chains."""
        folder, asked = self.out / "bridge", self.args.questions
        file = folder / "train.jsonl"
        settings = [f"out={folder}", f"limit={asked}", f"seed={BRIDGE_SEED}"]
        self.run("bridge", "-m", "grpo.bridge", "shapes", *settings)
        kept = [json.loads(line) for line in file.read_text().splitlines()]
        replies = [json.loads(line) for line in (folder / "3-reason.jsonl").read_text().splitlines()]
        letter = {e.uid: f"({e.letter})" for e in open_split("shapes", None, "train", asked, BRIDGE_SEED)}
        # the last reply to a question is the one that counts
        last = {reply["uid"]: reply["text"].strip() for reply in replies}
        self.found["bridge"] = {
            "kept": len(kept) / asked,
            "accuracy": fmean(text == letter[uid] for uid, text in last.items()),
            "length": fmean(len(row["extra"]["documents"][0].split()) for row in kept),
        }
        return file

    def train(self, stage: str, recipe: str, *settings: str) -> Path:
        """-> the run's folder."""
        folder = self.out / stage
        settings = (f"out={folder}", f"seed={self.args.seed}", *settings)
        self.run(stage, "train.py", recipe, *settings)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "loss" in row]
        left = "frac_skipped" if recipe == "shapes_cold" else "frac_reward_zero_std"
        self.found[stage] = {"kept": 1 - fmean(row.get(left, 0.0) for row in rows)}
        if recipe == "shapes_ptst":
            self.found[stage]["cut in the first 10 steps"] = fmean(
                row["completions/clipped_ratio"] for row in rows[:10]
            )
            self.found[stage]["tokens"] = rows[-1]["num_tokens"]
        return folder

    def evaluate(self, stage: str, model: str) -> None:
        """Add a policy's scores to its stage."""
        file = self.out / f"{stage}-evaluation.json"
        how = ["--items", str(self.args.items), "--samples", str(self.args.samples), "--cap", "320"]
        self.run(f"{stage}-evaluation", "evaluate.py", "--model", model, "--json", str(file), *how)
        answers = json.loads(file.read_text())
        greedy, sampled = answers["scores"], answers["more"][SAMPLED]["scores"]
        self.found.setdefault(stage, {})
        self.found[stage] |= {
            "accuracy": sampled["accuracy"],
            "length": sampled["mean_length"],
            "greedy": {key: greedy[key] for key in ("accuracy", "mean_length", "truncated")},
            "truncated": sampled["truncated"],
        }


def table(found: dict[str, dict], seconds: dict[str, list[float]]) -> str:
    """The stages as Markdown."""
    heads = (
        "stage",
        "kept",
        "accuracy",
        "length",
        "cut",
        "greedy accuracy",
        "greedy length",
        "greedy cut",
        "seconds",
        "of the processor",
    )
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    share = lambda value: "" if value is None else f"{value:.1%}"
    tokens = lambda value: "" if value is None else f"{value:.1f}"
    for stage, each in found.items():
        greedy = each.get("greedy", {})
        cells = [share(each.get("kept")), share(each["accuracy"]), tokens(each["length"])]
        cells += [share(each.get("truncated")), share(greedy.get("accuracy"))]
        cells += [tokens(greedy.get("mean_length")), share(greedy.get("truncated"))]
        times = [took for name, took in seconds.items() if name in (stage, f"{stage}-evaluation")]
        cells += [f"{sum(part):.0f}" for part in zip(*times)]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Run what is not there yet, and print. -> the JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/vision_r1_shapes", help="folder of all stages")
    parser.add_argument("--questions", type=int, default=1600, help="questions that the bridge asks")
    parser.add_argument("--items", type=int, default=128, help="held-out questions of an evaluation")
    parser.add_argument("--samples", type=int, default=4, help="sampled answers to each of them")
    parser.add_argument("--seed", type=int, default=0, help="of the cold start and of RL")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), help="runs of RL; none: no RL")
    parser.add_argument("--settings", nargs="*", default=[], help="settings for all runs of train.py")
    args = parser.parse_args(argv)
    work = Pipeline(args)
    chains = work.bridge()
    work.evaluate("base", "tiny")
    cold = work.train("cold", "shapes_cold", f"data={chains}", *args.settings)
    work.evaluate("cold", str(cold))
    for arm in args.arms:
        run = work.train(arm, "shapes_ptst", f"model={cold}", *ARMS[arm], *args.settings)
        work.evaluate(arm, str(run))
    seconds = work.seconds()
    print(table(work.found, seconds))
    minutes, processor = (round(sum(part) / 60, 2) for part in zip(*seconds.values()))
    found = {"bench": "vision_r1", "minutes": minutes, "processor_minutes": processor}
    found |= {"stages": work.found, "seconds": seconds, "about": about()}
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
