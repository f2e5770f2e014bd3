"""The passes of an evaluation: ways in which one model is asked the same questions, and what each found."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple, overload

from tqdm import tqdm

from data.chat import Chat
from data.sources.table import hook_of
from data.types import BadExample, Example
from grpo.evaluation.answers import Asking, answer_all
from grpo.evaluation.evaluated_model import EvaluatedModel, banned_ids, known_ids
from grpo.evaluation.protocols import PROTOCOLS, strict
from grpo.evaluation.resume import Kept, Log
from grpo.evaluation.scores import Answers, scores
from grpo.evaluation.tables import k_table, score_table
from grpo.evaluation.vision_r1 import closed
from grpo.memory import MemoryBudget
from grpo.sampling import Truncation


class Pass(NamedTuple):
    """A way of asking. key: its name in the JSON. changes: the changed fields of `Asking`. tries: in all,
    while no answer tag is closed."""

    key: str
    title: str
    changes: dict[str, Any]
    tries: int = 1


@dataclass(frozen=True)
class Questions(Sequence[Example]):
    """Some questions of a source, by their places, as a protocol asks them; made on demand."""

    source: Sequence[Example]
    places: Sequence[int]
    prepare: Callable[[Example], Example] = lambda example: example

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Questions: ...
    def __getitem__(self, index: int | slice) -> Example | Questions:
        if isinstance(index, slice):
            return replace(self, places=self.places[index])
        return self.prepare(self.source[self.places[index]])


@dataclass
class Session:
    """One model that is loaded, and the questions. log: of an evaluation that can be interrupted."""

    args: argparse.Namespace
    model: EvaluatedModel
    policy: Any
    chat: Chat
    examples: Sequence[Example]
    room: MemoryBudget
    log: Log | None = None

    def plain(self) -> Asking:
        """How the protocol asks, greedily."""
        read = partial(PROTOCOLS[self.args.protocol].read, direct=self.model.direct)
        return Asking(self.model.cap, seed=self.args.seed, read=read, measure=hook_of(self.args.task).measure)

    def answer(self, way: Pass) -> tuple[Answers, Answers]:
        """The completions of a pass that count, and those of its first try."""
        how = replace(self.plain(), **way.changes)

        def ask(examples: Sequence[Example], attempt: int) -> Answers:
            # how an answer is read changes no completion
            told = {name: value for name, value in way.changes.items() if name != "read"}
            told |= {"attempt": attempt} if attempt else {}
            kept = self.log.of(who=asdict(self.model), seed=self.args.seed, **told) if self.log else Kept()
            title = way.title + (f", try {attempt + 1}" if attempt else "")
            bar = partial(tqdm, desc=title, unit="question", disable=None, leave=False)
            with bar(total=len(examples)) as shown:
                asking = replace(how, attempt=attempt)
                rest = dict(kept=kept, progress=shown.update)
                return answer_all(self.policy, self.chat, examples, asking, self.room, **rest)

        return tried_again(ask, self.examples, way.tries)


def tried_again(
    ask: Callable[[Sequence[Example], int], Answers], examples: Sequence[Example], tries: int
) -> tuple[Answers, Answers]:
    """Ask, and ask again what has no closed answer tag, `tries` times in all; the last one counts.

    ask: (questions, number of the try from 0) -> one completion a question. -> the completions that count,
    and those of the first try.
    """
    first = ask(examples, 0)
    if tries == 1:
        return first, first
    final = Answers()
    final.extend(first)
    final.skipped = first.skipped
    places: dict[str, int] = {}
    for attempt in range(1, tries):
        opened = {group[0].uid: place for place, group in enumerate(final) if not closed(group[0].text)}
        if not opened:
            break
        places = places or places_of(examples)
        again = [places[uid] for uid in opened]
        for group in ask(Questions(examples, again), attempt):
            final[opened[group[0].uid]] = group
    return final, first


def places_of(examples: Sequence[Example]) -> dict[str, int]:
    """{uid: the number of its question}; without the questions that cannot be made."""
    found = {}
    for place in range(len(examples)):
        try:
            found[examples[place].uid] = place
        except BadExample:
            continue
    return found


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The changed fields of `Asking` for --samples."""
    sampling: dict[str, Any] = {"samples": args.samples, "temperature": args.temperature}
    if args.top_k or args.top_p:
        sampling["truncation"] = Truncation(args.top_k, args.top_p or 1.0)
    return sampling


def passes(args: argparse.Namespace, chat: Chat, model: EvaluatedModel, again: bool) -> list[Pass]:
    """The ways in which a model is asked, the protocol's first. again: it is the model of --compare."""
    published = PROTOCOLS[args.protocol].sampling
    first = Pass("compare" if again else "greedy", "greedy", {})
    if published:
        title = f"as published: temperature {published.temperature}, up to {published.tries} tries"
        first = Pass("compare" if again else "published", title, published.changes(), published.tries)
    found = [first]
    if args.samples:
        title = f"{args.samples} samples a question at temperature {args.temperature:g}"
        found.append(Pass("compare_sampled" if again else "sampled", title, sampling_of(args)))
    if again:
        return found
    if published:
        reading = {"read": partial(strict, direct=model.direct)}
        found.append(Pass("greedy_strict", "one greedy answer, read by strict", reading))
    if args.blind:
        found.append(
            Pass("blind", f"{first.title}, pictures withheld", first.changes | {"blind": True}, first.tries)
        )
    if args.ban:
        title = f"{first.title}, without {' and '.join(map(repr, args.ban))}"
        changes = first.changes | {"banned": banned_ids(chat, args.ban)}
        found.append(Pass("banned", title, changes, first.tries))
    if args.prefix:
        given = first.changes | {"prefix": known_ids(chat, args.prefix, "--prefix")}
        found.append(Pass("prefixed", f"{first.title}, begun with {args.prefix!r}", given, first.tries))
    return found


def block_of(title: str, answers: Answers, args: argparse.Namespace) -> dict[str, Any]:
    """Count the answers of one pass and print their tables. Returns what --json writes of them."""
    protocol = PROTOCOLS[args.protocol]
    found = scores(answers, protocol.total)
    print(f"\n{title}\n{score_table(found, protocol.shown, hook_of(args.task))}")
    if "pass@k" in found:
        print(f"\n{k_table(found)}")
    if answers.skipped:
        print(f"skipped {len(answers.skipped)}: {'; '.join(answers.skipped[:2])}", end="")
        print("; …" if len(answers.skipped) > 2 else "")
    rows = [answer.to_dict() for group in answers for answer in group]
    return {"title": title, "scores": found, "skipped": answers.skipped, "answers": rows}


def ladder(steps: Sequence[tuple[str, Answers]]) -> list[dict[str, Any]]:
    """What each step of a published evaluation adds: {"step", "accuracy", "interval", "adds"}, in shares."""
    found: list[dict[str, Any]] = []
    for name, answers in steps:
        total = scores(answers)["totals"]["micro"]
        adds = total["value"] - found[-1]["accuracy"] if found else 0.0
        found.append({"step": name, "accuracy": total["value"], "interval": total["interval"], "adds": adds})
    return found
