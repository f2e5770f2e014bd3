"""The gate of the built-in base model before GRPO:  python tests/bench/base.py [--model DIR] [--json FILE]

What does it see? The base predicts the readings in captions of fresh scenes, one by one. Counted is the share
of readings (x, y, size, shape, gap) whose likeliest word is right.

Does looking pay? It samples 16 completions of each held-out question. Among those with a readable answer, per
task: P(right | looked) - P(right | terse). GRPO can only prefer what is better, so the gate asks for more
than 0.3 on every task.

Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
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
from grpo.storage.model_folder import model_folder
from models import weights
from tests.bench.about import about


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the JSON object here as well")
    args = parser.parse_args()
    folder = model_folder(args.model)
    policy, chat = weights.load(folder), Chat(folder, template="shapes")
    seen = readings(policy, chat)
    print("readings right:  " + "   ".join(f"{unit} {share:.3f}" for unit, share in seen.items()))
    how = Asking(cap=96, samples=16, temperature=1.0, measure=looking.measure)
    answers = answer_all(policy, chat, Shapes("heldout", args.items), how)
    found = {"about": about(), "readings": seen, "tasks": {}}
    print(
        f"{'task':<10} {'looked':>7} {'again':>7} {'P(right|terse)':>15} {'P(right|looked)':>16} "
        f"{'P(right|again)':>15} {'gate':>7}"
    )
    for task in TASKS:
        rows = [a for group in answers for a in group if a.task == task]
        readable = [a for a in rows if a.letter]
        share = {
            name: sum(a.correct for a in part) / max(len(part), 1)
            for name, part in (
                ("terse", [a for a in readable if not a.measured["looking"]]),
                ("looked", [a for a in readable if a.measured["looking"]]),
                ("again", [a for a in readable if a.measured["self_correction"]]),
            )
        }
        found["tasks"][task] = share | {
            "accuracy": sum(a.correct for a in rows) / len(rows),
            "format": sum(a.well_formed for a in rows) / len(rows),
        }
        looked, again = (
            sum(a.measured[name] for a in rows) / len(rows) for name in ("looking", "self_correction")
        )
        print(
            f"{task:<10} {looked:7.3f} "
            f"{again:7.3f} {share['terse']:15.3f} "
            f"{share['looked']:16.3f} {share['again']:15.3f} {share['looked'] - share['terse']:7.3f}"
        )
    rows = [a for group in answers for a in group]
    found |= {
        "accuracy": sum(a.correct for a in rows) / len(rows),
        "format": sum(a.well_formed for a in rows) / len(rows),
    }
    print(f"sampled: accuracy {found['accuracy']:.3f}, format {found['format']:.3f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
