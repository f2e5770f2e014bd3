"""Reading an answer out of a completion: one strict parser for rewards, curves, evaluation and data checks.

Strict, because a policy finds every gap in a reward: "A or B", two tags, an empty tag or a tag inside the
reasoning are no answer. `why` names what could not be read; evaluation counts it apart from what was wrong.
In normal form (`data/answers/normal.py`) an answer is a letter, a choice's text, a number, a list or free
text. Every function is linear in the text. `..._paper` are the paper's own rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple

from data.answers.normal import TABLES, bare, normal, split_list
from data.answers.numbers import Number, parse_normal, same
from data.types import LETTERS, Example

THINK, END_THINK, ANSWER, END_ANSWER = TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# characters of an answer; what stands in place of a choice's index
LONGEST = 2_000
NONE, SEVERAL = -1, -2
_LABELLED = re.compile(TABLES["labelled"], re.VERBOSE | re.DOTALL)
_BRACKETED = re.compile(r"[(\[（【]\s*[A-Za-z]\s*[)\]）】]")
_BETWEEN = " ,;，；、"
_LISTED = tuple(re.compile(form, re.MULTILINE) for form in TABLES["listed"])
# words and labels that make two answers of one, where the choices are not known
_HEDGE = re.compile(r"\b(?:or|and|not|either|neither|maybe)\b|\b[A-Z]\b(?=[.):]|$)|\([A-Z]\)")
_NAMED = re.compile(TABLES["named"], re.VERBOSE)
_TURNED = str.maketrans("<≤", ">≥")
_BRIDGE = re.compile(rf"{END_THINK}\s*{ANSWER}")
_LETTER_PAPER = re.compile(r"(?:^|\s|\[|\()([A-H])(?:\s|\]|\)|$)")


class Extracted(NamedTuple):
    """The choice's text (or the free answer), its letter, and why there is none ("" if there is one)."""

    answer: str | None
    letter: str | None
    why: str


def extract(text: str, choices: Sequence[str]) -> Extracted:
    """The one answer in `text` (opening included), between one pair of answer tags outside the reasoning.

    It must be a letter (A, a, A., (A)), a choice's text, a value that one choice has, or a letter with its
    own text ("(A) yes"). Case, spacing, markup and labels ("The answer is") don't matter. Without choices
    it is the text between the tags.
    """
    content, why = _content(text)
    if why or not choices:
        return Extracted(None if why else content, None, why)
    index = chosen(content, tuple(choices))
    if index < 0:
        return Extracted(None, None, "not a choice" if index == NONE else "ambiguous")
    return Extracted(choices[index], LETTERS[index], "")


def read(text: str, example: Example) -> Extracted:
    """`extract`; and an answer to a question for a number must be one, or a choice that the question lists
    ("not a number")."""
    found = extract(text, example.choices)
    if found.answer is None or gold_number(example) is None or parse_normal(normal(found.answer)):
        return found
    listed = listed_choices(example.asked)
    return found if listed and chosen(found.answer, listed) >= 0 else Extracted(None, None, "not a number")


def is_right(text: str, example: Example) -> bool:
    """Whether the answer read from `text` is the example's.

    A choice by letter, text or value. A free answer by value (`numbers.same`) if `extra["kind"]` is "number",
    else as text or list, without case and spacing; and as a choice, if the question lists some.
    """
    answer = extract(text, example.choices).answer
    if answer is None or example.choices:
        return answer == example.answer
    return _is_right(answer, example.answer, example.extra.get("kind") == "number", example.asked)


@lru_cache(maxsize=4096)
def _is_right(answer: str, gold: str, number: bool, question: str) -> bool:
    said, wanted = normal(answer), normal(gold)
    if number and (value := parse_normal(wanted)):
        answered = parse_normal(said)
        if answered and same(answered, value):
            return True
        # 300 K and 300K
        if (not answered or value.named or answered.named) and plain(said) == plain(wanted):
            return True
    elif _same_text(said, wanted):
        return True
    listed = listed_choices(question)
    if listed and (index := chosen(gold, listed)) >= 0:
        return chosen(answer, listed) == index
    # the label of choices that are not known
    label = _LABELLED.fullmatch(said) if len(wanted) == 1 and wanted in LETTERS else None
    if not label or label["last"] or (label["bare"] and label["sep"] is None):
        return False
    letter = label["boxed"] or label["bare"]
    # "a. cat" may be running text
    same_letter = letter == wanted if label["own"] else letter.upper() == wanted
    return same_letter and not _HEDGE.search(label["own"])


