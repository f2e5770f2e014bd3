"""Records as tests/bench/findings.py writes them, made up: for the tests of the tables and figures."""

import math
import random

from data.shapes.world import CHANCE
from tests.bench.findings_tables import ARMS, COLUMNS, START, UNTRAINED, before

SETS = ("heldout", "pairs", "crowd", "large", "count", "noisy", "noisier", "noisy_count", "grey")
WORDS = "look : red x 3 so it is (A) </think> <answer> but wait let again .".split()
# accuracy and length at the end, by how an arm's name begins; the others end as the main job
ENDS = {
    "base": (0.44, 19),
    "best_prefix": (0.9, 26),
    "sft_": (0.6, 6),
    "base_0": (0.97, 60),
    "instruct": (0.4, 80),
    "llm": (0.48, 20),
    "cold": (0.7, 80),
    "long": (0.8, 90),
    "blind": (0.44, 12),
    "looks_0": (0.44, 6),
}


def record(finding: str, arm: str, seed: int) -> dict:
    """One made-up record; it depends on its arguments alone."""
    rng = random.Random(f"{finding}/{arm}/{seed}")
    accuracy, length = max(
        (name, end) for name, end in {"": (0.97, 42), **ENDS}.items() if arm.startswith(name)
    )[1]
    if arm.endswith(START):
        accuracy, length = accuracy / 2, length / 2
    accuracy = min(1.0, max(0.0, accuracy + rng.gauss(0, 0.015)))
    imitates = arm.startswith("sft_") and finding == "a"
    rl = not (imitates or arm in (*UNTRAINED, "cold") or arm.endswith(START))
    found = {"finding": finding, "arm": arm, "seed": seed, "base": "0123456789abcdef", "commit": "abc1234"}
    found["commands"] = [] if arm in UNTRAINED else [f"train.py shapes seed={seed} out=runs/{arm}"]
    found["minutes"] = 3.1 * bool(found["commands"])
    found["sets"] = {name: block(rng, accuracy, length, 400, 1) for name in SETS}
    found["sampled"] = {COLUMNS[finding][0]: block(rng, 0.97 * accuracy, length, 100, 8)}
    found["lengths"] = {
        "right": {str(n): rng.randint(5, 60) for n in range(int(0.7 * length), int(1.2 * length) + 2)},
        "wrong": {str(int(length) + 5): 40, "5": 25},
    }
    found["texts"] = [
        {"asked": f"How many {shape}s are there?", "text": f"<think> {arm} </think>", "right": seed == 0}
        for shape in ("star", "circle", "square")
    ]
    found["sound"] = 0.02 if arm.endswith(START) else 0.6 * accuracy
    found["passes"] = {
        str(2**n): 1 - (1 - found["sound"]) ** (2**n) for n in range(9 if finding in "ei" else 4)
    }
    if arm == "best_prefix":
        found["prefix"] = {"best": "look :", "items": 256, "right": {"look :": 250}}
    if imitates:
        found["curve"] = {"step": [1, 2], "nll": [1.0, 0.9]}
        found["evals"] = {"step": [0, 20, 40], "accuracy": [0.44, 0.5, accuracy], "length": [19, 8, length]}
        found["evals"]["step"][-1] *= 1 + 50 * (arm == "sft_long")
    if rl:
        found["curve"] = curve(rng, accuracy, length)
    if rl and finding in "abc":
        found["pushes"] = {
            str(step): {word: rng.gauss(0, 0.03) / (step + 1) ** 0.3 for word in WORDS}
            for step in (0, 20, 100)
        }
    return found


def block(rng: random.Random, accuracy: float, length: float, questions: int, samples: int) -> dict:
    """The scores of one set."""
    each = questions * samples // 4
    tasks = {task: [sum(rng.random() < accuracy for _ in range(each)), each] for task in CHANCE}
    looks = min(1.0, length / 30)
    return {
        "items": questions * samples,
        "questions": questions,
        "right": sum(right for right, _ in tasks.values()),
        "tasks": tasks,
        "length": length + rng.gauss(0, 0.5),
        "format": 0.98,
        "looks": looks,
        "again": looks / 2,
        "truncated": 0.01,
        "sound": 0.6 * accuracy,
    }


def curve(rng: random.Random, accuracy: float, length: float, steps: int = 40) -> dict:
    """The curves of training: they rise in an S. `again` is missing in the first step."""
    rise = [1 / (1 + math.exp(-(step - steps / 3) / 4)) for step in range(1, steps + 1)]
    return {
        "step": [*range(1, steps + 1)],
        "accuracy": [0.48 + (accuracy - 0.48) * x + rng.gauss(0, 0.02) for x in rise],
        "length": [19 + (length - 19) * x + rng.gauss(0, 1) for x in rise],
        "entropy": [0.7 - 0.4 * x + rng.gauss(0, 0.02) for x in rise],
        "looks": [0.4 + 0.6 * x for x in rise],
        "again": [None, *(0.1 + 0.3 * x for x in rise[1:])],
        "completions": [216] * steps,
    }


def records(seeds: int = 3) -> list[dict]:
    """All findings, in no order."""
    found = []
    for finding, arms in ARMS.items():
        begun = [arm for arm in arms if finding in "ei" or (finding == "b" and arm != "sft_0")]
        started = dict.fromkeys(map(before, begun))
        untrained = UNTRAINED if finding in ("main", "world", "noisier", "a") else ()
        found += [record(finding, arm, 0) for arm in untrained]
        found += [record(finding, arm, seed) for arm in (*arms, *started) for seed in range(seeds)]
    random.Random(0).shuffle(found)
    return found
