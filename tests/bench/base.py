"""The gate of the built-in base model before GRPO:  python tests/bench/base.py [--model DIR] [--json FILE]
[--make --seeds 0 1]

What does it see? The base predicts the readings in captions of fresh scenes, one by one. Counted is the share
of readings (x, y, size, shape, gap) whose likeliest word is right.

Does looking pay? It samples 16 completions of each held-out question. Among those with a readable answer, per
task: P(right | looked) - P(right | terse). GRPO can only prefer what is better, so the gate asks for more
than 0.3 on every task.

With --make it first trains a base from random weights with the recipe tiny_base, for each seed, and measures
these: `made` in the JSON has a seed's minutes (of its steps, by the clock), gate and readings. A stopped
command goes on where it was.

Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import grpo.parallel.openmp

import torch

from data.chat import Chat
from data.shapes import looking
from data.shapes.documents import described, gaps
from data.shapes.world import TASKS, Shapes, draw, free_pairs, scatter
from data.types import Example
from grpo.batch import collate_prompts
from grpo.evaluation.answers import Asking, answer_all
from grpo.sft import fit_documents, pad_documents
from grpo.storage.jsonl import read
from grpo.storage.model_folder import model_folder
from models import weights
from tests.bench.about import about, weights_hash

# P(right | looked) - P(right | terse), at least, on every task
GATE = 0.3


@torch.no_grad()
def readings(policy, chat, scenes: int = 300) -> dict[str, float]:
    """Teacher-forced accuracy of each kind of reading on fresh scenes."""
    rng, right, asked = random.Random("gate"), {}, {}
    for kind in (described, gaps):
        examples = []
        for i in range(scenes):
            scene = scatter(rng, free_pairs(rng, rng.randint(3, 5)))
            question, text = kind(scene, rng)
            pictures, extra = (partial(draw, scene),), {"documents": (text,)}
            examples.append(Example(f"gate/{i}", question, (), text, pictures=pictures, extra=extra))
        documents = [
            fit_documents(chat, e, cap=128, too_long="error")[0].extra["documents"] for e in examples
        ]
        tokens, length = pad_documents(documents)
        prompts = collate_prompts([chat.prompt(e) for e in examples], image_token=chat.image_token)
        guess = policy.logits(policy(prompts, tokens, length)).argmax(-1)
        for unit in ("x", "y", "size", "shape", "gap"):
            after = torch.zeros_like(tokens, dtype=torch.bool)
            after[..., 1:] = tokens[..., :-1] == chat.encode(unit)[0]
            if after.any():
                right[unit] = right.get(unit, 0) + int((guess == tokens)[after].sum())
                asked[unit] = asked.get(unit, 0) + int(after.sum())
    return {unit: right[unit] / asked[unit] for unit in right}


def shares(answers: list) -> dict[str, float]:
    """P(right) of the completions with a readable answer, by behaviour, and what the gate asks for."""
    readable = [a for a in answers if a.letter]
    parts = {
        "terse": [a for a in readable if not a.measured["looking"]],
        "looked": [a for a in readable if a.measured["looking"]],
        "again": [a for a in readable if a.measured["self_correction"]],
    }
    found = {name: sum(a.correct for a in part) / max(len(part), 1) for name, part in parts.items()}
    return found | {
        "gate": found["looked"] - found["terse"],
        "looking": sum(a.measured["looking"] for a in answers) / len(answers),
        **scored(answers),
    }


def scored(answers: list) -> dict[str, float]:
    """The shares that are right and well formed."""
    return {
        "accuracy": sum(a.correct for a in answers) / len(answers),
        "format": sum(a.well_formed for a in answers) / len(answers),
    }


def measured(model: str | Path, items: int) -> dict:
    """The readings and the gate of one model, printed as a table."""
    folder = model_folder(model)
    policy, chat = weights.load(folder), Chat(folder, template="shapes")
    seen = readings(policy, chat)
    print("readings right:  " + "   ".join(f"{unit} {share:.3f}" for unit, share in seen.items()))
    how = Asking(cap=96, samples=16, temperature=1.0, measure=looking.measure)
    answers = [a for group in answer_all(policy, chat, Shapes("heldout", items), how) for a in group]
    tasks = {task: shares([a for a in answers if a.task == task]) for task in TASKS}
    for number, (task, row) in enumerate(tasks.items()):
        if number == 0:
            print(f"{'task':<10}" + "".join(f"{name:>10}" for name in row))
        print(f"{task:<10}" + "".join(f"{value:10.3f}" for value in row.values()))
    gate = {task: row.pop("gate") for task, row in tasks.items()}
    passed = all(value > GATE for value in gate.values())
    print(f"the gate, more than {GATE} on every task: {'passed' if passed else 'NOT passed'}")
    where = about() | {"base": weights_hash(folder)[:12]}
    found = {"about": where, "readings": seen, "tasks": tasks, "gate": gate, "passed": passed}
    return found | scored(answers)


def make(seed: int, out: Path) -> tuple[Path, float]:
    """Train a base from random weights, or go on with it. -> its run folder, and the minutes of its steps."""
    folder = out / f"seed{seed}"
    command = ["train.py", "tiny_base", f"seed={seed}", f"out={folder}"]
    print("$ python " + " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return folder, sum(row.get("step_time", 0.0) for row in read(folder / "metrics.jsonl")) / 60


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the JSON object here as well")
    parser.add_argument("--make", action="store_true", help="train bases, and measure these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bases", help="folder of the runs")
    args = parser.parse_args()
    found: dict = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    if args.make:
        for seed in args.seeds:
            folder, minutes = make(seed, args.out)
            one = {"seed": seed, "minutes": round(minutes, 1), **measured(folder, args.items)}
            found.setdefault("made", {})[str(seed)] = one
    else:
        found |= measured(args.model, args.items)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
