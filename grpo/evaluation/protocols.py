"""How a benchmark is asked and scored: one named object for each protocol, all of them in this file.

`strict` is ours and the default: the reward's own parser, and every question alike in the total. The others
repeat published evaluations, so that their numbers can be compared with ours: `paper`
(VisualThinker-R1-Zero, arXiv 2503.05132, its src/eval), `cambrian` and `blink` (the official scores of
CV-Bench and BLINK), `mathvista` (MathVista's official comparison, with a rule where it asks GPT-4 to find
the answer), `official` (the comparisons of further benchmarks). `chat` reads models that talk and write no
tags. `vision_r1` repeats Vision-R1's own evaluation, which samples and asks again. A protocol has the
templates that ask, the reader of a completion, the total and the cap.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from math import floor
from typing import Any

from data.answers.parser import ANSWER, END_ANSWER, answer_paper, extract
from data.templates import TEMPLATES, TURN_START
from data.types import LETTERS, Example
from grpo.evaluation import comparisons
from grpo.evaluation import vision_r1 as published
from grpo.evaluation.chat_answers import find_answer
from grpo.evaluation.comparisons import Comparison, Reading, parsed, tagged
from grpo.rewards.math_verify import NOTHING, RIGHT, spellings
from grpo.rewards.user_code import RewardError, open_reward
from grpo.sampling import Truncation

# characters of a completion that `paper` reads; a longer one is unread
LONGEST = 20_000
# VisualThinker-R1-Zero's max_new_tokens in evaluation, and BLINK's
CAP = 1024
# runs in a process of its own
VERDICT = "grpo.rewards.math_verify:verdict"

# VisualThinker's evaluation to the letter: templates of both kinds of models, with and without reasoning
PAIRS = {
    "base": {"reasoning": "visualthinker", "direct": "visualthinker_direct"},
    "instruct": {"reasoning": "chatml_eval", "direct": "chatml_direct"},
}
# the question alone, with the model's own system prompt
PLAIN = {
    "base": dict.fromkeys(("reasoning", "direct"), "visualthinker_direct"),
    "instruct": dict.fromkeys(("reasoning", "direct"), "chatml_direct"),
}


class Reader(typing.Protocol):
    """A function that reads the answer in a completion. direct: the prompt asked for the answer alone."""

    __name__: str

    def __call__(self, text: str, example: Example, direct: bool = False) -> Reading: ...


# ---- reading an answer


def strict(text: str, example: Example, direct: bool = False) -> Reading:
    """The reward's own parser. A direct prompt asks for no tags, so there the first line that is not empty
    is the answer, and all of it."""
    return parsed(_with_tags(text) if direct else text, example)


def paper(text: str, example: Example, direct: bool = False) -> Reading:
    """VisualThinker's: in the first tag on one line, else in the whole completion, the last letter, choice
    or number that math-verify finds.

    Right if it is one of the gold answer's spellings: its text, its letter, its letter in brackets. So "A or
    B" is right where A is, and the article of "it is a cat" is read as (A). Without the extra math-verify
    its rule for letters and choices stands in for it, and formulas are not read.
    """
    if len(text) > LONGEST:
        return Reading(None, None, "answer too long", False)
    short = answer_paper(text, margins=True)
    strings, gold = spellings(example)
    answer = _last_string(short, strings)
    right = answer is not None and bool({answer, answer.lower()} & set(gold))
    if math_verify():
        verdict = _verified(short, example)
        answer = (answer or short[:200]) if verdict != NOTHING else None
        right = verdict == RIGHT
    if answer is None:
        return Reading(None, None, "nothing parsed", False)
    letter = _letter(answer, example.choices)
    return Reading(example.choices[LETTERS.index(letter)] if letter else answer, letter, "", right)


def chat(text: str, example: Example, direct: bool = False) -> Reading:
    """The answer that a model states in its own words (`grpo/evaluation/chat_answers.py`)."""
    said, why = find_answer(text, example)
    if why:
        return Reading(None, None, why, False)
    return strict(tagged(said), example)


def mathvista(text: str, example: Example, direct: bool = False) -> Reading:
    """The answer as `strict` finds it, compared as MathVista's evaluation does: a letter in brackets, else
    what `strict` reads, else the nearest choice; whole numbers; decimals, rounded as the question asks."""
    return _by(comparisons.mathvista, text, example, direct)


def official(text: str, example: Example, direct: bool = False) -> Reading:
    """The answer as `strict` finds it, compared by the rule of the benchmark that the question is from."""
    return _by(comparisons.compared, text, example, direct)


def _by(compare: Comparison, text: str, example: Example, direct: bool) -> Reading:
    found = extract(_with_tags(text) if direct else text, ())
    if found.answer is None:
        return Reading(None, None, found.why, False)
    return compare(found.answer, example)


def _with_tags(text: str) -> str:
    """A direct answer, in the tags that were not asked for. A completion that has tags stays as it is."""
    if ANSWER in text or END_ANSWER in text:
        return text
    return ANSWER + text.strip().partition("\n")[0] + END_ANSWER


def _letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of what `paper` read: "(a)", "A", or a choice."""
    plain = answer.strip("()").upper()
    lower = [choice.lower() for choice in choices]
    if answer.lower() in lower:
        return LETTERS[lower.index(answer.lower())]
    return plain if len(plain) == 1 and plain in LETTERS[: len(choices)] else None


def _verified(short: str, example: Example) -> float:
    """The verdict of math-verify: NOTHING, WRONG or RIGHT. A call that takes too long is ended: NOTHING."""
    reward = open_reward(VERDICT)
    try:
        return reward(short, example, None)
    except RewardError:
        return NOTHING


