"""--plan: what a whole bridge takes, measured on its first twenty questions. Their replies are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grpo.bridge.settings import Settings
from grpo.bridge.store import Spent

MEASURED = 20


@dataclass(frozen=True)
class Estimate:
    """What a stage takes for all questions. tokens_in, tokens_out: of a reply, on average."""

    stage: str
    requests: float
    tokens_in: float
    tokens_out: float
    hours: float
    money: float


def estimates(settings: Settings, spent: Mapping[str, Spent], measured: int, total: int) -> list[Estimate]:
    """From what `measured` questions took to what `total` will take. spent: by stage."""
    found = []
    for stage in settings.active:
        one = spent[stage]
        writer = settings.writer(stage)
        replies = max(one.replies, 1)
        # with further attempts, and without the questions that do not reach this stage
        requests = one.replies / max(measured, 1) * total
        tokens_in = one.tokens_in / replies
        tokens_out = one.tokens_out / replies
        together = writer.at_once if writer.kind == "server" else 1
        hours = requests * one.seconds / replies / together / 3600
        money = writer.money(1, 0) * tokens_in * requests + writer.money(0, 1) * tokens_out * requests
        found.append(Estimate(stage, requests, tokens_in, tokens_out, hours, money))
    return found


def table(found: list[Estimate], measured: int, total: int) -> str:
    """Estimates for people."""
    rows = [("stage", "requests", "tokens read", "tokens written", "hours", "money")]
    for one in found:
        tokens = (f"{one.tokens_in:,.0f} each", f"{one.tokens_out:,.0f} each")
        rows.append((one.stage, f"{one.requests:,.0f}", *tokens, f"{one.hours:,.2f}", f"{one.money:,.2f}"))
    read = sum(one.tokens_in * one.requests for one in found)
    written = sum(one.tokens_out * one.requests for one in found)
    sums = [sum(getattr(one, name) for one in found) for name in ("requests", "hours", "money")]
    tokens = (f"{read:,.0f}", f"{written:,.0f}")
    rows.append(("all", f"{sums[0]:,.0f}", *tokens, f"{sums[1]:,.2f}", f"{sums[2]:,.2f}"))
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(wide[0]), *(cell.rjust(width) for cell, width in zip(row[1:], wide[1:]))]
        lines.append("  ".join(cells))
    return "\n".join([f"{total:,} questions, from {measured} that were measured:", *lines])
