"""What the extra math-verify finds in an answer, for the protocol `paper`: VisualThinker-R1-Zero's evaluation, in a process that can be ended (`grpo/user_rewards.py`)."""

import logging

from data.types import Example
from grpo.protocols import NOTHING, RIGHT, WRONG, spellings

PARSING, COMPARING = 5, 5           # seconds each, math-verify's defaults; its timer is a signal, which a long product of large numbers doesn't hear


def verdict(text, example, length) -> float:
    """NOTHING, WRONG or RIGHT: LaTeX, an expression or one of the strings in `text`, against the right answer's spellings."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

    strings, gold = spellings(example)
    found = parse(text, [LatexExtractionConfig(), ExprExtractionConfig(), StringExtractionConfig(strings=strings)], parsing_timeout=PARSING)
    return (RIGHT if verify(gold=gold, target=found, timeout_seconds=COMPARING) else WRONG) if found else NOTHING


logging.getLogger("math_verify").setLevel(logging.CRITICAL)         # it prints the whole text of what it gives up
verdict.timeout = 2 * PARSING + COMPARING + 5.0
verdict("$\\frac{3}{2}$", Example("warm", "?", ("3/2", "2/3"), "3/2"), None)     # its grammars are built at the first use, which may take as long as a timeout allows
