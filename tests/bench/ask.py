"""Ask a policy sets of questions of the built-in world, and count its answers: for tests/bench/findings.py.

A sampled answer is *sound* if it is right and the last look in it reads, word for word, what the picture
shows. A guess is never sound, so pass@k of sound answers is not reached by guessing k times.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from data.chat import Chat
from data.shapes.documents import reading
from data.shapes.looking import SECOND_LOOK, measure
from data.sources.table import open_split
from data.types import Example
from grpo.evaluation.answers import Asking, answer_all
from grpo.evaluation.evaluated_model import known_ids
from grpo.evaluation.scores import Completion
from grpo.evaluation.statistics import pass_at_k
from grpo.storage.model_folder import load_model

# keys of a set of questions in findings.yaml
SET = ("split", "data", "max_pixels", "blind")
# questions whose first answer is kept as text
SHOWN = 6
# {name in a record: name in metrics.jsonl}
CURVE = {
    "step": "step",
    "accuracy": "accuracy",
    "counting": "accuracy/Count",
    "reward": "reward",
    "length": "completions/mean_length",
    "entropy": "entropy",
    "looks": "aha/looking",
    "again": "aha/self_correction",
    "all_equal": "frac_reward_zero_std",
    "completions": "completions/count",
    "rounds": "sampling/rounds",
    "nll": "nll",
}
EVALS = {"step": "step", "accuracy": "eval/accuracy", "length": "eval/mean_length", "looks": "eval/looking"}

Questions = Mapping[str, Any]


class Policy:
    """A policy, loaded at its first answer. folder: of the model. cap: longest answer, in tokens."""

    def __init__(self, folder: Path, cap: int) -> None:
        self.folder = folder
        self.cap = cap

    @cached_property
    def weights(self):
        """The model, without gradients."""
        return load_model(self.folder).requires_grad_(False)

    def chat(self, questions: Questions) -> Chat:
        """Prompts for a set of questions."""
        return Chat(self.folder, template="shapes", max_pixels=questions.get("max_pixels"))

    def ask(self, questions: Questions, items: int, samples: int = 1, prefix: str = "") -> dict[str, Any]:
        """The counted answers to the first `items` questions of a set. samples: 1 is one greedy answer, more
        are drawn at temperature 1. prefix: words with which each answer begins. Raises ValueError."""
        chat = self.chat(questions)
        examples = first(questions, items)
        begun = known_ids(chat, prefix, "prefix") if prefix else ()
        how = Asking(
            self.cap,
            samples,
            temperature=float(samples > 1),
            blind=questions.get("blind", False),
            prefix=begun,
            measure=measure,
        )
        answers = answer_all(self.weights, chat, examples, how)
        if answers.skipped:
            raise ValueError(f"{questions}: a question was not asked: {answers.skipped[0]}")
        return counted(answers, examples)

    def best_prefix(self, questions: Questions, texts: Sequence[str], items: int) -> dict[str, Any]:
        """Which prefix earns most on the training questions of a set: {best, items, right: {prefix: count}}.
        The first of equals is the best."""
        training = {**questions, "split": "train"}
        right = {text: self.ask(training, items, prefix=text)["right"] for text in texts}
        return {"best": max(right, key=lambda text: right[text]), "items": items, "right": right}


def first(questions: Questions, items: int) -> list[Example]:
    """The first `items` questions of a set."""
    source = open_split("shapes", questions.get("data"), questions.get("split", "heldout"), items, 0)
    return [source[index] for index in range(items)]


def sound(answer: Completion, example: Example) -> bool:
    """Whether the answer is right, and its last look reads what the picture shows."""
    return answer.correct and reading(example, example.extra["named"]) in SECOND_LOOK.split(answer.text)[-1]


def counted(answers: Sequence[Sequence[Completion]], examples: Sequence[Example]) -> dict[str, Any]:
    """The answers to questions, one list a question, in numbers.

    items, right: of answers; questions. format, looks, again, truncated, sound: shares of all answers.
    length: mean tokens. tasks: {task: [right, answers]}. lengths: {right: {tokens: answers}, wrong: ...}.
    passes: {k: unbiased pass@k of sound answers} for k = 1, 2, 4, ... texts: answers to the first questions.
    """
    rows = [row for group in answers for row in group]
    is_sound = [[sound(row, example) for row in group] for group, example in zip(answers, examples)]
    samples = len(answers[0])
    tasks = {row.task: [0, 0] for row in rows}
    for row in rows:
        tasks[row.task][0] += row.correct
        tasks[row.task][1] += 1
    found = {"items": len(rows), "questions": len(answers), "right": sum(row.correct for row in rows)}
    shares = {
        "format": [row.well_formed for row in rows],
        "looks": [row.measured["looking"] for row in rows],
        "again": [row.measured["self_correction"] for row in rows],
        "truncated": [not row.stopped for row in rows],
        "sound": [each for group in is_sound for each in group],
    }
    found |= {name: round(fmean(map(bool, each)), 5) for name, each in shares.items()}
    found |= {"length": round(fmean(row.length for row in rows), 3), "tasks": tasks}
    sizes = [1 << power for power in range(samples.bit_length()) if 1 << power <= samples]
    found["passes"] = {
        str(k): round(fmean(pass_at_k(samples, sum(group), k) for group in is_sound), 5) for k in sizes
    }
    found["lengths"] = {
        name: _histogram(row.length for row in rows if row.correct == right)
        for name, right in (("right", True), ("wrong", False))
    }
    shown = [group[0] for group in answers[:SHOWN]]
    found["texts"] = [{"asked": row.question, "text": row.text, "right": row.correct} for row in shown]
    return found


def _histogram(lengths) -> dict[str, int]:
    return {str(length): count for length, count in sorted(Counter(lengths).items())}


def followed(run: Path, names: Mapping[str, str], having: str) -> dict[str, list]:
    """Metrics of a run over its steps: {our name: numbers}, of the rows that have the metric `having`. A
    metric that no row has is left out. names: {our name: name in metrics.jsonl}."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if having in row]
    number = lambda value: round(value, 5) if isinstance(value, float) else value
    return {
        name: [number(row.get(key)) for row in rows]
        for name, key in names.items()
        if any(key in row for row in rows)
    }
