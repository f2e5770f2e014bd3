"""grpo/evaluation/protocols.py: totals against closed forms and the paper's printed table, readings
against a list of what models write, and against math-verify itself."""

import json
import random
import re
import time

import pytest

from data.answers.parser import answer_paper
from data.templates import renders_turns
from data.types import Example
from grpo.evaluation import protocols
from grpo.evaluation.evaluated_model import template_for
from grpo.evaluation.protocols import PAIRS, PROTOCOLS, family, mathvista, paper, strict

YES_NO = Example("u", "Is it?", ("yes", "no"), "yes")
NO = Example("u", "Is it?", ("yes", "no"), "no")
COUNT = Example("u", "How many?", ("3", "2", "1", "0"), "2")
DESK = Example(
    "u",
    "Which is closer?",
    ("the box (highlighted by a red box)", "the desk"),
    "the box (highlighted by a red box)",
)


# ---- what a completion says under the paper's protocol

# completion, question, what is read, right?   As math-verify 0.8.0 and 0.9.0 have it
PAPER = [
    ("<answer>(A)</answer>", YES_NO, "(A)", True),
    ("<answer>A</answer>", YES_NO, "A", True),
    ("<answer> a </answer>", YES_NO, "a", True),
    ("<answer>A. yes</answer>", YES_NO, "A", True),
    ("<answer>(A) yes</answer>", YES_NO, "(A)", True),
    ("<answer>yes</answer>", YES_NO, "yes", True),
    ("<answer>B</answer>", YES_NO, "B", False),
    ("<answer>no</answer>", YES_NO, "no", False),
    ("", YES_NO, None, False),
    ("<answer></answer>", YES_NO, None, False),
    # the opening that the base's prompt holds is not part of what the model said
    ("<think>(A)", YES_NO, "(A)", True),
    # an empty tag: the whole text, as theirs
    ("It is (A) below</think> <answer> \n</answer>", YES_NO, "(A)", True),
    ("<think>(B)\n<answer>\n\n A \n</answer>", YES_NO, "A", True),
    ("<answer>G</answer>", YES_NO, None, False),
    # a choice counts in its own letters only
    ("<answer>Yes</answer>", YES_NO, None, False),
    ("<answer>（A）</answer>", YES_NO, None, False),
    # the gate that `strict` closes
    ("<answer>A or B</answer>", YES_NO, "A", True),
    # the first: the text begins with it
    ("<answer>A or B or C</answer>", COUNT, "A", False),
    # the article
    ("I think it is a cat", YES_NO, "a", True),
    ("<answer>A</answer><answer>B</answer>", YES_NO, "A", True),
    ("not (A) but (B)", NO, "(B)", True),
    ("<answer>\nB\n</answer>", NO, "B", True),
    # a tag over two lines is no tag
    ("<answer>B\nor A</answer>", YES_NO, None, False),
    ("The final answer is (B)", NO, "(B)", True),
    ("answer: B because A is far", NO, "B", True),
    ("**B**", NO, "B", True),
    ("<think>the answer: A, no</think> B.", NO, "A", False),
    ("<answer>B) no</answer>", NO, "no", True),
    ("<answer>c</answer>", COUNT, "c", False),
    ("<answer>2</answer>", COUNT, "2", True),
    ("<answer>2.0</answer>", COUNT, "2", True),
    ("<answer>two</answer>", COUNT, None, False),
    ("There are 3 cats and 2 dogs", COUNT, "2", True),
    ("<answer>There are 2 organs</answer>", COUNT, "2", True),
    ("<answer>the box (highlighted by a red box)</answer>", DESK, "the box (highlighted by a red box)", True),
    ("<answer>box</answer>", DESK, None, False),
    ("<answer>The Box</answer>", DESK, None, False),
]


def read_as(text, example, said, right):
    found = paper(text, example)
    expected = (
        said and {"a": "yes", "b": "no"}.get(said.strip("()").lower(), said)
        if example.choices == ("yes", "no")
        else said
    )
    if example is COUNT and said and said.lower() in ("a", "c"):
        expected = {"a": "3", "c": "1"}[said.lower()]
    assert (found.answer, found.correct) == (expected, right), text
    assert (found.why == "") == (found.answer is not None)
    if found.letter:
        assert example.choices["ABCD".index(found.letter)] == found.answer


@pytest.mark.parametrize("text, example, said, right", PAPER)
def test_what_the_paper_s_protocol_reads(text, example, said, right, monkeypatch):
    """By our stand-in, whatever is installed."""
    monkeypatch.setattr(protocols, "math_verify", lambda: None)
    read_as(text, example, said, right)


@pytest.mark.parametrize("text, example, said, right", PAPER)
def test_math_verify_reads_the_same(text, example, said, right):
    pytest.importorskip("math_verify", reason="the extra math-verify is not installed")
    read_as(text, example, said, right)


