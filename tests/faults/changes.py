"""What does a run do that goes on after something of it has changed?    python tests/faults/changes.py

A small run with questions, pictures and a reward in files of its own, a base that is a run itself, and a KL
penalty is stopped after two of four steps. Then one thing is changed (CHANGES), and the same command is
started again. It has to refuse and name the change ("stops"), or to print a line and go on ("noted"), or to
go on and end as the undisturbed run, bit for bit ("harmless"). A change that stops is then accepted with
change=SETTING, and has to be in metrics.jsonl.

Prints the rows of the table of docs/results/reliability.md, and a line of JSON. Exit status 1 if a change
does anything else than CHANGES says.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from small import small_folder, small_policy

import train
from data.images import open_picture
from data.shapes.world import Shapes
from grpo.monitor import report
from grpo.run import inputs
from grpo.storage.checkpoint import complete
from models import weights

STEPS, STOP = 4, 2
SETTINGS = f"""shapes task=jsonl seed=1 steps={STEPS} prompts=2 group=3 cap=6 optim.lr=1e-3 optim.warmup=0
loss.kl_coef=0.02 eval.items=0 save.every=1 save.keep=0 report.every=0 device=cpu""".split()
REWARD = "from beside import NUMBER\n\n\ndef pay(text, example, length):\n    return length + NUMBER\n"


class Change(NamedTuple):
    """what: for the table. apply: (folder) -> further arguments. does: stops, noted or harmless. key: the
    setting that is named."""

    what: str
    apply: Callable[[Path], list[str] | None]
    does: str
    key: str = ""


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace a text in a file."""
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new)) and None


def reordered(folder: Path) -> None:
    """The questions backwards."""
    lines = (folder / "q.jsonl").read_text().splitlines(True)
    (folder / "q.jsonl").write_text("".join(reversed(lines)))


def touched(folder: Path) -> None:
    """Every file copied: new times, the same contents."""
    for path in (*folder.glob("*.*"), *(folder / "pictures").iterdir(), *folder.glob("base/checkpoints/*/*")):
        path.write_bytes(path.read_bytes())


def picture(folder: Path) -> None:
    """One picture in place of another."""
    shutil.copy(folder / "pictures" / "1.png", folder / "pictures" / "0.png")


def base_weights(folder: Path) -> None:
    """Other weights in the folder of the base."""
    weights.save(small_policy(seed=9), complete(folder / "base")[-1])


def base_trained(folder: Path) -> None:
    """The base is a run, and it has a newer checkpoint."""
    newer = shutil.copytree(complete(folder / "base")[-1], folder / "base" / "checkpoints" / "step_000002")
    weights.save(small_policy(seed=9), newer)
    (newer / "state.json").write_text(json.dumps({"step": 2}))


def threads(folder: Path) -> list[str]:
    """Another number of threads."""
    inputs.torch.set_num_threads(3)
    return []


def versions(folder: Path) -> list[str]:
    """Another version of each package."""
    inputs.version = lambda name: "0.0"
    return []


CHANGES = [
    Change("nothing", lambda folder: None, "harmless"),
    Change("every file copied (new times)", touched, "harmless"),
    Change("question file edited", replaced("q.jsonl", "Which 3?", "Who 3?"), "stops", "data"),
    Change("question file reordered", reordered, "stops", "data"),
    Change("picture replaced", picture, "stops", "data"),
    Change("reward edited", replaced("pay.py", "length +", "length *"), "stops", "rewards"),
    Change("module that the reward imports edited", replaced("beside.py", "1", "2"), "stops", "rewards"),
    Change("base weights replaced", base_weights, "stops", "model"),
    Change("base run trained on", base_trained, "stops", "model"),
    Change("another number of threads", threads, "noted"),
    Change("other versions of packages", versions, "noted"),
    Change("setting that changes the gradient", lambda folder: ["optim.lr=2e-3"], "stops", "optim.lr"),
    Change("larger cap", lambda folder: ["cap=9"], "stops", "cap"),
    Change("setting that does not", lambda folder: ["eval.items=0", "loss.micro_tokens=8192"], "harmless"),
    Change("more steps, the rate constant", lambda folder: [f"steps={STEPS + 1}"], "harmless"),
]


