"""`math-verify` as a second opinion: the rewards `accuracy_math_verify` and `accuracy_paper_math_verify`, and
the evaluation's protocol `paper`.

It passes text to sympy, which may run without end ("9^9^9^9"). So it runs in a process that can be ended, as
a user's reward does (`grpo/rewards/user_code.py`). The paper called version 0.5.2 in its training process.
"""

import logging
import multiprocessing

from data.answers.parser import extract
from data.types import Example

# characters; a longer completion is wrong, because its search for a number takes minutes
LONGEST = 50_000
# seconds, math-verify's defaults; its timer is a signal, which can't stop a long product of large numbers
PARSING = 5
COMPARING = 5
# the function attribute `timeout` of each reward below, seconds
TIMEOUT = 2 * PARSING + COMPARING + 5.0
NOTHING = 0.0
WRONG = 1.0
RIGHT = 2.0


def answer(text, example, length) -> float:
    """1 if math-verify finds the one answer, read strictly, equal to the example's (without choices)."""
    return float(_verify(_formula(example.answer), _formula(extract(text, example.choices).answer or "")))


def paper(text, example, length) -> float:
    """1 if math-verify finds the right answer anywhere: VisualThinker-R1-Zero compares the whole completion
    with the tagged answer, in this order."""
    return float(len(text) <= LONGEST and _verify(text, f"<answer>{example.answer}</answer>"))


def verdict(text, example, length) -> float:
    """NOTHING, WRONG or RIGHT, for the LaTeX, expression or string in `text`: VisualThinker's evaluation."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

    strings, gold = spellings(example)
    readers = (LatexExtractionConfig(), ExprExtractionConfig(), StringExtractionConfig(strings=strings))
    found = parse(text, readers, parsing_timeout=PARSING)
    if not found:
        return NOTHING
    return RIGHT if verify(gold=[*gold], target=found, timeout_seconds=COMPARING) else WRONG


def spellings(example: Example) -> tuple[tuple[str, ...], list[str]]:
    """The strings that VisualThinker's evaluation looks for, and those of them that are right."""
    gold = [example.answer.lower(), example.answer]
    if example.letter:
        gold += [form % x for x in (example.letter, example.letter.lower()) for form in ("%s", "(%s)")]
    letters = [form % letter for letter in "ABCDEFabcdef" for form in ("%s", "(%s)")]
    return tuple(dict.fromkeys([*letters, *example.choices])), gold


def _verify(first: str, second: str) -> bool:
    from math_verify import parse, verify

    gold = parse(first, parsing_timeout=PARSING)
    target = parse(second, parsing_timeout=PARSING)
    return bool(verify(gold, target, timeout_seconds=COMPARING))


def _formula(text: str) -> str:
    """math-verify reads LaTeX between dollars; without them it takes the first number of 2\\sqrt{2}."""
    return f"${text}$" if "\\" in text and "$" not in text else text


for reward in (answer, paper, verdict):
    # pyrefly: ignore[missing-attribute]
    reward.timeout = TIMEOUT
# math-verify logs the whole text when it gives up
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
if multiprocessing.parent_process() is not None:
    # the first use builds its grammars, which may take longer than a call may
    _verify("$\\frac{3}{2}$", "1.5")
