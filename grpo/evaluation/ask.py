"""One question about pictures of one's own: what `evaluate.py --ask` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from data.types import Example
from grpo.evaluation.answers import Answer, answer_all
from grpo.evaluation.protocols import Reading, strict

# the right answer of a question that somebody really asks
UNKNOWN = "?"


def ask(
    policy,
    chat,
    pictures: Sequence[Path],
    question: str,
    choices: Sequence[str] = (),
    *,
    cap: int,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    read: Callable[[str, Example], Reading] = strict,
) -> list[Answer]:
    """The answers to one question: a greedy one, or so many samples. Raises ValueError where it cannot be
    asked (BadExample: a picture, the length)."""
    example = Example(
        "ask", question, tuple(choices), choices[0] if choices else UNKNOWN, pictures=tuple(pictures)
    )
    how = {"samples": samples, "temperature": temperature} if samples else {}
    answers = answer_all(policy, chat, [example], cap=cap, seed=seed, read=read, **how)
    if not answers:
        raise ValueError(answers.skipped[0])
    return answers[0]


def told(answers: Sequence[Answer]) -> str:
    """The answers as text: each with its reasoning, as it was written, and below it what was read as the
    answer."""
    said = []
    for number, answer in enumerate(answers, 1):
        heading = f"--- {number} of {len(answers)}\n" if len(answers) > 1 else ""
        label = f"({answer.letter}) {answer.answer}" if answer.letter else answer.answer
        ending = f"answer: {label}" if answer.answer is not None else f"no answer could be read: {answer.why}"
        cut = "" if answer.stopped else f", cut off after {answer.length} tokens (--cap)"
        said.append(f"{heading}{answer.text.strip()}\n{ending}{cut}")
    return "\n\n".join(said)