def made(folder: Path) -> list[str]:
    """Write what a run needs. -> its arguments."""
    folder.mkdir(parents=True)
    (folder / "pictures").mkdir()
    world = Shapes("train", 24, seed=0)
    rows = []
    for number in range(24):
        open_picture(world[number].pictures[0], name="x").save(folder / "pictures" / f"{number}.png")
        rows.append({"question": f"Which {number}?", "answer": "1", "picture": f"pictures/{number}.png"})
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pay.py").write_text(REWARD)
    (folder / "beside.py").write_text("NUMBER = 1\n")
    small_folder(folder / "base" / "checkpoints" / "step_000001")
    (folder / "base" / "checkpoints" / "step_000001" / "state.json").write_text('{"step": 1}')
    return [
        *SETTINGS,
        "optim.decay=constant",
        f"model={folder / 'base'}",
        f"data={folder / 'q.jsonl'}",
        f"rewards={{{folder / 'pay.py'}:pay: 1}}",
    ]


def start(arguments: list[str], stop: int = 0) -> tuple[int, str]:
    """train.py in this process; a signal comes in step `stop`. -> (exit status, what it printed)."""
    real, calls = train.generate, []

    def generate(*args, **how):
        calls.append(1)
        if len(calls) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **how)

    said = io.StringIO()
    train.generate = generate
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = train.main(arguments)
    finally:
        train.generate = real
    return status, said.getvalue()


def left(out: Path) -> tuple:
    """What a run leaves: metrics without times, and all files of the checkpoint of step STEPS."""
    # a reward's metrics have the name of its file
    lines = (out / "metrics.jsonl").read_text().replace(f"{out.parent}/", "").splitlines()
    rows = [json.loads(line) for line in lines]
    timed = lambda key: key == "step_time" or key.startswith("time/")
    rows = [{key: row[key] for key in row if not timed(key)} for row in rows if row["step"] <= STEPS]
    folder = out / "checkpoints" / f"step_{STEPS:06d}"
    return rows, {path.name: path.read_bytes() for path in folder.iterdir()}


def tried(change: Change, folder: Path, straight: tuple) -> tuple[str, str]:
    """Stop a run, change something, go on. -> (what happened, the line that names it)."""
    arguments = made(folder)
    out = folder / "run"
    assert start([*arguments, f"out={out}"], stop=STOP)[0] == 143
    before, version = inputs.torch.get_num_threads(), inputs.version
    try:
        more = change.apply(folder) or []
        command = [*arguments, *more, f"out={out}"]
        status, said = start(command)
        if status == 2:
            line = next(line for line in said.splitlines() if line.startswith("train.py: "))
            status, said = start([*command, f"change={change.key}"])
            rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
            noted = [row for row in rows if "changed" in row]
            accepted = status == 0 and len(noted) == 1 and noted[0]["step"] == STOP
            return ("stops" if accepted and change.key in line else "stops, and cannot be accepted"), line
        assert status == 0, said
        lines = [line for line in said.splitlines() if line.startswith("note: ")]
        if lines:
            return "noted", lines[0]
        return ("harmless" if left(out) == straight else "goes on, and differs"), ""
    finally:
        inputs.version = version
        inputs.torch.set_num_threads(before)


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="changes with these words")
    asked = parser.parse_args(arguments)
    report.write_curves = lambda folder: []
    wrong = []
    chosen = [change for change in CHANGES if asked.only in change.what]
    with tempfile.TemporaryDirectory(prefix="glimpse-changes-") as name:
        place = Path(name)
        arguments = made(place / "straight")
        assert start([*arguments, f"out={place / 'straight' / 'run'}"])[0] == 0
        straight = left(place / "straight" / "run")
        for number, change in enumerate(chosen):
            found, line = tried(change, place / str(number), straight)
            line = line.replace(f"{place / str(number)}/", "").replace("|", "\\|")
            print(f"| {change.what} | {found} | {line} |", flush=True)
            wrong += [] if found == change.does else [change.what]
    print(json.dumps({"changes": len(chosen), "as_said": len(chosen) - len(wrong), "wrong": wrong}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
