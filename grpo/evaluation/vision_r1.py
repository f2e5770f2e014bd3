"""Vision-R1's published evaluation, step by step (arXiv 2503.06749; its repository, evaluation/).

It asks VLMEvalKit's question about a picture of at most 512 x 512 pixels, saved as JPEG. It samples, and
samples again while no answer tag is closed. It takes what stands between its tags, and compares by
VLMEvalKit's rules; a judge, if there is one, reads what they do not find right. The rules are those of May
2025.
"""

from __future__ import annotations

import io
import re
from dataclasses import replace
from functools import partial

from PIL import Image

from data.answers.parser import END_ANSWER
from data.images import open_picture
from data.types import LETTERS, Example, Picture
from grpo.evaluation.comparisons import Comparison, Reading, chartqa, chosen_at, mm_math, plain, yes_or_no

# its wrapper of servers shrinks each picture to fit into a square of this side
SIDE = 512
# to the letter, spaces too
_EXTRACTED = re.compile(r"<answer> Final Answer:(.*?) </answer>", re.DOTALL)
# these become spaces before letters are looked for
_SEPARATORS = str.maketrans(".()[],:;!*#{}", " " * 13)
# a reply with one of these is no answer, and is wrong
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


# ---- the question


def prepared(example: Example) -> Example:
    """The question as VLMEvalKit words it (`extra["query"]`), with the shrunk pictures."""
    pictures: tuple[Picture, ...] = tuple(
        partial(shrunk, picture, f"{example.uid}: picture {number}")
        for number, picture in enumerate(example.pictures, 1)
    )
    return replace(example, wording=example.extra.get("query") or example.wording, pictures=pictures)


def shrunk(picture: Picture, name: str) -> Image.Image:
    """A picture within SIDE x SIDE pixels, as it is after it was saved as JPEG. Raises BadPicture."""
    image = open_picture(picture, name=name).copy()
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


# ---- the tries


def closed(text: str) -> bool:
    """Whether an answer tag is closed: then it is not asked again."""
    return END_ANSWER in text


# ---- the answer


def extracted(text: str) -> str:
    """What stands between the tags, as the paper's own models write it; else the whole completion."""
    found = _EXTRACTED.search(text)
    return found[1] if found else text


def vision_r1(text: str, example: Example, direct: bool = False) -> Reading:
    """What is extracted, compared by VLMEvalKit's rules."""
    return by_rule(extracted(text.strip()), example)


def by_rule(said: str, example: Example) -> Reading:
    """VLMEvalKit's comparison for the benchmark that the question is from."""
    rule = RULES.get(example.extra.get("benchmark", ""), lettered if example.choices else plain)
    return rule(said, example)


def lettered(said: str, example: Example) -> Reading:
    """The one letter that stands alone, else the one choice that the text contains. A long text contains
    none: one of more than twice the length of all choices."""
    if any(refusal in said for refusal in _REFUSALS):
        return Reading(None, None, "refused", False)
    words = said.translate(_SEPARATORS).split()
    letters = LETTERS[: len(example.choices)]
    standing = [letter for letter in letters if letter in words]
    if len(standing) == 1:
        return chosen_at(letters.index(standing[0]), example)
    if not standing and "Z" in words:
        return Reading(None, None, "refused", False)
    if len(said) <= 2 * sum(map(len, example.choices)):
        lower = said.lower()
        named = [place for place, choice in enumerate(example.choices) if choice.lower() in lower]
        if len(named) == 1:
            return chosen_at(named[0], example)
    return Reading(None, None, "ambiguous" if len(standing) > 1 else "not a choice", False)


def mathvista(said: str, example: Example) -> Reading:
    """Choices as `lettered`; numbers as Python reads the whole text, without rounding. A list is never right:
    the script compares the word None with it."""
    if example.choices:
        return lettered(said, example)
    kind = example.extra.get("answer_type")
    if kind not in ("integer", "float"):
        return Reading(said.strip() or None, None, "" if said.strip() else "empty answer", False)
    read: type[int] | type[float] = int if kind == "integer" else float
    try:
        return Reading(said.strip(), None, "", read(said) == read(example.answer))
    except ValueError:
        return Reading(None, None, "not a number", False)


def mathverse(said: str, example: Example) -> Reading:
    """The same text as the answer: its letter, where it has one. All else is for the judge."""
    gold = example.letter or example.answer
    right = said.strip() == gold.strip()
    return Reading(
        said.strip() or None, example.letter if right else None, "" if said.strip() else "empty answer", right
    )


def dynamath(said: str, example: Example) -> Reading:
    """The one letter of A to E that the text has; a number at its front, within 0.001; a text that is a part
    of the right one."""
    if example.choices:
        upper = said.strip().upper()
        found = [letter for letter in "ABCDE" if letter in upper]
        if len(found) != 1 or LETTERS.index(found[0]) >= len(example.choices):
            return Reading(None, None, "ambiguous" if found else "not a choice", False)
        return chosen_at(LETTERS.index(found[0]), example)
    said = said.strip()
    if example.extra.get("answer_type") == "float":
        try:
            value = float(said.split(" ")[0])
            right = abs(value - float(example.answer)) <= 1e-3
        except ValueError:
            return Reading(None, None, "not a number", False)
        return Reading(said, None, "", right)
    return Reading(
        said or None,
        None,
        "" if said else "empty answer",
        bool(said) and said.lower() in example.answer.lower(),
    )


RULES: dict[str, Comparison] = {
    "mathvista": mathvista,
    "mathverse": mathverse,
    "mm_math": mm_math,
    "dynamath": dynamath,
    "chartqa": chartqa,
    "mme": yes_or_no,
    "hallusion": yes_or_no,
}
