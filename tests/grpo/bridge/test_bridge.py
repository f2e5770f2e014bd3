"""The bridge as a command, against a server that fails in every way (small_bridge.py)."""

import json
import os
import signal
import time

import pytest

pytest.importorskip("openai")

from fake_server import message, serving
from small_bridge import IMPATIENT, answer, command, faults, items, replies, run

from grpo.bridge import __main__ as program
from grpo.bridge import run as running
from grpo.serving import client

KEY = "sk-a-secret-of-this-test"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(client, "POLL", 0.02)


@pytest.fixture
def data(tmp_path):
    return items(tmp_path / "data", 4)


def bridge(fake, data, *more):
    """-> exit status."""
    return program.main(command(fake.url, data, data.parent / "out", *more))


def one_line(capsys, *words):
    """The only line of an error; it holds the words."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grpo.bridge: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    return lines[0]


def test_every_stage_is_asked_about_every_question(data):
    with serving(answer=answer) as fake:
        assert bridge(fake, data) == 0
    found = replies(data.parent / "out")
    assert set(found) == {(s, f"q{n}", 0) for s in ("pseudo", "describe", "reason") for n in range(4)}
    bodies = [body for body, _ in fake.seen]
    shown = [body["messages"][0]["content"] for body in bodies]
    assert sum(isinstance(each, list) for each in shown) == 8, "two stages show the picture"
    described = next(each[1]["text"] for each in shown if "a thinking process:" in str(each))
    assert "A picture, described as number" in described and "What is" in described
    reasoned = next(each for each in shown if isinstance(each, str))
    assert reasoned.startswith("A picture, described as number") and "Standard answer: " in reasoned
    assert found["reason", "q1", 0]["thinking"].startswith("First I look")


def test_the_same_command_asks_nothing_again(data):
    with serving(answer=answer) as fake:
        assert bridge(fake, data) == 0
        before = replies(data.parent / "out")
        count = len(fake.seen)
        assert bridge(fake, data) == 0
    assert len(fake.seen) == count and replies(data.parent / "out") == before


def test_a_killed_bridge_ends_as_an_undisturbed_one(tmp_path):
    data = items(tmp_path / "data", 5)
    with serving(answer=answer, fault=faults(1)) as fake:
        straight = command(fake.url, data, tmp_path / "straight", *IMPATIENT)
        status = run(straight)
        wanted = replies(tmp_path / "straight")
        # another server's memory of arrivals would be another one
        fake.arrivals.clear()
        killed = command(fake.url, data, tmp_path / "killed", *IMPATIENT)
        assert run(killed, kill_after=7) == -9
        assert run(killed) == status
    assert replies(tmp_path / "killed") == wanted and status in (0, 3)


def test_a_torn_last_line_is_cut_off(data):
    out = data.parent / "out"
    with serving(answer=answer) as fake:
        assert bridge(fake, data) == 0
        wanted = replies(out)
        file = out / "2-describe.jsonl"
        file.write_bytes(file.read_bytes()[:-20])
        asked = len(fake.seen)
        assert bridge(fake, data) == 0
    assert replies(out) == wanted and len(fake.seen) == asked + 1


def test_a_broken_line_is_named(data, capsys):
    with serving(answer=answer) as fake:
        assert bridge(fake, data) == 0
        file = data.parent / "out" / "1-pseudo.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join([lines[0], b'{"uid": 3}\n', *lines[2:]]))
        capsys.readouterr()
        assert bridge(fake, data) == 2
    one_line(capsys, "1-pseudo.jsonl, line 2", "not a stored reply")


# ---- replies of a bad form


def test_a_bad_reply_is_asked_for_again_with_another_seed(data):
    """The first reasoning of each question is cut; the second one is whole."""
    seeds = {}

    def cut(body, arrival):
        text = str(body["messages"])
        first = seeds.setdefault(text, body["seed"]) == body["seed"]
        return message("An unfinished", "length") if first and "Following the above" in text else None

    with serving(answer=answer, fault=cut) as fake:
        assert bridge(fake, data) == 0
    found = replies(data.parent / "out")
    assert {attempt for stage, _, attempt in found if stage == "reason"} == {0, 1}
    assert {attempt for stage, _, attempt in found if stage != "reason"} == {0}


def test_what_stays_bad_is_parked_and_stops_no_other(data, capsys):
    bad = lambda body, _: 500 if "What is 2 plus" in str(body["messages"]) else None
    with serving(answer=answer, fault=bad) as fake:
        assert bridge(fake, data, "attempts=2", "vision.retries=0") == 3
        assert "parked: 1 at pseudo; the same command tries" in capsys.readouterr().err
        found = replies(data.parent / "out")
        assert {key for key in found if key[1] == "q2"} == {("pseudo", "q2", 0), ("pseudo", "q2", 1)}
        assert len([key for key in found if key[0] == "reason"]) == 3
        fake.fault = lambda body, _: None
        assert bridge(fake, data, "attempts=2") == 0
    found = replies(data.parent / "out")
    assert ("pseudo", "q2", 2) in found and ("reason", "q2", 0) in found


def test_a_dead_server_ends_the_run(data, capsys, monkeypatch):
    monkeypatch.setattr(running, "FAILURES", 3)
    with serving() as fake:
        url = fake.url
    assert program.main(command(url, data, data.parent / "out", "vision.retries=0")) == 2
    one_line(capsys, "the last 3 requests of pseudo failed", "onnect")


# ---- what changes


@pytest.mark.parametrize(
    "change, named",
    [
        ("vision.model=other", "model of pseudo is not"),
        ("pseudo.prompt=mulberry", "prompt of pseudo is not"),
        ("pseudo.temperature=0.1", "temperature of pseudo is not"),
        ("seed=3", "seed of pseudo is not"),
    ],
)
def test_a_change_is_named_and_needs_again(data, capsys, change, named):
    with serving(answer=answer) as fake:
        assert bridge(fake, data) == 0
        capsys.readouterr()
        asked = len(fake.seen)
        assert bridge(fake, data, change) == 2
        one_line(capsys, named, "again=true")
        assert len(fake.seen) == asked
        assert bridge(fake, data, change, "again=true") == 0
        assert len(fake.seen) > asked
        asked = len(fake.seen)
        assert bridge(fake, data, change) == 0
        assert len(fake.seen) == asked, "what was asked again is not asked a third time"


def test_a_changed_question_is_named(data, capsys):
    with serving(answer=answer) as fake:
        assert bridge(fake, data) == 0
        data.write_text(data.read_text().replace("What is 2 plus", "Pray, what is 2 plus"))
        assert bridge(fake, data) == 2
    one_line(capsys, "'q2' has changed", "again=true")


def test_more_questions_are_no_change(data):
    with serving(answer=answer) as fake:
        assert bridge(fake, data, "limit=2") == 0
        assert len(fake.seen) == 6
        assert bridge(fake, data) == 0
        assert len(fake.seen) == 12


def test_repeated_questions_and_those_of_a_benchmark_are_not_asked(data):
    """Money is not spent on what the filters refuse in any case."""
    first, second, *_ = data.read_text().splitlines()
    again = json.dumps(json.loads(first) | {"uid": "again"})
    data.write_text(data.read_text() + again + "\n")
    bench = data.parent / "bench.jsonl"
    bench.write_text(second + "\n")
    with serving(answer=answer) as fake:
        assert bridge(fake, data, f"filters.against=[{{task: jsonl, data: {bench}}}]") == 0
    assert {uid for _, uid, _ in replies(data.parent / "out")} == {"q0", "q2", "q3"}


# ---- what ends it


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_ends_at_once(data, capsys, monkeypatch, status):
    monkeypatch.setenv("A_KEY", KEY)
    told = (status, {}, {"error": {"message": f"bad key {KEY}"}})
    with serving(fault=lambda *_: told) as fake:
        assert bridge(fake, data, "vision.key_env=A_KEY") == 2
    assert KEY not in one_line(capsys, str(status), "A_KEY")
    assert len(fake.seen) <= 4 and not replies(data.parent / "out")


def test_a_missing_key_is_named(data, capsys, monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    with serving() as fake:
        assert bridge(fake, data, "vision.key_env=A_KEY") == 2
    one_line(capsys, "A_KEY is not set")
    assert not fake.seen


def test_missing_pictures_end_it_before_the_first_request(data, capsys):
    (data.parent / "1.png").unlink()
    with serving() as fake:
        assert bridge(fake, data) == 2
    one_line(capsys, "1 picture files are missing", "no file 1.png")
    assert not fake.seen


def test_a_picture_that_cannot_be_read_is_left_out(data, capsys):
    (data.parent / "1.png").write_bytes(b"no picture")
    with serving(answer=answer) as fake:
        assert bridge(fake, data) == 0
    said = capsys.readouterr().err
    assert "left out: example 'q1', picture 1" in said and "1 questions cannot be used" in said
    assert len(fake.seen) == 9


def test_pictures_are_checked_again_when_there_are_more_questions(data, capsys):
    (data.parent / "3.png").unlink()
    with serving(answer=answer) as fake:
        assert bridge(fake, data, "limit=2") == 0
        assert bridge(fake, data) == 2
        one_line(capsys, "1 picture files are missing", "no file 3.png")
        assert len(fake.seen) == 6


def test_a_key_that_a_server_repeats_is_not_stored(data, capfd, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    told = (400, {}, {"error": {"message": f"no room for {KEY}"}})
    with serving(fault=lambda *_: told) as fake:
        assert bridge(fake, data, "vision.key_env=A_KEY", "attempts=1") == 3
    written = [path.read_bytes() for path in (data.parent / "out").rglob("*") if path.is_file()]
    assert b"no room for <A_KEY>" in b"".join(written) and KEY.encode() not in b"".join(written)
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("budget", ["budget.tokens=0", "budget.money=0", "budget.tokens=-3"])
def test_a_budget_of_nothing_is_refused(data, capsys, budget):
    with serving() as fake:
        assert bridge(fake, data, budget) == 2
    one_line(capsys, budget.partition("=")[0], "lets nothing be asked")


def test_a_budget_ends_it_and_a_larger_one_goes_on(data, capsys):
    with serving(answer=answer) as fake:
        assert bridge(fake, data, "budget.tokens=30", "vision.at_once=1") == 3
        assert len(fake.seen) == 3, "a reply has 10 tokens"
        assert "the budget is used up (30 tokens)" in capsys.readouterr().err
        price = ["vision.price={in: 1000, out: 0}", "reasoner.price={in: 0, out: 1000}"]
        assert bridge(fake, data, "budget.money=0.001", *price) == 3
        assert len(fake.seen) == 3
        assert bridge(fake, data) == 0
    assert len(fake.seen) == 12


def test_a_budget_that_is_just_enough_is_not_used_up(data):
    with serving(answer=answer) as fake:
        assert bridge(fake, data, "budget.tokens=120", "vision.at_once=1", "reasoner.at_once=1") == 0
    assert len(fake.seen) == 12


def test_a_full_disk_is_one_sentence(data, capsys, monkeypatch):
    out = data.parent / "out"
    fsync = os.fsync

    def full(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith("2-describe.jsonl"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with serving(answer=answer) as fake:
        monkeypatch.setattr(os, "fsync", full)
        assert bridge(fake, data) == 2
        one_line(capsys, "No space left", "the same command goes on")
        assert len(replies(out)) == 4 and not (out / "2-describe.jsonl").read_bytes()
        monkeypatch.setattr(os, "fsync", fsync)
        assert bridge(fake, data) == 0
    assert len(replies(out)) == 12


def test_one_writer_at_a_time(data, capsys):
    from grpo.run import lock

    lock.claim(data.parent / "out")
    try:
        with serving() as fake:
            # the same process may not claim it twice either
            assert bridge(fake, data) == 2
    finally:
        lock.leave()
    one_line(capsys, "writes to", "out=DIR")


def test_ctrl_c_finishes_what_is_in_flight(data, capsys):
    sent = []

    def interrupts(body: dict) -> dict:
        if len(fake.seen) > 2 and not sent:
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return answer(body)

    with serving(answer=interrupts, seconds=0.1) as fake:
        start = time.monotonic()
        status = bridge(fake, data, "vision.at_once=2")
        assert status == 130 and time.monotonic() - start < 8
        said = capsys.readouterr().err
        assert "the same command goes on from here" in said
        assert len(replies(data.parent / "out")) == len(fake.seen) < 12
        assert bridge(fake, data) == 0
    assert len(fake.seen) == 12


# ---- before the start


def test_a_plan_measures_and_keeps_what_it_measured(tmp_path, capsys):
    data = items(tmp_path / "data", 30)
    price = ["vision.price={in: 1000000, out: 0}", "reasoner.price={in: 0, out: 2000000}"]
    with serving(answer=answer) as fake:
        assert bridge(fake, data, *price, "--plan") == 0
        assert len(fake.seen) == 60
        table = capsys.readouterr().out.splitlines()
        assert table[0] == "30 questions, from 20 that were measured:"
        rows = {line.split()[0]: line.split() for line in table[1:]}
        # 7 tokens read and 3 written a reply
        assert rows["pseudo"][1:6] == ["30", "7", "each", "3", "each"] and rows["pseudo"][-1] == "210.00"
        assert rows["reason"][-1] == "180.00" and rows["all"][1:4] == ["90", "630", "270"]
        assert bridge(fake, data, *price) == 0
    assert len(fake.seen) == 90


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "give a recipe"),
        (["vision_r2"], "did you mean 'vision_r1'"),
        (["vision_r1", "--out=3"], "settings are written without dashes"),
        (["vision_r1", "--plam"], "did you mean '--plan'"),
        (["vision_r1", "pseudo.promt=x"], "did you mean 'pseudo.prompt'"),
        (["vision_r1", "pseudo.prompt=lcott"], "did you mean 'lcot'"),
        (["vision_r1", "pseudo.prompt=no.txt"], "cannot be read"),
        (["vision_r1", "pseudo.prompt=null"], "there is no such reply"),
        (["vision_r1", "reason.prompt=null"], "reason.prompt"),
        (["vision_r1", "vision.model="], "vision.model"),
        (["vision_r1", "vision.url=nowhere", "data=x"], "x"),
        (["vision_r1", "vision.kind=clever"], "one of server, local, function"),
        (["vision_r1", "reasoner.price={in: 1}"], "reasoner.price"),
        (["vision_r1", "reason.top_p=0"], "reason.top_p"),
        (["vision_r1", "attempts=0"], "attempts"),
        (["vision_r1", "budget.money=3"], "no price is known"),
        (["vision_r1", "mine.yaml"], "2 recipes"),
    ],
)
def test_settings_that_cannot_be_right_are_named(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program.main(arguments) == 2
    one_line(capsys, named)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_help_names_every_setting_once(capsys):
    assert program.main(["--help"]) == 0
    said = capsys.readouterr().out
    for text in ("vision_r1", "budget.tokens=null", "pseudo.prompt=null", "again=false", "Exit status"):
        assert text in said
    assert max(map(len, said.splitlines())) <= 120


def test_a_recipe_of_ones_own_inherits(tmp_path):
    from grpo.bridge.settings import load

    (tmp_path / "mine.yaml").write_text("base: vision_r1\nreason:\n  max_tokens: 99\n")
    found = load(str(tmp_path / "mine.yaml"))
    assert found.reason.max_tokens == 99 and found.pseudo.prompt == "lcot"
    assert found.out == "runs/bridge_mine"


def test_a_function_writes_too(data, monkeypatch):
    from grpo.bridge import writers

    def think(text, rng):
        return f"<think> {rng.random()} {'Let me see once more. ' * 3} </think> The answer is 3."

    monkeypatch.setitem(writers.FUNCTIONS, "think", think)
    with serving(answer=answer) as fake:
        more = ["reasoner.kind=function", "reasoner.model=think"]
        assert bridge(fake, data, *more) == 0
        found = replies(data.parent / "out")
        out = data.parent / "out" / "3-reason.jsonl"
        out.write_bytes(b"")
        assert bridge(fake, data, *more) == 0
    assert replies(data.parent / "out") == found, "its randomness belongs to the question"
    assert found["reason", "q0", 0]["text"] == "The answer is 3."
    assert "<think>" not in json.dumps(found["reason", "q0", 0])
