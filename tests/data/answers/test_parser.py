"""The answer parser against texts that have been paid for elsewhere, or could be."""

import itertools
import random
import re
import time

import pytest

from data.answers.parser import extract, is_right, is_right_paper, well_formed, well_formed_paper
from data.types import Example

CHOICES = ("yes", "no", "can't tell", "A red car.")


def said(content):
    return extract(f"<think>look</think> <answer>{content}</answer>", CHOICES)


@pytest.mark.parametrize(
    "content, letter",
    [
        ("A", "A"),
        ("b", "B"),
        ("(C)", "C"),
        ("(d)", "D"),
        ("A.", "A"),
        ("B)", "B"),
        ("C:", "C"),
        ("[D]", "D"),
        ("(A).", "A"),
        ("  (A)\n", "A"),
        ("yes", "A"),
        ("No", "B"),
        ("no.", "B"),
        ("CAN'T TELL", "C"),
        ("can't\n tell", "C"),
        ("a red car", "D"),
        ("A red car.", "D"),
        ("(B) no", "B"),
        ("B. no", "B"),
        ("b: No.", "B"),
        ("(D) A red car.", "D"),
        ("(B)\nno", "B"),
        ("[B] no", "B"),
        ("（B）", "B"),
        ("Ｂ", "B"),
        ("（Ｂ）ｎｏ", "B"),
        # full-width, as Chinese-trained models write
        ("B。", "B"),
        ("A or B", None),
        ("A or B or C", None),
        ("A, B", None),
        ("AB", None),
        ("A B", None),
        ("(A)(B)", None),
        ("(A) (B)", None),
        ("A/B", None),
        ("yes or no", None),
        ("yes no", None),
        ("yes, not no", None),
        ("not yes", None),
        ("(A) no", None),
        ("A: no", None),
        ("yes (B)", None),
        ("E", None),
        ("(E)", None),
        ("Z", None),
        ("1", None),
        ("", None),
        ("   \n", None),
        ("()", None),
        ("(", None),
        (".", None),
        ("(A", None),
        ("A]", None),
        ("((A))", "A"),
        ("the answer is A", "A"),
        ("option A", "A"),
        ("A red", None),
        ("a dog", None),
        ("maybe", None),
        ("\\boxed{A}", "A"),
        ("**A**", "A"),
        ("А", None),
        ("Α", None),
        ("Ⓐ", None),
        ("【A】", "A"),
        ("❨A❩", "A"),
        ("A\u200b", "A"),
        ("ª", None),
        # Cyrillic, Greek, circled … look-alikes
        ("𝐀", None),
        ("<b>A</b>", "A"),
        ("<think>A</think>", None),
        ("A</think>", None),
        ("<think>A", None),
        ("A" * 5000, None),
        ("yes " * 1000, None),
    ],
)
def test_what_an_answer_may_be(content, letter):
    found = said(content)
    assert found.letter == letter
    assert found.answer == (None if letter is None else CHOICES["ABCD".index(letter)])
    assert bool(found.why) == (letter is None)


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "no answer tag"),
        ("A", "no answer tag"),
        ("<think>A</think>", "no answer tag"),
        ("<ANSWER>A</ANSWER>", "no answer tag"),
        ("< answer >A</ answer >", "no answer tag"),
        ("<answer>A", "unclosed answer tag"),
        ("A</answer>", "unclosed answer tag"),
        ("</answer>A<answer>", "unclosed answer tag"),
        ("<answer>A</answer><answer>A</answer>", "several answer tags"),
        ("<answer>A</answer> <answer>B</answer>", "several answer tags"),
        ("<answer><answer>A</answer></answer>", "several answer tags"),
        ("<answer>A<answer>", "several answer tags"),
        ("<answer>A</answer></answer>", "several answer tags"),
        ("<think><answer>A</answer></think><answer>B</answer>", "several answer tags"),
        ("<think><answer>A</answer></think>", "answer inside the reasoning"),
        ("<think>so <answer>A</answer>", "answer inside the reasoning"),
        ("<think>a</think><think>b<answer>A</answer>", "answer inside the reasoning"),
        ("<answer>A</answer></think>", "answer inside the reasoning"),
        ("<think><think>a</think><answer>A</answer></think>", "answer inside the reasoning"),
        ("<think>a</think><answer></answer>", "empty answer"),
        ("<answer>\n</answer>", "empty answer"),
        ("<think>a</think><answer>A<think></answer>", "reasoning inside the answer"),
        ("<answer>A or B or C</answer>", "not a choice"),
        ("<answer>" + "x" * 3000 + "</answer>", "answer too long"),
    ],
)
def test_why_there_is_no_answer(text, why):
    assert extract(text, CHOICES) == (None, None, why)


