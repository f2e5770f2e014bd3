"""What a source gives (`Example`) and what a model takes (`Prompt`).

Everything that can be wrong with one example is a `BadExample` that names it, so that a run may skip it,
count it and say which it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# The bytes of a picture file, its path, or a function that draws it when it is needed.
Picture = bytes | Path | Callable[[], Image.Image]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class BadExample(ValueError):
    """One example cannot be used; the message names its uid and the reason."""


class BadPicture(BadExample):
    """A picture cannot be used: corrupt, empty, too large, too narrow, or of a kind that would lose its
    values."""


class BadRow(BadExample):
    """One row of a file is no example. `where` is its file and number, `field` what is wrong with it,
    `remedy` what to do ("" if nothing)."""

    def __init__(self, where: str, field: str, reason: str, remedy: str = "") -> None:
        super().__init__(f"{where}: {f'{field}: ' if field else ''}{reason}{f'; {remedy}' if remedy else ''}")
        self.where, self.field, self.reason, self.remedy = where, field, reason, remedy


class BadSource(ValueError):
    """A source is unknown, or its file is missing, unreadable or not of its layout; the message names file
    and column."""


class PromptTooLong(BadExample):
    """A prompt has more tokens than the limit. Prompts are never cut: a cut would separate pictures from
    their placeholders."""


@dataclass(frozen=True)
class Example:
    """One question about zero or more pictures.

    `answer` is the text of the right choice, or free text where `choices` is empty. `extra` is for the
    source's own facts (a scene's geometry, a dataset's row) and is never shown to a model. `wording` is for
    sources that word question and choices in their own way. Raises BadExample.
    """

    uid: str
    question: str
    choices: tuple[str, ...]
    answer: str
    task: str = ""
    pictures: tuple[Picture, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    wording: str = ""

    def __post_init__(self) -> None:
        def bad(reason: str) -> BadExample:
            return BadExample(f"example {self.uid!r}: {reason}")

        if not self.uid:
            raise BadExample(f"an example has no uid: {self.question!r}")
        if not self.question.strip():
            raise bad("the question is empty")
        if isinstance(self.choices, str) or isinstance(self.pictures, (str, bytes)):
            raise bad("choices and pictures are tuples, got a single one")
        if len(self.choices) == 1 or len(self.choices) > len(LETTERS):
            raise bad(f"{len(self.choices)} choices; give 2 to {len(LETTERS)}, or none for a free answer")
        if len(set(self.choices)) < len(self.choices):
            raise bad(f"two choices are the same: {list(self.choices)}")
        if not all(choice.strip() for choice in self.choices):
            raise bad(f"a choice is empty: {list(self.choices)}")
        if self.choices and self.answer not in self.choices:
            raise bad(f"the answer {self.answer!r} is not among the choices {list(self.choices)}")
        if not self.answer.strip():
            raise bad("the answer is empty")

    @property
    def letter(self) -> str | None:
        """The letter of the right choice, "A" for the first; None for a free answer."""
        return LETTERS[self.choices.index(self.answer)] if self.choices else None

    @property
    def asked(self) -> str:
        """What the model is asked: the question and, below it, its choices as CV-Bench and BLINK word
        them; or the source's own wording."""
        if self.wording or not self.choices:
            return self.wording or self.question
        return f"{self.question}\n{listed(self.choices)}"


def listed(choices: tuple[str, ...]) -> str:
    """`Select from the following choices.` and one line `(A) …` a choice."""
    lines = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices)]
    return "\n".join(["Select from the following choices.", *lines])


def measure_nothing(text: str, example: Example) -> dict[str, bool | None]:
    """The measurements of a task that has none of its own."""
    return {}


@dataclass(frozen=True)
class TaskHook:
    """What a task adds to metrics, evaluation and report. `data/sources/table.py` lists the hooks by task.

    measure: (a completion's text, its example) -> {name: True, False, or None where it does not apply}. Each
    name becomes a metric: the share of True. columns: {name: heading} of the measurements shown in tables.
    charts: (title, note, {name: label}) for the report. sets: {split: label} of further sets of questions,
    evaluated before and after training.
    """

    measure: Callable[[str, Example], Mapping[str, bool | None]] = measure_nothing
    columns: Mapping[str, str] = field(default_factory=dict)
    charts: tuple[tuple[str, str, Mapping[str, str]], ...] = ()
    sets: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Prompt:
    """One example as a model reads it: S tokens, and the N patches of its I pictures.

    `text` is the prompt with one placeholder a picture, for people; `tokens` is the truth.
    """

    uid: str
    text: str
    # (S,) int64, a picture's placeholder repeated once per merged patch
    tokens: np.ndarray
    # (N, 3 * temporal * patch * patch) float32
    patches: np.ndarray
    # (I, 3) int64: patches along time, height and width of each picture
    grid: np.ndarray