def _last_string(short: str, strings: tuple[str, ...]) -> str | None:
    """The same without math-verify: the last of `strings`, as a word, by the first pattern that finds one."""
    for pattern in _patterns(strings):
        matches = pattern.finditer(short)
        if found := max(matches, key=lambda match: (match.end(), -match.start()), default=None):
            return found["said"]
    return None


@lru_cache(maxsize=64)
def _patterns(strings: tuple[str, ...]) -> list[re.Pattern[str]]:
    said = "(?P<said>" + "|".join(map(re.escape, strings)) + ")"
    word = rf"(?:\*\*)?{said}(?:\*\*)?(?:[.,:\s]|$)"
    patterns = (
        rf"(?i:final answer is):?\s*{said}\.?\s?I hope",
        rf"(?i:final answer.{{0,100}}?)\s+is:?\s*{said}",
        rf"(?i:answer):.{{0,50}}?(?:^|\s){word}",
        rf"(?i:answer).{{0,50}}?(?:^|\s){word}",
        f"^{word}",
        rf"(?:^|\s){word}",
    )
    return [re.compile(pattern) for pattern in patterns]


@lru_cache(maxsize=1)
def math_verify() -> str | None:
    """The version of the extra math-verify, None where it is not installed."""
    try:
        return version("math-verify")
    except PackageNotFoundError:
        return None


# ---- printing a total


def rounded(share: float) -> str:
    """0.59476 -> 59.5"""
    return f"{100 * share:.1f}"


def truncated(share: float) -> str:
    """0.59476 -> 59.47: cut after two decimals, as VisualThinker prints its tables. The small number added
    is for 0.29, which is a little less than 29 % in floating point."""
    return f"{floor(10_000 * share + 1e-6) / 100:.2f}"


# ---- the protocols


@dataclass(frozen=True)
class Sampling:
    """Published evaluations that sample. tries: in all, while no answer tag is closed."""

    temperature: float
    top_p: float
    tries: int

    def changes(self) -> dict[str, Any]:
        """The changed fields of `Asking`."""
        return {"temperature": self.temperature, "truncation": Truncation(None, self.top_p)}


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is asked and scored.

    total: a name in `totals.TOTALS`.  cap: longest completion, tokens.  templates: {"base" | "instruct":
    {"reasoning" | "direct": a template}}.  max_pixels: larger pictures are scaled down (None: as the model's
    processor says). as_trained: a checkpoint of a run is asked with the run's template, cap and limits
    instead of these.  form: of the template, where neither a run nor the command line chooses one.  shown:
    prints an accuracy.  prepare: makes the question that is asked.  sampling: None is greedy.
    extracted, rule: the parts of `read`, for a judge: what is taken out of a completion, and how it compares.
    """

    name: str
    about: str
    read: Reader = strict
    total: str = "micro"
    cap: int = CAP
    templates: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: PAIRS)
    max_pixels: int | None = None
    as_trained: bool = False
    form: str = "reasoning"
    shown: Callable[[float], str] = rounded
    prepare: Callable[[Example], Example] | None = None
    sampling: Sampling | None = None
    extracted: Callable[[str], str] = str
    rule: Comparison | None = None

    def compare(self, said: str, example: Example) -> Reading:
        """The reading of an answer that was found in a completion."""
        return self.rule(said, example) if self.rule else self.read(tagged(said), example)

    def checker(self) -> str:
        """What compares the answers, for the record."""
        if self.read is not paper:
            return f"our rule ({self.read.__name__})"
        if math_verify():
            return f"math-verify {math_verify()}"
        return "our rule for letters and choices (math-verify is not installed)"


ABOUT = {
    "strict": "the reward's parser, every question alike; a run's checkpoint is asked as the run was",
    "paper": "VisualThinker-R1-Zero's extraction and right answers, every question alike, percentages cut",
    "cambrian": "strict reading; CV-Bench's official total, the mean of 2D (of its two sources) and 3D",
    "blink": "strict reading; BLINK's official total, the mean of its subtasks",
    "mathvista": "strict reading; MathVista's comparison: nearest choice, whole numbers, rounded decimals",
    "official": "strict reading; the comparison of the benchmark's owners (ChartQA: within 5 %, and so on)",
    "vision_r1": "Vision-R1's published evaluation: its question, 512-pixel JPEG, sampled, up to five tries",
    "chat": "for models that talk: the letter or choice that they state, every question alike; asked direct",
}
PROTOCOLS: dict[str, Protocol] = {
    "strict": Protocol("strict", ABOUT["strict"], as_trained=True),
    "paper": Protocol("paper", ABOUT["paper"], read=paper, shown=truncated),
    "cambrian": Protocol("cambrian", ABOUT["cambrian"], total="source_averaged"),
    "blink": Protocol("blink", ABOUT["blink"], total="task_averaged"),
    "mathvista": Protocol("mathvista", ABOUT["mathvista"], read=mathvista),
    "official": Protocol("official", ABOUT["official"], read=official),
    "vision_r1": Protocol(
        "vision_r1",
        ABOUT["vision_r1"],
        read=published.vision_r1,
        cap=16_000,
        templates=PLAIN,
        form="direct",
        prepare=published.prepared,
        sampling=Sampling(temperature=0.6, top_p=0.95, tries=5),
        extracted=published.extracted,
        rule=published.by_rule,
    ),
    "chat": Protocol("chat", ABOUT["chat"], read=chat, form="direct"),
}


def family(template: str) -> str | None:
    """The kind of model that a template asks: "instruct" if it writes turns, else "base"; None for the
    built-in world's template and for those that are not built in, which have no direct form."""
    if template == "shapes" or template not in TEMPLATES:
        return None
    return "instruct" if TURN_START in TEMPLATES[template].text else "base"
