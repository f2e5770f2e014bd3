"""Runs on several ranks: in every way in which ranks differ from each other, on two "nodes", and resumed
on another number of them."""

import json
import socket
import subprocess
import sys

import pytest
import ranks
import torch
from safetensors.torch import load_file

import train
from grpo.storage.checkpoint import complete

pytestmark = pytest.mark.usefixtures("in_process")


def asked(*arguments):
    """ranks.py in a process of its own, since it forks. -> (status, its last line)."""
    done = subprocess.run(
        [sys.executable, ranks.__file__, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "names",
    [
        ("split groups, dynamic", "imitation, fewer prompts than ranks"),
        pytest.param((), marks=pytest.mark.slow, id="every case"),
    ],
)
def test_three_ranks_do_what_one_does(names):
    status, said = asked("--cases", *names)
    found = said["cases"]
    assert status == 0 and set(found) == set(names or ranks.CASES)
    assert 0 < said["gradient_max_relative"] <= ranks.GRADIENT
    for name, row in found.items():
        assert row["tokens_identical"] and row["samples_identical"], (name, row)
        # float32: bit for bit, but for a rounding of a sum in float64
        assert row["weights_max_relative"] <= (1e-6 if "bfloat16" in name else 1e-7), (name, row)
        # in bfloat16 a rollout's log-probs depend on what is decoded together
        assert row["metrics_max_difference"] <= (1e-3 if "bfloat16" in name else 1e-5), (name, row)


@pytest.mark.timeout(900)
def test_two_nodes_are_two_ranks(base, tmp_path):
    """Two agents of torchrun on one machine meet at a port, as two machines would; their run goes on on
    one rank, and is the run of one rank."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    argv = ["shapes", *ranks.QUIET, *ranks.SMALL, "prompts=3", f"model={base}"]
    agent = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-id=glimpse",
        "--local-addr=localhost",
        "train.py",
        *argv,
        f"out={tmp_path / 'nodes'}",
    ]
    nodes = [
        subprocess.Popen(agent, cwd=ranks.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    # one of all ranks talks
    assert sum(text.count("2 x cpu") for text in said) == 1
    torch.set_num_threads(1)
    assert train.main([*argv, f"out={tmp_path / 'one'}"]) == 0
    two, one = (load_file(complete(tmp_path / name)[-1] / "model.safetensors") for name in ("nodes", "one"))
    assert ranks.parted(one, two)[0] <= 1e-5
