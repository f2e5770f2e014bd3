"""What a person reads when a run under torchrun ends early: our line, once, whatever torchrun adds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo.storage.checkpoint import complete

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SMALL = """shapes seed=1 prompts=2 group=3 cap=8 limit=40 eval.items=0 save.every=1 report.every=0
device=cpu""".split()
# train.py, whose second learning step does not fit on rank 1
TOO_LARGE = """
import os, sys
import torch
import train
real, calls = train.completion_logprobs, []
def crowded(*args, **how):
    if torch.is_grad_enabled():
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return real(*args, **how)
if __name__ == "__main__":
    train.completion_logprobs = crowded
    sys.exit(train.main(sys.argv[1:]))
"""


def started(count, *command):
    """`torchrun --nproc-per-node=count`, or python where count is 0, in a process group of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count else []
    return subprocess.Popen(
        [sys.executable, *torchrun, *map(str, command)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def our_lines(said):
    return [line for line in said.splitlines() if line.startswith("train.py: ")]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("count", [0, 2])
def test_a_typo_is_named_once(count):
    """count: processes of torchrun; 0 is `python train.py`. torchrun's own status is 1."""
    process = started(count, "train.py", "typo=1")
    said = process.communicate(timeout=180)[1]
    assert process.returncode == (1 if count else 2), said
    assert sum("typo" in line for line in said.splitlines()) == 1 and len(our_lines(said)) == 1, said
    assert "Traceback" not in said or count, said
    if count:
        # the rank that printed it, and no other, ended with status 2 by itself
        assert said.count("exitcode  : 2 ") == 1, said


@pytest.mark.timeout(200)
def test_ctrl_c_is_answered_with_one_line(base, tmp_path):
    """Ctrl-C of a terminal reaches torchrun and both ranks, and torchrun passes it on besides."""
    out = tmp_path / "run"
    process = started(2, "train.py", *SMALL, "steps=1000", f"model={base}", f"out={out}")
    until = time.monotonic() + 100
    while not complete(out) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode not in (0, None), said
    lines = our_lines(said)
    assert len(lines) == 1 and "stopped by SIGINT after step" in lines[0], said
    assert str(complete(out)[-1]) in lines[0], said


@pytest.mark.timeout(200)
def test_out_of_memory_on_one_rank_is_said_once_and_names_it(base, tmp_path):
    out, script = tmp_path / "run", tmp_path / "script.py"
    script.write_text(TOO_LARGE)
    # with two sections each rank learns from one micro-batch in a step
    settings = ["steps=3", "loss.sections=2", "loss.micro_tokens=300", f"model={base}", f"out={out}"]
    process = started(2, script, *SMALL, *settings)
    said = process.communicate(timeout=180)[1]
    lines = our_lines(said)
    assert process.returncode == 1 and len(lines) == 1, said
    for words in (
        "rank 1 is out of memory with loss.micro_tokens=300",
        "Set loss.micro_tokens=",
        "step_000001",
    ):
        assert words in lines[0], lines
