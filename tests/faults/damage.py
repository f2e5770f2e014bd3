"""Does damage ever go unnoticed?    python tests/faults/damage.py [--only WORD] [key=value ...]

Damages one thing at a time in what a run reads: its checkpoints, its logs and settings, the model, pictures,
rows, tables. Or it takes the disk away while the run writes. Then it starts train.py, which has to do what is
stated for that case (ENDS):

    identical   end like the undisturbed run, bit for bit, after it has named the damage, if there was any
    skipped     end, after it has named the example, or the lines of the log, that are left out
    refused     print one line that says what is wrong, and where; end with exit status 2, and leave the
                checkpoints unchanged

A traceback is a failure. So is a run that ends well and differently without a word. Prints a line for each
case, and ends with a line of JSON. Exit status 1 if a case failed.
"""

import argparse
import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]
from kills import left_behind
from small import small_folder

import train
from data.shapes.world import Shapes
from grpo.monitor import report
from grpo.storage import checkpoint, jsonl

ENDS = ("identical", "skipped", "refused")
ROWS, STEPS = 8, 3
SETTINGS = [
    "shapes",
    # else it is the folder's, and runs are compared across folders
    "name=run",
    "seed=1",
    f"steps={STEPS}",
    f"prompts={ROWS // 2}",
    "group=3",
    "cap=6",
    "rewards={length: 100, format: 1}",
    "optim.lr=1e-3",
    "optim.warmup=0",
    "eval.items=0",
    "save.every=1",
    "save.keep=0",
    "report.every=0",
    "device=cpu",
]
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "optimizer.safetensors",
    "state.json",
)


@dataclass
class Place:
    """What a case may harm: everything is its own copy."""

    # the model
    base: Path
    # a folder of questions.jsonl and images/
    data: Path
    # stopped after step 2 of 3, with a checkpoint of each
    run: Path
    newest: Path
    settings: list[str]


@dataclass
class Case:
    """harm(place), perhaps a context in which the run then happens; what has to come of it, and the words
    that have to be said."""

    name: str
    harm: Callable[[Place], object]
    end: str
    words: tuple[str, ...] = ()
    # a new run, not one that goes on
    fresh: bool = False


# ---- harm


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)


def gone(path: Path) -> None:
    path.unlink()


def write(path: Path, text: str) -> None:
    path.write_text(text)


HARMS = {"cut in half": cut, "empty": empty, "a bit flipped": flip, "gone": gone}


def each_checkpoint(place: Place, harm: Callable[[Path], None], name: str) -> None:
    for folder in checkpoint.complete(place.run):
        harm(folder / name)


def row(place: Place, change: Callable[[dict], object], number: int = 3) -> None:
    """Change a line of questions.jsonl, from 1: the object, or what the function gives instead of it."""
    file = place.data / "questions.jsonl"
    lines = file.read_text().splitlines()
    value = json.loads(lines[number - 1])
    changed = change(value)
    lines[number - 1] = (
        changed if isinstance(changed, str) else json.dumps(value if changed is None else changed)
    )
    file.write_text("\n".join(lines) + "\n", encoding="latin-1")


def full(what: object, name: str) -> contextlib.AbstractContextManager:
    """The disk is full for one function."""

    def refuse(*args, **how):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return mock.patch.object(what, name, refuse)


def small_disk(place: Place, megabytes: float) -> contextlib.ExitStack | None:
    """The run's folder on a disk of its own that has no room for another checkpoint. None where one may
    not mount."""
    aside = place.run.with_name("aside")
    place.run.rename(aside)
    place.run.mkdir()
    taken = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(taken + megabytes * 1e6)}", "none", str(place.run)],
        capture_output=True,
    ).returncode:
        place.run.rmdir()
        aside.rename(place.run)
        return None
    shutil.copytree(aside, place.run, dirs_exist_ok=True)
    stack = contextlib.ExitStack()
    stack.callback(subprocess.run, ["umount", str(place.run)], check=True)
    return stack


