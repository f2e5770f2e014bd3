"""Recipes scaled down: a tiny random checkpoint, small data made on the spot, and the settings that say how
much there is. Nothing else of a recipe is touched."""

import json
from pathlib import Path

import torch
from qwen import blink_file, chains_folder, jsonl_folder, problems_file, qwen_folder, sat_file

from grpo.config import parse
from grpo.storage.checkpoint import complete
from grpo.storage.model_folder import load_model

SMALL = [
    "steps=2",
    "prompts=2",
    "group=3",
    "cap=40",
    "device=cpu",
    "dtype=float32",
    "eval.items=2",
    "eval.every=0",
    "eval.cap=4",
    "save.every=1",
    "save.keep=0",
    "optim.warmup=0",
    "optim.lr=1e-3",
]
# of pictures that are not the built-in world's
PIXELS = ["max_pixels=6272", "min_pixels=3136"]
# a random policy never answers right, so it is paid for its length as well
PAID = ["rewards.length=100"]


def data_of(folder: Path) -> dict[str, Path]:
    """{task: a file or folder in its layout}, made here."""
    sat = sat_file(folder / "SAT_train.parquet")
    cold = chains_folder(folder / "cold")
    return {
        "sat": sat,
        "sat_paper": sat,
        "jsonl": jsonl_folder(folder / "mine", documents=True),
        "vision_r1": problems_file(folder / "train.parquet"),
        "vision_r1_cold": cold,
        "vision_r1_cold_answers": cold,
        "blink": blink_file(folder / "val-00000-of-00001.parquet"),
    }


def bases(folder: Path):
    """recipe -> the tiny twin of its model; the built-in model is its own."""
    made = {}

    def base_of(recipe: str) -> Path | str:
        if "tiny" in (model := parse.load(recipe).model):
            return model
        kind = "qwen3_vl" if "Qwen3-VL" in parse.load(recipe).model else "qwen2_vl"
        if kind not in made:
            made[kind] = qwen_folder(folder / kind, kind)
        return made[kind]

    return base_of


def overrides(recipe: str) -> list[str]:
    """The settings that scale a recipe down."""
    cfg = parse.load(recipe)
    own = [*SMALL, *(PAID if cfg.method == "grpo" else []), *(PIXELS if "tiny" not in cfg.model else [])]
    if cfg.stages:
        stages = [f"{{until: {i + 1}, group: 4, cap: {12 + 8 * i}}}" for i in range(len(cfg.stages))]
        own.append(f"stages=[{', '.join(stages)}]")
    if cfg.method == "sft":
        # its documents are up to that long
        own.append("cap=128")
    if cfg.max_rounds > 2:
        own.append("max_rounds=2")
    if cfg.loss.minibatches > 2:
        own.append(f"prompts={cfg.loss.minibatches}")
    return own


def small(recipe, base, data, out, *settings) -> list[str]:
    """The command line of a recipe scaled down."""
    task = parse.load(recipe).task
    where = [f"data={data[task]}"] if task in data else []
    return [recipe, f"model={base}", *where, f"out={out}", *overrides(recipe), *settings]


def metrics(folder: Path) -> list[dict]:
    """The rows of a run, without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "step_time" and not k.startswith("time/")} for row in rows]


def moved(base, folder) -> tuple[set[str], set[str]]:
    """Names of the weights that training changed, and of those it did not: bit for bit."""
    # an adapter is added to its base
    before, after = (load_model(each).state_dict() for each in (base, complete(folder)[-1]))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    return changed, before.keys() - changed
