"""Does every recipe train, and go on from its checkpoint?    python tests/bench/every_recipe.py [RECIPE ...]

Each recipe is scaled down (tests/tiny_recipes.py): a tiny random checkpoint of its architecture, small data
made on the spot, and the settings that say how much there is. It makes two steps. The same command with a
third step goes on from the checkpoint. Checked: losses and gradients are finite, the first two steps stay as
they were in metrics.jsonl, and the third moves the weights. Prints a table and, as its last line, one JSON
object. The exit status is 1 if a recipe fails.
"""

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[part]) for part in (2, 1)]
import grpo.parallel.openmp

from tiny_recipes import bases, data_of, metrics, moved, overrides, small

import train
from grpo.config import parse
from grpo.storage.checkpoint import complete
from tests.bench.about import about


def quietly(command: list[str]) -> str:
    """Run train.py in this process. -> "" or what it said when it failed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main(command)
    return "" if status == 0 else f"exit status {status}: {said.getvalue().strip()[-300:]}"


def learned(out: Path) -> list[dict]:
    """The rows of metrics.jsonl that are steps, without their times and without an evaluation's scores."""
    rows = [row for row in metrics(out) if "loss" in row]
    return [{key: value for key, value in row.items() if not key.startswith("eval/")} for row in rows]


def tried(recipe: str, base: Path | str, data: dict, out: Path) -> dict:
    """Two steps, then a third one. -> {seconds, steps, loss, grad_norm, wrong: "" or what is wrong}."""
    start = time.perf_counter()
    command = small(recipe, base, data, out)
    found = {"architecture": "qwen3_vl" if "qwen3" in str(base) else "qwen2_vl", "wrong": quietly(command)}
    if not found["wrong"]:
        before = learned(out)
        second = complete(out)[-1]
        found["wrong"] = quietly([*command, "steps=3"])
    if not found["wrong"]:
        rows = learned(out)
        steps = [row["step"] for row in rows]
        last = rows[-1]
        found |= {"steps": steps, "loss": last["loss"], "grad_norm": last["grad_norm"]}
        checks = {
            "the steps are not 1, 2, 3": steps == [1, 2, 3],
            "a loss or gradient is not finite": all(
                math.isfinite(row[key]) for row in rows for key in ("loss", "grad_norm")
            ),
            "the first steps were written anew": rows[:2] == before,
            "the third step moved no weight": bool(moved(second, out)[0]),
        }
        found["wrong"] = "; ".join(said for said, holds in checks.items() if not holds)
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def table(found: dict[str, dict]) -> str:
    """The results as Markdown."""
    lines = [
        "| recipe | method | checkpoint | steps | loss at step 3 | gradient | seconds |",
        "|" + "---|" * 7,
    ]
    for recipe, each in found.items():
        cfg = parse.load(recipe)
        result = (
            f"**{each['wrong']}** | | "
            if each["wrong"]
            else f"1, 2; 3 | {each['loss']:+.3f} | {each['grad_norm']:.2f}"
        )
        lines.append(f"| `{recipe}` | {cfg.method} | {each['architecture']} | {result} | {each['seconds']} |")
    return "\n".join(lines)


def scaled(names: list[str]) -> str:
    """Which settings scale which of these recipes down, as a list."""
    which: dict[str, list[str]] = {}
    for name in names:
        for setting in overrides(name):
            which.setdefault(setting, []).append(name)
    shared = [setting for setting, recipes in which.items() if len(recipes) == len(names)]
    lines = [f"- all: `{' '.join(shared)}`"]
    for setting, recipes in which.items():
        if setting not in shared:
            others = [name for name in names if name not in recipes]
            few = f"all but {', '.join(others)}" if len(others) < len(recipes) else ", ".join(recipes)
            lines.append(f"- `{setting}`: {few}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="these only; default: all")
    args = parser.parse_args(argv)
    names = args.recipes or list(parse.recipes())
    with tempfile.TemporaryDirectory() as folder:
        base_of, data = bases(Path(folder) / "models"), data_of(Path(folder))
        found = {}
        for name in names:
            found[name] = tried(name, base_of(name), data, Path(folder) / "runs" / name)
            print(f"{name}: {found[name]['wrong'] or 'trains and goes on'}", file=sys.stderr, flush=True)
    print(table(found))
    print(f"\nSettings that scale a recipe down:\n\n{scaled(names)}")
    wrong = [name for name, each in found.items() if each["wrong"]]
    print(json.dumps({"bench": "every_recipe", "recipes": len(found), "wrong": wrong, "about": about()}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
