"""grpo/evaluation/comparisons.py: each benchmark's own rule on answers made by hand."""

import math

import pytest

from data.types import Example
from grpo.evaluation.comparisons import COMPARISONS, compared
from grpo.evaluation.protocols import PROTOCOLS


def asked(benchmark, answer, choices=(), **extra):
    return Example("u", "What?", choices, answer, extra={"benchmark": benchmark} | extra)


# benchmark, right answer, what is said, right?
FREE = [
    # within 5 % of the right number
    ("chartqa", "100", "105", True),
    ("chartqa", "100", "95", True),
    ("chartqa", "100", "105.1", False),
    ("chartqa", "-20", "-20.9", True),
    ("chartqa", "12%", "0.12", True),
    ("chartqa", "12%", "12", False),
    ("chartqa", "0", "0", True),
    ("chartqa", "0", "0.001", False),
    ("chartqa", "Red", "red", True),
    ("chartqa", "Red", "dark red", False),
    ("chartqa", "2", "nan", False),
    ("chartqa", "2", "inf", False),
    # within 0.001
    ("dynamath", "2.0944", "2.094", True),
    ("dynamath", "2.0944", "2.0955", False),
    ("dynamath", "3.14159", "π", True),
    ("dynamath", "12", "12.0", True),
    ("dynamath", "12", "twelve o'clock", None),
    # within 0.01, also of a hundredth and of a hundred times as much
    ("mm_math", "3.14", "3.15", True),
    ("mm_math", "3.14", "3.16", False),
    ("mm_math", "0.5", "50", True),
    ("mm_math", "50", r"\boxed{0.5}", True),
    ("mm_math", r"5\text{cm}", "5", True),
    ("mm_math", "60", r"$60^\circ$", True),
    ("mm_math", "60^{\\circ}", "60", True),
    ("mm_math", "1, 2", "2, 1", True),
    ("mm_math", "1, 2", "1", False),
    ("mm_math", "1, 2", "1, 2, 3", False),
    ("mm_math", "1", "1, 1", False),
    ("mm_math", r"\pm 2", "2, -2", True),
    ("mm_math", r"\frac{1}{2}", "1/2", True),
    ("mm_math", "(2, 3)", "(2,3)", True),
    ("mm_math", "y=2x", "y = 2x", True),
    ("mm_math", "8cm", "It is so.\nThe length is $8$ cm", True),
    ("mm_math", "8", "9", False),
]


@pytest.mark.parametrize("benchmark, gold, said, right", FREE)
def test_a_free_answer(benchmark, gold, said, right):
    found = compared(said, asked(benchmark, gold, answer_type="float"))
    assert found.correct == bool(right)
    assert (found.answer is None) == (right is None)


@pytest.mark.parametrize("gold", [0.3, 1.0, 7.5, 1234.5])
def test_the_edge_of_five_percent(gold):
    for share in (0.0499, 0.0501):
        said = f"{gold * (1 + share):.9f}"
        assert compared(said, asked("chartqa", str(gold))).correct == (share < 0.05)
        assert compared(said, asked("chartqa", str(gold))).correct == math.isclose(
            float(said), gold, rel_tol=0.05 / 1.05
        )


def test_a_text_of_dynamath_may_be_a_part_of_the_right_one():
    question = asked("dynamath", "September (Sep)", answer_type="text")
    assert compared("sep", question).correct and not compared("October", question).correct
    assert compared(" ", question) == (None, None, "empty answer", False)


@pytest.mark.parametrize(
    "said, answer",
    [
        ("Yes", "Yes"),
        ("yes, it is.", "Yes"),
        ("No.", "No"),
        ("The answer is no", "No"),
        ("Yes or no", None),
        ("I know nothing", None),
        ("A", None),
    ],
)
@pytest.mark.parametrize("benchmark", ["mme", "hallusion"])
def test_yes_and_no(benchmark, said, answer):
    found = compared(said, asked(benchmark, "Yes", ("Yes", "No")))
    assert (found.answer, found.correct) == (answer, answer == "Yes")


def test_without_a_benchmark_the_reward_decides():
    question = Example("u", "Is it?", ("yes", "no"), "yes")
    assert compared("A", question).correct and not compared("A or B", question).correct
    assert compared("(A) yes", asked("mmstar", "yes", ("yes", "no"))).correct


def test_official_reads_what_strict_reads():
    read = PROTOCOLS["official"].read
    chart = asked("chartqa", "100")
    assert read("<think>t</think> <answer>104</answer>", chart).correct
    assert not PROTOCOLS["strict"].read("<think>t</think> <answer>104</answer>", chart).correct
    assert read("104", chart).why == "no answer tag" and read("104\nand more", chart, direct=True).correct


@pytest.mark.parametrize("benchmark", COMPARISONS)
def test_long_answers_take_no_time(benchmark):
    """At most 2,000 characters are an answer; each rule is fast on the worst of them."""
    choices = ("Yes", "No") if benchmark in ("mme", "hallusion") else ()
    for text in (
        "(" * 2000,
        "1," * 1000,
        r"\pm" * 600,
        r"\boxed{" * 280,
        "$" * 2000,
        "m" * 2000,
        "1 m" * 600,
    ):
        compared(text, asked(benchmark, "Yes" if choices else "1", choices, answer_type="float"))
