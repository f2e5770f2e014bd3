"""Guards: what goes wrong in a run of GRPO, seen in the last lines of metrics.jsonl, and said once in plain
words with what to do.

A guard is a pure function of metrics, so a resumed run says and writes what an undisturbed one does. It holds
where a condition was met in each of the last so
many steps: one bad step is noise. Guards warn and change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Guard:
    """Holds if each of the last `steps` lines of metrics is `bad`. says: what happened, and what to do."""

    steps: int
    # of a line, given as a function: metric → number (nan where there is none)
    bad: Callable[[Callable[[str], float]], bool]
    says: str


GUARDS = {
    "kl": Guard(
        3,
        lambda at: at("kl") > 2.0,
        "the policy has been more than 2 nats per token away from its reference for 3 steps; it may write "
        "gibberish soon. "
        "Lower optim.lr or raise loss.kl_coef, and start again from the base or from an earlier checkpoint",
    ),
    "no_reward": Guard(
        20,
        lambda at: at("reward") == 0 and at("reward_std") == 0,
        "no completion has earned anything in 20 steps, so nothing is learned. Read some in samples.jsonl: "
        "most often the format is never met, or "
        "completions are cut before they answer. Raise cap, take another template, or imitate first "
        "(method=sft)",
    ),
    "truncated": Guard(
        5,
        lambda at: at("completions/clipped_ratio") == 1,
        "every completion of the last 5 steps was cut off by the cap; none came to its end. "
        "Raise cap, and check that the stop ids in generation_config.json are the tokenizer's",
    ),
    "entropy": Guard(
        10,
        lambda at: at("entropy") < 0.01,
        "the entropy has been below 0.01 nats per token for 10 steps: the policy writes the same again and "
        "again and finds nothing new. If accuracy is where "
        "it should be, stop here; else lower optim.lr, raise loss.clip_high (DAPO: 0.28) or loss.kl_coef, "
        "or take harder questions",
    ),
    "identical": Guard(
        5,
        lambda at: at("completions/identical_groups") >= 0.5,
        "in half of the groups or more, all completions have been the same, token by token, for 5 steps; "
        "such groups have nothing to compare. "
        "Raise temperature or take harder questions; if it was so from the start, look at what the base "
        "does with these prompts",
    ),
}
NONFINITE = (
    "the loss or the gradient was not finite. This update was skipped, and its prompts are named in "
    "metrics.jsonl. It may happen once: the next time the run "
    "stops. If it does, lower optim.lr, and look at those prompts"
)
LONGEST = max(guard.steps for guard in GUARDS.values())


def check(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """The last lines of metrics.jsonl, the newest at the end (LONGEST are enough) → does each guard hold?"""
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
    """What the guards of a whole run said: {name, says, first, steps}, where `steps` counts the steps in
    which the guard held. For the report."""
    found = []
    for name, says in [(name, guard.says) for name, guard in GUARDS.items()] + [("nonfinite", NONFINITE)]:
        if held := [row["step"] for row in rows if row.get(f"guard/{name}")]:
            found.append({"name": name, "says": says, "first": held[0], "steps": len(held)})
    return sorted(found, key=lambda warning: warning["first"])
