"""The totals of benchmarks, each as its owners define it, with 95 % intervals.

A total is made of marks, one a question. Some need groups of questions that belong together: variants of one
question, questions about one picture. `groups` of `Example.extra` says which do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import sqrt
from statistics import fmean
from typing import Any, NamedTuple

from grpo.evaluation.statistics import wilson

# CV-Bench: mean of 2D (mean of its two sources) and 3D
WEIGHTS = {"ADE20K": Fraction(1, 4), "COCO": Fraction(1, 4), "Omni3D": Fraction(1, 2)}
# MME's tasks of perception, ten of its fourteen; the others are of cognition
PERCEPTION = "OCR artwork celebrity color count existence landmark position posters scene".split()
# MME's points for a task in which all is right: 100 for the questions, 100 for the pictures
POINTS = 200


class Mark(NamedTuple):
    """A question in a total: its task, its picture's source, the share of its completions that are right, and
    the groups that it is in, by the group's kind."""

    task: str
    source: str | None
    right: float
    groups: Mapping[str, str | tuple[str, ...]] = {}


def micro(marks: Sequence[Mark]) -> dict[str, Any]:
    """Every question alike. Returns {"value", "interval"} (Wilson's)."""
    return _mean([mark.right for mark in marks])


def _mean(rights: Sequence[float]) -> dict[str, Any]:
    right = sum(rights)
    return {"value": right / len(rights), "interval": list(wilson(min(right, len(rights)), len(rights)))}


def source_averaged(marks: Sequence[Mark]) -> dict[str, Any]:
    """CV-Bench's official score: ((ADE20K + COCO) / 2 + Omni3D) / 2, of the accuracies by source. Raises
    ValueError where a source is missing."""
    found = {name: [mark for mark in marks if mark.source == name] for name in WEIGHTS}
    if missing := [name for name in WEIGHTS if not found[name]]:
        need = f"the source-averaged total needs questions of {', '.join(WEIGHTS)}"
        problem = f"there are none of {', '.join(missing)}"
        raise ValueError(f"{need}, and {problem}; it is for --task cvbench, all of it")
    return _weighted({name: (float(weight), micro(found[name])) for name, weight in WEIGHTS.items()})


def task_averaged(marks: Sequence[Mark]) -> dict[str, Any]:
    """BLINK's official score: the mean of the accuracies of its subtasks, of whatever size."""
    tasks = dict.fromkeys(mark.task for mark in marks)
    share = 1 / len(tasks)
    return _weighted({task: (share, micro([mark for mark in marks if mark.task == task])) for task in tasks})


def _weighted(parts: Mapping[str, tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """A weighted mean of totals, with its interval (MOVER: Zou and Donner, Stat. Med. 27:1693, 2008)."""
    value = sum(weight * part["value"] for weight, part in parts.values())
    low, high = (
        sqrt(sum((weight * (part["value"] - part["interval"][end])) ** 2 for weight, part in parts.values()))
        for end in (0, 1)
    )
    shares = {name: part["value"] for name, (_, part) in parts.items()}
    return {"value": value, "interval": [value - low, value + high], "parts": shares}


def grouped(marks: Sequence[Mark], kind: str) -> dict[str, list[Mark]]:
    """The marks of each group of a kind. A question may be in several groups of one kind."""
    found: dict[str, list[Mark]] = {}
    for mark in marks:
        names = mark.groups.get(kind, ())
        for name in [names] if isinstance(names, str) else names:
            found.setdefault(name, []).append(mark)
    return found


def all_right(marks: Sequence[Mark], kind: str) -> dict[str, Any]:
    """The share of groups in which every question is right; a group is the unit of the interval."""
    return _mean([min(mark.right for mark in group) for group in grouped(marks, kind).values()])


def worst_case(marks: Sequence[Mark]) -> dict[str, Any]:
    """DynaMath's: a question is right only if all its variants are."""
    return all_right(marks, "question")


def figures(marks: Sequence[Mark]) -> dict[str, Any]:
    """HallusionBench's fAcc: a figure is right only if all questions about it are."""
    return all_right(marks, "figure")


def hallusion(marks: Sequence[Mark]) -> dict[str, Any]:
    """The mean of HallusionBench's aAcc (questions), fAcc (figures) and qAcc (a question about all of its
    figures). The three come from the same answers; so the ends of the interval are the means of theirs."""
    parts = {"aAcc": micro(marks), "fAcc": figures(marks), "qAcc": worst_case(marks)}
    ends = [fmean(part["interval"][end] for part in parts.values()) for end in (0, 1)]
    shares = {name: part["value"] for name, part in parts.items()}
    return {"value": fmean(shares.values()), "interval": ends, "parts": shares}


def mme(marks: Sequence[Mark]) -> dict[str, Any]:
    """MME's score: of each task the share of right questions and the share of pictures with both right, 100
    points each; perception is the sum of ten tasks, cognition of four. "value" is the share of all points
    that these tasks give; "points" has the points."""
    tasks: dict[str, tuple[float, dict[str, Any]]] = {}
    names = dict.fromkeys(mark.task for mark in marks)
    for name in names:
        pictures = grouped([mark for mark in marks if mark.task == name], "picture").values()
        both = [
            (fmean(mark.right for mark in group) + min(mark.right for mark in group)) / 2
            for group in pictures
        ]
        tasks[name] = (1 / len(names), _mean(both))
    found = _weighted(tasks)
    points = {name: POINTS * share for name, share in found["parts"].items()}
    sums = {
        "perception": sum(value for name, value in points.items() if name in PERCEPTION),
        "cognition": sum(value for name, value in points.items() if name not in PERCEPTION),
    }
    return found | {"points": sums | points, "of": POINTS * len(names)}


TOTALS = {
    "micro": micro,
    "source_averaged": source_averaged,
    "task_averaged": task_averaged,
    "worst_case": worst_case,
    "hallusion": hallusion,
    "mme": mme,
}


def totals(marks: Sequence[Mark], how: str) -> dict[str, dict[str, Any]]:
    """The totals that these questions allow, by name, and the one named `how`. Raises ValueError if they do
    not allow that one."""
    kinds = {kind for mark in marks for kind in mark.groups}
    names = ["micro"]
    # questions of CV-Bench have both totals, whatever the protocol
    names += ["source_averaged"] if {mark.source for mark in marks} >= set(WEIGHTS) else []
    names += ["hallusion"] if "figure" in kinds else ["worst_case"] if "question" in kinds else []
    names += ["mme"] if "picture" in kinds else []
    return {name: TOTALS[name](marks) for name in dict.fromkeys([*names, how])}


def shares_by(marks: Sequence[Mark]) -> dict[str, dict[str, dict[str, Any]]]:
    """Accuracy by each kind of group that divides the questions into few parts: {kind: {part: {"questions",
    "value", "interval"}}}. Kinds whose groups are single questions or pictures are for totals only."""
    kinds = dict.fromkeys(kind for mark in marks for kind in mark.groups)
    found = {}
    for kind in (each for each in kinds if each not in ("question", "figure", "picture")):
        parts = grouped(marks, kind)
        found[kind] = {name: {"questions": len(parts[name])} | micro(parts[name]) for name in sorted(parts)}
    return found
