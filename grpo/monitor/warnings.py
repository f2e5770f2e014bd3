"""Guards: signs that a run of GRPO goes wrong, found in the last rows of metrics.jsonl.

A guard is a pure function of metrics, so a resumed run warns and writes as an undisturbed one does. It holds
where a condition is true in each of the last steps: one bad step is noise. Guards warn once, and change
nothing. Their texts are in page/warnings.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Guard:
    """Holds if each of the last `steps` rows is `bad`. bad: of a function from a metric's name to its number
    (nan without one). says: what happened, and what to do."""

    steps: int
    bad: Callable[[Callable[[str], float]], bool]
    says: str


SAYS = yaml.safe_load((Path(__file__).parent / "page" / "warnings.yaml").read_text("utf-8"))
GUARDS = {
    "kl": Guard(3, lambda at: at("kl") > 2.0, SAYS["kl"]),
    "no_reward": Guard(20, lambda at: at("reward") == 0 and at("reward_std") == 0, SAYS["no_reward"]),
    "truncated": Guard(5, lambda at: at("completions/clipped_ratio") == 1, SAYS["truncated"]),
    "entropy": Guard(10, lambda at: at("entropy") < 0.01, SAYS["entropy"]),
    "identical": Guard(5, lambda at: at("completions/identical_groups") >= 0.5, SAYS["identical"]),
}
NONFINITE = SAYS["nonfinite"]
LONGEST = max(guard.steps for guard in GUARDS.values())


def check(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether each guard holds, from the last rows of metrics.jsonl, the newest last; LONGEST are enough."""
    return {
        name: len(rows) >= guard.steps and all(guard.bad(_numbers(row)) for row in rows[-guard.steps :])
        for name, guard in GUARDS.items()
    }


def _numbers(row: Mapping[str, Any]) -> Callable[[str], float]:
    def at(name: str) -> float:
        value = row.get(name)
        # nan compares as false
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan

    return at


def warnings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The guards that held in a run, for the report: {name, says, first, steps}, by the first step in which
    each held. steps: in how many it held."""
    found = []
    for name, says in SAYS.items():
        if held := [row["step"] for row in rows if row.get(f"guard/{name}")]:
            found.append({"name": name, "says": says, "first": held[0], "steps": len(held)})
    return sorted(found, key=lambda warning: warning["first"])
