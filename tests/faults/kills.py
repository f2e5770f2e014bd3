"""Is a killed run the run it would have been?    python tests/faults/kills.py --kills 200 [--seed 0]

Kills small runs with SIGKILL at random moments and starts them again with the same command until they end.
Then it compares their files, bit for bit, with those of undisturbed runs: every file of the checkpoints,
samples.jsonl, config.yaml, and metrics.jsonl and summary.json without their times. A run is of one of four
kinds (RUNS) and writes its checkpoints in one of two manners (MANNERS). A kill comes in one of three ways
(WAYS):

    clock   after a random part of the time that such a run takes, wherever it is then
    change  before the k-th change of the run's folder, k random: a file opened to be written, renamed or
            removed, a folder made or removed
    byte    inside a write: the kernel ends the process when a file grows beyond a random size; the first part
            of that file stays

A kill may cost the steps since the last complete save. That is the distance between two saves if training
waits for a save. It is twice that if training goes on meanwhile, because the last save may be under way.

Runs are forked from one process that has imported everything, so a kill costs half a second on a free core.
Prints a line for each run, and ends with a line of JSON: kills, kills of runs that ended identical, and the
most steps that a kill cost. Exit status 1 if a run differs.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

# one thread: after a fork there are no others
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from small import small_folder

import train
from grpo.monitor import report
from grpo.storage import checkpoint

# so that the last save is not one of those in between
EVERY, STEPS = 2, 5
COMMON = [
    "shapes",
    # else it is the folder's, and runs are compared across folders
    "name=run",
    "seed=1",
    f"steps={STEPS}",
    "prompts=2",
    "group=3",
    "cap=6",
    "rewards={length: 100, format: 1}",
    "optim.lr=1e-3",
    "optim.warmup=0",
    "eval.items=2",
    "eval.every=2",
    f"save.every={EVERY}",
    "save.keep=1",
    "report.every=2",
    "report.prompts=1",
    "limit=40",
    "device=cpu",
]
RUNS = {
    "grpo": [],
    "muon, two updates, a reference": ["optim.name=muon", "loss.updates=2", "loss.kl_coef=0.02"],
    "weights rounded at random": ["optim.name=adamw_bf16", "dtype=bfloat16"],
    "every checkpoint kept": ["save.every=1", "save.keep=0"],
    "imitation": ["method=sft", "task=documents", "cap=128", "eval.items=0"],
}
MANNERS = {"in the foreground": ["save.background=false"], "in the background": ["save.background=true"]}
# steps lost
ALLOWED = {"in the foreground": EVERY, "in the background": 2 * EVERY}
WAYS = ("clock", "change", "byte")
# audit events
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def child(base: Path, out: Path, kind: str, manner: str, way: str | None, moment: float) -> None:
    """What a forked process does: the run, prepared for its death. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # drawing takes longer than the run, and nothing is read from it
    report.write_curves = lambda folder, say=print: []
    if way == "byte":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(moment), int(moment)))
    if way in ("change", "count"):
        seen = []

        def hook(event: str, arguments: tuple) -> None:
            if event not in CHANGES or not str(arguments[0]).startswith(str(out)):
                return
            if event == "open" and not (
                isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            ):
                return
            seen.append(event)
            if way == "change" and len(seen) > moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
    status = 3
    with (
        open(out.with_suffix(".log"), "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            status = train.main([*COMMON, *RUNS[kind], *MANNERS[manner], f"model={base}", f"out={out}"])
            if way == "count":
                print(f"\nchanges {len(seen)}")
        finally:
            log.flush()
            os._exit(status)


def run(*arguments, until: float | None = None) -> int:
    """Fork `child`; kill it after `until` seconds. -> its exit status, negative for the signal that ended
    it."""
    started = time.monotonic()
    process = os.fork()
    if not process:
        child(*arguments)
    while until is not None:
        left = until - (time.monotonic() - started)
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        if left <= 0:
            os.kill(process, signal.SIGKILL)
            break
        time.sleep(min(left, 0.005))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def steps_done(out: Path) -> int:
    """The last whole line of metrics.jsonl."""
    lines = (out / "metrics.jsonl").read_bytes().split(b"\n")[:-1] if (out / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def left_behind(out: Path) -> dict:
    """Everything a finished run leaves that has to be the same: path -> content."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name, content = str(path.relative_to(out)), path.read_bytes()
        if name == "metrics.jsonl":
            content = [
                {k: v for k, v in json.loads(line).items() if k != "step_time" and not k.startswith("time/")}
                for line in content.splitlines()
            ]
        elif name == "summary.json":
            content = {k: v for k, v in json.loads(content).items() if k not in ("seconds", "resumed_after")}
        elif name == "inputs.json":
            # sizes and checksums of files; a time that is newer than two seconds is not kept
            content = json.loads(content)
            content["files"] = {
                setting: {file: (size, digest) for file, (size, _, digest) in files.items()}
                for setting, files in content["files"].items()
            }
        elif name == "report.html":
            # drawn from the others, times included
            content = b""
        elif name == "config.yaml":
            # the runs are to be the same
            content = content.replace(str(out).encode(), b"OUT").replace(
                b"background: false", b"background: true"
            )
        found[name] = content
    return found


def disturbed(
    base: Path,
    out: Path,
    kind: str,
    manner: str,
    seconds: float,
    changes: int,
    sizes: list[int],
    most: int,
    chance: random.Random,
) -> tuple[list[str], int, str]:
    """A run that is killed up to `most` times, and then left alone. -> (the ways of the kills, the most
    steps that one cost, what it said if it failed)."""
    ways, lost = [], 0
    while len(ways) < most:
        way = chance.choice(WAYS)
        moment = {
            "clock": 0.0,
            "change": chance.randrange(changes),
            "byte": chance.randrange(1, chance.choice(sizes)),
        }[way]
        status = run(
            base, out, kind, manner, way, moment, until=chance.uniform(0, seconds) if way == "clock" else None
        )
        # the kernel took a part of the write and said so: train.py ends by itself, as on a full disk
        refused = way == "byte" and status == 2
        if status not in (-signal.SIGKILL, -signal.SIGXFSZ) and not refused:
            # it had ended before its time came
            if status == 0:
                return ways, lost, ""
            return ways, lost, f"status {status}"
        ways.append(way)
        found, line = checkpoint.newest(out)
        if line:
            return ways, lost, line
        lost = max(lost, steps_done(out) - (int(found.name[5:]) if found else 0))
    status = run(base, out, kind, manner, None, 0.0)
    return ways, lost, f"status {status}" if status else ""


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    chance, ways, identical, runs, lost = random.Random(asked.seed), [], 0, 0, dict.fromkeys(MANNERS, 0)
    with tempfile.TemporaryDirectory(prefix="glimpse-kills-") as folder:
        place = Path(folder)
        if not (process := os.fork()):
            small_folder(place / "base")
            os._exit(0)
        os.waitpid(process, 0)
        straight = {}
        for number, kind in enumerate(RUNS):
            out, started = place / f"straight{number}", time.monotonic()
            if run(place / "base", out, kind, "in the foreground", "count", 0.0):
                print(out.with_suffix(".log").read_text(), file=sys.stderr)
                return 1
            seconds, wanted = time.monotonic() - started, left_behind(out)
            changes = int(out.with_suffix(".log").read_text().rpartition("changes ")[2])
            straight[kind] = (
                wanted,
                seconds,
                changes,
                [
                    path.stat().st_size
                    for path in out.rglob("*")
                    if path.is_file() and path.stat().st_size > 1
                ],
            )
        started = time.monotonic()
        while len(ways) < asked.kills:
            kind, manner, out = chance.choice(list(RUNS)), chance.choice(list(MANNERS)), place / f"run{runs}"
            wanted, seconds, changes, sizes = straight[kind]
            came, cost, wrong = disturbed(
                place / "base",
                out,
                kind,
                manner,
                seconds,
                changes,
                sizes,
                min(chance.choice((1, 1, 2, 3)), asked.kills - len(ways)),
                chance,
            )
            found = left_behind(out)
            differ = sorted(
                name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
            )
            if wrong or differ or cost > ALLOWED[manner]:
                log = out.with_suffix(".log").read_text().strip().splitlines()[-1:]
                print(
                    f"run {runs} ({kind}, {manner}; killed: {', '.join(came)}): {wrong}, {cost} steps "
                    f"lost, differs in {differ}; {log}",
                    flush=True,
                )
            else:
                identical += len(came)
                print(
                    f"run {runs} ({kind}, {manner}; killed: {', '.join(came) or 'not in time'}): "
                    f"identical, {cost} steps lost at most",
                    flush=True,
                )
            ways, lost[manner], runs = ways + came, max(lost[manner], cost), runs + 1
            shutil.rmtree(out)
    print(
        json.dumps(
            {
                "kills": len(ways),
                "identical": identical,
                "runs": runs,
                **{way: ways.count(way) for way in WAYS},
                "save_every": EVERY,
                "most_steps_lost": lost["in the foreground"],
                "most_steps_lost_in_background": lost["in the background"],
                "seconds_per_kill": round((time.monotonic() - started) / max(len(ways), 1), 2),
                "seed": asked.seed,
            }
        )
    )
    return int(identical < len(ways))


if __name__ == "__main__":
    sys.exit(main())
