"""A run folder as train.py leaves it, invented: to test the report and to look at it (python
tests/grpo/monitor/fake_run.py FOLDER)."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from PIL import Image, ImageDraw

from grpo.config import parse
from grpo.storage.jsonl import Metrics

TASKS = ("Count", "Relation", "Depth", "Distance")
TERSE = "it must be that one . </think> <answer> ( {letter} ) </answer>"
LOOK = (
    "look : the red circle is at 1 4 and the blue square is at 5 2 . 1 is less than 5 , so the red circle is "
    "on the {side} . "
    "</think> <answer> ( {letter} ) </answer>"
)
AGAIN = (
    "look : the red circle is at 6 4 and the blue square is at 5 2 . but wait , let me look again : the red "
    "circle is at 1 4 . "
    "1 is less than 5 , so the red circle is on the {side} . </think> <answer> ( {letter} ) </answer>"
)


def picture(seed: int) -> str:
    """An 84 x 84 picture of a circle and a square, as a data URI."""
    draw = random.Random(seed)
    image = Image.new("RGB", (84, 84), (244, 241, 234))
    pen = ImageDraw.Draw(image)
    x, y = draw.randint(8, 24), draw.randint(30, 56)
    pen.ellipse((x, y, x + 18, y + 18), fill=(200, 60, 50))
    x, y = draw.randint(48, 62), draw.randint(8, 40)
    pen.rectangle((x, y, x + 16, y + 16), fill=(60, 100, 190))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def completion(draw: random.Random, skill: float, advantage: float | None) -> dict:
    """One completion of a policy with `skill` in [0, 1]."""
    kind = TERSE if draw.random() > skill + 0.3 else AGAIN if draw.random() < 0.2 + 0.6 * skill else LOOK
    right = draw.random() < (0.5 if kind is TERSE else 0.65 + 0.33 * skill)
    body = kind.format(letter="A" if right else "B", side="left" if right else "right")
    stopped = draw.random() < 0.9 + 0.1 * skill
    tokens = body.split() if stopped else body.split()[:-3]
    text = "<think> " + " ".join(tokens)
    parts = {"accuracy": float(right and stopped), "format": float(stopped)}
    tokens += ["<|endoftext|>"] if stopped else []
    clipped = [draw.random() < 0.03 for _ in tokens]
    logp = [-abs(draw.gauss(0, 1)) * (0.2 + 0.9 * (draw.random() < 0.2)) for _ in tokens]
    weight = [0.0 if c else (advantage or 0) * (1 + draw.gauss(0, 0.1)) / len(tokens) / 12 for c in clipped]
    kl = [abs(draw.gauss(0, 0.02)) * skill for _ in tokens]
    return {
        "tokens": tokens,
        "text": text,
        "parts": parts,
        "reward": sum(parts.values()),
        "advantage": advantage,
        "weight": weight,
        "logp": logp,
        "kl": kl,
        "clipped": clipped,
        "stopped": stopped,
    }


def question(seed: int, kind: str, step: int) -> dict:
    """A question with its picture and no completions yet."""
    return {
        "kind": kind,
        "step": step,
        "uid": f"{kind}-{seed}",
        "question": "Where is the red circle, seen from the blue square?",
        "task": TASKS[seed % 4],
        "choices": ["on its left", "on its right"],
        "answer": "on its left",
        "picture": picture(seed),
    }


def group(seed: int, step: int, skill: float, size: int) -> dict:
    """A question with `size` completions and their advantages."""
    rewards = [
        completion(random.Random(seed * 7919 + step * 31 + g), skill, None)["reward"] for g in range(size)
    ]
    mean = sum(rewards) / size
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (size - 1))
    found = question(seed, "train", step)
    advantages = [(r - mean) / (std + 1e-4) for r in rewards]
    found["completions"] = [
        completion(random.Random(seed * 7919 + step * 31 + g), skill, a) for g, a in enumerate(advantages)
    ]
    return found


def fake_run(folder: Path, steps: int = 100, size: int = 12) -> Path:
    """Write config.yaml, metrics.jsonl, samples.jsonl and summary.json of an invented run into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    parse.save(
        parse.load("shapes", [f"steps={steps}", f"group={size}", f"out={folder}", "name=shapes"]), folder
    )
    metrics, samples, draw = (
        Metrics(folder / "metrics.jsonl"),
        Metrics(folder / "samples.jsonl"),
        random.Random(0),
    )
    for step in range(steps + 1):
        skill = 1 / (1 + math.exp(-(step / steps - 0.35) * 11))
        row = {"step": step} | (_step(draw, step / steps, skill) if step else {})
        if step % max(1, steps // 4) == 0:
            row |= {
                "eval/accuracy": 0.49 + 0.44 * skill,
                "eval/format": 0.7 + 0.29 * skill,
                "eval/mean_length": 12 + 36 * skill,
                "eval/extraction_failure": 0.3 * (1 - skill),
            }
            row |= {
                f"eval/accuracy/{task}": min(1, 0.49 + 0.45 * skill + 0.03 * i)
                for i, task in enumerate(TASKS)
            }
            for seed in range(4):
                samples.write(
                    question(seed, "heldout", step)
                    | {"completions": [completion(random.Random(seed * 97 + step), skill, None)]}
                )
        if step and step % max(1, steps // 10) == 0:
            for seed in range(3):
                samples.write(group(100 + seed, step, skill, size))
        metrics.write(row)
    base = {
        "accuracy": 0.487,
        "accuracy/Count": 0.31,
        "accuracy/Relation": 0.52,
        "accuracy/Depth": 0.55,
        "accuracy/Distance": 0.57,
        "format": 0.71,
        "mean_length": 12.4,
        "extraction_failure": 0.21,
        "aha/self_correction": 0.19,
    }
    final = {
        "accuracy": 0.941,
        "accuracy/Count": 0.93,
        "accuracy/Relation": 0.97,
        "accuracy/Depth": 0.94,
        "accuracy/Distance": 0.92,
        "format": 0.99,
        "mean_length": 48.1,
        "extraction_failure": 0.004,
        "aha/self_correction": 0.83,
    }
    (folder / "summary.json").write_text(json.dumps({"base": base, "final": final, "seconds": 287.4}))
    return folder


def _step(draw: random.Random, done: float, skill: float) -> dict:
    def noisy(value: float, by: float = 0.03) -> float:
        return min(1.0, max(0.0, value + draw.gauss(0, by)))

    row = {
        "reward": 1.1 + 0.85 * skill + draw.gauss(0, 0.05),
        "reward_std": 0.7 - 0.5 * skill,
        "frac_reward_zero_std": noisy(0.1 + 0.5 * skill),
        "rewards/accuracy/mean": noisy(0.48 + 0.45 * skill),
        "rewards/format/mean": noisy(0.7 + 0.29 * skill),
        "completions/mean_length": 16 + 34 * skill + draw.gauss(0, 1.5),
        "completions/min_length": 8 + 10 * skill,
        "completions/max_length": 62 + draw.random() * 6,
        "completions/clipped_ratio": noisy(0.06 * (1 - skill), 0.01),
        "entropy": 0.9 - 0.6 * skill + draw.gauss(0, 0.02),
        "kl": 0.12 * skill**2 + abs(draw.gauss(0, 0.002)),
        "grad_norm": math.exp(draw.gauss(-0.5, 0.3)),
        "learning_rate": 2.5e-4 * min(1, done * 20) * (1 - 0.9 * done),
        "loss": draw.gauss(0, 1e-3),
        "num_tokens": int(done * 2e6),
        "step_time": 1.6 + 1.3 * skill,
        "clip_ratio/low_mean": 0.0,
        "clip_ratio/high_mean": 0.0,
        "sampling/logp_gap_mean": 2e-7 * math.exp(draw.gauss(0, 0.2)),
        "sampling/logp_gap_max": 3e-6 * math.exp(draw.gauss(0, 0.3)),
        "aha/looking": noisy(0.4 + 0.58 * skill),
        "aha/self_correction": noisy(0.18 + 0.65 * skill),
        "aha/wrong_to_right": noisy(0.15 + 0.1 * math.sin(3 * skill), 0.02),
        "aha/right_to_wrong": noisy(0.05 * (1 - skill) + 0.02, 0.01),
        "time/rollout": 0.9 + skill,
        "time/learn": 0.7 + 0.3 * skill,
        "completions/count": 48,
        "completions/mean_length_right": 17 + 34 * skill + draw.gauss(0, 2),
        "completions/mean_length_wrong": 20 + 30 * skill + draw.gauss(0, 3),
        "completions/repetition": noisy(0.2 - 0.15 * skill, 0.02),
        "completions/loop_ratio": noisy(0.05 * (1 - skill), 0.01),
        "completions/identical_groups": 0.0,
        "guard/truncated": int(0.2 < done < 0.3),
        "guard/kl": 0,
    }
    for name, often in (("visualthinker", 0.25), ("vlaa", 0.18)):
        share, gain, sd = noisy(often + 0.65 * skill), draw.gauss(0.1, 0.15), 0.4
        row |= {
            f"aha/{name}": share,
            f"aha/{name}/accuracy_with": noisy(0.5 + 0.4 * skill),
            f"aha/{name}/accuracy_without": noisy(0.45 + 0.4 * skill),
            f"aha/{name}/gain": gain,
            f"aha/{name}/gain_sd": sd,
            f"aha/{name}/gain_low": gain - 0.3,
            f"aha/{name}/gain_high": gain + 0.3,
            f"aha/{name}/gain_groups": 3,
        }
    row |= {
        "aha/word/wait": noisy(0.18 + 0.65 * skill),
        "aha/word/check": noisy(0.05, 0.02),
        "aha/word/i_should_check": 0.0,
    }
    start = [0.30, 0.40, 0.50, 0.60]
    return row | {f"accuracy/{task}": noisy(a + (0.93 - a) * skill, 0.05) for a, task in zip(start, TASKS)}


if __name__ == "__main__":
    from grpo.monitor.report import write_curves, write_report

    made = fake_run(Path(sys.argv[1]))
    print(write_curves(made), write_report(made))