def test_what_compares_is_said(monkeypatch):
    monkeypatch.setattr(protocols, "math_verify", lambda: None)
    assert "not installed" in PROTOCOLS["paper"].checker()
    monkeypatch.setattr(protocols, "math_verify", lambda: "0.8.0")
    assert (
        PROTOCOLS["paper"].checker() == "math-verify 0.8.0"
        and PROTOCOLS["strict"].checker() == "our rule (strict)"
    )


def test_what_takes_for_ever_is_ended(monkeypatch, tmp_path):
    """A checker that hangs on one completion is ended: that completion is unread, and the next one is
    read."""
    file = tmp_path / "slow_verdict.py"
    file.write_text(
        "def verdict(text, example, length):\n    while text == 'hang':\n        pass\n    return 2.0 if "
        "text == 'B' else 0.0\n\n\n"
        "verdict.timeout = 0.5\n"
    )
    monkeypatch.setattr(protocols, "VERDICT", f"{file}:verdict")
    monkeypatch.setattr(protocols, "math_verify", lambda: "a slow one")
    assert paper("<answer>hang</answer>", NO) == (None, None, "nothing parsed", False)
    assert paper("<answer>B</answer>", NO) == ("no", "B", "", True)
    # what it says counts, not what our search finds
    assert paper("<answer>A</answer>", NO) == (None, None, "nothing parsed", False)
    protocols.open_reward(f"{file}:verdict").close()


def test_long_texts_take_no_longer(monkeypatch):
    """10 MB are unread; what is read at most takes linear time, whatever it repeats."""
    monkeypatch.setattr(protocols, "math_verify", lambda: None)
    assert paper("A " * 5_000_000, YES_NO).why == "answer too long"
    start = time.process_time()
    for piece in ("answer ", "final answer ", "<answer>", "<answer>\n</answer>", "a ", "** "):
        paper((piece * protocols.LONGEST)[: protocols.LONGEST], YES_NO)
    # 1 s on the slow machine that this was written on
    assert time.process_time() - start < 10
    assert (
        strict("a\n" * 5_000_000, YES_NO, True).correct
        and strict("a " * 5_000_000, YES_NO, True).why == "answer too long"
    )


# ---- the strict one, and direct prompts


@pytest.mark.parametrize(
    "text, letter, why",
    [
        ("(A)", "A", ""),
        ("A", "A", ""),
        ("A. yes", "A", ""),
        ("yes", "A", ""),
        ("Yes.", "A", ""),
        ("\n (B) no\nUser: And now?", "B", ""),
        ("<answer> (A) </answer>", "A", ""),
        ("A or B", None, "not a choice"),
        ("It is (A)", None, "not a choice"),
        ("", None, "empty answer"),
        ("  \n ", None, "empty answer"),
        ("<answer>A</answer> <answer>A</answer>", None, "several answer tags"),
        ("</answer>", None, "unclosed answer tag"),
    ],
)
def test_a_direct_prompt_asks_for_no_tag(text, letter, why):
    """The first line that says something is the answer, and all of it; with a reasoning prompt the same
    text is unread."""
    found = strict(text, YES_NO, True)
    assert (found.letter, found.why, found.correct) == (letter, why, letter == "A")
    assert "<answer>" in text or strict(text, YES_NO).answer is None


# ---- MathVista's comparison


def question(answer, kind, **extra):
    return Example(
        "u", "?", (), answer, extra={"answer_type": kind, "precision": 1.0, "kind": "number", **extra}
    )


# the nearest choice
@pytest.mark.parametrize(
    "example, said, right",
    [
        (question("1.2", "float"), "1.2", True),
        (question("1.2", "float"), "1.23 m", True),
        (question("1.2", "float"), "1.3", False),
        (question("1.2", "float"), r"\frac{6}{5}", True),
        (question("1.25", "float", precision=2.0), "1.2", False),
        (question("1.2", "float"), "about 1.2", None),
        (question("7", "integer"), "7", True),
        (question("7", "integer"), "7.9", True),
        # it cuts, as theirs does
        (question("7", "integer"), "8", False),
        (question("7", "integer"), "seven", None),
        (question("7", "integer"), "1e999", None),
        (question("1", "integer"), "4/3", None),
        (question("2", "integer"), "6/3", True),
        (question("7", "integer", precision=float("nan")), "7", True),
        # right answers that are no plain floats
        (question("3,000", "integer"), "3000", True),
        (question("3,000", "integer"), "3,000", True),
        (question("1/2", "float"), "0.5", True),
        (question("50%", "float"), "50", True),
        (question("50%", "float"), "0.5", True),
        (question("$5", "integer"), "5 dollars", True),
        (question("none", "integer"), "none", True),
        (question("none", "integer"), "3", False),
        # a letter in brackets comes before the nearest text
        (Example("u", "?", ("3", "4", "5", "6"), "6", extra={"answer_type": "text"}), "(D) 4√3", True),
        (Example("u", "?", ("3", "4", "5", "6"), "3", extra={"answer_type": "text"}), "(D) 4√3", False),
        (Example("u", "?", ("(c)", "(a)"), "(a)", extra={"answer_type": "text"}), "B", True),
        # of equal choices either letter is right
        (Example("u", "?", ("9", "12", "18", "18"), "18", may_repeat=True), "C", True),
        (Example("u", "?", ("9", "12", "18", "18"), "18", may_repeat=True), "(D)", True),
        (Example("u", "?", ("9", "12", "18", "18"), "18", may_repeat=True), "18", True),
        (question("7", "integer", precision=None), "7 cm", True),
        (question("[0, 5]", "list"), "[0,5]", True),
        (question("[0, 5]", "list"), "[5,0]", False),
        (Example("u", "?", ("145°", "35°"), "145°", extra={"answer_type": "text"}), "145", True),
        (Example("u", "?", ("145°", "35°"), "145°", extra={"answer_type": "text"}), "(B)", False),
        (Example("u", "?", ("145°", "35°"), "145°", extra={"answer_type": "text"}), "A", True),
    ],
)
def test_mathvista_compares_as_its_owners_do(example, said, right):
    found = mathvista(f"<think> so </think> <answer> {said} </answer>", example)
    assert found.correct == bool(right) and (found.answer is None) == (right is None), found
    assert mathvista(said, example, True) == found and mathvista(said, example).why == "no answer tag"


