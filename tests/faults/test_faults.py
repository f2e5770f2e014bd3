"""The programs beside this file, in small; what they found in full stands in docs/results/reliability.md.
And that they would notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import interrupts
import pytest

HERE = Path(__file__).resolve().parent


def called(program, *arguments, broken=""):
    """Run a program with something of it replaced. -> (exit status, what it printed, its last line read as
    JSON)."""
    code = (
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport "
        f"{program}\n{broken}\nsys.exit({program}.main({list(arguments)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=290)
    lines = done.stdout.splitlines()
    assert lines and lines[-1].startswith("{"), done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads(lines[-1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills.py forks")


@pytest.mark.slow
def test_a_machine_that_is_gone_for_a_while_changes_nothing():
    status, said, last = called("restarts", "--nodes", "--times", "1")
    assert status == 0 and last["identical"] == last["named"] == last["lost"] == 1, said


@needs_fork
def test_killed_runs_are_the_runs_they_would_have_been():
    status, _, last = called("kills", "--kills", "4", "--seed", "2")
    assert (
        status == 0
        and last["kills"] == last["identical"] == 4
        and last["most_steps_lost"] <= last["save_every"]
    )
    assert last["most_steps_lost_in_background"] <= 2 * last["save_every"]


@needs_fork
@pytest.mark.slow
def test_kills_notices_what_a_resumed_run_does_not_restore():
    """An optimizer that begins anew. The kills come late enough for a checkpoint to be there."""
    status, said, last = called(
        "kills",
        "--kills",
        "2",
        "--seed",
        "2",
        broken="class Chance(kills.random.Random):\n"
        "    def randrange(self, *most): return most[-1] * 4 // 5\n"
        "kills.random = type('random', (), {'Random': Chance})\nkills.WAYS = ('change',)\n"
        "kills.checkpoint.load_optimizer = lambda folder, *_: int(folder.name[5:])",
    )
    assert status == 1 and last["identical"] < 2 and "optimizer.safetensors" in said, said


def test_damage_is_named_or_refused():
    status, said, last = called("damage", "--only", "model.safetensors")
    assert (
        status == 0
        and last["cases"] == 8
        and last["failed"] == []
        and said.count("Going on from step_000001") == 4
    )


def test_damage_notices_damage_that_goes_unnoticed():
    status, said, last = called(
        "damage", "--only", "checkpoint: model.safetensors", broken="damage.checkpoint.damage = lambda *_: ''"
    )
    assert status == 1 and len(last["failed"]) == 4 and "FAILED: does not say" in said


@needs_fork
def test_answers_and_pictures_of_every_kind_are_read_or_refused():
    status, said, last = called("fuzz", "--answers", "1000", "--pictures", "300")
    assert (
        status == 0
        and last["findings"] == 0
        and last["answers"]["tried"] == 1000
        and last["pictures"]["tried"] == 300
    ), said
    assert (
        last["answers"]["read"] > 20
        and sum(count for kind, count in last["pictures"].items() if kind.startswith("refused")) > 100
    )


@needs_fork
@pytest.mark.slow
def test_fuzz_notices_another_error_a_long_wait_a_wrong_value_and_a_death():
    """In that order, each once, in the processes that it forks."""
    broken = (
        """
def first(real, harm):
    calls = []
    def wrapped(*args, **how):
        calls.append(1)
        return harm() if len(calls) == 1 else real(*args, **how)
    return wrapped
def spin():
    start = fuzz.time.process_time()
    while fuzz.time.process_time() < start + 1.1: pass
"""
        + "{}"
    )
    for harm, words in (
        ("fuzz.open_picture = first(fuzz.open_picture, lambda: 1 / 0)", "ZeroDivisionError"),
        ("fuzz.answers.parse = first(fuzz.answers.parse, spin)", "took 1.1"),
        ("fuzz.REWARDS['format'] = first(fuzz.REWARDS['format'], lambda: 2)", "format gave 2"),
        ("fuzz.read = first(fuzz.read, lambda: fuzz.os._exit(7))", "ended with 7"),
    ):
        status, said, last = called("fuzz", "--answers", "3", "--pictures", "3", broken=broken.format(harm))
        assert status == 1 and last["findings"] == 1 and words in said, said


@pytest.mark.slow
def test_changed_runs_do_what_the_table_says():
    status, said, last = called("changes")
    assert status == 0 and last["changes"] >= 15 and not last["wrong"], said


@pytest.mark.slow
def test_every_kind_of_damage():
    status, said, last = called("damage")
    assert status == 0 and last["cases"] >= 40 and not last["failed"], said


def test_ctrl_c_leaves_a_page_curves_and_a_checkpoint(capsys):
    assert interrupts.main(["--times", "1", "--seed", "3"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("gone", ["report.html", "curves.png", "checkpoints"])
def test_interrupts_notices_what_is_missing(tmp_path, gone):
    (tmp_path / "checkpoints" / "step_000007").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000007" / "state.json").touch()
    (tmp_path / "report.html").write_text("stopped by SIGINT after step 7 of 40</html>")
    (tmp_path / "curves.png").write_bytes(b"IEND1234")
    said = "train.py: stopped by SIGINT after step 7 of 40: saved"
    assert interrupts.missing(tmp_path, said, 130, 130) == []
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    assert len(interrupts.missing(tmp_path, said, 130, 130)) == 1
    assert interrupts.missing(tmp_path, "", 130, 130) and interrupts.missing(tmp_path, said, 1, 130)
