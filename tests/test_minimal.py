"""docs/minimal.py is the algorithm of train.py: equal completions, rewards, losses, weights, to the bit."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from grpo.storage.checkpoint import complete
from models import weights

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "docs" / "minimal.py"
# two steps of warm-up, and two after it
STEPS, WARMUP, SEED = 4, 2, 3
SETTINGS = [
    "shapes",
    "model=tiny",
    "task=shapes",
    "template=shapes",
    f"seed={SEED}",
    f"steps={STEPS}",
    "device=cpu",
    "dtype=float32",
    # 1, 2  sample and score
    "prompts=8",
    "group=8",
    "cap=96",
    "temperature=1",
    "rewards={accuracy: 1, format: 1}",
    # 3  compare
    "advantage=std",
    "loss.weighting=token",
    # 4  learn: PPO's clip, no KL, one update of one micro-batch
    "loss.surrogate=clip",
    "loss.kl_coef=0",
    "loss.updates=1",
    "loss.sections=1",
    "loss.micro_tokens=1000000",
    "optim.name=adamw",
    "optim.lr=1e-4",
    f"optim.warmup={WARMUP}",
    "optim.decay=constant",
    "optim.weight_decay=0",
    "optim.max_grad_norm=1",
    # 5  keep: every completion and every step's weights
    "eval.items=0",
    "report.every=1",
    "report.prompts=8",
    "save.every=1",
    "save.keep=0",
]


@pytest.fixture(scope="module")
def run(run_once):
    """What train.py computed in each step with these settings: as `step_of`, with tokens as text."""
    out = run_once(*SETTINGS)
    read = lambda name: [json.loads(line) for line in (out / name).read_text("utf-8").splitlines()]
    steps = []
    rows_of_steps = [row for row in read("metrics.jsonl") if "loss" in row]
    for folder, metrics in zip(complete(out), rows_of_steps, strict=True):
        shown = [x for x in read("samples.jsonl") if x["kind"] == "train" and x["step"] == metrics["step"]]
        rows = [row for group in shown for row in group["completions"]]
        steps.append({name: [row[name] for row in rows] for name in ("tokens", "reward", "advantage")})
        steps[-1] |= {"loss": metrics["loss"], "norm": metrics["grad_norm"]}
        steps[-1]["weights"] = weights.load(folder).state_dict()
    assert len(steps) == STEPS
    return steps


def minimal(monkeypatch, steps: int, change: tuple[str, str] = ("", "")) -> list[dict]:
    """Run the program for some steps, with one piece of its text changed. -> what each step computed."""
    source = PROGRAM.read_text("utf-8")
    for old, new in (("STEPS = 30", f"STEPS = {steps}"), ("WARMUP = 5", f"WARMUP = {WARMUP}"), change):
        assert not old or source.count(old) == 1, f"docs/minimal.py has no {old!r}, or more than one"
        source = source.replace(old, new) if old else source
    # one more line at the end of its loop
    source += "\n    done.append(step_of(globals()))\n"
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), str(SEED)])
    names = {"__name__": "__main__", "__file__": str(PROGRAM), "done": [], "step_of": step_of}
    exec(compile(source, str(PROGRAM), "exec"), names)
    return names["done"]


def step_of(names: dict) -> dict:
    rollout = names["rollout"]
    rows = zip(rollout.tokens.flatten(0, 1).tolist(), rollout.length.flatten().tolist())
    return {
        "tokens": [[names["chat"].piece(token) for token in row[:length]] for row, length in rows],
        "reward": names["reward"].flatten().tolist(),
        "advantage": names["advantage"].flatten().tolist(),
        "loss": names["loss"],
        "norm": names["norm"].item(),
        "weights": {name: value.clone() for name, value in names["policy"].state_dict().items()},
    }


def difference(steps: list[dict], others: list[dict]) -> str | None:
    """What differs first, or None."""
    for number, (step, other) in enumerate(zip(steps, others), 1):
        for name in ("tokens", "reward", "advantage", "loss", "norm"):
            if step[name] != other[name]:
                return f"{name} of step {number}"
        assert step["weights"].keys() == other["weights"].keys()
        for name, value in step["weights"].items():
            if not torch.equal(value, other["weights"][name]):
                return f"{name} after step {number}"
    return None


def test_it_is_the_same_algorithm(run, monkeypatch, in_process):
    assert difference(minimal(monkeypatch, STEPS), run) is None


@pytest.mark.parametrize(
    "old, new, found",
    [
        ("LR * (step + 1) / WARMUP if step < WARMUP else LR", "LR", "after step 1"),
        ("temperature=1.0,\n", "temperature=0.9,\n", "tokens of step 1"),
        ('"format": 1.0', '"format": 0.5', "reward of step 1"),
        ("token_mean, tokens", "lambda length, *_: length * P * G, tokens", "loss of step 1"),
        ("group_advantages(reward)", "group_advantages(reward, eps=1e-3)", "advantage of step 1"),
        ("clip_gradient(policy, 1.0)", "clip_gradient(policy, 0.1)", "after step 1"),
        ("weight_decay=0.0", "weight_decay=0.1", "after step 1"),
    ],
)
def test_another_algorithm_is_noticed(run, monkeypatch, in_process, old, new, found):
    assert found in (difference(minimal(monkeypatch, 1, (old, new)), run) or "")


def test_it_is_short():
    assert len(PROGRAM.read_text("utf-8").splitlines()) <= 120


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recorded_runs_learn(seed):
    """docs/results/minimal.md: the table holds what the files say, and the reward rises by 0.3 or more."""
    text = (ROOT / f"docs/results/minimal/seed_{seed}.txt").read_text("utf-8")
    reward = [float(value) for value in re.findall(r"^step +\d+  reward ([\d.]+)", text, re.MULTILINE)]
    assert len(reward) == 30
    first, last = sum(reward[:5]) / 5, sum(reward[-5:]) / 5
    assert last - first >= 0.3
    row = f"| [{seed}](minimal/seed_{seed}.txt) | {first:.2f} | {last:.2f} | {last - first:.2f} |"
    assert row in (ROOT / "docs/results/minimal.md").read_text("utf-8")
