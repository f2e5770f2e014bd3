"""Fixtures of the tests that call train.main in this process."""

import os

import grpo.parallel.openmp

# before torch is imported: the processes of pytest-xdist share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from small import small_folder

import train
from grpo.monitor import report


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small random policy's folder."""
    return small_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    """A run that all tests of a module compare theirs with: run_once(*arguments of train.py) -> its folder.
    Curves are not drawn."""

    def run(*arguments):
        out = tmp_path_factory.mktemp("runs") / "straight"
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(report, "write_curves", lambda folder, say=print: [])
            assert train.main([*arguments, f"out={out}"]) == 0
        return out

    return run


@pytest.fixture
def in_process(monkeypatch):
    """train.main takes all cores; the other tests get back what they had. Curves are not drawn: they take
    longer than the steps."""
    before = torch.get_num_threads()
    monkeypatch.setattr(report, "write_curves", lambda folder, say=print: [])
    yield
    torch.set_num_threads(before)
