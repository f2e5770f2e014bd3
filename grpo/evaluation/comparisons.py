"""How benchmarks compare an answer with the right one, each by its owners' rule.

A comparison takes the answer that was found in a completion. `compared` chooses it by `extra["benchmark"]`;
without one, the reward's own comparison decides. No rule evaluates what a model wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from data.answers import numbers
from data.answers.parser import ANSWER, END_ANSWER, extract, is_right, read
from data.sources.vlmeval import boxed, kind_of
from data.types import LETTERS, Example

# ChartQA: a number may differ by this share of the right one (arXiv 2203.10244, section 5.1)
RELAXED = 0.05
# DynaMath: a number may differ by this much
DYNAMATH = 1e-3
# MM-Math: a number may differ by this much; its own rule adds a hundredth of it for rounding
MM_MATH = 1e-2 * 1.01
# what MM-Math takes out of both answers, beside its units of length
_DECORATION = re.compile(
    r"\\left|\\right|\^\{?\\circ\}?|°|\\,|\$|厘米|米"
    r"|\\(?:text|mathrm|mathbf)\{[ ~]*(?:[cdm]?m|米)?\}(?:\^\{?2\}?)?"
    r"|(?<=[0-9}])[ ]?[cdm]?m(?:\^\{?2\}?)?(?![A-Za-z])"
)
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


class Reading(NamedTuple):
    """What was read: the answer (or None, and `why`), its letter if it is a choice, whether it is right."""

    answer: str | None
    letter: str | None
    why: str
    correct: bool


def tagged(said: str) -> str:
    """An answer in answer tags, for the one parser."""
    return f"{ANSWER}{said}{END_ANSWER}"


def plain(said: str, example: Example) -> Reading:
    """The reward's own comparison."""
    return parsed(tagged(said), example)


def parsed(text: str, example: Example) -> Reading:
    """The reward's own reading of a completion with tags."""
    found = read(text, example)
    return Reading(found.answer, found.letter, found.why, is_right(text, example))


def chosen_at(index: int, example: Example) -> Reading:
    """The choice of that index. Of equal choices each is right."""
    answer = example.choices[index]
    return Reading(answer, LETTERS[index], "", answer == example.answer)


def mathvista(said: str, example: Example) -> Reading:
    """A letter in brackets, else what the parser reads, else the nearest choice; whole numbers; decimals,
    rounded as the question asks."""
    if example.choices:
        letters = LETTERS[: len(example.choices)]
        bracketed = re.search(r"\(([A-Za-z])\)", said)
        letter = bracketed[1].upper() if bracketed else said.strip()
        if len(letter) == 1 and letter in letters:
            return chosen_at(letters.index(letter), example)
        answer = None if bracketed else extract(tagged(said), example.choices).answer
        answer = answer or min(example.choices, key=partial(_distance, said[:200]))
        return chosen_at(example.choices.index(answer), example)
    gold = numbers.parse(example.answer)
    kind = example.extra.get("answer_type", "text")
    if kind not in ("integer", "float") or gold is None:
        return Reading(said, None, "", "".join(said.split()) == "".join(example.answer.split()))
    number = numbers.parse(said)
    # 7.9 is cut to 7, and 4/3 is no integer
    if number is None or (kind == "integer" and number.value % 1 and "." not in said):
        return Reading(None, None, "not a number", False)
    precision = float(example.extra.get("precision") or 0)
    # a table's empty field is NaN
    places = int(precision) if precision == precision else 0
    shown = int if kind == "integer" else lambda value: round(float(value), places)
    right = shown(number.value) == shown(gold.value) or numbers.same(number, gold)
    return Reading(str(shown(number.value)), None, "", right)


def chartqa(said: str, example: Example) -> Reading:
    """A number within 5 % of the right one, or the same text in any case. 12 % is 0.12."""
    said = said.strip()
    golds = example.extra.get("golds") or (example.answer,)
    return Reading(said, None, "", any(_relaxed(said, gold) for gold in golds))


