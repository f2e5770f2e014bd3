"""What a person reads when a run under torchrun ends early: our line, once, whatever torchrun adds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_typo_is_named_once(count):
    """count: processes of torchrun; 0 is `python train.py`. torchrun's own status is 1."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count else []
    done = subprocess.run(
        [sys.executable, *torchrun, "train.py", "typo=1"],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = done.stderr.splitlines()
    assert done.returncode == (1 if count else 2), done.stderr
    assert sum("typo" in line for line in lines) == 1, done.stderr
    assert sum(line.startswith("train.py: ") for line in lines) == 1, done.stderr
    assert "Traceback" not in done.stderr or count, done.stderr
    if count:
        # the rank that printed it, and no other, ended with status 2 by itself
        assert done.stderr.count("exitcode  : 2 ") == 1, done.stderr
