"""The findings of both papers in miniature:  python tests/bench/findings.py [--only a b] [--list]

findings.yaml beside this file says what is run. A finding has arms. An arm is a row of runs of train.py, each
from the policy of the run before; it is run for each of its seeds, and its last policy is asked the sets of
questions that the finding names (tests/bench/ask.py). A record of each arm and seed goes to --json.

Everything that exists is kept. The folder of a run is named after its recipe and a hash of all that decides
its numbers: the base's weights and every setting, of the runs before it too. So arms that begin alike share
runs, and a changed setting is another run. A run that was stopped goes on. A record is kept while its hash is
that of its arm, also where the runs are gone. Killed anywhere, the same command goes on to the same numbers.

The first seeds of all arms come first, then the second ones. --jobs 2 runs two arms at a time, with one
thread each, which is how two cores do most. The last line counts the records; the exit status is 1 if an arm
failed.
"""

import argparse
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import grpo.parallel.openmp

import train
from grpo.storage.atomic import write_whole
from grpo.storage.checkpoint import complete
from grpo.storage.model_folder import load_model, model_folder
from tests.bench.about import about
from tests.bench.ask import CURVE, EVALS, Policy, first, followed
from tests.bench.findings_plan import Arm, Plan, Stage, hashed, is_measured, listed, read_spec
from tests.bench.pushes import pushes

SPEC = Path(__file__).with_suffix(".yaml")


