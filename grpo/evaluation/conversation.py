"""Questions of one's own: --ask puts a few, each with its pictures and choices, and --chat one line after the
other. The model is loaded once. Each question stands alone: the model does not see the earlier ones."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from data.chat import Chat
from data.images import open_picture
from data.sources.rows import placed
from data.types import BadPicture, Example
from grpo.evaluation.answers import Asking, answer_all
from grpo.evaluation.scores import Completion

# stands for the right answer, which is not known
UNKNOWN = "?"
COMMANDS = (
    "/picture FILE [FILE ...] shows other pictures, /picture none, /quit ends; a file's name alone shows it"
)


@dataclass(frozen=True)
class Question:
    """A question about pictures of one's own, perhaps with choices."""

    text: str
    pictures: tuple[Path, ...] = ()
    choices: tuple[str, ...] = ()


class AddQuestion(argparse.Action):
    """--ask PICTURE ... "QUESTION": one more question."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        *pictures, text = values
        if not pictures:
            parser.error("argument --ask: give one or more pictures, and then the question in quotes")
        asked = getattr(namespace, self.dest) or ()
        setattr(namespace, self.dest, (*asked, Question(text, tuple(map(Path, pictures)))))


class AddChoice(argparse.Action):
    """--choice TEXT: a choice of the --ask in front of it."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if not namespace.ask:
            parser.error("argument --choice: goes behind its --ask")
        *others, last = namespace.ask
        namespace.ask = (*others, replace(last, choices=(*last.choices, values)))


def check(question: Question) -> None:
    """Look at the pictures before a model is loaded. Raises ValueError."""
    for number, path in enumerate(question.pictures, 1):
        open_picture(path, name=f"--ask: picture {number}")


def ask(policy, chat: Chat, question: Question, how: Asking) -> list[Completion]:
    """The completions of a question. Raises ValueError where it cannot be asked."""
    gold = question.choices[0] if question.choices else UNKNOWN
    example = placed(
        Example("ask", question.text, question.choices, gold, pictures=question.pictures), "--ask"
    )
    answers = answer_all(policy, chat, [example], how)
    if not answers:
        raise ValueError(answers.skipped[0])
    return answers[0]


def answers_as_text(answers: Sequence[Completion]) -> str:
    """Each completion as it was written, with its reasoning, and below it the answer that was read."""
    parts = []
    for number, answer in enumerate(answers, 1):
        heading = f"--- {number} of {len(answers)}\n" if len(answers) > 1 else ""
        label = f"({answer.letter}) {answer.answer}" if answer.letter else answer.answer
        ending = f"answer: {label}" if answer.answer is not None else f"no answer could be read: {answer.why}"
        cut = "" if answer.stopped else f", cut off after {answer.length} tokens (--cap)"
        parts.append(f"{heading}{answer.text.strip()}\n{ending}{cut}")
    return "\n\n".join(parts)


def all_answers(questions: Sequence[Question], reply: Callable[[Question], str]) -> Iterator[str]:
    """The answer to each question, below the question if there are several."""
    for question in questions:
        heading = (
            f"=== {', '.join(map(str, question.pictures))}: {question.text}\n" if len(questions) > 1 else ""
        )
        yield heading + reply(question)


def converse(
    reply: Callable[[Question], str],
    lines: Iterable[str],
    pictures: Sequence[Path] = (),
    say: Callable[[str], Any] = print,
) -> None:
    """The loop of --chat: a line is a question about the pictures that are shown, the name of a picture, or
    one of COMMANDS. What cannot be done is said, and the loop goes on."""
    shown = tuple(pictures)
    for line in lines:
        words = line.strip()
        if words == "/quit":
            return
        try:
            if (named := _named_pictures(words)) is not None:
                for number, path in enumerate(named, 1):
                    open_picture(path, name=f"picture {number}")
                shown = named
                say(f"shown: {', '.join(map(str, shown)) or 'no picture'}")
            elif words.startswith("/"):
                say(f"no such file or command: {words.split()[0]}; {COMMANDS}")
            elif words:
                say(reply(Question(words, shown)))
        except (ValueError, OSError) as error:
            say(f"cannot be asked: {error}")


def _named_pictures(words: str) -> tuple[Path, ...] | None:
    """The pictures that a line names; None if it is no such line. Raises ValueError."""
    command, _, rest = words.partition(" ")
    if command == "/picture":
        names = shlex.split(rest)
        if not names:
            raise ValueError(COMMANDS)
        if missing := [name for name in names if not Path(name).is_file()]:
            if names == ["none"]:
                return ()
            raise BadPicture(f"no file {missing[0]}")
        return tuple(map(Path, names))
    # a long question is no name of a file
    if words and len(words) < 256 and "\0" not in words and Path(words).is_file():
        return (Path(words),)
    return None


def typed(stream: TextIO | None = None) -> Iterator[str]:
    """The lines of stdin: of a terminal, with a prompt, or of a pipe. Ctrl-D and Ctrl-C end them."""
    stream = stream or sys.stdin
    try:
        while True:
            if stream.isatty():
                print("> ", end="", flush=True)
            line = stream.readline()
            if not line:
                return
            yield line
    except KeyboardInterrupt:
        return
    finally:
        if stream.isatty():
            print()
