"""Answers that somebody's checker has paid for, or that would break one, each with the verdict of every rule.

tests/data/answers/test_numbers.py asserts each verdict, and docs/answers.md shows them (written by
`python -m tests.docs_sync`).
The last two columns are math-verify's, version 0.9.0; they are asserted where it is installed.
"""

from typing import NamedTuple

from data.types import Example

LETTERS = ("yes", "no", "can't tell")
MIXED = ("A", "B", "dog")
TEN_MB = 10_000_000


class Case(NamedTuple):
    """`said` stands between answer tags after a thought, unless `text` gives the whole completion. 1:
    right, 0: wrong."""

    said: str
    gold: str
    # is_right: the strict rule
    accuracy: int
    # accuracy_paper
    paper: int
    # accuracy_math_verify
    math: int
    # accuracy_paper_math_verify
    paper_math: int
    choices: tuple[str, ...] = ()
    text: str | None = None
    # in the table, where the text is too long for it
    shown: str = ""

    @property
    def completion(self) -> str:
        return f"<think>look</think> <answer>{self.said}</answer>" if self.text is None else self.text

    @property
    def example(self) -> Example:
        return Example(
            "adversarial",
            "Which? How many?",
            self.choices,
            self.gold,
            extra={} if self.choices else {"kind": "number"},
        )


def _letters(said, accuracy, paper, gold="no", choices=LETTERS):
    # math-verify is not asked for choices, and finds none in words
    return Case(said, gold, accuracy, paper, accuracy, paper, choices)


def _numbers(*rows):
    """(said, gold, accuracy) and math-verify's verdict where it is another; the paper's string rule takes
    a number only in the spelling of the right one."""
    return [
        Case(said, gold, accuracy, int(said == gold), math[0] if math else accuracy, int(said == gold))
        for said, gold, accuracy, *math in rows
    ]


def _whole(text, gold, accuracy, paper, paper_math=None, choices=(), shown=""):
    return Case(
        "", gold, accuracy, paper, accuracy, paper if paper_math is None else paper_math, choices, text, shown
    )


