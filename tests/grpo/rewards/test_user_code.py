"""A user's own reward function: what it is given, and that nothing it does can stop a run without a named
error."""

import contextlib
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
from grpo.rewards.signatures import checked
from grpo.rewards.user_code import RewardError, RewardTimeout, UserReward, described, load, names_a_file

FILE = """\
import multiprocessing, os, subprocess, sys, time
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

def forks(text, example, length):
    os.fork()
    return float(text)

def forks_and_raises(text, example, length):
    os.fork()
    raise ValueError(f"in both at {text}")

def has_children(text, example, length):
    sleeps = [sys.executable, "-c", "import time; time.sleep(1000)"]
    children = [subprocess.Popen(sleeps).pid, os.fork()]
    if not children[1]:
        time.sleep(1000)
        os._exit(0)
    with open(text, "w") as note:
        note.write(" ".join(map(str, children)))
    while "wait" in text: time.sleep(1)
    return 1.0

has_children.timeout = 5

def has_daemons(text, example, length):
    # they leave the group: in sessions of their own, of a parent that has ended
    code = "import os, time; os.setsid(); (os.fork() and os._exit(0)); print(os.getpid(), flush=True)"
    code += "; time.sleep(1000)"
    sleeps = [sys.executable, "-c", "import time; time.sleep(1000)"]
    pids = [subprocess.Popen(sleeps, start_new_session=True).pid]
    pids.append(int(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE).stdout.readline()))
    if not (child := os.fork()):
        os.setsid()
        time.sleep(1000)
    with open(text, "w") as note:
        note.write(" ".join(map(str, [*pids, child])))
    while "wait" in text: time.sleep(1)
    if "die" in text: os._exit(3)
    return 1.0

has_daemons.timeout = 5

def writes(text, example, length):
    what, descriptors = text.split(), [int(n) for n in os.listdir("/dev/fd") if int(n) > 2]
    if what[0] == "child" and os.fork() == 0:
        descriptors = range(3, 100)
    elif what[0] == "child":
        os.wait()
        return 0.25
    for descriptor in descriptors:
        try: os.write(descriptor, eval(what[1]))
        except OSError: pass
    if what[0] == "child": os._exit(0)
    return 0.25

writes.timeout = 3

def uses_a_pool(text, example, length):
    with multiprocessing.Pool(2) as pool:
        return float(sum(pool.map(len, text.split())))

def prints(text, example, length):
    print("to stdout"), os.system("echo from a child"), print("to stderr", file=sys.stderr)
    return 0.5
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
        ("raise", r"raised KeyError: 'no such thing' \(line 15\)"),
        ("leave", r"raised SystemExit: bye \(line 14\)"),
        ("list", "returned a list of 3; return one number"),
        ("none", "returned None"),
        ("nan", "returned nan; return a finite number"),
    ],
)
def test_what_is_no_number_is_named(moody, text, message):
    with pytest.raises(RewardError, match=rf"mine.py:moody': it {message}.*, at the question 't/7'"):
        moody(text, ASKED, 1)
    # and the process still runs
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
    ask = UserReward._ask

    def signalled_before_it_has_handlers(self, question, seconds, about):
        os.kill(self.process.pid, number)
        return ask(self, question, seconds, about)

    monkeypatch.setattr(UserReward, "_ask", signalled_before_it_has_handlers)
    early = UserReward(f"{file}:moody")
    assert early.process.is_alive() and not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {number}
    early.close()


def runs(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(*pids: int) -> bool:
    """Whether the processes end within five seconds."""
    for _ in range(50):
        if not any(map(runs, pids)):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def opened(file):
    """opened(function): a reward of the file; one process each for all tests, because it takes a second."""
    rewards = {}

    def opened(function):
        if function not in rewards:
            rewards[function] = UserReward(f"{file}:{function}")
        return rewards[function]

    yield opened
    for reward in rewards.values():
        reward.close()


def test_a_fork_that_returns_shifts_no_score(opened):
    """Asked for 1 to 6, a reward that forks gave 1, 1, 2, 2, 3, 4: the child answered as well, and each
    answer was taken for that of the next question."""
    reward = opened("forks")
    assert [reward(str(n), ASKED, 1) for n in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    reward = opened("forks_and_raises")
    for n in range(1, 4):
        with pytest.raises(RewardError, match=rf"it raised ValueError: in both at {n} \(line 27\), at the"):
            reward(str(n), ASKED, 1)


@pytest.mark.parametrize("how", ["returns", "waits"])
def test_children_of_a_reward_end_with_it(opened, tmp_path, how):
    """One that returns leaves them for its next call; one that hangs is ended with them."""
    reward = opened("has_children")
    note = tmp_path / how
    if how == "waits":
        with pytest.raises(RewardTimeout, match="no result after 5 seconds, at the question 't/7'"):
            reward(str(note), ASKED, 1)
        children = [int(pid) for pid in note.read_text().split()]
    else:
        assert reward(str(note), ASKED, 1) == 1
        children = [int(pid) for pid in note.read_text().split()]
        assert all(map(runs, children))
        reward.close()
    assert ended(*children)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="found by what /proc shows")
@pytest.mark.parametrize("how", ["returns", "waits", "die"])
def test_children_in_sessions_of_their_own_end_with_a_reward(opened, tmp_path, how):
    reward = opened("has_daemons")
    if how == "returns":
        assert reward(str(tmp_path / how), ASKED, 1) == 1
        reward.close()
    else:
        with pytest.raises(RewardError):
            reward(str(tmp_path / how), ASKED, 1)
    assert ended(*(int(pid) for pid in (tmp_path / how).read_text().split()))


@pytest.mark.parametrize("message", [r"b'garbage'", r"b'\\0\\0'", r"b'\\0\\0\\0\\x02{}'", r"b'\\xff'*9"])
def test_what_a_child_writes_reaches_nobody(opened, message):
    reward = opened("writes")
    assert [reward(f"child {message}", ASKED, 1) for _ in range(3)] == [0.25] * 3


@pytest.mark.parametrize(
    "message",
    [r"b'garbage'", r"b'\\0\\0'", r"b'\\0\\0\\0\\x02{}'", r"b'\\0\\0\\0\\x01['", r"b'\\0\\0\\1\\0'"],
)
def test_what_is_no_answer_is_refused(opened, message):
    """The function itself writes to all it has open, the run's pipe too. The next call has a new process."""
    reward = opened("writes")
    with pytest.raises(
        RewardError, match=r"writes': (its process wrote what is no answer|no result after 3 seconds).*'t/7'"
    ):
        reward(f"self {message}", ASKED, 1)
    assert reward("child b''", ASKED, 1) == 0.25