@pytest.mark.parametrize(
    "text",
    [
        "<answer>B</answer>",
        "<think>a</think><answer>B</answer>",
        "so:\n<answer>\nB\n</answer> bye",
        "<think>a</think><think>b</think><answer>B</answer>",
        "<think>a\n\nb</think>\n<answer>(B) no</answer></div>",
        "<think>a</think> <answer>B</answer> <think>c</think>",
        "</think> <answer>B</answer>",
    ],
)
def test_one_answer_outside_the_reasoning(text):
    assert extract(text, CHOICES) == ("no", "B", "")


def test_choices_that_are_letters_or_numbers():
    # a bare "B" may mean the choice B or the letter B
    shuffled = ("B", "A", "3", "C")
    assert extract("<answer>B</answer>", shuffled).why == "ambiguous"
    assert extract("<answer>(B)</answer>", shuffled).answer == "A"
    assert extract("<answer>(A) B</answer>", shuffled).answer == "B"
    assert extract("<answer>3</answer>", shuffled).letter == "C"
    assert extract("<answer>B</answer>", ("A", "B")).letter == "B"
    assert extract("<answer>2</answer>", ("3", "2", "1")).answer == "2"


def test_choices_that_differ_only_in_case_are_read_in_their_own_case():
    assert extract("<answer>polish</answer>", ("Polish", "polish")).letter == "B"
    assert extract("<answer>POLISH</answer>", ("Polish", "polish")).why == "ambiguous"
    assert extract("<answer>(B)</answer>", ("Polish", "polish")).answer == "polish"
    assert extract("<answer>(B) polish</answer>", ("Polish", "polish")).answer == "polish"


def test_composed_and_decomposed_letters_are_one():
    # tokenizers compose, files need not
    assert extract("<answer>caf\u00e9</answer>", ("cafe\u0301", "bar")).letter == "A"


def test_is_right():
    asked = Example("u", "Which?", ("yes", "no"), "no")
    assert is_right("<answer>(B)</answer>", asked) and is_right("<answer>No.</answer>", asked)
    assert (
        not is_right("<answer>A</answer>", asked)
        and not is_right("no", asked)
        and not is_right("<answer>A or B</answer>", asked)
    )
    free = Example("u", "How wide?", (), "4.5 cm")
    assert is_right("<answer> 4.5  CM. </answer>", free)
    assert not any(is_right(f"<answer>{content}</answer>", free) for content in ("4.5", "4.5 cm or 5 cm", ""))
    assert extract("<answer> any text </answer>", ()) == ("any text", None, "")


def test_is_right_paper_is_its_regular_expressions_on_random_texts():
    """The rule as published, on random texts: `re.search` for the first tag without DOTALL, `re.findall`
    for the last letter."""

    def published(completion, gold):
        tagged = re.search(r"<answer>(.*?)</answer>", completion)
        said = tagged.group(1).strip() if tagged else completion.strip()
        letters = re.findall(r"(^|\s|\[|\()([A-H])(\s|\]|\)|$)", said)
        return said == gold or bool(letters and letters[-1][1] == gold)

    rng, seen = random.Random(0), set()
    for _ in range(6000):
        completion = "".join(
            rng.choices(
                ("<answer>", "</answer>", "</think>", "A", "B", " ", "(", "]", "\n", "or", "A B"),
                k=rng.randint(0, 7),
            )
        )
        for gold in ("A", "B", "or"):
            right = published(completion, gold)
            seen.add((right, gold))
            assert is_right_paper("<think>" + completion, Example("u", "Which?", (), gold)) == right, (
                completion
            )
    assert len(seen) == 6


