"""A user's own reward function: what it is given, and that nothing it does can stop a run without a named
error."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch

from data.types import Example
from grpo.rewards import user_code
from grpo.rewards.rules import rule, score
from grpo.rewards.user_code import (
    RewardError,
    RewardTimeout,
    UserReward,
    called,
    checked,
    described,
    load,
    names_a_file,
)

FILE = """\
import os, sys, time
import beside

def words(text, example, length):
    print("a print disturbs nothing")
    score = len(text.split()) / 10 + length + (example.answer in text) + beside.NOTHING
    return score + len(example.pictures) + example.extra["bonus"]

def moody(text, example, length):
    if text == "hang":
        while True: pass
    if text == "sleep": time.sleep(100)
    if text == "die": os._exit(3)
    if text == "leave": sys.exit("bye")
    if text == "raise": raise KeyError("no such thing")
    return {"list": [1, 2, 3], "none": None, "nan": float("nan")}.get(text, 0.5)

moody.timeout = 3
number = 5
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FILE)
    (path.parent / "beside.py").write_text("NOTHING = 0\n")
    return path


@pytest.fixture(scope="module")
def moody(file):
    reward = UserReward(f"{file}:moody")
    yield reward
    reward.close()


ASKED = Example("t/7", "How many?", (), "3", pictures=(lambda: None,), extra=MappingProxyType({"bonus": 100}))


def test_a_function_is_given_text_example_and_length(file, monkeypatch):
    """Through `score`, the file's path relative to the working directory, as a recipe names it. Pictures
    stay with the run: they need not travel."""
    monkeypatch.chdir(file.parent)
    assert names_a_file("mine.py:words") and not names_a_file("accuracy")
    reward, parts = score(
        [["3 is it", "no"]], [ASKED], {"mine.py:words": 2.0, "format": 1.0}, torch.tensor([[10, 20]])
    )
    torch.testing.assert_close(parts["mine.py:words"], torch.tensor([[111.3, 120.1]]))
    torch.testing.assert_close(reward, torch.tensor([[222.6, 240.2]]))
    # one process a run
    assert rule("mine.py:words") is rule("mine.py:words")
    rule("mine.py:words").close()


@pytest.mark.parametrize(
    "text, message",
    [
        ("raise", r"raised KeyError: 'no such thing' \(line 14\)"),
        ("leave", r"raised SystemExit: bye \(line 13\)"),
        ("list", "returned a list of 3; return one number"),
        ("none", "returned None"),
        ("nan", "returned nan; return a finite number"),
    ],
)
def test_what_is_no_number_is_named(moody, text, message):
    with pytest.raises(RewardError, match=rf"mine.py:moody': it {message}.*, at the question 't/7'"):
        moody(text, ASKED, 1)
    # and the process lives on
    assert moody("fine", ASKED, 1) == 0.5


@pytest.mark.parametrize("text", ["hang", "sleep"])
def test_a_call_that_hangs_is_ended_with_its_process(moody, text):
    process = moody.process
    with pytest.raises(
        RewardTimeout, match=r"mine.py:moody': no result after 3 seconds, at the question 't/7'"
    ):
        moody(text, ASKED, 1)
    assert not process.is_alive()
    # a new one
    assert moody("fine", ASKED, 1) == 0.5


def test_a_process_that_dies_is_named(moody):
    with pytest.raises(
        RewardError, match=r"mine.py:moody': its process ended with exit code 3, at the question 't/7'"
    ):
        moody("die", ASKED, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_tells_the_run_to_stop_does_not_end_its_rewards(moody, file, monkeypatch, number):
    """A scheduler sends SIGTERM to every process, and the step under way still has to be scored. Also
    while the file is being loaded."""
    assert moody("fine", ASKED, 1) == 0.5
    os.kill(moody.process.pid, number)
    time.sleep(0.1)
    assert moody("fine", ASKED, 1) == 0.5 and moody.process.is_alive()
    answer = UserReward._answer

    def told_before_it_can_know(self, seconds, about):
        os.kill(self.process.pid, number)
        return answer(self, seconds, about)

    monkeypatch.setattr(UserReward, "_answer", told_before_it_can_know)
    early = UserReward(f"{file}:moody")
    assert early.process.is_alive() and not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {number}
    early.close()


def test_a_process_does_not_outlive_its_run(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for a parent that is gone"))
    user_code._end_with(parent=-1)
    assert ended == [1]


def test_a_file_that_cannot_be_loaded_is_named_before_the_run(file, tmp_path, monkeypatch):
    with pytest.raises(RewardError, match=r"missing.py:f': there is no file .*missing.py"):
        UserReward("missing.py:f")
    (tmp_path / "broken.py").write_text("x = 1\nimport no_such_module\n")
    with pytest.raises(
        RewardError,
        match=r"broken.py:f': it raised ModuleNotFoundError: No module named 'no_such_module' \(line 2\), at "
        r"loading the file",
    ):
        UserReward(f"{tmp_path / 'broken.py'}:f")
    (tmp_path / "endless.py").write_text("while True: pass\n")
    # too short for any file; an endless one takes longer than any
    monkeypatch.setattr(user_code, "LOADING", 0.5)
    with pytest.raises(
        RewardTimeout, match=r"endless.py:f': no result after 0.5 seconds, at loading the file"
    ):
        UserReward(f"{tmp_path / 'endless.py'}:f")


def test_loading_in_this_process(file, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("nothing", "number"):
        with pytest.raises(ValueError, match=f"mine.py has no function '{name}'"):
            load(str(file), name)
    (file.parent / "syntax.py").write_text("def f(:\n")
    with pytest.raises(SyntaxError) as caught:
        load(str(file.parent / "syntax.py"), "f")
    assert "it raised SyntaxError" in described(caught.value, str(file))
    assert called(load(str(file), "moody"), ("fine", ASKED, None), str(file)) == {"value": 0.5}


@pytest.mark.parametrize("value", [0, 1, True, 0.5, -3, np.float32(0.5), np.float64(2), np.int64(3)])
def test_numbers_are_numbers(value):
    assert checked(value) == float(value) and type(checked(value)) is float


@pytest.mark.parametrize(
    "value, words",
    [
        (None, "returned None"),
        ("1", "a str"),
        ([1.0], "a list of 1"),
        ((1, 2), "a tuple of 2"),
        (np.zeros((2, 3)), r"a ndarray of shape \(2, 3\)"),
        (torch.tensor(1.0), r"a Tensor of shape \(\)"),
        (1j, "a complex"),
        (float("inf"), "returned inf"),
        (float("nan"), "returned nan"),
        (1e300, r"returned 1e\+300; return a finite"),
        ({}, "a dict"),
    ],
)
def test_everything_else_is_not(value, words):
    with pytest.raises(ValueError, match=words):
        checked(value)


def test_a_program_that_used_one_ends(tmp_path):
    """Python waits for such processes at its own exit, and this one ignores the SIGTERM that would end it."""
    (tmp_path / "mine.py").write_text("def paid(text, example, length):\n    return 1.0\n")
    (tmp_path / "program.py").write_text(
        "from grpo.rewards.user_code import UserReward\nif __name__ == '__main__':\n    reward = "
        "UserReward('mine.py:paid')\n    print('ready')\n"
    )
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr
