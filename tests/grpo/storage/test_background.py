"""Checkpoints that are written while training goes on: the same bytes, nothing lost, nothing left behind,
and an error is not forgotten."""

import json
import os
import signal
import threading
import time

import pytest

import train
from grpo.storage import checkpoint
from grpo.storage.checkpoint import complete, newest

QUICK = [
    "shapes",
    "seed=1",
    "steps=5",
    "prompts=2",
    "group=3",
    "cap=8",
    "rewards={length: 100, format: 1}",
    "optim.lr=1e-3",
    "optim.warmup=0",
    "eval.items=0",
    "save.every=2",
    "save.keep=0",
    "report.every=1",
    "report.prompts=1",
    "limit=40",
    "device=cpu",
]
pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def straight(base, run_once):
    """In the foreground."""
    return run_once(*QUICK, "save.background=false", f"model={base}")


def same(a, b):
    assert [path.name for path in complete(a)] == [path.name for path in complete(b)]
    for one, two in zip(complete(a), complete(b)):
        assert {path.name: path.read_bytes() for path in one.iterdir()} == {
            path.name: path.read_bytes() for path in two.iterdir()
        }
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k != "step_time" and not k.startswith("time/")}
            for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        for out in (a, b)
    ]
    assert rows[0] == rows[1] and (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()


def at_step(monkeypatch, step, what):
    """Call `what` when a step, from 1, begins to sample."""
    real, calls = train.generate, []

    def generate(*args, **how):
        calls.append(1)
        if len(calls) == step:
            what()
        return real(*args, **how)

    monkeypatch.setattr(train, "generate", generate)


def slowly(monkeypatch, until):
    """Writing goes on when `until`, an Event, is set."""
    real = checkpoint.write

    def write(*args, **how):
        assert until.wait(30)
        return real(*args, **how)

    monkeypatch.setattr(checkpoint, "write", write)


def test_training_goes_on_and_what_is_written_is_what_was(base, straight, tmp_path, monkeypatch):
    """The checkpoint of step 2 is written when step 4 has begun, and holds the weights and moments of step
    2; that of step 4 waits for it."""
    begun, visible, out = threading.Event(), [], tmp_path / "run"
    slowly(monkeypatch, begun)
    at_step(monkeypatch, 4, lambda: (visible.extend(complete(out)), begun.set()))
    assert train.main([*QUICK, f"model={base}", f"out={out}"]) == 0
    assert visible == []
    same(out, straight)


def test_one_is_written_at_a_time(base, straight, tmp_path, monkeypatch):
    """The copy of the last one is not overwritten while it is being written, however long that takes."""
    real, writing, most = checkpoint.write, [], []

    def write(*args, **how):
        writing.append(1)
        most.append(len(writing))
        time.sleep(0.3)
        try:
            return real(*args, **how)
        finally:
            writing.pop()

    monkeypatch.setattr(checkpoint, "write", write)
    assert train.main([*QUICK, f"model={base}", f"out={tmp_path / 'run'}"]) == 0
    assert most == [1, 1, 1]
    same(tmp_path / "run", straight)


def test_the_line_of_a_step_is_on_the_disk_before_its_checkpoint_is_visible(base, tmp_path, monkeypatch):
    out, flush, replace, flushed, seen = tmp_path / "run", checkpoint.flush, os.replace, [], []

    def recorded(path):
        flushed.append((path.name, path.read_bytes() if path.name == "metrics.jsonl" else b""))
        flush(path)

    def visible(source, target):
        if str(target).endswith(tuple("0123456789")):
            step = int(str(target)[-6:])
            _name, content = [each for each in flushed if each[0] == "metrics.jsonl"][-1]
            seen.append(
                (
                    step,
                    step in [json.loads(line)["step"] for line in content.splitlines()],
                    "samples.jsonl" in [name for name, _ in flushed],
                )
            )
            flushed.clear()
        replace(source, target)

    monkeypatch.setattr(checkpoint, "flush", recorded)
    monkeypatch.setattr(checkpoint.os, "replace", visible)
    assert train.main([*QUICK, f"model={base}", f"out={out}"]) == 0
    assert seen == [(2, True, True), (4, True, True), (5, True, True)]


def test_an_error_in_the_background_ends_the_run(base, straight, tmp_path, monkeypatch, capsys):
    """At the end of the step after it; the older checkpoint is as it was, and with space again the run
    ends where it would have."""
    out, failed = tmp_path / "run", threading.Event()
    command, real = [*QUICK, f"model={base}", f"out={out}"], checkpoint.write
    with monkeypatch.context() as patched:

        def write(run, step, *args, **how):
            if step == 4:
                try:
                    patched.setattr(
                        checkpoint,
                        "save_file",
                        lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")),
                    )
                    return real(run, step, *args, **how)
                finally:
                    failed.set()
            return real(run, step, *args, **how)

        patched.setattr(checkpoint, "write", write)
        at_step(patched, 5, lambda: (failed.wait(30), time.sleep(0.1)))
        assert train.main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        line.startswith("train.py: could not save step 4 to")
        and "No space left on device" in line
        and "out=DIR" in line
    )
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000002"] and newest(out)[1] == ""
    assert [json.loads(row)["step"] for row in (out / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]
    assert train.main(command) == 0
    same(out, straight)


def test_a_run_that_ends_by_an_error_finishes_its_save(base, tmp_path, monkeypatch, capsys):
    begun, out = threading.Event(), tmp_path / "run"
    slowly(monkeypatch, begun)

    def wrong():
        threading.Timer(0.3, begun.set).start()
        raise ValueError("something else")

    at_step(monkeypatch, 3, wrong)
    assert train.main([*QUICK, f"model={base}", f"out={out}"]) == 2
    assert "\ntrain.py: something else\n" in capsys.readouterr().err
    assert [path.name for path in complete(out)] == ["step_000002"] and newest(out)[1] == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_told_to_stop_and_the_disk_is_full(base, tmp_path, monkeypatch, capsys):
    """It does not say that it has saved."""
    at_step(
        monkeypatch,
        3,
        lambda: (
            monkeypatch.setattr(
                checkpoint,
                "save_file",
                lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")),
            ),
            os.kill(os.getpid(), signal.SIGTERM),
            time.sleep(0.3),
        ),
    )
    assert train.main([*QUICK, "save.every=0", f"model={base}", f"out={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert (
        "train.py: could not save step 3" in said
        and "saved in" not in said
        and complete(tmp_path / "run") == []
    )


@pytest.mark.parametrize(
    "step, saved",
    [(3, ["step_000002", "step_000003"]), (2, ["step_000002"])],
    ids=["in the step after", "in the step that is saved"],
)
def test_told_to_stop_while_a_checkpoint_is_written(
    base, straight, tmp_path, monkeypatch, capsys, step, saved
):
    """Both are there when the process ends, and the run goes on as if nothing had happened."""
    begun, out = threading.Event(), tmp_path / "run"
    command = [*QUICK, f"model={base}", f"out={out}"]
    with monkeypatch.context() as patched:
        slowly(patched, begun)
        at_step(
            patched,
            step,
            lambda: (
                os.kill(os.getpid(), signal.SIGTERM),
                threading.Timer(0.5, begun.set).start(),
                time.sleep(0.3),
            ),
        )
        assert train.main(command) == 143
    assert f"saved in {out / 'checkpoints' / saved[-1]}" in capsys.readouterr().err
    assert [path.name for path in complete(out)] == saved and newest(out)[1] == ""
    assert train.main(command) == 0
    for name in ("step_000002", "step_000005"):
        for path in (straight / "checkpoints" / name).iterdir():
            assert path.read_bytes() == (out / "checkpoints" / name / path.name).read_bytes(), path.name