def gold_number(example: Example) -> Number | None:
    """The right answer as a number. None: it is compared as text."""
    asks = not example.choices and example.extra.get("kind") == "number"
    return parse_normal(normal(example.answer)) if asks else None


def is_right_paper(text: str, example: Example) -> bool:
    """VisualThinker-R1-Zero's accuracy without its computer algebra (docs/04): the first <answer>…</answer>
    on one line, else the whole text, equals the answer, or the last A-H between spaces or brackets does."""
    said = answer_paper(text, margins=False)
    if said == example.answer.strip():
        return True
    letters = _LETTER_PAPER.findall(said)
    return bool(letters) and letters[-1] == example.answer.strip()


def well_formed(text: str) -> bool:
    """`<think>…</think> <answer>…</answer>`: each tag once, in this order, and only white space outside."""
    return all(text.count(tag) == 1 for tag in TAGS) and well_formed_paper(text.strip())


def well_formed_paper(text: str) -> bool:
    """VisualThinker-R1-Zero's `<think>.*?</think>\\s*<answer>.*?</answer>` over the whole text, where tags
    may repeat; without the regular expression's backtracking, which is quadratic."""
    return text.startswith(THINK) and text.endswith(END_ANSWER) and bool(_BRIDGE.search(text))


def answer_paper(text: str, margins: bool) -> str:
    """VisualThinker-R1-Zero's first answer on one line, or all but the <think> that its prompt opens.

    margins: as in its evaluation, `<answer>\\s*(.*?)\\s*</answer>`, where an empty tag counts as none; else
    as in its training, `<answer>(.*?)</answer>`. Without the expressions, which are quadratic in opened tags.
    """
    for part in text.split(END_ANSWER)[:-1]:
        part = part.rstrip() if margins else part
        before, _, line = part.rpartition("\n")
        if margins and before.rstrip().endswith(ANSWER):
            return line.strip()
        _, tag, inside = line.partition(ANSWER)
        if inside.strip() or (tag and not margins):
            return inside.strip()
        if tag:
            break
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
    if THINK in content or END_THINK in content:
        return "", "reasoning inside the answer"
    return content, ""


@lru_cache(maxsize=4096)
def chosen(content: str, choices: tuple[str, ...]) -> int:
    """The index of the one choice that `content` means, by letter or text, else by value; NONE or SEVERAL."""
    said = normal(content)
    label = _LABELLED.fullmatch(said)
    lettered = set()
    if label:
        index = LETTERS.index((label["boxed"] or label["bare"] or label["last"]).upper())
        own = bare(label["own"] if label["last"] is None else label["text"])
        if index < len(choices) and (not own or _means(own, choices[index])):
            lettered = {index}
    # two choices may differ in case only
    texts = {index for index, choice in enumerate(choices) if normal(choice) == said}
    texts = texts or {index for index, choice in enumerate(choices) if plain(normal(choice)) == plain(said)}
    # "A car" is the text "a car", if there is one
    found = texts if texts and label and label["bare"] and label["sep"] is None else lettered | texts
    if len(found) > 1 and lettered and _BRACKETED.search(content) and content.strip() not in choices:
        found = lettered
    if not found:
        found = {index for index, choice in enumerate(choices) if _means(said, choice)}
    # of equal choices the first
    found = {choices.index(choices[index]) for index in found}
    return found.pop() if len(found) == 1 else SEVERAL if found else NONE


def _means(said: str, choice: str) -> bool:
    """Whether a text in normal form is a choice's, or has its value."""
    return _same_text(said, normal(choice)) or _same_value(said, normal(choice))


