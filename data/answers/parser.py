"""Reading an answer out of a completion: one strict parser, shared by the reward and by evaluation.

Strict because a reward that can be fooled will be: "A or B or C" is not an answer, neither are two tags, an
empty one, or one inside the reasoning. What could not be read is named (`why`), so that evaluation can count
it apart from what was wrong. Every function is linear in
the text: completions are long and nobody vouches for them. The paper's own rules stand beside the strict
ones, by name (`…_paper`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from data.answers import numbers
from data.types import LETTERS, Example

THINK, END_THINK, ANSWER, END_ANSWER = TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# characters of an answer; a longer one is a text, not an answer
LONGEST = 2_000

# Chinese-trained models write （Ａ） as readily as (A): full-width forms are read as their ASCII twins.
_NARROW = {**{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}, 0x3002: "."}
_LABEL = re.compile(r"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])(?=[.):]|$)[.):]?)[.:]?\s*(.*)", re.DOTALL)
_BRIDGE = re.compile(rf"{END_THINK}\s*{ANSWER}")
_LETTER_PAPER = re.compile(r"(?:^|\s|\[|\()([A-H])(?:\s|\]|\)|$)")


class Extracted(NamedTuple):
    """The answer read: the choice's text (or the free answer), its letter, and why there is none ("" if
    there is one)."""

    answer: str | None
    letter: str | None
    why: str


def extract(text: str, choices: Sequence[str]) -> Extracted:
    """The one answer in `text` (opening included), between exactly one pair of answer tags outside the
    reasoning.

    It must be a letter (A, a, A., (A), [A]), a choice's text, or a letter with its own text ("(A) yes").
    Case, white space and a final full stop don't matter. Without choices it is whatever stands between the
    tags.
    """
    content, why = _content(text)
    if why:
        return Extracted(None, None, why)
    if not choices:
        return Extracted(content, None, "")
    readings = _readings(content, choices)
    if len(readings) != 1:
        return Extracted(None, None, "ambiguous" if readings else "not a choice")
    index = readings.pop()
    return Extracted(choices[index], LETTERS[index], "")


def read(text: str, example: Example) -> Extracted:
    """`extract`, and in addition an answer to a question for a number must be one ("not a number")."""
    found = extract(text, example.choices)
    if not found.why and gold_number(example) and numbers.parse(found.answer) is None:
        return Extracted(None, None, "not a number")
    return found


def is_right(text: str, example: Example) -> bool:
    """Whether the answer read from `text` is the example's.

    A choice by its letter or its text; a free answer as text, without case, spacing and final full stop; and
    as a number, by value (`numbers.same`), where the example says `extra["kind"] == "number"`.
    """
    answer = extract(text, example.choices).answer
    if answer is None or example.choices:
        return answer == example.answer
    if gold := gold_number(example):
        said = numbers.parse(answer)
        return said is not None and numbers.same(said, gold)
    return _plain(answer) == _plain(example.answer)


def gold_number(example: Example) -> numbers.Number | None:
    """The right answer as a number. None: it is compared as text, because the example does not ask for a
    number, or its answer is none."""
    return (
        numbers.parse(example.answer)
        if not example.choices and example.extra.get("kind") == "number"
        else None
    )


def is_right_paper(text: str, example: Example) -> bool:
    """VisualThinker-R1-Zero's accuracy without its computer algebra: what it pays for, docs/04 says.

    The first <answer>…</answer> on one line, wherever it stands, or the whole text where there is none: equal
    to the answer's text to the letter, or the last A-H between spaces or brackets in it is.
    """
    said = _answer_paper(text)
    if said == example.answer.strip():
        return True
    letters = list(_LETTER_PAPER.finditer(said))
    return bool(letters) and letters[-1][1] == example.answer.strip()


def well_formed(text: str) -> bool:
    """`<think>…</think> <answer>…</answer>`: each tag exactly once, in this order, and only white space
    outside."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    return well_formed_paper(text.strip())


def well_formed_paper(text: str) -> bool:
    """VisualThinker-R1-Zero's format test, `<think>.*?</think>\\s*<answer>.*?</answer>` over the whole text.

    Looser than `well_formed`: tags may repeat inside. Written without the regular expression's backtracking,
    which is quadratic.
    """
    return text.startswith(THINK) and text.endswith(END_ANSWER) and bool(_BRIDGE.search(text))


def _answer_paper(text: str) -> str:
    """`<answer>(.*?)</answer>` or everything. Line by line, because the regular expression is quadratic where
    tags don't close.

    The prompt of the paper ends with the opening <think>, which is no part of the completion that its rule
    reads.
    """
    for line in text.split("\n") if ANSWER in text else ():
        start = line.find(ANSWER)
        end = line.find(END_ANSWER, start + len(ANSWER)) if start >= 0 else -1
        if end >= 0:
            return line[start + len(ANSWER) : end].strip()
    return text.removeprefix(THINK).strip()


def _content(text: str) -> tuple[str, str]:
    """What stands between the answer tags, and why it is no answer ("" if it may be one)."""
    opened, closed = text.count(ANSWER), text.count(END_ANSWER)
    if not opened and not closed:
        return "", "no answer tag"
    if opened > 1 or closed > 1:
        return "", "several answer tags"
    start, end = text.find(ANSWER), text.find(END_ANSWER)
    if start < 0 or end < start:
        return "", "unclosed answer tag"
    before, content, after = text[:start], text[start + len(ANSWER) : end].strip(), text[end:]
    if before.count(THINK) > before.count(END_THINK) or after.count(END_THINK) > after.count(THINK):
        return "", "answer inside the reasoning"
    if not content:
        return "", "empty answer"
    if len(content) > LONGEST:
        return "", "answer too long"
    return (
        (content, "")
        if THINK not in content and END_THINK not in content
        else ("", "reasoning inside the answer")
    )


def _readings(content: str, choices: Sequence[str]) -> set[int]:
    """The indices of all choices that `content` may mean."""
    said, plain = _plain(content), _plain_choices(tuple(choices))
    readings = {index for index, choice in enumerate(plain) if choice == said}
    if label := _LABEL.fullmatch(said):
        letter = next(group for group in label.groups()[:3] if group)
        index, own = LETTERS.index(letter.upper()), label.group(4)
        if index < len(choices) and own in ("", plain[index]):
            readings.add(index)
    return readings


@lru_cache(maxsize=4096)
def _plain_choices(choices: tuple[str, ...]) -> tuple[str, ...]:
    """Remembered, because a group's completions are all held against the same choices."""
    return tuple(map(_plain, choices))


def _plain(text: str) -> str:
    """Without what an answer's meaning does not hang on: case, spacing, full-width forms, a final full
    stop."""
    text = (
        text.lower() if text.isascii() else unicodedata.normalize("NFC", text).translate(_NARROW).casefold()
    )
    return " ".join(text.split()).removesuffix(".").rstrip()