def cases() -> list[Case]:
    """All of them."""
    found = [
        Case(
            f"checkpoint: {name} {how}",
            lambda p, name=name, harm=harm: harm(p.newest / name),
            "identical",
            ("damaged: ", f"step_000002/{name}", "Going on from step_000001"),
        )
        for name in FILES
        for how, harm in HARMS.items()
    ]
    found += [
        Case(
            f"all checkpoints: {name} {how}",
            lambda p, name=name, harm=HARMS[how]: each_checkpoint(p, harm, name),
            "refused",
            (f"step_000001/{name}", f"step_000002/{name}", "No checkpoint is left", "remove"),
        )
        for name, how in (
            ("model.safetensors", "a bit flipped"),
            ("state.json", "gone"),
            ("optimizer.safetensors", "cut in half"),
        )
    ]
    older = lambda p: p.newest.with_name("step_000001")
    named = ("damaged: ", "Going on from step_000001")
    found += [
        Case(
            "checkpoint: another step in state.json",
            lambda p: write(
                p.newest / "state.json",
                (p.newest / "state.json").read_text().replace('"step": 2', '"step": 1'),
            ),
            "identical",
            named,
        ),
        Case(
            "checkpoint: state.json of the one before",
            lambda p: shutil.copyfile(older(p) / "state.json", p.newest / "state.json"),
            "identical",
            named,
        ),
        Case(
            "checkpoint: optimizer of the one before",
            lambda p: shutil.copyfile(older(p) / "optimizer.safetensors", p.newest / "optimizer.safetensors"),
            "identical",
            named,
        ),
        Case(
            "checkpoint: an empty folder",
            lambda p: (shutil.rmtree(p.newest), p.newest.mkdir()),
            "identical",
            named,
        ),
        Case(
            "checkpoint: a file in its place",
            lambda p: (shutil.rmtree(p.newest), p.newest.write_text("")),
            "identical",
        ),
        Case(
            "checkpoint: half of one that was being written",
            lambda p: (
                p.newest.rename(p.newest.with_suffix(".tmp")),
                cut(p.newest.with_suffix(".tmp") / "state.json"),
            ),
            "identical",
        ),
        Case("checkpoints: all gone", lambda p: shutil.rmtree(p.run / "checkpoints"), "identical"),
        Case(
            "metrics.jsonl: half a line at the end",
            lambda p: cut(p.run / "metrics.jsonl"),
            "skipped",
            ("metrics.jsonl", "lines", "are lost"),
        ),
        Case(
            "metrics.jsonl: a line that is none",
            lambda p: write(p.run / "metrics.jsonl", "hello\n" + (p.run / "metrics.jsonl").read_text()),
            "refused",
            ("metrics.jsonl, line 1",),
        ),
        Case("config.yaml empty", lambda p: empty(p.run / "config.yaml"), "refused", ("another version",)),
        Case(
            "config.yaml: no YAML",
            lambda p: write(p.run / "config.yaml", "a: [1\n"),
            "refused",
            ("config.yaml", "YAML"),
        ),
        Case("config.yaml gone", lambda p: gone(p.run / "config.yaml"), "identical"),
    ]
    # ---- the model
    for name, how, words in (
        ("model.safetensors", "cut in half", ("model.safetensors", "damaged")),
        ("model.safetensors", "empty", ("model.safetensors", "damaged")),
        ("model.safetensors", "gone", ("model.safetensors",)),
        ("config.json", "cut in half", ("config.json",)),
        ("config.json", "gone", ("config.json",)),
        ("tokenizer.json", "cut in half", ("tokenizer.json",)),
        ("tokenizer.json", "empty", ("tokenizer.json",)),
        ("tokenizer.json", "gone", ("tokenizer.json",)),
        ("generation_config.json", "cut in half", ("generation_config.json",)),
        ("preprocessor_config.json", "empty", ("preprocessor_config.json",)),
    ):
        found.append(
            Case(
                f"model: {name} {how}",
                lambda p, name=name, harm=HARMS[how]: harm(p.base / name),
                "refused",
                words,
                fresh=True,
            )
        )
    # ---- pictures and rows
    picture = lambda p: p.data / "images" / "2.png"
    for how, harm in {
        **HARMS,
        "with a broken header": partial(flip, at=0.0),
        "text": lambda path: write(path, "no picture"),
        "a bomb": lambda path: path.write_bytes(
            path.read_bytes()[:16] + b"\x00\x0f\xff\xff" * 2 + path.read_bytes()[24:]
        ),
    }.items():
        # a flipped bit of a picture's pixels cannot be noticed
        if how != "a bit flipped":
            found.append(
                Case(
                    f"picture {how}",
                    lambda p, harm=harm: harm(picture(p)),
                    "skipped",
                    ("skipped", "line 3" if how == "gone" else "mine/2"),
                    fresh=True,
                )
            )
    for how, change in {
        "cut off": lambda r: json.dumps(r)[:40],
        "no object": lambda r: "[1, 2]",
        "an unknown field": lambda r: r.update(quesiton="?"),
        "without a question": lambda r: r.pop("question") and None,
        "an answer that is no choice": lambda r: r.update(answer="nowhere"),
        "one choice": lambda r: r.update(choices=["left"]),
        "a number for a question": lambda r: r.update(question=7),
        "not UTF-8": lambda r: '{"question": "\xff\xfe"}',
        "a picture outside": lambda r: r.update(picture="../../secret.png"),
        "a picture that is a folder": lambda r: r.update(picture="images"),
    }.items():
        found.append(
            Case(
                f"row {how}",
                lambda p, change=change: row(p, change),
                "skipped",
                ("questions.jsonl",),
                fresh=True,
            )
        )
    found += [
        Case(
            "rows: none",
            lambda p: empty(p.data / "questions.jsonl"),
            "refused",
            ("no training example", "data"),
            fresh=True,
        ),
        Case("rows: no file", lambda p: gone(p.data / "questions.jsonl"), "refused", ("data",), fresh=True),
        Case(
            "rows: random bytes",
            lambda p: (p.data / "questions.jsonl").write_bytes(bytes(range(256)) * 20),
            "refused",
            ("questions.jsonl",),
            fresh=True,
        ),
    ]
    # ---- the disk
    words = ("step 3", "No space left", "out=DIR")
    found += [
        Case(f"disk full in {name}", lambda p, what=what, name=name: full(what, name), "refused", words)
        for what, name in (
            (checkpoint, "save_file"),
            (checkpoint.weights, "save"),
            (checkpoint.shutil, "copyfile"),
            (checkpoint, "write_state"),
            (checkpoint, "flush"),
        )
    ]
    found += [
        Case(
            "disk full while writing a line of metrics",
            lambda p: full(jsonl, "_plain"),
            "refused",
            ("No space left",),
        ),
        Case(
            "disk with too little room for a checkpoint",
            partial(small_disk, megabytes=0.3),
            "refused",
            ("step 3", "MB are needed", "MB are free"),
        ),
        Case("disk that fills while a checkpoint is written", filling, "refused", words),
    ]
    return found


