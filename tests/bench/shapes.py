"""Everything that docs/results/shapes.md reports, in one command:  python tests/bench/shapes.py [--out
runs/measured] [--seeds 0 1 2]

Runs the recipe `shapes` on each seed and once blind, then asks the base and the trained policies: greedy on
4,000 held-out scenes and on 400 with unseen pairs, with the picture withheld, with the second look banned; 8
sampled completions of 400 questions, and 64 of 200 for pass@k. The base is also asked with "look :" given,
the control. Prints one line a measurement; the last line is one JSON object, which is also written to
measured.json there (docs/results/shapes/ has the recorded one). A measurement whose file is there already is
read, not repeated.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.bench.about import about


def run(*command: str) -> float:
    """Run a command of this repository, echo it, stop where it fails. -> seconds."""
    print("$ python " + " ".join(command), flush=True)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    out = (ROOT / args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)

    runs = {f"seed{seed}": [f"seed={seed}"] for seed in args.seeds} | {"blind": ["blind=true"]}
    for name, settings in runs.items():
        if not (out / name / "summary.json").exists():
            run("train.py", "shapes", f"out={out / name}", *settings)

    asked = {
        "heldout": ["--items", "4000", "--blind", "--ban", "but"],
        "pairs": ["--split", "pairs", "--items", "400"],
        "eight": ["--items", "400", "--samples", "8"],
        "samples": ["--items", "200", "--samples", "64"],
    }
    found: dict[str, dict] = {}
    for model in ("base", *runs):
        for kind, settings in asked.items():
            if kind == "samples" and model not in ("base", "seed0"):
                continue
            # the control: what the base does when its first two words are given
            if model == "base" and kind in ("heldout", "pairs"):
                settings = [*settings, "--prefix", "look :"]
            file = out / f"{model}-{kind}.json"
            if not file.exists():
                run(
                    "evaluate.py",
                    "--model",
                    "tiny" if model == "base" else str(out / model),
                    "--task",
                    "shapes",
                    "--json",
                    str(file),
                    *settings,
                )
            answers = json.loads(file.read_text())
            for name, block in {
                kind: answers,
                **{f"{kind} {key}": more for key, more in answers["more"].items()},
            }.items():
                found.setdefault(model, {})[name] = block["scores"]
                print(f"{model:<6} {name:<16} " + brief(block["scores"]), flush=True)
    for name in runs:
        found[name]["summary"] = json.loads((out / name / "summary.json").read_text())
        found[name]["seconds"] = found[name]["summary"]["seconds"]
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        found[name]["gap_max"] = max(
            row["sampling/logp_gap_max"] for row in rows if "sampling/logp_gap_max" in row
        )
        print(f"{name:<6} {found[name]['seconds']:.0f} s, largest log-prob gap {found[name]['gap_max']:.2e}")
    found["about"] = about()
    (out / "measured.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


def brief(scores: dict) -> str:
    """The figures of one evaluation on one line."""
    line = f"accuracy {scores['accuracy']:.3f} [{scores['interval'][0]:.3f}, {scores['interval'][1]:.3f}]  "
    line += "  ".join(f"{task} {block['accuracy']:.3f}" for task, block in scores["tasks"].items())
    line += f"  format {scores['format']:.3f}  length {scores['mean_length']:.1f}"
    line += "".join(f"  {name} {share:.3f}" for name, share in scores["measured"].items())
    if "pass@k" in scores:
        line += "\n" + " " * 24 + "  ".join(f"pass@{k} {v['value']:.3f}" for k, v in scores["pass@k"].items())
    return line


if __name__ == "__main__":
    main()
