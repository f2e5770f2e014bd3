"""Guards: signs that a run of GRPO goes wrong, found in the rows of metrics.jsonl.

A guard is a pure function of the last rows and of the first ones, so a resumed run warns and writes as an
undisturbed one does. It looks at several rows, because one bad step is noise. Guards warn once, and change
nothing. Their texts are in page/warnings.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pvariance
from typing import Any

import yaml

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Guard:
    """Holds if the last `steps` rows are `bad`. bad: of these rows and of the run's first ones. says: what
    happened, and what to do. now: of these rows, a sentence with the figure, for the terminal."""

    steps: int
    bad: Callable[[Sequence[Row], Sequence[Row]], bool]
    says: str
    now: Callable[[Sequence[Row]], str] = lambda last: ""

    def message(self, rows: Sequence[Row]) -> str:
        """What to print when it holds in the last of these rows."""
        return self.now(rows[-self.steps :]) + self.says


def number(row: Row, name: str) -> float:
    """A metric, nan if the row has no finite number for it. nan compares as false."""
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def mean(rows: Sequence[Row], name: str) -> float:
    """Its mean over rows, nan if one row has none."""
    return fmean(number(row, name) for row in rows) if rows else math.nan


def each(name: str, bad: Callable[[float], bool]) -> Callable[[Sequence[Row], Sequence[Row]], bool]:
    """A condition on the metric of every row."""
    return lambda last, first: all(bad(number(row, name)) for row in last)


def no_reward(last: Sequence[Row], first: Sequence[Row]) -> bool:
    """All rewards are 0, not only their mean."""
    return all(number(row, "reward") == 0 and number(row, "reward_std") == 0 for row in last)


def kl_grows(last: Sequence[Row], first: Sequence[Row]) -> bool:
    """Above half a nat, and twice what it was in the earlier half of the rows."""
    half = len(last) // 2
    now = mean(last[half:], "kl")
    return now > 0.5 and now > 2 * mean(last[:half], "kl")


def format_only(last: Sequence[Row], first: Sequence[Row]) -> bool:
    """The form is met and the accuracy is that of guessing, within 5 points."""
    formed = mean(last, "rewards/format/mean") > 0.9
    return formed and mean(last, "accuracy") < mean(last, "chance") + 0.05


def no_thinking(last: Sequence[Row], first: Sequence[Row]) -> bool:
    """Nine answers in ten come without a thought, in a run that pays for the form."""
    asked = [row for row in last if "rewards/format/mean" in row]
    return len(asked) == len(last) and each("completions/unthought_ratio", lambda v: v >= 0.9)(last, first)


def shrinking(last: Sequence[Row], first: Sequence[Row]) -> bool:
    """Half as long as at the beginning, and no more often right."""
    if number(last[-1], "step") < 2 * len(last):
        return False
    length = mean(last, "completions/mean_length") < 0.5 * mean(first, "completions/mean_length")
    return length and mean(last, "accuracy") <= mean(first, "accuracy") + 0.02


def no_progress(last: Sequence[Row], first: Sequence[Row]) -> bool:
    """After 200 steps the reward is not above the first rows' by two standard errors."""
    if not first or number(last[-1], "step") < 200 or not mean(last, "accuracy") < 0.95:
        return False
    noise = sum(pvariance(number(row, "reward") for row in rows) / len(rows) for rows in (last, first))
    return mean(last, "reward") - mean(first, "reward") <= 2 * noise**0.5


def cut_now(last: Sequence[Row]) -> str:
    """How many of the last completions were cut."""
    share = mean(last, "completions/clipped_ratio")
    return f"{share:.0%} of this stage's completions are cut; their reward is 0 whatever they say. "


SAYS = yaml.safe_load((Path(__file__).parent / "page" / "warnings.yaml").read_text("utf-8"))
GUARDS = {
    "kl": Guard(3, each("kl", lambda v: v > 2.0), SAYS["kl"]),
    "kl_grows": Guard(20, kl_grows, SAYS["kl_grows"]),
    "no_reward": Guard(20, no_reward, SAYS["no_reward"]),
    "format_only": Guard(50, format_only, SAYS["format_only"]),
    "no_thinking": Guard(20, no_thinking, SAYS["no_thinking"]),
    "shrinking": Guard(20, shrinking, SAYS["shrinking"]),
    "no_progress": Guard(50, no_progress, SAYS["no_progress"]),
    "truncated": Guard(5, each("completions/clipped_ratio", lambda v: v >= 0.9), SAYS["truncated"], cut_now),
    "entropy": Guard(10, each("entropy", lambda v: v < 0.01), SAYS["entropy"]),
    "identical": Guard(5, each("completions/identical_groups", lambda v: v >= 0.5), SAYS["identical"]),
}
NONFINITE = SAYS["nonfinite"]
LONGEST = max(guard.steps for guard in GUARDS.values())
# rows at the beginning of a run that the last ones are compared with
FIRST = 20


def check(rows: Sequence[Row], first: Sequence[Row] | None = None) -> dict[str, bool]:
    """Whether each guard holds, from the last rows of metrics.jsonl, the newest last; LONGEST are enough.
    first: the first FIRST rows of the run; None: `rows` is the whole run."""
    first = rows[:FIRST] if first is None else first
    return {
        name: len(rows) >= guard.steps and guard.bad(rows[-guard.steps :], first)
        for name, guard in GUARDS.items()
    }


def warnings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The guards that held in a run, for the report: {name, says, first, steps}, by the first step in which
    each held. steps: in how many it held."""
    found = []
    for name, says in SAYS.items():
        if held := [row["step"] for row in rows if row.get(f"guard/{name}")]:
            found.append({"name": name, "says": says, "first": held[0], "steps": len(held)})
    return sorted(found, key=lambda warning: warning["first"])