@pytest.mark.parametrize("change", [{"number": 7}, {"pid": 1}, {"number": None}])
def test_an_answer_to_another_question_is_refused(moody, monkeypatch, change):
    real = user_code.json.loads
    monkeypatch.setattr(user_code.json, "loads", lambda text: real(text) | change)
    with pytest.raises(RewardError, match="no answer .* in place of an answer with number and pid .*'t/7'"):
        moody("fine", ASKED, 1)
    monkeypatch.undo()
    assert moody("fine", ASKED, 1) == 0.5


def test_a_reward_may_have_a_pool(opened):
    """A pool ends its processes by SIGTERM, which the reward's own process ignores."""
    reward = opened("uses_a_pool")
    assert [reward("a bc def", ASKED, 1) for _ in range(2)] == [6, 6]


@pytest.mark.parametrize("function, place", [("has_children", "wait"), ("has_daemons", "idle")])
def test_a_process_does_not_outlive_its_run(file, tmp_path, function, place):
    """Not even one that hangs, with children, in a run that was killed; nor children of one that is idle."""
    program = tmp_path / "program.py"
    program.write_text(
        "from data.types import Example\nfrom grpo.rewards import UserReward\n"
        f"if __name__ == '__main__':\n    reward = UserReward('{file}:{function}')\n"
        f"    print(reward.process.pid, flush=True)\n    reward.timeout = 1000\n"
        f"    reward('{tmp_path / place}', Example('t/1', '?', (), '1'), 1)\n"
        "    import time\n    time.sleep(1000)\n"
    )
    run = started(program)
    pid, note = int(run.stdout.readline()), tmp_path / place
    while not note.exists() or len(note.read_text().split()) < 2:
        time.sleep(0.1)
    children = [int(child) for child in note.read_text().split()]
    assert runs(pid) and all(map(runs, children))
    run.kill()
    run.wait()
    assert ended(pid, *children)


def test_prints_disturb_nothing(file, tmp_path):
    """What a reward prints goes to stderr, so a program's own output is whole; Ctrl-C in a call ends both."""
    program = tmp_path / "program.py"
    program.write_text(
        "from data.types import Example\nfrom grpo.rewards import UserReward\n"
        f"if __name__ == '__main__':\n    reward = UserReward('{file}:prints')\n"
        "    print(reward('', Example('t/1', '?', (), '1'), 1), flush=True)\n"
        f"    reward = UserReward('{file}:moody')\n    reward.timeout = 1000\n    print('asks', flush=True)\n"
        "    reward('sleep', Example('t/1', '?', (), '1'), 1)\n"
    )
    run = started(program)
    assert [run.stdout.readline() for _ in range(2)] == ["0.5\n", "asks\n"]
    for _ in range(10):
        # a signal just before Python waits for an answer is heard at the next one only
        run.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(2)
            break
    out, err = run.communicate(timeout=2)
    assert out == "" and "KeyboardInterrupt" in err
    assert all(line in err for line in ("to stdout", "from a child", "to stderr"))


def started(program: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen(
        [sys.executable, program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=program.parent,
        preexec_fn=hears_signals,
    )


def hears_signals() -> None:
    """As at a terminal, whatever the tests run under."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
    assert load(str(file), "moody")("fine", ASKED, None) == 0.5


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
    run = started(tmp_path / "program.py")
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, "ready\n"), err