@contextlib.contextmanager
def locked(folder: Path, waiting: str = "") -> Iterator[None]:
    """Hold a folder, which is made; other processes that want it wait. waiting: said before a wait."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                print(waiting, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def run_stage(stage: Stage, title: str) -> None:
    """Train, unless it is done: stage.json in the folder then says so, with the command and its seconds. The
    words of the run go to FOLDER.log. Raises RuntimeError if training fails."""
    note, log = stage.folder / "stage.json", stage.folder.with_name(stage.folder.name + ".log")
    with locked(stage.folder, f"{title}: another process runs {stage.folder.name}"):
        done = json.loads(note.read_text()) if note.exists() else {"seconds": 0.0}
        if done.get("finished"):
            return
        print(f"{title}: train.py {' '.join(stage.settings)}", flush=True)
        start = time.perf_counter()
        with open(log, "a") as words, contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
            status = train.main(list(stage.settings))
        done = {
            "command": " ".join(stage.settings),
            "seconds": round(done["seconds"] + time.perf_counter() - start, 1),
        }
        write_whole(note, json.dumps(done | {"finished": status == 0}, indent=1) + "\n")
    if status > 128:
        raise KeyboardInterrupt
    if status:
        said = log.read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"train.py ended with status {status}: {' '.join(said)} (see {log})")
    print(f"{title}: {done['seconds'] / 60:.1f} minutes", flush=True)


class Measured:
    """Asks the last policy of an arm. Each answer is kept as a file of its folder, for other arms as well."""

    def __init__(self, arm: Arm, plan: Plan) -> None:
        self.arm = arm
        last = arm.stages[-1] if arm.stages else None
        folder = last.folder if last else plan.out / f"base-{arm.start[:8]}"
        self.kept = folder / "asked"
        self.record: dict[str, Any] = {"sets": {}, "sampled": {}}
        model = model_folder(str(last.folder) if last else plan.models["{base}"])
        if arm.entry.best and last:
            model = self.best(last)
        self.policy = Policy(model, arm.entry.cap)

    def best(self, stage: Stage) -> Path:
        """The kept weights of the step whose evaluation was best; the first of equals."""
        evals = followed(stage.folder, EVALS, "eval/accuracy")
        folders = {int(path.name[5:]): path for path in (stage.folder / "weights").iterdir()}
        folders |= {stage.cfg.steps: complete(stage.folder)[-1]}
        scores = {step: right for step, right in zip(evals["step"], evals["accuracy"]) if step in folders}
        step = self.record["best_step"] = max(scores, key=lambda step: scores[step])
        return folders[step]

    def once(self, name: str, ask: str, *how: Any, **options: Any) -> dict[str, Any]:
        """What a method of the policy gives for these arguments, from the file if it is there."""
        digest = hashed([ask, how, options, self.policy.cap, self.policy.folder.name])
        file = self.kept / f"{name}-{digest[:8]}.json"
        with locked(self.kept):
            if not file.exists():
                write_whole(file, json.dumps(getattr(self.policy, ask)(*how, **options)))
            return json.loads(file.read_text())

    def all(self) -> dict[str, Any]:
        """The part of the record that is about answers."""
        entry, asked, record = self.arm.entry, self.arm.asked, self.record
        main = entry.measure[0]
        prefix = ""
        if entry.prefix:
            record["prefix"] = self.once("prefix", "best_prefix", asked["sets"][main], **asked["prefixes"])
            prefix = record["prefix"]["best"]
        for name in entry.measure:
            how = {"items": asked["items"], "prefix": prefix}
            record["sets"][name] = self.once(name, "ask", asked["sets"][name], **how)
        how = asked["sampled"] | {"prefix": prefix}
        sampled = record["sampled"][main] = self.once(f"{main}-sampled", "ask", asked["sets"][main], **how)
        record |= {name: sampled[name] for name in ("lengths", "sound", "passes", "texts")}
        if entry.passes:
            many = self.once("passes", "ask", asked["sets"][entry.passes], **asked["passes"])
            record["passes"] = many["passes"]
        return record


def pushed(arm: Arm, base: str) -> dict[str, dict[str, float]]:
    """{step: {word: push}} of the last run of an arm, at the weights behind each step of `pushes`. Weights
    are those that `save.weights_every` has kept; step 0 is the policy from which the run began."""
    stage = arm.stages[-1]
    before = str(arm.stages[-2].folder) if len(arm.stages) > 1 else base
    questions = first({"data": stage.cfg.data, "split": "train"}, arm.asked["pushes"]["items"])
    chat = Policy(model_folder(before), stage.cfg.cap).chat({})
    found = {}
    for step in arm.entry.pushes:
        folder = stage.folder / "weights" / f"step_{step:06d}" if step else model_folder(before)
        words = pushes(load_model(folder), chat, questions, stage.cfg, step)
        found[str(step)] = {word: round(push, 6) for word, push in words.items() if abs(push) >= 1e-6}
    return found


def run(arm: Arm, plan: Plan) -> dict[str, Any]:
    """Train and ask. -> the record. Raises RuntimeError and ValueError."""
    for stage in arm.stages:
        run_stage(stage, arm.title)
    record = dict(zip(("finding", "arm", "seed"), arm.identity))
    record |= {"base": arm.start, "digest": arm.digest, "commit": about()["commit"]}
    record["commands"] = [f"train.py {' '.join(stage.settings)}" for stage in arm.stages]
    notes = [json.loads((stage.folder / "stage.json").read_text()) for stage in arm.stages]
    record["minutes"] = round(sum(note["seconds"] for note in notes) / 60, 2)
    if arm.stages:
        folder = arm.stages[-1].folder
        record["curve"] = followed(folder, CURVE, "loss")
        record["evals"] = followed(folder, EVALS, "eval/accuracy")
    record |= Measured(arm, plan).all()
    if arm.entry.pushes:
        record["pushes"] = pushed(arm, plan.models["{base}"])
    return record


def read_records(file: Path) -> dict[tuple[str, str, int], dict]:
    """{(finding, arm, seed): record} of a measured.json; nothing if there is none."""
    records = json.loads(file.read_text("utf-8"))["records"] if file.exists() else []
    return {(each["finding"], each["arm"], each["seed"]): each for each in records}


def keep(record: dict, file: Path) -> None:
    """Put a record in the place of its older one. Other processes may do so at the same time."""
    with locked(file.parent):
        records = read_records(file) | {(record["finding"], record["arm"], record["seed"]): record}
        lines = ",\n".join(json.dumps(records[identity]) for identity in sorted(records))
        write_whole(file, f'{{"records": [\n{lines}\n]}}\n')


def run_all(arms: list[Arm], plan: Plan, args: argparse.Namespace) -> list[str]:
    """Run and keep. -> a line for each arm that failed."""

    def one(number: int) -> str:
        arm = arms[number]
        print(f"[{number + 1}/{len(arms)}] {arm.title}", flush=True)
        if args.jobs > 1:
            return "" if beside(arm, args) == 0 else arm.title
        try:
            keep(run(arm, plan), args.json)
        except (RuntimeError, ValueError, OSError) as error:
            print(f"{arm.title}: {error}", file=sys.stderr, flush=True)
            return f"{arm.title}: {error}"
        return ""

    if args.jobs == 1:
        return list(filter(None, map(one, range(len(arms)))))
    with ThreadPool(args.jobs) as pool:
        return list(filter(None, pool.imap(one, range(len(arms)))))


def beside(arm: Arm, args: argparse.Namespace) -> int:
    """Run an arm in a process of its own, with one thread. -> its exit status."""
    options = {"--base": args.base, "--trunk": args.trunk, "--out": args.out, "--json": args.json}
    options |= {"--spec": args.spec, "--only": arm.finding, "--arm": arm.name, "--seeds": arm.seed}
    given = [str(each) for pair in options.items() if pair[1] is not None for each in pair]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, __file__, *given], env=environment, check=False).returncode


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="FINDING", help="these findings")
    parser.add_argument("--arm", nargs="+", default=[], metavar="NAME", help="these arms of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="of their seeds only these")
    parser.add_argument("--base", default="tiny", help="the base: a model as train.py takes it")
    parser.add_argument("--trunk", default="models/tiny_trunk", help="the base's trunk, where branches begin")
    parser.add_argument("--jobs", type=int, default=1, help="arms at a time; above 1 with one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/findings"), help="folder of all runs")
    parser.add_argument("--json", type=Path, default=Path("docs/results/findings/measured.json"))
    parser.add_argument("--spec", type=Path, default=SPEC, help="another findings.yaml")
    parser.add_argument("--list", action="store_true", help="print what there is, and run nothing")
    args = parser.parse_args(argv)
    args.out, args.json, args.spec = ((ROOT / path) for path in (args.out, args.json, args.spec))
    return args


def main(argv: list[str] | None = None) -> int:
    """-> exit status."""
    args = arguments(argv)
    try:
        spec = read_spec(args.spec)
        plan = Plan(spec, args.base, args.trunk, args.out)
        arms = plan.arms(args.only, args.arm, args.seeds)
    except (ValueError, OSError) as error:
        print(f"findings.py: {error}", file=sys.stderr)
        return 2
    records = read_records(args.json)
    if args.list:
        print(listed(arms, records, spec))
        return 0
    try:
        failed = run_all([arm for arm in arms if not is_measured(arm, records)], plan, args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    records = read_records(args.json)
    count = sum(is_measured(arm, records) for arm in arms)
    print(json.dumps({"bench": "findings", "arms": len(arms), "measured": count, "failed": failed}))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
