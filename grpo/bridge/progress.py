"""How far a stage is: a bar with the time left, tokens and money; plain lines where stderr is no terminal."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from grpo.bridge.settings import Writer
from grpo.bridge.store import Spent

# seconds between two plain lines
EVERY = 30.0


class Progress:
    """Of one stage. total: questions. spent: of the stage, counted elsewhere."""

    def __init__(self, stage: str, total: int, spent: Spent, writer: Writer) -> None:
        self.stage, self.total, self.spent, self.writer = stage, total, spent, writer
        self.done = self.parked = 0
        self.began = self.said = time.monotonic()
        # questions that were there before anything was asked say nothing about the speed
        self.found = 0
        self.bar = tqdm(
            total=total, desc=stage, unit="question", file=sys.stderr, disable=not sys.stderr.isatty()
        )

    def passed(self) -> None:
        """A question needs no request."""
        self.found += 1
        self._step()

    def finished(self, parked: bool) -> None:
        """The last reply about a question came."""
        self.parked += parked
        self._step()

    def _step(self) -> None:
        self.done += 1
        self.bar.set_postfix_str(self.cost(), refresh=False)
        self.bar.update()
        if self.bar.disable and (now := time.monotonic()) - self.said >= EVERY:
            self.said = now
            print(f"{self.line()}, {self.left(now)}", file=sys.stderr, flush=True)

    def left(self, now: float) -> str:
        """The time left, in words."""
        asked = self.done - self.found
        if not asked:
            return "time left unknown"
        return f"{tqdm.format_interval((self.total - self.done) * (now - self.began) / asked)} left"

    def cost(self) -> str:
        """Tokens and money of the stage."""
        money = self.writer.money(self.spent.tokens_in, self.spent.tokens_out)
        parts = [f"{self.spent.tokens:,} tokens", f"{money:.2f} money" if money else ""]
        parts.append(f"{self.parked} parked" if self.parked else "")
        return ", ".join(filter(None, parts))

    def line(self) -> str:
        """One line about the stage."""
        return f"{self.stage}: {self.done} of {self.total} questions, {self.cost()}"

    def close(self) -> None:
        """End the bar, and leave a line in its place."""
        self.bar.leave = False
        self.bar.close()
        print(self.line(), file=sys.stderr, flush=True)