CASES = {
    "Letters and words; the right answer is no, the choices are (A) yes, (B) no, (C) can't tell": [
        _letters("B", 1, 0),
        _letters("(B)", 1, 0),
        _letters("no", 1, 1),
        _letters("No.", 1, 0),
        _letters("(B) no", 1, 0),
        _letters("（B）", 1, 0),
        _letters("【B】", 1, 0),
        _letters("**B**", 1, 0),
        _letters("`B`", 1, 0),
        _letters("“no”", 1, 0),
        _letters("(B) **no**", 1, 0),
        _letters("B!", 1, 0),
        _letters("", 0, 0),
        _letters("A or B or C", 0, 0),
        _letters("yes or no", 0, 0),
        _letters("(A) no", 0, 0),
        _letters("the answer is B", 1, 0),
        _letters("Final Answer: B", 1, 0),
        _letters("the answer is not B", 0, 0),
        _letters("a cat", 0, 0),
        _letters("\\boxed{B}", 1, 0),
        _letters("\\boxed{A}\\boxed{B}", 0, 0),
    ],
    (
        "Choices that are letters themselves; the right answer is A, the choices are (A) A, (B) B, (C) "
        "dog, as where points in a picture are called A and B"
    ): [
        _letters("A", 1, 1, "A", MIXED),
        _letters("B or A", 0, 1, "A", MIXED),
        _letters("[A)", 0, 1, "A", MIXED),
        _letters("not A", 0, 1, "A", MIXED),
        _letters("(C) dog A", 0, 1, "A", MIXED),
        _letters("a", 1, 0, "A", MIXED),
    ],
    "Tags; the right answer is no, the choices as above": [
        _whole("<answer>no</answer> <answer>yes</answer>", "no", 0, 1, choices=LETTERS),
        _whole("<think><answer>no</answer></think>", "no", 0, 1, choices=LETTERS),
        _whole("<answer><answer>no</answer></answer>", "no", 0, 0, choices=LETTERS),
        _whole("<answer>no", "no", 0, 0, choices=LETTERS),
        _whole("no", "no", 0, 1, choices=LETTERS),
        _whole("<answer>\nno\n</answer>", "no", 1, 0, choices=LETTERS),
        _whole("<answer>no <think></answer>", "no", 0, 0, choices=LETTERS),
    ],
    "Numbers": _numbers(
        ("3", "3", 1),
        ("３", "3", 1, 0),
        ("3.0", "3", 1),
        ("+3", "3", 1, 0),
        ("−3", "-3", 1, 0),
        ("-3", "3", 0),
        ("-0", "0", 1),
        ("007", "7", 1),
        ("3/2", "1.5", 1),
        ("\\frac{3}{2}", "1.5", 1),
        ("\\dfrac32", "1.5", 1),
        ("1 1/2", "1.5", 1, 0),
        ("1½", "1.5", 1, 0),
        ("1\\frac{1}{2}", "1.5", 1),
        ("50%", "0.5", 1),
        ("50\\%", "0.5", 1),
        ("50%", "50", 1),
        ("0.333333", "1/3", 1),
        ("0.33", "1/3", 0),
        ("140°", "140", 1),
        ("140^\\circ", "140°", 1),
        ("140 degrees", "140^{\\circ}", 1),
        ("2\\sqrt{2}", "\\sqrt{8}", 1),
        ("2√2", "2.828427", 1, 0),
        ("2\\sqrt{2}", "2.8", 0),
        ("\\pi", "3.141593", 1),
        ("\\pi", "3.14", 0),
        ("1+\\sqrt{2}", "2.414214", 1),
        ("\\frac{3\\pi}{4}", "2.356194", 1),
        ("1e3", "1000", 1, 0),
        ("3 × 10^5", "300000", 1, 0),
        ("3 \\times 10^{5}", "3e5", 1, 0),
        ("x=3", "3", 1),
        ("$3$", "3", 1),
        ("\\boxed{3}", "3", 1),
        ("3 cm", "3", 1),
        ("3", "3 cm", 1),
        ("300 cm", "3 m", 1, 0),
        ("3 m", "3 cm", 0, 1),
        ("3\\text{ cm}", "3 cm", 1),
        ("$4.50", "4.5", 1),
        ("1,000", "1000", 1),
        ("1{,}000", "1000", 1, 0),
        ("1.000,5", "1000.5", 0),
        ("1,5", "1.5", 0, 1),
        ("1 000", "1000", 0, 1),
    ),
    "No numbers": _numbers(
        ("", "3", 0),
        ("3 or 4", "3", 0),
        ("3 or 4", "4", 0, 1),
        ("3, 4", "3", 0),
        ("3-4", "-1", 0, 1),
        ("3 4", "3", 0),
        ("12*7", "84", 0, 1),
        ("1+2", "3", 0, 1),
        ("(3)(4)", "12", 0),
        ("about 3", "3", 0, 1),
        ("three", "3", 0),
        ("3 apples", "3", 0, 1),
        ("not 3", "3", 0, 1),
        ("0x10", "16", 0),
        ("0x10", "0", 0, 1),
        ("1_000", "1000", 0),
        ("٣", "3", 0),
        ("NaN", "3", 0),
        ("infinity", "3", 0),
        ("\\infty", "3", 0),
        ("1e999", "3", 0),
        ("1e999999999", "3", 0),
        ("1/0", "3", 0),
        ("0/0", "3", 0),
        ("9^9^9^9", "3", 0),
        ("\\sqrt{-1}", "1", 0),
        ("--3", "3", 0),
        ("1/2/3", "1/6", 0, 1),
        ("__import__('os').system('true')", "3", 0),
        ("().__class__", "3", 0),
    ),
    "Numbers in whole completions": [
        _whole("<think>it may be 3</think>", "3", 0, 0),
        _whole("<think>2</think> <answer>2</answer> or 3", "3", 0, 0),
        _whole("3", "3", 0, 1),
        _whole("<answer>2</answer> <answer>3</answer>", "3", 0, 0),
        _whole("<think>no, \\frac{1}{2} is too small</think>", "\\frac{1}{2}", 0, 0, 1),
        _whole("<think>\\frac{1}{2}</think> <answer>2</answer>", "\\frac{1}{2}", 0, 0, 1),
        _whole("<answer>" + "(" * 400 + "3" + ")" * 400 + "</answer>", "3", 0, 0, shown="3 in 400 brackets"),
        _whole("<answer>" + "3" * 400 + "</answer>", "3", 0, 0, shown="a 3 of 400 digits"),
        _whole("<answer>" + "3" * TEN_MB + "</answer>", "3", 0, 0, shown="a 3 of 10 million digits"),
        _whole(
            "<think>" + "3 " * (TEN_MB // 2) + "</think> <answer>3</answer>",
            "3",
            1,
            1,
            shown="10 MB of thought and a 3",
        ),
        _whole("<answer>" * (TEN_MB // 8) + "3", "3", 0, 0, shown="10 MB of opened tags and a 3"),
    ],
}
