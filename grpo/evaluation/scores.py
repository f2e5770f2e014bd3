"""One record of a completion, and the function that counts records: the same for training and evaluation.

How an answer is read is up to the protocol (`grpo/evaluation/protocols.py`; the default is the reward's
parser). An answer that cannot be read is counted apart from a wrong one: the same model scores 49.8 or 73.0
on CV-Bench, depending on how it is asked, so an accuracy without its extraction failures says little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from data.answers.parser import well_formed
from data.types import Example, Measure, measure_nothing, short
from grpo.evaluation.protocols import Reading, strict
from grpo.evaluation.reflection import ends_in_loop, reflection_scores, repetition, said
from grpo.evaluation.statistics import maj_at_k, paired_difference, pass_at_k, wilson
from grpo.evaluation.totals import Mark, shares_by, totals


@dataclass(frozen=True)
class Completion:
    """One completion and what was read in it.

    answer, letter: None where no answer could be read; then `why` has the reason. picture: file names, or the
    uid and the picture's number. source: where a benchmark has the picture from. tokens: with the stop token.
    stopped: False where the cap cut it off. measured: by the task's hook. said: keywords of reflection.
    repeated: share of repeated 4-grams. groups: parts of the benchmark that it counts in, by their kind.
    reward, parts: in training only.
    """

    uid: str
    task: str
    picture: str | None
    question: str
    choices: tuple[str, ...]
    gold: str
    text: str
    tokens: tuple[int, ...]
    stopped: bool
    answer: str | None
    letter: str | None
    why: str
    correct: bool
    well_formed: bool
    source: str | None
    measured: Mapping[str, bool | None]
    said: frozenset[str]
    repeated: float
    loops: bool
    groups: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    reward: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens, the stop token included."""
        return len(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `evaluate.py --json` writes them: `text` is called completion there."""
        names = "uid task picture question choices gold length stopped answer letter why correct".split()
        found = {name: getattr(self, name) for name in [*names, "well_formed", "source"]}
        found |= {"groups": dict(self.groups)} if self.groups else {}
        return found | {"completion": self.text, "measured": dict(self.measured)}


class Answers(list[list[Completion]]):
    """A list of completions for each question, in order. `skipped`: why each other one was not asked."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[str] = []


def read_completion(
    example: Example,
    text: str,
    tokens: Sequence[int],
    stopped: bool,
    read: Callable[[str, Example], Reading] = strict,
    measure: Measure = measure_nothing,
) -> Completion:
    """The record of one completion of an example. read: finds the answer. measure: of the task's hook."""
    found = read(text, example)
    pictures = [
        picture.name if isinstance(picture, Path) else f"{example.uid}#{number}"
        for number, picture in enumerate(example.pictures, 1)
    ]
    # the stop token ends a loop and does not break it
    written = tokens[:-1] if stopped else tokens
    return Completion(
        uid=example.uid,
        task=example.task,
        picture=", ".join(pictures) or None,
        question=example.question,
        choices=example.choices,
        gold=example.answer,
        text=text,
        tokens=tuple(tokens),
        stopped=stopped,
        **found._asdict(),
        well_formed=well_formed(text),
        source=example.extra.get("source"),
        measured=measure(text, example),
        said=said(text),
        repeated=repetition(written),
        loops=ends_in_loop(written),
        groups=example.extra.get("groups", {}),
    )


def total(groups: Sequence[Sequence[Completion]]) -> dict[str, Any]:
    """Count the completions of some questions, one list a question.

    accuracy, format, extraction_failure, truncated, repetition and loop_ratio are means over all
    completions; mean_length is in tokens. "aha": `reflection_scores`. "measured": {name: share of the
    completions for which the task's measurement is True, among those that it applies to; 0 where it applies
    to none}.
    """
    rows = [row for group in groups for row in group]
    measured = {}
    for name in dict.fromkeys(name for row in rows for name in row.measured):
        applies = [row.measured[name] for row in rows if row.measured.get(name) is not None]
        measured[name] = fmean(map(bool, applies)) if applies else 0.0
    return {
        "accuracy": fmean(row.correct for row in rows),
        "format": fmean(row.well_formed for row in rows),
        "extraction_failure": fmean(row.answer is None for row in rows),
        "mean_length": fmean(row.length for row in rows),
        "truncated": fmean(not row.stopped for row in rows),
        "repetition": fmean(row.repeated for row in rows),
        "loop_ratio": fmean(row.loops for row in rows),
        "aha": reflection_scores([[(row.said, row.correct) for row in group] for group in groups]),
        "measured": measured,
    }


def scores(answers: Sequence[Sequence[Completion]], how: str = "micro") -> dict[str, Any]:
    """The scores of some questions, one list of completions a question; and, under "tasks", of each task.

    What `total` counts; and questions, skipped, completions (a question), the accuracy's 95 % "interval",
    chance (1 / choices), and "failures" (the reasons of unread answers, counted). "totals" has the total in
    each way that these questions allow (`totals.TOTALS`), "total" the one named `how`. With several
    completions a question: "pass@k" and "maj@k" for k = 1, 2, 4, …, as {k: {"value", "interval"}}. Raises
    ValueError without answers, or without those that the total needs.
    """
    skipped = answers.skipped if isinstance(answers, Answers) else []
    if not answers:
        raise ValueError(f"no question could be asked: {skipped[0] if skipped else 'there are none'}")
    found = _block(answers) | {"skipped": len(skipped)}
    tasks = dict.fromkeys(group[0].task for group in answers if group[0].task)
    found["tasks"] = {task: _block([group for group in answers if group[0].task == task]) for task in tasks}
    marks = [
        Mark(group[0].task, group[0].source, fmean(row.correct for row in group), group[0].groups)
        for group in answers
    ]
    found["totals"] = totals(marks, how)
    found["total"] = {"name": how} | found["totals"][how]
    if by := shares_by(marks):
        found["by"] = by
    return found


def _block(groups: Sequence[Sequence[Completion]]) -> dict[str, Any]:
    """The scores of some questions. Completions of one question are not independent. So the question is the
    unit of every interval: its own accuracy counts as a fraction of a success."""
    right = [fmean(row.correct for row in group) for group in groups]
    found = total(groups) | {
        "questions": len(groups),
        "completions": len(groups[0]),
        "interval": _mean(right)["interval"],
        "chance": fmean(1 / len(group[0].choices) if group[0].choices else 0.0 for group in groups),
        "failures": dict(Counter(row.why for group in groups for row in group if row.why).most_common()),
    }
    if (n := len(groups[0])) > 1:
        sizes = [k for k in (1 << i for i in range(n.bit_length())) if k < n] + [n]
        found["pass@k"] = {
            k: _mean([pass_at_k(n, sum(row.correct for row in group), k) for group in groups]) for k in sizes
        }
        found["maj@k"] = {k: _mean([_majority(group, k) for group in groups]) for k in sizes}
    return found


def _majority(group: Sequence[Completion], k: int) -> float:
    """maj@k of one question. All right answers vote together: their spellings may differ."""
    return maj_at_k([True if row.correct else row.answer for row in group], True, k)


def _mean(values: list[float]) -> dict[str, Any]:
    # min: a sum of rounded fractions may pass n by a rounding
    return {"value": fmean(values), "interval": list(wilson(min(sum(values), len(values)), len(values)))}


def differences(
    first: Sequence[Sequence[Completion]], second: Sequence[Sequence[Completion]]
) -> dict[str, dict[str, Any]]:
    """First minus second over the questions that both have: {task, and "all": both accuracies and `Paired`}.
    Raises ValueError where they have none in common, or two have one uid."""
    other = {group[0].uid: group[0] for group in second}
    for answers in (first, second):
        if len({group[0].uid for group in answers}) < len(answers):
            uid, count = Counter(group[0].uid for group in answers).most_common(1)[0]
            raise ValueError(
                f"the uid {short(uid)} is that of {count} questions, so answers cannot be paired"
            )
    pairs = [(group[0], other[group[0].uid]) for group in first if group[0].uid in other]
    if not pairs:
        raise ValueError("no question could be asked of both; see what was skipped")
    found = {}
    for task in [*dict.fromkeys(a.task for a, _ in pairs if a.task), "all"]:
        a, b = zip(*((a.correct, b.correct) for a, b in pairs if task in ("all", a.task)))
        found[task] = {"first": sum(a) / len(a), "second": sum(b) / len(b)} | asdict(paired_difference(a, b))
    return found


def flat_scores(found: Mapping[str, Any]) -> dict[str, float]:
    """The scores as one flat dict of numbers, as metrics.jsonl has them: accuracy, accuracy/<task>, …"""
    names = "accuracy format mean_length extraction_failure truncated repetition loop_ratio skipped".split()
    words = {f"aha/{name}": value for name, value in found["aha"].items() if "word/" not in name}
    tasks = {f"accuracy/{task}": block["accuracy"] for task, block in found["tasks"].items()}
    asked = {"questions": found["questions"]}
    asked |= {f"questions/{task}": block["questions"] for task, block in found["tasks"].items()}
    return {name: found[name] for name in names} | found["measured"] | words | tasks | asked
