"""The run of a bridge: stage by stage, question by question, from where the stored replies end.

A reply that a form filter finds bad is asked for again with a new seed, up to `attempts` times. What is still
bad is parked: it goes no further, and stops no other question. A pass over all stages that ends with parked
questions is a round; the next command begins another one, in which each of them has `attempts` more. The
number of the round is kept in bridge.json, so a command that was killed goes on in the same round, and asks
what it would have asked.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.sources.kinds import Kinds
from data.types import BadExample, BadPicture, Example
from grpo.bridge import stages
from grpo.bridge.filters import Known, form_reasons
from grpo.bridge.progress import Progress
from grpo.bridge.settings import Settings
from grpo.bridge.stages import Asking, Job
from grpo.bridge.store import FILES, Store, Stored
from grpo.bridge.writers import opened
from grpo.config.typed import ConfigError
from grpo.serving.client import Stop
from grpo.serving.messages import Reply
from grpo.storage.atomic import write_whole

STATE = "bridge.json"
# failed requests without a success between them that end the run
FAILURES = 50


class WriterFails(ValueError):
    """Every request fails: the writer is not there, or takes no request of this kind."""


def asking_of(settings: Settings, stage: str) -> Asking:
    """How a stage asks."""
    how = getattr(settings, stage)
    return Asking(
        stage,
        settings.prompts()[stage],
        settings.writer(stage).name,
        *(how.system, how.max_tokens, how.temperature, how.top_p),
        settings.max_pixels,
        settings.seed,
        shows=stage != "reason",
    )


class Bridge:
    """One command's work in a folder. known: repeated questions and those of benchmarks, which are not asked.
    over: the budget is used up. parked: questions, by stage. left_out: questions that cannot be used."""

    def __init__(
        self, settings: Settings, examples: Sequence[Example], store: Store, stop: Stop, known: Known
    ) -> None:
        self.settings, self.examples, self.store, self.stop = settings, examples, store, stop
        self.known = known
        self.asking = {stage: asking_of(settings, stage) for stage in settings.active}
        self.over = False
        self.parked = dict.fromkeys(settings.active, 0)
        self.round = self._begin()
        self.left_out = 0
        self._kinds = Kinds()

    # ---- the folder

    @property
    def _state(self) -> Path:
        return self.store.folder / STATE

    def _begin(self) -> int:
        """Compare how the stages ask with how the stored replies were asked for, and note it. -> the round.
        Raises ConfigError for a change that `again` does not accept."""
        now = {stage: asdict(asking) for stage, asking in self.asking.items()}
        before = self._read_state()
        count = len(self.examples)
        if before["checked"] < count:
            self._check_pictures()
        for stage, asking in now.items():
            told = before["stages"].get(stage)
            changed = [key for key in asking if told and told.get(key) != asking[key]]
            if changed and self.store.spent[stage].replies and not self.settings.again:
                what = f"{' and '.join(changed)} of {stage} {'is' if len(changed) == 1 else 'are'} not"
                ways = "again=true asks again and keeps the old lines; out=DIR begins another folder"
                where = self.store.folder / FILES[stage]
                raise ConfigError(f"{what} what the replies in {where} were asked with: {ways}")
        told = before | {"checked": max(before["checked"], count), "stages": before["stages"] | now}
        self._write_state(told)
        return before["round"]

    def _read_state(self) -> dict[str, Any]:
        """round: of the next pass. checked: questions whose pictures are known to be there. stages: how each
        stage asked. Raises ConfigError."""
        told: dict[str, Any] = {"round": 1, "checked": 0, "stages": {}}
        if self._state.exists():
            try:
                told |= json.loads(self._state.read_text("utf-8"))
            except (ValueError, TypeError):
                ways = "remove it, and the same command goes on"
                raise ConfigError(f"{self._state}: this file was edited: {ways}") from None
        return told

    def _write_state(self, told: dict[str, Any]) -> None:
        write_whole(self._state, json.dumps(told, indent=1) + "\n")

    def _check_pictures(self) -> None:
        """Before the first request: raise BadPicture if picture files are missing."""
        first, count = "", 0
        for index in tqdm(range(len(self.examples)), "pictures", unit="question", leave=False, disable=None):
            try:
                self.examples[index]
            except BadExample as error:
                if getattr(error, "reason", "").startswith("no file"):
                    first = first or str(error)
                    count += 1
        if count:
            ways = "put them there, or leave their rows out; python -m data.check names each"
            raise BadPicture(f"{count} picture files are missing ({first}): {ways}")

    # ---- what is asked

    def run(self, whole: bool = True) -> None:
        """Ask whatever is not stored yet. whole: these are all questions, so a round ends with them. Raises
        ValueError where nothing more can be asked, and OSError."""
        for stage in self.settings.active:
            self.run_stage(stage)
            if self.stop.is_set():
                return
        for line in self._kinds.others():
            tqdm.write(f"left out: {line}", file=sys.stderr)
        if whole and any(self.parked.values()) and not self.over:
            self._write_state(self._read_state() | {"round": self.round + 1})

    def run_stage(self, stage: str) -> None:
        """One stage of all questions."""
        settings = self.settings.writer(stage)
        progress = Progress(stage, len(self.examples), self.store.spent[stage], settings)
        retries: deque[int] = deque()
        jobs = self.jobs(stage, range(len(self.examples)), retries, progress)
        first = next(jobs, None)
        try:
            if first is not None:
                with opened(settings, "reasoner" if stage == "reason" else "vision") as writer:
                    self._write(writer.write, jobs_from(first, jobs), retries, progress)
                    # what had to be asked again at the very end
                    while retries and not self.stop.is_set() and not self.over:
                        more = self.jobs(stage, (), retries, progress)
                        self._write(writer.write, more, retries, progress)
        finally:
            self.parked[stage] = progress.parked
            progress.close()

    def _write(self, write, jobs: Iterable[Job], retries: deque[int], progress: Progress) -> None:
        """Store the replies as they come."""
        failures = 0
        for job, reply in write(jobs, self.stop):
            model = self.asking[job.stage].model
            self.store.add(Stored(job.uid, job.stage, job.attempt, model, reply))
            failures = failures + 1 if reply.error else 0
            if failures >= FAILURES:
                said = f"the last {failures} requests of {job.stage} failed ({reply.error})"
                raise WriterFails(f"{said}; the same command goes on when it can")
            good = self.is_good(job.stage, reply, self.examples[job.index])
            if not good and self.may_try(job.attempt):
                retries.append(job.index)
            else:
                progress.finished(parked=not good)

    def jobs(
        self, stage: str, indices: Iterable[int], retries: deque[int], progress: Progress
    ) -> Iterator[Job]:
        """The requests that a stage still needs; those of `retries`, which grows meanwhile, come first."""
        order = iter(indices)
        first = stage == self.settings.active[0]
        while True:
            again = bool(retries)
            index = retries.popleft() if again else next(order, None)
            if index is None:
                return
            job = None
            try:
                example = self.examples[index]
                if not first or again or not self.known.reasons(example):
                    job = self.next_job(stage, example, index, progress)
                if job is not None:
                    job = replace(job, pictures=stages.pictures(self.asking[stage], example))
            except BadExample as error:
                # it may have been made before its picture was opened
                job = None
                if first:
                    self._leave_out(error)
            if job is not None and self.is_over():
                return
            if job is not None:
                yield job
            elif not again:
                progress.passed()

    def next_job(self, stage: str, example: Example, index: int, progress: Progress) -> Job | None:
        """The next request of a stage about a question, without pictures; None if it needs none now. Raises
        ConfigError if the stored reply belongs to another question or picture."""
        asking = self.asking[stage]
        earlier: dict[str, Reply] = {}
        for before in self.settings.active[: self.settings.active.index(stage)]:
            stored = self.store.last(before, example.uid)
            if stored is None or not self.is_good(before, stored.reply, example):
                return None
            earlier[before] = stored.reply
        last = self.store.last(stage, example.uid)
        if last is None:
            return stages.job(asking, example, earlier, 0, index)
        if stages.job(asking, example, earlier, last.attempt).name == last.reply.request:
            if self.is_good(stage, last.reply, example):
                return None
            if self.may_try(last.attempt):
                return stages.job(asking, example, earlier, last.attempt + 1, index)
            progress.parked += 1
            return None
        if not earlier and not self.settings.again:
            where = self.store.folder / FILES[stage]
            ways = "again=true asks again and keeps the old line; out=DIR begins another folder"
            raise ConfigError(f"{where}: the question or picture of {example.uid!r} has changed: {ways}")
        # a stage before has another reply now
        return stages.job(asking, example, earlier, 0, index)

    def is_good(self, stage: str, reply: Reply, example: Example) -> bool:
        """Whether another attempt could not mend anything."""
        return not form_reasons(stage, reply, example)

    def may_try(self, attempt: int) -> bool:
        """Whether there may be an attempt after this one in this round."""
        return attempt + 1 < self.settings.attempts * self.round

    def is_over(self) -> bool:
        """Whether the budget is used up."""
        budget = self.settings.budget
        tokens = sum(spent.tokens for spent in self.store.spent.values())
        self.over |= budget.tokens is not None and tokens >= budget.tokens
        self.over |= budget.money is not None and self.money() >= budget.money
        return self.over

    def money(self) -> float:
        """What all replies in the folder have cost."""
        return sum(
            self.settings.writer(stage).money(spent.tokens_in, spent.tokens_out)
            for stage, spent in self.store.spent.items()
        )

    def spent_text(self) -> str:
        """What all replies in the folder have cost, in words."""
        tokens = sum(spent.tokens for spent in self.store.spent.values())
        return f"{tokens:,} tokens" + (f", {money:.2f} money" if (money := self.money()) else "")

    def _leave_out(self, error: BadExample) -> None:
        """Name a question that cannot be used."""
        self.left_out += 1
        if self._kinds.is_shown(str(error)):
            tqdm.write(f"left out: {error}", file=sys.stderr)


def jobs_from(first: Job, others: Iterator[Job]) -> Iterator[Job]:
    """One job, then the others."""
    yield first
    yield from others
