"""SIGTERM and SIGINT: the step is finished, a checkpoint saved, the way on named; all ranks leave
together; a second signal stops at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from grpo.run import signals
from grpo.storage.checkpoint import complete

ROOT = Path(__file__).resolve().parents[3]

QUICK = [
    "shapes",
    "seed=1",
    "steps=4",
    "prompts=2",
    "group=3",
    "cap=8",
    "rewards={length: 100, format: 1}",
    "optim.lr=1e-3",
    "optim.warmup=0",
    "eval.items=2",
    "eval.every=2",
    "save.every=0",
    "save.keep=1",
    "report.every=1",
    "report.prompts=1",
    "limit=40",
    "device=cpu",
]
# train.py, where something happens at a rollout of the person's choice.
SCRIPT = """
import os, signal, sys, time
import train
from grpo.run import signals
real, calls = train.generate, []
def generate(*args, **how):
    calls.append(1)
    {what}
    return real(*args, **how)
if __name__ == "__main__":
    train.generate = generate
    sys.exit(train.main(sys.argv[1:]))
"""


pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def straight(base, run_once):
    return run_once(*QUICK, f"model={base}")


def told(monkeypatch, number, *steps):
    """A signal comes while these steps (from 1) sample."""
    real, calls = train.generate, []

    def generate(*args, **how):
        calls.append(1)
        if len(calls) in steps:
            os.kill(os.getpid(), number)
            # for the thread that listens
            time.sleep(0.3)
        return real(*args, **how)

    monkeypatch.setattr(train, "generate", generate)


def same(a, b):
    """Final checkpoint, metrics without times, and samples: bit for bit."""
    one, two = complete(a)[-1], complete(b)[-1]
    assert one.name == two.name and sorted(p.name for p in one.iterdir()) == sorted(
        p.name for p in two.iterdir()
    )
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k != "step_time" and not k.startswith("time/")}
            for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        for out in (a, b)
    ]
    assert rows[0] == rows[1]
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_run_that_is_told_to_stop_saves_and_goes_on_as_if_nothing_had_happened(
    base, straight, tmp_path, monkeypatch, capfd, number, status
):
    out, before = tmp_path / "run", signal.getsignal(number)
    command = [*QUICK, f"model={base}", f"out={out}"]
    with monkeypatch.context() as patched:
        told(patched, number, 3)
        assert train.main(command) == status
    said = capfd.readouterr().err
    assert f"{number.name}: finishing this step, then saving" in said and "Traceback" not in said
    assert said.splitlines()[-1] == (
        f"train.py: stopped by {number.name} after step 3 of 4: saved in "
        f"{out / 'checkpoints' / 'step_000003'}; "
        "the same command goes on from there"
    )
    assert [path.name for path in complete(out)] == ["step_000003"] and not (out / "summary.json").exists()
    page = (out / "report.html").read_text()
    assert f"stopped by {number.name} after step 3 of 4: saved in" in page and '"name":"stopped"' in page
    assert signal.getsignal(number) == before
    assert train.main(command) == 0 and "going on after step 3" in capfd.readouterr().out
    same(out, straight)
    assert [path.name for path in complete(out)] == ["step_000004"]


def test_what_comes_twice_within_two_seconds_was_meant_once(base, tmp_path, monkeypatch, capfd):
    """torchrun passes on what it gets, and a scheduler may tell every process besides."""
    real = train.generate

    def generate(*args, **how):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return real(*args, **how)

    monkeypatch.setattr(train, "generate", generate)
    assert train.main([*QUICK, f"model={base}", f"out={tmp_path / 'run'}"]) == 143
    assert (
        capfd.readouterr().err.count("once more to stop at once") == 1
        and complete(tmp_path / "run")[-1].name == "step_000001"
    )


def test_before_the_first_step_there_is_nothing_to_save(base, straight, tmp_path, monkeypatch, capfd):
    from grpo.run import lifecycle

    real, out = lifecycle.Lifecycle.evaluate, tmp_path / "run"

    def evaluate(*args, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        return real(*args, **how)

    with monkeypatch.context() as patched:
        patched.setattr(lifecycle.Lifecycle, "evaluate", evaluate)
        assert train.main([*QUICK, f"model={base}", f"out={out}"]) == 143
    assert "nothing is saved; the same command starts anew" in capfd.readouterr().err and complete(out) == []
    assert train.main([*QUICK, f"model={base}", f"out={out}"]) == 0
    same(out, straight)


def test_in_the_last_step_the_run_is_finished(base, straight, tmp_path, monkeypatch):
    told(monkeypatch, signal.SIGTERM, 4)
    assert (
        train.main([*QUICK, f"model={base}", f"out={tmp_path / 'run'}"]) == 0
        and (tmp_path / "run" / "summary.json").exists()
    )
    same(tmp_path / "run", straight)


def test_other_signals_that_python_handles_do_not_stop_it(base, straight, tmp_path, monkeypatch):
    """math-verify's timer is one."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        told(monkeypatch, signal.SIGALRM, 2)
        assert train.main([*QUICK, f"model={base}", f"out={tmp_path / 'run'}"]) == 0
    finally:
        signal.signal(signal.SIGALRM, before)
    same(tmp_path / "run", straight)


# ---- in processes of their own


def called(tmp_path, what, arguments, ranks=0):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{what}", what))
    program = [
        sys.executable,
        *(["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []),
        str(script),
    ]
    return subprocess.run(
        [*program, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def test_a_second_signal_stops_at_once(base, tmp_path):
    """The process would sleep for four minutes more."""
    what = """
    signals.REPEAT_SECONDS = 0.1
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        time.sleep(0.5)
    time.sleep(240)"""
    done = called(tmp_path, what, [*QUICK, f"model={base}", f"out={tmp_path / 'run'}"])
    assert done.returncode == 130, done.stderr
    assert (
        "SIGTERM: finishing this step" in done.stderr
        and "Traceback" not in done.stderr
        and complete(tmp_path / "run") == []
    )


def test_one_rank_is_told_and_all_leave_after_the_same_step(base, straight, tmp_path):
    out = tmp_path / "run"
    what = (
        "len(calls) == 2 and os.environ['RANK'] == '1' and (os.kill(os.getpid(), signal.SIGTERM), "
        "time.sleep(0.5))"
    )
    done = called(tmp_path, what, [*QUICK, f"model={base}", f"out={out}"], ranks=2)
    assert (
        done.returncode != 0 and done.stderr.count("stopped by SIGTERM after step 2 of 4: saved in") == 1
    ), done.stderr
    # torchrun's own account of both ranks: the first left by itself; torchrun may have ended the other on
    # its way out.
    assert (left := done.stderr.count("exitcode  : 143")) >= 1 and left + done.stderr.count(
        "exitcode  : -15"
    ) == 2, done.stderr
    assert "stopped by SIGTERM after step 2 of 4" in (out / "report.html").read_text()
    assert (out / "curves.png").is_file() and not list(out.glob("*.tmp"))
    assert [path.name for path in complete(out)] == ["step_000002"]
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [
        0,
        1,
        2,
    ]


def test_status_is_what_shells_expect():
    assert (
        signals.Interrupted(signal.SIGINT, 3, 9, Path("x")).status == 130
        and signals.Interrupted(signal.SIGTERM, 0, 9, None).status == 143
    )
