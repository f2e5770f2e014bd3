"""metrics.jsonl: a line is whole or not there, and a resumed file is the uninterrupted one."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from grpo.storage.jsonl import Metrics, read

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, *steps):
    metrics = Metrics(path)
    for step in steps:
        metrics.write({"step": step, "reward": step / 3})
    return path.read_bytes()


def test_rows_come_back_to_the_last_bit(path):
    write(path, 0, 1, 2)
    assert read(path) == [{"step": s, "reward": s / 3} for s in (0, 1, 2)]


def test_resume_gives_the_uninterrupted_file(path, tmp_path):
    whole = write(tmp_path / "whole.jsonl", 0, 1, 2, 3, 4, 5)
    write(path, 0, 1, 2, 3, 4)
    Metrics(path).resume(2)
    assert write(path, 3, 4, 5) == whole


def test_a_torn_last_line_is_dropped(path):
    whole = write(path, 0, 1)
    path.write_bytes(whole + b'{"step": 2, "rew')
    assert [row["step"] for row in read(path)] == [0, 1]
    Metrics(path).resume(5)
    assert path.read_bytes() == whole


def test_a_complete_object_without_its_newline_is_torn_too(path):
    """It might be the beginning of another line's end: {"step": 2} is whole only if something after it
    says so."""
    whole = write(path, 0)
    path.write_bytes(whole + b'{"step": 1}')
    assert [row["step"] for row in read(path)] == [0]


@pytest.mark.parametrize("broken", [b"not json\n", b'{"reward": 1}\n', b"[1]\n", b'\xff{"step": 1}\n'])
def test_a_broken_line_in_the_middle_is_an_error_that_changes_nothing(path, broken):
    path.write_bytes(b'{"step": 0}\n' + broken + b'{"step": 2}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        Metrics(path).resume(2)
    assert path.read_bytes() == before


def test_resume_without_a_file_and_metrics_without_a_path(path):
    Metrics(path).resume(3)
    assert not path.exists() and read(path) == []
    nowhere = Metrics(None).resume(1)
    nowhere.write({"step": 1})


def test_numbers_of_any_kind_are_strict_json(path):
    Metrics(path).write(
        {
            "step": 1,
            "a": torch.tensor(0.5),
            "b": float("nan"),
            "c": float("inf"),
            "d": {"e": torch.ones(2)},
            "f": "\ud800 \u2028",
        }
    )
    line = path.read_text()
    assert line.count("\n") == 1
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"step": 1, "a": 0.5, "b": None, "c": None, "d": {"e": [1.0, 1.0]}, "f": "\ud800 \u2028"}


@pytest.mark.parametrize("row", [{}, {"step": None}, {"step": 1.5}])
def test_a_line_needs_a_step(path, row):
    with pytest.raises(ValueError, match="needs an int 'step'"):
        Metrics(path).write(row)


def test_a_full_disk_leaves_whole_lines(path):
    whole = write(path, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # room for a part of the line: what a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
        with pytest.raises(OSError):
            Metrics(path).write({"step": 1, "reward": 0.123456789})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == whole


def test_after_a_kill_and_a_resume_all_lines_are_whole(path):
    """The kernel may stop a write between two pages, so a long line can be torn; this run of it often is."""
    program = (
        "import sys, itertools; from grpo.storage.jsonl import Metrics; m = Metrics(sys.argv[1])\n"
        "for step in itertools.count(): m.write({'step': step, 'text': 'x' * 5000})"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and (not path.exists() or path.stat().st_size < 200_000):
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = len(read(path))
    Metrics(path).resume(done)
    assert path.read_bytes().endswith(b"\n") and path.stat().st_size > 190_000
    assert [row["step"] for row in map(json.loads, path.read_text().splitlines())] == list(range(done))
