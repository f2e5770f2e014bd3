"""A judge on a server of the test's own: what it is asked, what its replies change, and what is kept."""

import json
import re

import pytest

pytest.importorskip("openai", reason="servers are an optional extra")

import evaluate
from data.types import Example
from grpo.evaluation import passes
from grpo.evaluation.judge import Judge, Verdicts, prompts_of
from grpo.evaluation.protocols import PROTOCOLS
from grpo.evaluation.scores import Answers, read_completion
from grpo.serving.client import Client, Server
from tests.grpo.serving.fake_server import message, serving

PROTOCOL = PROTOCOLS["vision_r1"]
EXAMPLES = [
    Example("right", "Which?", ("red", "blue"), "red", extra={"benchmark": "mathvista"}),
    Example("talks", "Which colour?", ("red", "blue"), "blue", extra={"benchmark": "mathvista"}),
    Example("number", "How many?", (), "14", extra={"benchmark": "mathvista", "answer_type": "integer"}),
    Example("verse", "How long?", (), "0.5 m", extra={"benchmark": "mathverse"}),
    Example("rules", "How long?", (), "2", extra={"benchmark": "mm_math"}),
]
SAID = {"right": "A", "talks": "red or blue? blue", "number": "there are 14", "verse": "50 cm", "rules": "3"}


def answers():
    found = Answers()
    for example in EXAMPLES:
        text = f"<think>t</think><answer> Final Answer:{SAID[example.uid]} </answer>"
        found.append([read_completion(example, text, [1], True, PROTOCOL.read)])
    found.skipped = ["example 'x': damaged"]
    return found


def reply(body):
    """What the server's model writes: the extraction, or the verdict."""
    text = body["messages"][-1]["content"]
    if text.rstrip().endswith("Verdict:"):
        return message("1")
    return message(next(out for said, out in REPLIES.items() if f"Response: {said}" in text))


REPLIES = {"red or blue? blue": "B", "there are 14": "14", "50 cm": "50 cm"}


def judge(url, folder, model="m", prompts=None, **server):
    client = Client(Server(url, model, retries=0, **server))
    return Judge(
        client, Verdicts(folder / "v.jsonl"), prompts or prompts_of(), PROTOCOL.compare, PROTOCOL.extracted
    )


def test_only_what_is_not_right_by_the_rules_is_asked(tmp_path):
    with serving(answer=reply) as fake:
        found, counts = judge(fake.url, tmp_path).read(answers(), EXAMPLES)
    assert [group[0].correct for group in answers()] == [True, False, False, False, False]
    assert [group[0].correct for group in found] == [True, True, True, True, False]
    assert [group[0].answer for group in found] == ["red", "blue", "14", "50 cm", "3"]
    assert found.skipped == ["example 'x': damaged"]
    # three extractions, and a verdict where the rule sees no equal lengths; none for MM-Math
    assert counts == {"read": 3, "requests": 4, "kept": 0, "right": 3, "failed": 0, "why": ""}
    bodies = [body for body, _ in fake.seen]
    assert all((body["temperature"], body["max_tokens"], body["model"]) == (0.0, 128, "m") for body in bodies)
    verdict = bodies[-1]["messages"][-1]["content"]
    assert "Right answer: 0.5 m" in verdict and "Student's answer: 50 cm" in verdict
    # of the completion the judge sees what stands between the tags
    assert not any("<think>" in body["messages"][-1]["content"] for body in bodies)


def test_replies_are_kept_and_another_prompt_or_model_is_asked_again(tmp_path):
    with serving(answer=reply) as fake:
        first, _ = judge(fake.url, tmp_path).read(answers(), EXAMPLES)
        again, counts = judge(fake.url, tmp_path).read(answers(), EXAMPLES)
        assert (counts["requests"], counts["kept"], len(fake.seen)) == (0, 4, 4)
        assert [group[0] for group in first] == [group[0] for group in again]
        assert judge(fake.url, tmp_path, model="other").read(answers(), EXAMPLES)[1]["requests"] == 4
        changed = {name: dict(entry) for name, entry in prompts_of().items()}
        changed["mathvista"]["extract"] += "!"
        changed["mathvista"]["extract"] = changed["mathvista"]["extract"].replace("Final answer:", "Answer:")
        assert judge(fake.url, tmp_path, prompts=changed).read(answers(), EXAMPLES)[1]["requests"] == 2
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and {row["step"] for row in rows} == {"extract", "verdict"}
    assert {row["uid"] for row in rows} == {"talks", "number", "verse"}