def test_the_papers_two_first_tags_are_its_regular_expressions_on_random_texts():
    """Training: `<answer>(.*?)</answer>`. Evaluation: with white space inside the tags, and an empty one is
    none. Both in linear time."""
    rng, seen = random.Random(0), set()
    pieces = (
        "<answer>",
        "</answer>",
        "</think>",
        "A",
        "b c",
        " ",
        "\n",
        "\n \n",
        "<answer>\n",
        "\n</answer>",
    )
    for _ in range(6000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 7)))
        training = re.search(r"<answer>(.*?)</answer>", text)
        evaluation = re.search(r"<answer>\s*(.*?)\s*</answer>", text)
        for found, margins in ((training, False), (evaluation and evaluation[1] and evaluation, True)):
            expected = found[1].strip() if found else text.strip()
            assert answer_paper("<think>" + text, margins) == expected, (text, margins)
            seen.add((bool(found), margins))
    assert len(seen) == 4
    start = time.process_time()
    for piece in ("<answer>", "<answer>\n", "\n", "</answer>", "<answer>\n</answer>", " ", "<answer> \n"):
        answer_paper(piece * 300_000, True)
        answer_paper(piece * 300_000, False)
    assert time.process_time() - start < 10


# ---- who is asked how


TURNS = {"chat_template": "{{ '<|im_start|>' + message.role }}"}


@pytest.mark.parametrize(
    "files, turns",
    [
        ({}, False),
        ({"chat_template.json": TURNS}, True),
        ({"chat_template.jinja": "<|im_start|>user\n{{ text }}<|im_end|>"}, True),
        ({"tokenizer_config.json": TURNS}, True),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "<|im_start|>"}]}},
            True,
        ),
        # a base model's: the question alone
        ({"chat_template.json": {"chat_template": "{% for c in messages %}{{ c }}{% endfor %}"}}, False),
        ({"chat_template.jinja": "{# <|im_start|> #}{% if '<|im_start|>' in x %}{{ x }}{% endif %}"}, False),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, False),
        # the processor's template comes before the tokenizer's
        ({"chat_template.json": {"chat_template": "{{ text }}"}, "tokenizer_config.json": TURNS}, False),
        ({"tokenizer_config.json": {"chat_template": 3}}, False),
        ({"tokenizer_config.json": []}, False),
    ],
)
def test_an_instruct_model_is_known_by_its_chat_template(files, turns, tmp_path):
    """Not by its name. The template is searched and never run."""
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert renders_turns(tmp_path) is turns
    (tmp_path / "chat_template.json").write_text("{")
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="chat_template.json: not JSON"):
        renders_turns(tmp_path)


def test_a_template_says_whom_it_asks():
    for kind, pair in PAIRS.items():
        assert [family(template) for template in pair.values()] == [kind, kind]
    assert family("shapes") is None and family("chatml") == "instruct"


def test_prompt_and_template_choose_among_four():
    free, own = PROTOCOLS["paper"], PROTOCOLS["strict"]
    assert (
        template_for("visualthinker", free, None, keep=False)
        == template_for("visualthinker_direct", free, "reasoning", keep=False)
        == "visualthinker"
    )
    assert template_for("visualthinker", own, "direct", keep=True) == "visualthinker_direct"
    # as it was trained
    assert (
        template_for("chatml", own, None, keep=True)
        == template_for("chatml", own, "reasoning", keep=True)
        == "chatml"
    )
    assert (
        template_for("chatml", free, None, keep=False)
        == template_for("chatml_direct", own, "reasoning", keep=True)
        == "chatml_eval"
    )
    assert template_for("chatml", own, "direct", keep=True) == "chatml_direct"
    assert (
        template_for("shapes", free, None, keep=False)
        == template_for("shapes", own, "reasoning", keep=True)
        == "shapes"
    )
    with pytest.raises(ValueError, match="--prompt: the template shapes has no direct form"):
        template_for("shapes", own, "direct", keep=True)