@lru_cache(maxsize=1024)
def listed_choices(question: str) -> tuple[str, ...]:
    """The choices that a question's own text lists: "(A) 36° (B) 54°", "A:36°B:54°", one a line. () if none.

    Of several lists the longest, or the last of these; a choice ends with its line.
    """
    question = question.replace("**", "")
    found: list[list[re.Match[str]]] = [[]]
    for style in _LISTED:
        marks = list(style.finditer(question))
        for letters in (LETTERS, LETTERS.lower()):
            start = max((at for at, mark in enumerate(marks) if mark[1] == letters[0]), default=len(marks))
            pairs = takewhile(lambda pair: pair[0] == pair[1][1], zip(letters, marks[start:]))
            found.append([mark for _, mark in pairs])
    run = max(found, key=lambda run: (len(run), run[0].start() if run else 0))
    ends = [mark.start() for mark in run[1:]] + [len(question)]
    texts = [question[mark.end() : end].strip().partition("\n")[0] for mark, end in zip(run, ends)]
    texts = [
        re.sub("(?<=[ ,;，；、])(?:or|and|或)$", "", text.rstrip(_BETWEEN)).strip(_BETWEEN) for text in texts
    ]
    return tuple(texts) if len(texts) > 1 and all(texts) else ()


def _same_text(a: str, b: str) -> bool:
    """Two texts in normal form: without case and spacing; tuples, intervals, lists, ratios and inequalities
    part by part, numbers in them by value; sets in any order; numbers with a unit each by value. A name that
    one of them lacks does not count: y = 2x, P(3, 4)."""
    if plain(a) == plain(b):
        return True
    value, other = parse_normal(a), parse_normal(b)
    if value and other and value.unit and other.unit:
        return same(value, other)
    (name, form, parts), (other_name, other_form, others) = _parts(a), _parts(b)
    if form != other_form or len(parts) != len(others) or (name and other_name and name != other_name):
        return False
    if len(parts) == 1:
        return plain(parts[0]) == plain(others[0])
    if form == "{}":
        parts, others = sorted(parts, key=_in_order), sorted(others, key=_in_order)
    return all(
        _same_value(x, y) or plain(x).lstrip("+") == plain(y).lstrip("+") for x, y in zip(parts, others)
    )


def _same_value(a: str, b: str) -> bool:
    value, other = parse_normal(a), parse_normal(b)
    return bool(value and other and same(value, other))


def _in_order(part: str) -> tuple[float, str]:
    value = parse_normal(part)
    return (float(value.value), "") if value else (math.inf, plain(part))


@lru_cache(maxsize=4096)
def _parts(text: str) -> tuple[str, str, list[str]]:
    """Its name, its brackets or signs, its parts: P(3, 4) -> P, "()", 3 and 4; 2 < x -> "", ">", x and 2."""
    found = _NAMED.match(text)
    name = (found["point"] or found["name"] or "") if found else ""
    text = text[found.end() :] if found else text
    form = text[:1] + text[-1:]
    if re.fullmatch(r"[(\[][)\]]|\{\}", form):
        return name, form, [normal(part) for part in split_list(text[1:-1], brackets=True)]
    if signs := "".join(re.findall("[<>≤≥:]", text)):
        parts = [normal(part) for part in re.split("[<>≤≥:]", text)]
        if not set(signs) <= set("<≤"):
            return name, signs, parts
        return name, signs[::-1].translate(_TURNED), parts[::-1]
    return name, "", [normal(part) for part in split_list(text, brackets=False)]


@lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """A text in normal form without case, and without spaces beside punctuation and operators or in 5 cm.
    Of simple fractions and products one spelling: x/2, 2x."""
    text = text.casefold().replace("×", "*")
    if "\\frac" in text:
        text = re.sub(r"(?<!\^)\\frac\{(\w+)\}\{(\w+)\}(?! ?[\w\\({])", r"\1/\2", text)
    text = re.sub(r" ?([^\w\s]) ?|(?<=[0-9]) (?=[^\W\d])", r"\1", text).strip()
    return re.sub(r"(?<=[0-9])\*(?=[^\W0-9_]|[(\\])", "", text) if "*" in text else text
