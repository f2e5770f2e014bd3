"""`math-verify` as a second opinion, only where a recipe asks for it by name (`accuracy_math_verify`,
`accuracy_paper_math_verify`), and in the protocol `paper`.

It hands text to sympy, which can take for ever ("9^9^9^9"), so it runs as a user's reward does, in a process
that can be ended (`grpo/rewards/user_code.py`). The paper called it in the training process and pinned
version 0.5.2. Needs the extra `math`.
"""

import logging

from data.answers.parser import extract
from grpo.evaluation.protocols import NOTHING, RIGHT, WRONG, spellings

# characters of a completion that are looked at; a longer one is wrong, because its search for a number takes
# minutes
LONGEST = 50_000
# seconds each, math-verify's defaults; its timer is a signal, which a long product of large numbers doesn't
# hear
PARSING, COMPARING = (5, 5)


def answer(text, example, length) -> float:
    """1 if the one answer, read strictly, is the example's for math-verify: for answers without choices."""
    return float(_verify(_formula(example.answer), _formula(extract(text, example.choices).answer or "")))


def paper(text, example, length) -> float:
    """1 if math-verify finds the right answer anywhere: VisualThinker-R1-Zero compares the whole
    completion with the tagged answer, in this order."""
    return float(len(text) <= LONGEST and _verify(text, f"<answer>{example.answer}</answer>"))


def verdict(text, example, length) -> float:
    """NOTHING, WRONG or RIGHT: LaTeX, an expression or one of the strings in `text`, against the right
    answer's spellings, as VisualThinker-R1-Zero's evaluation does."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

    strings, gold = spellings(example)
    found = parse(
        text,
        [LatexExtractionConfig(), ExprExtractionConfig(), StringExtractionConfig(strings=strings)],
        parsing_timeout=PARSING,
    )
    return (
        (RIGHT if verify(gold=gold, target=found, timeout_seconds=COMPARING) else WRONG) if found else NOTHING
    )


def _verify(first: str, second: str) -> bool:
    from math_verify import parse, verify

    return bool(
        verify(
            parse(first, parsing_timeout=PARSING),
            parse(second, parsing_timeout=PARSING),
            timeout_seconds=COMPARING,
        )
    )


def _formula(text: str) -> str:
    """math-verify reads LaTeX between dollars; without them it takes the first number of 2\\sqrt{2}."""
    return f"${text}$" if "\\" in text and "$" not in text else text


# it prints the whole text of what it gives up
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
answer.timeout = paper.timeout = verdict.timeout = 2 * PARSING + COMPARING + 5.0
# its grammars are built at the first use, which may take as long as a timeout allows
_verify("$\\frac{3}{2}$", "1.5")
