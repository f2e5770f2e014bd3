"""A rank that dies, stops, hangs or raises: every other one names it and ends, in bounded time, with no
torchrun around; and torchrun starts them again by itself."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from grpo.parallel.lost_ranks import LOST, SECONDS_FOR_WORDS

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests" / "faults"))
from restarts import QUICK, left_behind, torchrun

TIMEOUT = 5.0
# Ranks that add numbers four times; something happens to one of them before the third time.
SCRIPT = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from grpo.parallel.ranks import end_with, gather_objects, join_ranks, leave_ranks

def happens(what):
    print("now", time.time(), file=sys.stderr, flush=True)
    if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop": os.kill(os.getpid(), signal.SIGSTOP)
    if what == "hang": time.sleep(1000)
    if what == "slow": time.sleep(0.6 * {TIMEOUT})
    if what == "raise": raise ValueError("the reward of question 7")
    if what == "break": raise KeyError("question 7")

def main(what, which):
    try:
        ranks = join_ranks("cpu", {TIMEOUT})
        for step in range(4):
            if step == 2 and ranks.rank == int(which): happens(what)
            if step == 2 and what == "all raise": raise ValueError("a setting is wrong")
            assert ranks.sum(torch.ones(3)).tolist() == [ranks.size] * 3
            assert len(gather_objects([0] * ranks.rank)) == sum(range(ranks.size))
    except ValueError as error:
        return end_with(error, 2)
    except BaseException as error:
        return end_with(error, None)
    finally:
        leave_ranks()
    return 0

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
"""


def run_ranks(tmp_path, size, what, which, agent=True):
    """The script on `size` ranks. agent: the store outlives the ranks, as with torchrun's agent; else rank 0
    holds it. -> per rank: exit status (None for one that had to be killed here), what
    it printed, seconds from the event to its end."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": str(agent),
        "WORLD_SIZE": str(size),
    }
    if not agent:
        # its port is free again
        del store
    logs = [tmp_path / f"{rank}.log" for rank in range(size)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, what, str(which)],
            stderr=open(log, "w"),
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]
    ended: dict[int, float] = {}
    until = time.time() + 60
    wanted = [rank for rank in range(size) if rank != which or what not in ("hang", "stop")]
    while len(ended) < len(wanted) and time.time() < until:
        ended |= {r: time.time() for r in wanted if r not in ended and processes[r].poll() is not None}
        time.sleep(0.05)
    statuses = [process.poll() for process in processes]
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    printed = [log.read_text() for log in logs]
    stamps = re.findall(r"now (\S+)", "".join(printed))
    began = float(stamps[0]) if stamps else until
    return [(statuses[r], printed[r], ended.get(r, until) - began) for r in range(size)]


def named(found, rank, words, seconds, *, by):
    """Each rank of `by` ended within the seconds, with one line, which names that rank only."""
    for own in by:
        status, printed, took = found[own]
        assert status == LOST and took < seconds, (own, status, took, printed)
        assert re.findall(r"train.py: .*", printed) == re.findall(
            rf"train.py: on rank {own}: rank {rank} {words}\. The same command .*", printed
        ), printed
        assert printed.count("train.py: ") == 1 and "Traceback" not in printed, printed
        assert len(re.findall(r"rank \d", printed)) == 2, printed


@pytest.mark.timeout(200)
@pytest.mark.parametrize("which", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_by_the_two_others(tmp_path, which):
    found = run_ranks(tmp_path, 3, "kill", which)
    assert found[which][0] == -signal.SIGKILL
    words = "has died: its process ended without a word, before the end of 'a sum over all ranks'"
    named(found, which, words, SECONDS_FOR_WORDS + 5, by=[r for r in range(3) if r != which])


@pytest.mark.timeout(200)
def test_a_killed_rank_that_holds_the_store_is_named(tmp_path):
    """Ranks that were started without torchrun."""
    found = run_ranks(tmp_path, 2, "kill", 0, agent=False)
    status, printed, took = found[1]
    assert found[0][0] == -signal.SIGKILL and status == LOST and took < SECONDS_FOR_WORDS + 5, found
    assert printed.count("train.py: ") == 1 and "Traceback" not in printed, printed
    assert "rank 0, which holds the store of the process group, has died" in printed, printed


@pytest.mark.timeout(200)
@pytest.mark.parametrize("what", ["hang", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named_by_the_two_others(tmp_path, what):
    found = run_ranks(tmp_path, 3, what, 1)
    words = r"hangs: it has not come to 'a sum over all ranks' within 5 seconds"
    named(found, 1, words, TIMEOUT + SECONDS_FOR_WORDS + 5, by=(0, 2))


@pytest.mark.timeout(200)
def test_an_expected_error_of_one_rank_is_printed_by_that_rank_alone(tmp_path):
    """The other rank's collective fails because of it, and prints no second line on the same machine."""
    found = run_ranks(tmp_path, 2, "raise", 1)
    assert [status for status, _, _ in found] == [LOST, 2]
    assert found[1][1].count("train.py: the reward of question 7") == 1
    assert "train.py" not in found[0][1] and found[0][2] < 5


@pytest.mark.timeout(200)
def test_an_unexpected_error_of_one_rank_is_quoted_by_the_other(tmp_path):
    found = run_ranks(tmp_path, 2, "break", 1)
    assert "KeyError: 'question 7'" in found[1][1] and "train.py: " not in found[1][1]
    named(found, 1, r"ended with an error: KeyError: 'question 7'", 5, by=(0,))


@pytest.mark.timeout(200)
def test_an_error_of_all_ranks_is_printed_once(tmp_path):
    found = run_ranks(tmp_path, 3, "all raise", 9)
    assert [status for status, _, _ in found] == [2, 2, 2]
    assert "".join(printed for _, printed, _ in found) == "\ntrain.py: a setting is wrong\n"


@pytest.mark.timeout(200)
def test_a_slow_rank_is_waited_for_and_ranks_that_end_together_print_nothing(tmp_path):
    found = run_ranks(tmp_path, 2, "slow", 1)
    assert [status for status, _, _ in found] == [0, 0]
    assert not any("train.py" in printed for _, printed, _ in found), found


# ---- torchrun's own restart: restarts.py, which does more of it


@pytest.fixture(scope="module")
def straight(base, run_once):
    """What the undisturbed run learned, on one rank."""
    return learned(run_once(*QUICK, f"model={base}"))


def learned(out):
    """The samples, and the weights of every checkpoint."""
    _, samples, files = left_behind(out)
    return samples, {name: file for name, file in files.items() if name.endswith("model.safetensors")}


@pytest.mark.timeout(500)
def test_torchrun_goes_on_by_itself_after_a_rank_died(base, tmp_path, straight):
    """Rank 0, which writes the metrics and holds the store, is killed in step 4; the checkpoint of step 2
    is the last one."""
    out, said, _ = torchrun(base, tmp_path, "kill", 4, 0)
    assert re.search(r"train.py: on rank 1: rank 0 has died: its process ended without a word", said), said
    assert (
        said.endswith("exit status 0\n")
        and said.count("going on after step 2") == 1
        and "connectFullMesh" not in said
    ), said
    assert learned(out) == straight


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_rank_that_hardly_gets_a_processor_changes_nothing(base, tmp_path, straight):
    out, said, _ = torchrun(base, tmp_path, "starve", 2, 1)
    assert said.endswith("exit status 0\n") and "going on" not in said and learned(out) == straight, said