def test_killed_within_a_line_it_goes_on(tmp_path):
    """After every kept line, and within it: what is there is not asked again."""
    with serving(answer=reply) as fake:
        straight, _ = judge(fake.url, tmp_path).read(answers(), EXAMPLES)
        whole = (tmp_path / "v.jsonl").read_bytes()
        lines = whole.splitlines(keepends=True)
        for count in range(4):
            for torn in (b"", lines[count][:20]):
                (tmp_path / "v.jsonl").write_bytes(b"".join(lines[:count]) + torn)
                found, counts = judge(fake.url, tmp_path).read(answers(), EXAMPLES)
                assert (counts["kept"], counts["requests"]) == (count, 4 - count)
                assert [group[0] for group in found] == [group[0] for group in straight]
                assert sorted((tmp_path / "v.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_request_that_fails_counts_by_the_rules_and_is_asked_again(tmp_path):
    with serving(500, answer=reply) as fake:
        found, counts = judge(fake.url, tmp_path, at_once=1).read(answers(), EXAMPLES)
        assert counts["failed"] == 1 and counts["right"] == 2 and "500" in counts["why"]
        assert sum(group[0].correct for group in found) == 3
        assert judge(fake.url, tmp_path).read(answers(), EXAMPLES)[1] | {"why": ""} == {
            "read": 3,
            "requests": 1,
            "kept": 3,
            "right": 3,
            "failed": 0,
            "why": "",
        }


def test_a_file_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "v.jsonl").write_text("my notes\n")
    with pytest.raises(ValueError, match=r"v.jsonl, line 1: not written by a judge"):
        Verdicts(tmp_path / "v.jsonl")
    assert (tmp_path / "v.jsonl").read_text() == "my notes\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("- a", "write {benchmark: {extract: text, verdict: text}}"),
        ("mathvista: {ask: x}", "mathvista: ask: there are extract and verdict"),
        ("mathvista: {extract: '{q}'}", "mathvista: extract: no field 'q'"),
        ("mathvista: {extract: '{'}", "mathvista: extract: "),
        ("mathvista: {extract: 5}", "mathvista: extract: there are"),
        ("mathvista: [", "not YAML"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, text, words):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        prompts_of(tmp_path / "p.yaml")
    assert words in str(error.value) and "p.yaml" in str(error.value) and "\n" not in str(error.value)


# ---- the command


def invented(policy, chat, examples, how, *rest, **options):
    found = Answers()
    for number in range(len(examples)):
        said = examples[number].letter if number % 2 else "the first or second"
        text = f"<answer> Final Answer:{said} </answer>"
        found.append([read_completion(examples[number], text, [1], True, how.read)])
    return found


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(passes, "answer_all", invented)
    monkeypatch.setenv("MY_KEY", "secret-key")
    argv = [
        "--protocol",
        "vision_r1",
        "--items",
        "4",
        "--json",
        str(tmp_path / "out.json"),
        "--device",
        "cpu",
    ]
    with serving(answer=lambda body: message("A")) as fake:
        assert evaluate.main(argv) == 0 and not fake.seen
        argv += ["--judge", "m", "--judge-url", fake.url, "--judge-key-env", "MY_KEY"]
        assert evaluate.main(argv) == 0
        asked = len(fake.seen)
        assert 0 < asked <= 2 and {headers["authorization"] for _, headers in fake.seen} == {
            "Bearer secret-key"
        }
        assert evaluate.main(argv) == 0 and len(fake.seen) == asked
    out = capsys.readouterr().out
    assert "with the judge" in out and "the judge read 2 answers" in out
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["more"]["judged"]["judge"]["read"] == 2 and told["steps"][-1]["step"] == "with the judge"
    # the key is in no file
    assert not any(b"secret-key" in path.read_bytes() for path in tmp_path.iterdir())


def test_any_protocol_may_have_a_judge(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(passes, "answer_all", invented)
    argv = ["--items", "4", "--json", str(tmp_path / "out.json"), "--device", "cpu", "--judge", "m"]
    with serving(answer=lambda body: message("A")) as fake:
        assert evaluate.main([*argv, "--judge-url", fake.url]) == 0
        text = fake.seen[0][0]["messages"][-1]["content"]
    assert re.search(r"Response: <answer> Final Answer:", text)
    assert json.loads((tmp_path / "out.json").read_text())["steps"][0]["step"] == "the rules"


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--judge", "m"], "--judge: needs --json"),
        (["--judge", "m", "--json", "{}/o.json", "--judge-url", "nonsense"], "url: 'nonsense' is no address"),
        (["--judge", "m", "--json", "{}/o.json", "--judge-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["--judge", "m", "--json", "{}/o.json", "--judge-prompts", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, extra, words):
    monkeypatch.setattr(passes, "answer_all", lambda *_, **__: 1 / 0)
    assert evaluate.main([word.format(tmp_path) for word in extra]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1


def test_a_key_that_is_refused_ends_it_and_loses_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(passes, "answer_all", invented)
    argv = [
        "--items",
        "4",
        "--json",
        str(tmp_path / "out.json"),
        "--device",
        "cpu",
        "--judge",
        "m",
        "--judge-url",
    ]
    with serving(401) as fake:
        assert evaluate.main([*argv, fake.url]) == 2
    assert "the key is refused" in capsys.readouterr().err and (tmp_path / "out.json.part").exists()
