"""A rank that dies, stops, hangs or raises: every other one names it and ends, in bounded time, with no
torchrun around; and torchrun starts them again by itself."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo.parallel.watch import LOST

ROOT = Path(__file__).resolve().parents[2]
from restarts import left_behind, torchrun

TIMEOUT = 5.0
# Ranks that add numbers four times; something happens to the last one before the third time.
SCRIPT = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from grpo.parallel import ranks

def happens(what):
    if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop": os.kill(os.getpid(), signal.SIGSTOP)
    if what == "hang": time.sleep(1000)
    if what == "raise": raise ValueError("the reward of question 7")
    until, x = time.time() + 2 * {TIMEOUT}, torch.ones(60, 60)
    while what == "slow" and time.time() < until:
        y = x @ x
        z = torch.sort(x.flatten())
        y = torch.randn(60, 60)
        z = y.exp()
        x = torch.linalg.qr(z)[0]

def main(rank, size, *events):
    ranks.join_ranks("cpu", {TIMEOUT})
    try:
        for step in range(4):
            ranks.announce(f"step {{step + 1}}")
            time.sleep(1.1)                 # a beat, so that the others know
            if rank == size - 1 and step == 2:
                for event in events:
                    print("now", time.time(), file=sys.stderr, flush=True)
                    happens(event)
            if "device" in events and step == 2 and rank == 0:
                # as on a GPU: the sum is ordered, and waited for somewhere else
                with ranks.meeting("the sum of the gradients"): pass
                time.sleep(1000)
            assert ranks.sum_over_ranks(torch.ones(3)).tolist() == [size] * 3
        ranks.leave_ranks()
    except ValueError as error:
        ranks.leave_ranks(error)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), *sys.argv[1:]))
"""


def ranks(tmp_path, size, *events):
    """The script on so many ranks. → per rank (exit status, or None for one that had to be ended here;
    what it said; seconds from the last event to its end)."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(size),
    }
    logs = [tmp_path / f"{rank}.log" for rank in range(size)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, *events],
            stderr=open(log, "w"),
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]
    found, until = [], time.time() + 120
    for process in processes[:-1] + processes[-1:] * ("stop" not in events):
        process.wait(max(until - time.time(), 1))
        found.append((process.returncode, time.time()))
    if "stop" in events:
        processes[-1].send_signal(signal.SIGCONT)
        # and it finds out for itself what has become of the others
        processes[-1].wait(30)
        found.append((processes[-1].returncode, time.time()))
    said = [log.read_text() for log in logs]
    happened = [float(stamp) for stamp in re.findall(r"now (\S+)", said[-1])] or [until]
    return [(status, text, ended - happened[-1]) for (status, ended), text in zip(found, said)]


def named(found, rank, words, seconds, *, among):
    """Each of these ranks ended within so many seconds, with one line that names the rank and says these
    words."""
    for own in among:
        status, said, took = found[own]
        assert status == LOST and took < seconds, (own, status, took, said)
        assert (
            len(re.findall(rf"train.py: on rank {own}: rank {rank} {words}", said)) == 1
            and "Traceback" not in said
        ), said
        # its own and that one, no others
        assert said.count("rank ") == 2 or own == rank, said


@pytest.mark.timeout(200)
def test_a_killed_rank_is_named_by_the_two_others(tmp_path):
    found = ranks(tmp_path, 3, "kill")
    assert found[2][0] == -signal.SIGKILL
    named(
        found,
        2,
        r"is gone: its process ended without a word \(step 3, in .*script.py, line \d+ \(main\)\)",
        10,
        among=(0, 1),
    )


@pytest.mark.timeout(200)
def test_a_stopped_rank_is_named_and_ends_when_it_goes_on(tmp_path):
    found = ranks(tmp_path, 2, "stop")
    named(found, 1, r"has given no sign of life for 5 seconds \(step 3", TIMEOUT + 10, among=(0,))
    assert found[1][0] == LOST


@pytest.mark.timeout(200)
def test_a_rank_that_hangs_is_named_and_shows_where(tmp_path):
    found = ranks(tmp_path, 2, "hang")
    named(
        found,
        1,
        r"has not come to 'a sum over all ranks' and has not moved for 5 seconds \(step 3, in "
        r".*script.py, line \d+ \(happens\)\)",
        TIMEOUT + 10,
        among=(0, 1),
    )
    # the place, for whoever wrote it
    assert "time.sleep(1000)" in found[1][1]


@pytest.mark.timeout(200)
def test_a_rank_that_hangs_is_named_where_sums_are_waited_for_later(tmp_path):
    """Neither is in a meeting, and neither moves; the one that was in fewer is behind."""
    found = ranks(tmp_path, 2, "device", "hang")
    named(
        found,
        1,
        r"has not come to 'the sum of the gradients' and has not moved for 5 seconds \(step 3, ",
        TIMEOUT + 10,
        among=(0, 1),
    )


@pytest.mark.timeout(200)
def test_a_slow_rank_is_waited_for_and_one_that_raises_is_quoted(tmp_path):
    """Twice the timeout is nothing for a rank that moves."""
    found = ranks(tmp_path, 2, "slow", "raise")
    assert found[1][0] == 2 and found[1][1].count("now ") == 2
    named(
        found,
        1,
        r"ended with an error \(step 3, .*\): ValueError: the reward of question 7\.",
        10,
        among=(0,),
    )


@pytest.mark.timeout(200)
def test_ranks_that_end_together_say_nothing(tmp_path):
    assert [(status, said) for status, said, _ in ranks(tmp_path, 2)] == [(0, ""), (0, "")]


# ---- torchrun's own restart: restarts.py, which does more of it


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    """The undisturbed run."""
    out, said, _ = torchrun(base, tmp_path_factory.mktemp("straight"), "nothing", 0, 0)
    assert said.endswith("exit status 0\n") and "going on" not in said, said
    return left_behind(out)


@pytest.mark.timeout(500)
def test_torchrun_goes_on_by_itself_after_a_rank_died(base, tmp_path, straight):
    """Rank 0, which writes the metrics and holds the store, is killed in step 4; the checkpoint of step 2
    is the last one."""
    out, said, _ = torchrun(base, tmp_path, "kill", 4, 0)
    assert re.search(
        r"train.py: on rank 1: rank 0 is gone: its process ended without a word \(step 4, ", said
    ), said
    assert (
        said.endswith("exit status 0\n")
        and said.count("going on after step 2") == 1
        and "connectFullMesh" not in said
    ), said
    assert left_behind(out) == straight


@pytest.mark.timeout(500)
def test_a_rank_that_hardly_gets_a_processor_changes_nothing(base, tmp_path, straight):
    out, said, _ = torchrun(base, tmp_path, "starve", 2, 1)
    assert said.endswith("exit status 0\n") and "going on" not in said and left_behind(out) == straight, said