GOOD = "<think>a</think><answer>b</answer>"
NUMBER = Example("u", "How many?", (), "3", extra={"kind": "number"})


@pytest.mark.parametrize(
    "text, strict, paper",
    [
        (GOOD, True, True),
        (f"\n {GOOD}\t\n", True, False),
        ("<think></think>\n<answer></answer>", True, True),
        ("<think>a\nb</think>\n\n<answer>c\nd</answer>", True, True),
        ("", False, False),
        (GOOD + "x", False, False),
        ("x" + GOOD, False, False),
        (GOOD * 2, False, True),
        ("<think>a</think> so <answer>b</answer>", False, False),
        ("<think>a</think><answer>b</answer></answer>", False, True),
        ("<think><think>a</think><answer>b</answer>", False, True),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False, True),
        ("<think>a<answer>b</answer></think>", False, False),
        ("<answer>b</answer><think>a</think>", False, False),
        ("<think>a</think>", False, False),
        ("<answer>b</answer>", False, False),
        ("<think>a</answer><answer>b</think>", False, False),
        ("<think>a</think></answer><answer>b", False, False),
        ("<THINK>a</THINK><ANSWER>b</ANSWER>", False, False),
        ("<think>a</think>\u00a0<answer>b</answer>", True, True),
        ("<think></think><answer></answer", False, False),
        ("<think>a</think><answer>", False, False),
    ],
)
def test_well_formed(text, strict, paper):
    assert well_formed(text) is strict
    assert well_formed_paper(text) is paper


def test_the_two_formats_are_their_regular_expressions_on_random_texts():
    parts = ("<think>", "</think>", "<answer>", "</answer>", " ", "x", "\n", "")
    rng = random.Random(0)
    texts = ["".join(p) for p in itertools.product(parts[:4], repeat=5)]
    texts += ["".join(rng.choices(parts, k=rng.randint(0, 12))) for _ in range(4000)]
    texts += ["<think>" + "".join(rng.choices(parts, k=rng.randint(0, 9))) + "</answer>" for _ in range(4000)]
    one = r"(?:(?!</?think>|</?answer>).)*"
    strict = re.compile(rf"\s*<think>{one}</think>\s*<answer>{one}</answer>\s*", re.DOTALL)
    paper = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
    assert (
        sum(bool(strict.fullmatch(t)) for t in texts) > 10
        and sum(bool(paper.fullmatch(t)) for t in texts) > 50
    )
    for text in texts:
        assert well_formed(text) == bool(strict.fullmatch(text)), text
        assert well_formed_paper(text) == bool(paper.fullmatch(text)), text


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "start, piece, end",
    [
        ("<think>", "look ", "</think><answer>B</answer>"),
        ("<think>", " ", ""),
        ("", "<answer>", ""),
        ("", "<answer>\n", ""),
        ("", "<think>", ""),
        ("<think>", "</think><answer>", "</answer>x</answer>"),
        ("<think>", "</think> ", ""),
        ("", "<", ""),
        ("<answer>", "(", "</answer>"),
        ("<answer>", " ", "B</answer>"),
        ("<think></think>", " ", "<answer>B</answer>"),
        ("<think></think>", " \n", "x</answer>"),
        ("<answer>A", " or B", "</answer>"),
        ("", "(A ", ""),
    ],
)
def test_time_grows_with_the_text_and_no_faster(start, piece, end):
    """Ten megabytes take at most four times ten times the processor time of one: a quadratic search would
    take a hundred times. In seconds: tests/bench/answers.py."""

    def cost(size: int) -> float:
        text = start + piece * (size // len(piece)) + end
        before = time.process_time()
        (
            extract(text, CHOICES),
            extract(text, ()),
            is_right(text, NUMBER),
            is_right_paper(text, NUMBER),
            well_formed(text),
            well_formed_paper(text),
        )
        return time.process_time() - before

    assert cost(10 * MEGABYTE) < 40 * max(cost(MEGABYTE), cost(MEGABYTE), 2e-3)