def _relaxed(said: str, gold: str) -> bool:
    value, right = _float(said), _float(gold)
    if value is None or not right:
        return said.lower() == gold.lower()
    return abs(value - right) <= RELAXED * abs(right)


def _float(text: str) -> float | None:
    """A decimal, perhaps with a percent sign. Not "inf" and "nan", which Python reads, too."""
    found = re.fullmatch(
        r"\s*([+-]?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?)\s*(%?)\s*", text.replace(",", "")
    )
    return float(found[1]) / (100 if found[2] else 1) if found else None


def dynamath(said: str, example: Example) -> Reading:
    """A number within 0.001; a choice; a text that is a part of the right one."""
    if example.choices:
        return plain(said, example)
    if example.extra.get("answer_type") == "float":
        value, gold = numbers.parse(said), numbers.parse(example.answer)
        if value is None or gold is None:
            return Reading(None, None, "not a number", False)
        return Reading(said.strip(), None, "", abs(float(value.value) - float(gold.value)) <= DYNAMATH)
    said = said.strip()
    return Reading(
        said or None,
        None,
        "" if said else "empty answer",
        bool(said) and said.lower() in example.answer.lower(),
    )


def mm_math(said: str, example: Example) -> Reading:
    r"""Parts between commas in any order, \pm both ways: the same text, a number within 0.01 (also of a
    hundredth and of a hundred times the right one), or equal by the reward's comparison. Its owners' script
    also compares formulas by computer algebra."""
    mine, golds = _parts(said), _parts(example.answer)
    right = len(mine) == len(golds)
    for gold in golds:
        found = next((part for part in mine if _same_part(part, gold, example)), None)
        if found is None:
            right = False
            break
        mine.remove(found)
    return Reading(said.strip() or None, None, "" if said.strip() else "empty answer", right)


def _parts(text: str) -> list[str]:
    r"""What stands in \boxed{…}, else between dollars on the last line, else all; cleaned, in its parts."""
    last = text.strip().rpartition("\n")[2]
    whole = ",".join(boxed(text) or re.findall(r"\$(.*?)\$", last)) or text
    whole = _DECORATION.sub("", whole.replace("，", ",").replace("（", "(").replace("）", ")"))
    pieces: list[str] = []
    piece = ""
    depth = 0
    for letter in whole + ",":
        depth += _BRACKETS.get(letter, 0)
        if letter == "," and depth <= 0:
            pieces.append(piece.strip(" \n.:;^_=+`!@#%&*~。"))
            piece = ""
        else:
            piece += letter
    pieces = [each for each in pieces if each]
    return [each.replace("\\pm", sign) for each in pieces for sign in ("+", "-")[: 1 + ("\\pm" in each)]]


def _same_part(said: str, gold: str, example: Example) -> bool:
    if said == gold:
        return True
    value, right = numbers.parse(said), numbers.parse(gold)
    if value and right:
        wanted = float(right.value)
        return any(abs(float(value.value) - each) <= MM_MATH for each in (wanted / 100, wanted, wanted * 100))
    return is_right(tagged(said), replace(example, answer=gold, extra={"kind": kind_of(gold)}))


def yes_or_no(said: str, example: Example) -> Reading:
    """The only one of yes and no that is said as a word."""
    words = re.findall(r"[a-z]+", said.lower())
    found = [word for word in ("yes", "no") if word in words]
    if len(found) != 1:
        return Reading(None, None, "ambiguous" if found else "not a choice", False)
    return chosen_at(["yes", "no"].index(found[0]), example)


def _distance(a: str, b: str) -> int:
    """Levenshtein's distance: how many letters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


Comparison = Callable[[str, Example], Reading]
COMPARISONS: dict[str, Comparison] = {
    "mathvista": mathvista,
    "chartqa": chartqa,
    "dynamath": dynamath,
    "mm_math": mm_math,
    "mme": yes_or_no,
    "hallusion": yes_or_no,
}


def compared(said: str, example: Example) -> Reading:
    """The comparison of the benchmark that the question is from."""
    return COMPARISONS.get(example.extra.get("benchmark", ""), plain)(said, example)
