"""Guards: signs that a run of GRPO goes wrong, found in the last rows of metrics.jsonl.

A guard is a pure function of metrics, so a resumed run warns and writes as an undisturbed one does. It holds
where a condition is true in each of the last steps: one bad step is noise. Guards warn once, and change
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Guard:
    """Holds if each of the last `steps` rows is `bad`. bad: of a function from a metric's name to its number
    (nan without one). says: what happened, and what to do."""

    steps: int
    bad: Callable[[Callable[[str], float]], bool]
    says: str


GUARDS = {
    "kl": Guard(
        3,
        lambda at: at("kl") > 2.0,
        "the policy has been more than 2 nats per token away from its reference for 3 steps; it may write "
        "gibberish soon. Lower optim.lr or raise loss.kl_coef, and start again from the base or from an "
        "earlier checkpoint",
    ),
    "no_reward": Guard(
        20,
        lambda at: at("reward") == 0 and at("reward_std") == 0,
        "no completion has earned anything in 20 steps, so nothing is learned. Read some in samples.jsonl: "
        "most often the format is never met, or completions are cut before they answer. Raise cap, take "
        "another template, or imitate first (method=sft)",
    ),
    "truncated": Guard(
        5,
        lambda at: at("completions/clipped_ratio") == 1,
        "every completion of the last 5 steps was cut off by the cap; none came to its end. Raise cap, and "
        "check that the stop ids in generation_config.json are the tokenizer's",
    ),
    "entropy": Guard(
        10,
        lambda at: at("entropy") < 0.01,
        "the entropy has been below 0.01 nats per token for 10 steps: the policy repeats itself and finds "
        "nothing new. If accuracy is where it should be, stop here; else lower optim.lr, raise "
        "loss.clip_high (DAPO: 0.28) or loss.kl_coef, or take harder questions",
    ),
    "identical": Guard(
        5,
        lambda at: at("completions/identical_groups") >= 0.5,
        "in half of the groups or more, all completions have been the same, token by token, for 5 steps; "
        "such groups have nothing to compare. Raise temperature or take harder questions; if it was so from "
        "the start, look at what the base does with these prompts",
    ),
}
NONFINITE = (
    "the loss or the gradient was not finite. This update was skipped, and its prompts are named in "
    "metrics.jsonl. It may happen once: the next time the run stops. If it does, lower optim.lr, and look "
    "at those prompts"
)
LONGEST = max(guard.steps for guard in GUARDS.values())


def check(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether each guard holds, from the last rows of metrics.jsonl, the newest last; LONGEST rows are "
    "enough."""
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
    for name, says in [*((name, guard.says) for name, guard in GUARDS.items()), ("nonfinite", NONFINITE)]:
        if held := [row["step"] for row in rows if row.get(f"guard/{name}")]:
            found.append({"name": name, "says": says, "first": held[0], "steps": len(held)})
    return sorted(found, key=lambda warning: warning["first"])
