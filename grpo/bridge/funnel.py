"""What became of the questions: counts by reason, and a few examples of each. Its size does not depend on the
number of questions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data.images import open_picture
from data.types import BadExample, Example
from grpo.bridge.cleanup import clean
from grpo.bridge.filters import DESCRIBE, PSEUDO, REASON, TABLE, Replies
from grpo.evaluation.word_counts import VISION_R1, Count
from grpo.serving.messages import data_url, png

KEPT = "kept"
# shown of each reason; pixels of a shown picture's longer side; characters of a shown text
EXAMPLES = 3
SIDE = 320
LONGEST = 4000
# words at which a bar of the histogram of lengths begins
EDGES = (0, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240)


def bar_of(words: int) -> int:
    """The bar of a chain with that number of words, as an index of EDGES."""
    return sum(words >= edge for edge in EDGES) - 1


@dataclass
class Funnel:
    """Counts over the questions.

    asked, kept: questions. first: by the reason that comes first in the table, so that these and `kept` add
    up to `asked`. every: by each reason. tasks, kinds: {name: [kept, asked]}. lengths, words: of the chains
    as they were written, and of those that were kept. replaced: phrases, in the kept chains. shown: examples
    by reason.
    """

    asked: int = 0
    kept: int = 0
    first: Counter[str] = field(default_factory=Counter)
    every: Counter[str] = field(default_factory=Counter)
    tasks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    kinds: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    lengths: dict[str, list[int]] = field(
        default_factory=lambda: {when: [0] * len(EDGES) for when in ("before", "after")}
    )
    words: dict[str, Count] = field(
        default_factory=lambda: {when: Count(VISION_R1) for when in ("before", "after")}
    )
    replaced: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, example: Example, replies: Replies, why: Sequence[str]) -> None:
        """Count a question. why: the reasons against its chain, in the table's order."""
        self.asked += 1
        self.kept += not why
        self.first.update(why[:1])
        self.every.update(why)
        for counts in (self.tasks[example.task], self.kinds[kind_of(example)]):
            counts[0] += not why
            counts[1] += 1
        thinking = replies[REASON].thinking if REASON in replies else ""
        cleaned, replaced = clean(thinking)
        if thinking:
            self._count("before", thinking)
        if not why:
            self._count("after", cleaned)
            self.replaced.update(replaced)
        for reason in why or (KEPT,):
            if len(self.shown[reason]) < EXAMPLES:
                self.shown[reason].append(shown(example, replies, why))

    def _count(self, when: str, chain: str) -> None:
        self.lengths[when][bar_of(len(chain.split()))] += 1
        self.words[when].add(chain)

    def lines(self) -> list[str]:
        """The funnel for a terminal, a line a reason."""
        share = lambda count: f"{count:>9,}  {count / max(self.asked, 1):6.1%}"
        rows = [f"{'questions':<26}{self.asked:>9,}"]
        rows += [f"- {reason:<24}{share(self.first[reason])}" for reason in TABLE if self.first[reason]]
        return [*rows, f"{KEPT:<26}{share(self.kept)}"]


def kind_of(example: Example) -> str:
    """The kind of answer: choices, number or text."""
    return "choices" if example.choices else str(example.extra.get("kind", "text"))


def shown(example: Example, replies: Replies, why: Sequence[str]) -> dict[str, Any]:
    """A question with its replies, as the report shows it."""
    reason = replies.get(REASON)
    earlier = {stage: short_text(replies[stage].text) for stage in (PSEUDO, DESCRIBE) if stage in replies}
    return {
        "uid": short_text(example.uid),
        "question": short_text(example.question),
        "choices": [short_text(choice) for choice in example.choices],
        "answer": short_text(example.answer),
        "task": short_text(example.task),
        "picture": picture_url(example),
        "why": list(why),
        "earlier": earlier,
        "chain": short_text(clean(reason.thinking)[0]) if reason else "",
        "said": short_text(reason.text) if reason else "",
        "errors": {stage: short_text(reply.error) for stage, reply in replies.items() if reply.error},
    }


def short_text(text: str) -> str:
    """A text of at most LONGEST characters."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n… ({len(text) - LONGEST:,} more characters) …\n{text[-half:]}"


def picture_url(example: Example) -> str | None:
    """The example's first picture, made small, as a data URL; None without a readable one."""
    if not example.pictures:
        return None
    try:
        image = open_picture(example.pictures[0], name=example.uid)
    except BadExample:
        return None
    image.thumbnail((SIDE, SIDE))
    return data_url(png(image))