def filling(place: Place) -> contextlib.ExitStack | None:
    """A real small disk, and a look at its room that came too early."""
    stack = small_disk(place, megabytes=0.3)
    if stack is not None:
        roomy = shutil.disk_usage(ROOT)._replace(free=1 << 40)
        stack.enter_context(mock.patch.object(checkpoint.shutil, "disk_usage", lambda path: roomy))
    return stack


# ---- what comes of it


def questions(folder: Path) -> Path:
    """Questions of the built-in world as a person's own: questions.jsonl and images/."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, example in enumerate(Shapes("train", ROWS)[j] for j in range(ROWS)):
        example.pictures[0]().save(folder / "images" / f"{i}.png")
        lines.append(
            json.dumps(
                {
                    "uid": f"mine/{i}",
                    "question": example.question,
                    "choices": list(example.choices),
                    "answer": example.answer,
                    "picture": f"images/{i}.png",
                }
            )
        )
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def started(place: Place) -> tuple[int, str]:
    """train.py in this process -> (exit status, what it said); a traceback is part of that, and -1 its
    status."""
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        mock.patch.object(report, "write_curves", lambda folder, say=print: []),
    ):
        try:
            status = train.main([*SETTINGS, *place.settings, f"model={place.base}", f"out={place.run}"])
        except Exception:
            status = -1
            traceback.print_exc()
    return status, said.getvalue()


def judged(case: Case, place: Place, wanted: dict) -> tuple[str, str]:
    """Let a case happen. -> ("" or what is wrong, the last line that was said)."""
    before = {str(path): path.read_bytes() for path in place.run.rglob("step_*/*")}
    harmed = case.harm(place)
    if (case.harm in (filling,) or getattr(case.harm, "func", None) is small_disk) and harmed is None:
        return "not possible here", "no right to mount a disk"
    with (
        harmed
        if isinstance(harmed, (contextlib.ExitStack, type(mock.patch.object(os, "sep"))))
        else contextlib.nullcontext()
    ):
        kept = {str(path): path.read_bytes() for path in place.run.rglob("step_*/*")}
        status, said = started(place)
        # without the bar
        lines = [
            line.strip()
            for line in said.replace("\r", "\n").splitlines()
            if line.strip("\x1b[A ") and "%|" not in line
        ]
        line = lines[-1] if lines else ""
        if "Traceback" in said:
            return "a traceback", line
        if status != (2 if case.end == "refused" else 0):
            return f"status {status}", line
        if missing := [word for word in case.words if not any(word in each for each in lines)]:
            return f"does not say {missing}", line
        after = {str(path): path.read_bytes() for path in place.run.rglob("step_*/*")}
        if case.end == "refused" and (
            after != kept or (not case.fresh and "disk" in case.name and kept != before)
        ):
            return "checkpoints were touched", line
    if case.end == "refused":
        return (
            "" if all(any(word in each for word in case.words) for each in lines[-1:]) else "not in one line"
        ), line
    if case.end == "identical":
        found = left_behind(place.run)
        if differ := sorted(
            name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
        ):
            return f"differs in {differ}", line
        return "", next((each for each in lines if each.startswith("damaged")), "")
    return "", next((each for each in lines if all(word in each for word in case.words)), line)


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("settings", nargs="*", help="of every run besides, such as save.background=false")
    asked = parser.parse_args(arguments)
    SETTINGS.extend(asked.settings)
    results, failed, began = dict.fromkeys(ENDS, 0), [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="glimpse-damage-") as folder:
        root = Path(folder)
        (root / "base").mkdir()
        small_folder(root / "base")
        straight = Place(
            root / "base",
            questions(root / "data"),
            root / "straight",
            root,
            ["task=jsonl", f"data={root / 'data'}"],
        )
        status, said = started(straight)
        if status:
            print(said, file=sys.stderr)
            return 1
        wanted, impossible = left_behind(straight.run), []
        for number, case in enumerate(each for each in cases() if asked.only in each.name):
            here = root / f"case{number}"
            data = Path(shutil.copytree(root / "data", here / "data")) if case.fresh else root / "data"
            base = Path(shutil.copytree(root / "base", here / "base")) if case.fresh else root / "base"
            place = Place(
                base,
                data,
                here / "run",
                here / "run" / "checkpoints" / "step_000002",
                ["task=jsonl", f"data={data}"],
            )
            if not case.fresh:
                shutil.copytree(straight.run, place.run)
                shutil.rmtree(place.run / "checkpoints" / f"step_{STEPS:06d}")
                (place.run / "summary.json").unlink(missing_ok=True)
            wrong, line = judged(case, place, wanted)
            if wrong == "not possible here":
                impossible.append(case.name)
            elif wrong:
                failed.append(case.name)
            else:
                results[case.end] += 1
            print(
                f"{'FAILED: ' + wrong if wrong else case.end:<12} {case.name:<55} "
                f"{line.replace(str(root), '')[:300]}",
                flush=True,
            )
            shutil.rmtree(here, ignore_errors=True)
    print(
        json.dumps(
            {
                "cases": sum(results.values()) + len(failed),
                **results,
                "failed": failed,
                "not_possible_here": impossible,
                "seconds": round(time.monotonic() - began, 1),
            }
        )
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
