"""--ask with several questions, and --chat: a loop on a pipe. The model is loaded once."""

import io
import sys

import pytest
from PIL import Image

import evaluate
from grpo.evaluation import evaluated_model
from grpo.evaluation.conversation import Question, converse, typed


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "my photo.png"):
        Image.new("RGB", (56, 56), "red").save(tmp_path / name)
    return tmp_path


@pytest.fixture
def loads(monkeypatch):
    """How often a model was loaded."""
    real, count = evaluated_model.EvaluatedModel.open, []
    monkeypatch.setattr(evaluated_model.EvaluatedModel, "open", lambda *args: count.append(1) or real(*args))
    return count


def talk(lines, pictures=()):
    """(what was said, what was asked) of a conversation."""
    said, asked = [], []
    converse(lambda question: asked.append(question) or f"re: {question.text}", lines, pictures, said.append)
    return said, asked


def test_lines_are_questions_about_the_picture_that_is_shown(pictures):
    said, asked = talk(
        ["a.png\n", "What?\n", "/picture b.png a.png\n", "And now?\n", "/picture none\n", "Hm?\n"]
    )
    assert [(q.text, [p.name for p in q.pictures]) for q in asked] == [
        ("What?", ["a.png"]),
        ("And now?", ["b.png", "a.png"]),
        ("Hm?", []),
    ]
    assert said == [
        "shown: a.png",
        "re: What?",
        "shown: b.png, a.png",
        "re: And now?",
        "shown: no picture",
        "re: Hm?",
    ]


def test_what_cannot_be_done_is_said_and_the_loop_goes_on(pictures):
    (pictures / "broken.png").write_bytes(b"\x89PNG broken")
    lines = [
        "/picture nowhere.png",
        "/picture",
        "/where",
        "broken.png",
        "'my photo.png'",
        "/picture 'my photo.png'",
    ]
    said, asked = talk([*lines, "What?", "/quit", "never asked"], ["a.png"])
    assert [question.text for question in asked] == ["'my photo.png'", "What?"]
    assert said[0] == "cannot be asked: no file nowhere.png" and "/picture FILE" in said[1]
    assert said[2].startswith("no such file or command: /where")
    assert said[3].startswith("cannot be asked: picture 1") and said[5] == "shown: my photo.png"
    # a picture that cannot be shown leaves the other one
    assert asked[0].pictures == ("a.png",) and len(said) == 7


def test_empty_lines_say_nothing(pictures):
    assert talk(["\n", "  \n", ""]) == ([], [])


def test_an_error_of_the_model_ends_nothing():
    def reply(question):
        raise ValueError("the prompt has 999 tokens")

    said = []
    converse(reply, ["long", "longer"], (), said.append)
    assert said == ["cannot be asked: the prompt has 999 tokens"] * 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_prompt_and_a_pipe_has_none(capsys):
    assert list(typed(io.StringIO("a\nb"))) == ["a\n", "b"] and capsys.readouterr().out == ""
    assert list(typed(Terminal("a\n"))) == ["a\n"] and capsys.readouterr().out == "> > \n"


def test_ctrl_c_ends_the_loop(capsys):
    class Interrupted(Terminal):
        def readline(self):
            raise KeyboardInterrupt

    assert list(typed(Interrupted())) == []


def test_chat_on_a_pipe(pictures, loads, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("Is the circle red ?\n/picture b.png\nWhat is it ?\n/quit\n")
    )
    argv = ["--device", "cpu", "--cap", "3", "--chat", "a.png"]
    assert evaluate.main(argv) == 0 and len(loads) == 1
    out = capsys.readouterr().out
    assert (
        out.count("cut off after 3 tokens") == 2
        and "shown: b.png" in out
        and ">" not in out.replace("<think>", "")
    )
    # without a picture, and until the pipe ends
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it ?"))
    assert evaluate.main(["--device", "cpu", "--cap", "3", "--chat"]) == 0
    assert capsys.readouterr().out.count("cut off after 3 tokens") == 1


def test_several_questions_load_the_model_once(pictures, loads, capsys):
    argv = [
        "--device",
        "cpu",
        "--cap",
        "3",
        "--ask",
        "a.png",
        "Is it red ?",
        "--choice",
        "yes",
        "--choice",
        "no",
    ]
    assert evaluate.main([*argv, "--ask", "a.png", "b.png", "What is it ?"]) == 0 and len(loads) == 1
    out = capsys.readouterr().out
    assert "=== a.png: Is it red ?\n" in out and "=== a.png, b.png: What is it ?\n" in out
    asked = evaluate.arguments([*argv, "--ask", "b.png", "What?", "--choice", "x", "--choice", "y"]).ask
    assert [question.choices for question in asked] == [("yes", "no"), ("x", "y")]
    assert asked[1] == Question("What?", (pictures.__class__("b.png"),), ("x", "y"))


def test_a_picture_that_is_missing_is_found_before_the_model_is_loaded(pictures, loads, capsys):
    argv = ["--ask", "a.png", "What?", "--ask", "nowhere.png", "What?"]
    assert evaluate.main(argv) == 2 and not loads
    assert "--ask: picture 1: the picture (nowhere.png) cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--choice", "yes", "--ask", "a.png", "What?"], "--choice: goes behind its --ask"),
        (["--chat", "--ask", "a.png", "What?"], "--chat: does not go with --ask"),
        (["--chat", "--json", "x.json"], "--json: does not go with --chat"),
        (["--chat", "--checkpoints", "x"], "--checkpoints: does not go with --chat"),
    ],
)
def test_options_that_do_not_go_together(pictures, capsys, argv, words):
    assert evaluate.main(argv) == 2
    assert words in capsys.readouterr().err
