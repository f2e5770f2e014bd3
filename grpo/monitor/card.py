"""README.md of an exported policy: what it learned from, how, what changed, and how to ask it.

Everything is read from the run folder. Paths of the machine that trained are left out: a card is published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml
from PIL import Image

from data.chat import Chat
from data.sources.table import hook_of
from data.templates import RECORD, TRAINED
from data.types import Example
from grpo.config import Config, load_run
from grpo.evaluation.statistics import wilson
from grpo.evaluation.tables import interval, markdown
from grpo.monitor.curves import PAGE
from grpo.storage.jsonl import read


def run_of(folder: Path) -> Path | None:
    """The run that a checkpoint or a folder of its weights is of, None for another folder."""
    run = folder.resolve().parent.parent
    own = (run / "config.yaml").is_file() and folder.resolve().parent.name in ("checkpoints", "weights")
    return run if own else None


def card(checkpoint: Path, name: str) -> str:
    """The text of README.md for a checkpoint of a run. name: of the exported folder. Raises ValueError."""
    run = checkpoint.resolve().parent.parent
    cfg = load_run(run)
    step = int(checkpoint.resolve().name.rpartition("_")[2])
    base = shown(cfg.model)
    data = f"`{shown(cfg.data)}`" if cfg.data else f"the built-in task `{cfg.task}`"
    how = (
        f"GRPO, {cfg.prompts} questions × {cfg.group} completions a step,"
        if cfg.method == "grpo"
        else "imitation"
    )
    filled = {
        "name": cfg.name or name,
        "base": f"`{base}`",
        "base_model": f"base_model: {base}\n" if base == cfg.model and "/" in base else "",
        "summary": f"`{base}`, trained by {how} for {step} steps on {data}, with Glimpse.",
        "scores": scores(cfg, run, step),
        "cap": str(cfg.cap),
        "snippet": snippet(checkpoint, cfg, name),
        "made": made(run),
        "config": yaml.safe_dump(published(cfg.to_dict()), sort_keys=False, allow_unicode=True).rstrip(),
        "data": data,
        "rewards": ", ".join(f"`{shown(part)}` × {weight:g}" for part, weight in cfg.rewards.items())
        or "none",
    }
    return Template((PAGE / "card.md").read_text("utf-8")).substitute(filled)


def snippet(folder: Path, cfg: Config, name: str) -> str:
    """Python that asks the policy about a picture, as it was trained, with transformers alone."""
    # a checkpoint holds the template that it was trained with
    template = TRAINED if (folder / RECORD).is_file() else cfg.template
    chat = Chat(folder, template=template, max_prompt=1 << 30)
    blank = Image.new("RGB", (64, 64))
    prompt = chat.prompt(Example("card", "{question}", (), "-", pictures=(lambda: blank,))).text
    ask = Template((PAGE / "ask.py.txt").read_text("utf-8"))
    return ask.substitute(
        folder=json.dumps(name), prompt=json.dumps(prompt, ensure_ascii=False), cap=cfg.cap
    ).rstrip()


def scores(cfg: Config, run: Path, step: int) -> str:
    """The table of the first evaluation and of the last one up to `step`, with 95 % intervals."""
    rows = [row for row in read(run / "metrics.jsonl") if "eval/accuracy" in row and row["step"] <= step]
    if len(rows) < 2:
        return "It was not evaluated."
    base, final = rows[0], rows[-1]
    hook = hook_of(cfg.task)
    names = ["accuracy", *sorted(key[5:] for key in final if key.startswith("eval/accuracy/"))]
    names += [f"{split}/accuracy" for split in hook.sets] + ["format", "mean_length"]
    table = []
    for name in names:
        if f"eval/{name}" not in base or f"eval/{name}" not in final:
            continue
        count = final.get(
            "eval/" + (name.replace("accuracy", "questions") if "accuracy" in name else "questions")
        )
        cells = [cell(row[f"eval/{name}"], count, share=name != "mean_length") for row in (base, final)]
        table.append([name.replace("_", " "), count or "", *cells])
    when = f"before training and after step {final['step']}"
    return f"Held-out questions, answered greedily, {when}.\n\n" + markdown(
        ["", "n", "before", "after"], table
    )


def cell(value: float, count: int | None, share: bool) -> str:
    """A number; a share in percent with its 95 % interval, if it is of `count` questions."""
    if not share:
        return f"{value:.1f}"
    return f"{100 * value:.1f} %" + (f" ({interval(*wilson(value * count, count))})" if count else "")


def made(run: Path) -> str:
    """A sentence on base, versions and code, from the notes of the run folder."""
    lines = []
    notes = {
        name: json.loads((run / name).read_text("utf-8"))
        for name in ("base.json", "inputs.json")
        if (run / name).is_file()
    }
    if commit := notes.get("base.json", {}).get("revision"):
        lines.append(f"The base is of commit `{commit}`.")
    if used := notes.get("inputs.json", {}).get("with"):
        versions = ", ".join(f"{key} {value}" for key, value in used.items())
        lines.append(f"Made with {versions}.")
    return " ".join([*lines, "These are all settings; paths are shortened to names."])


def published(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the run's folder, and with names in place of paths."""
    plain = {key: value for key, value in tree.items() if key not in ("out", "log")}
    plain |= {key: shown(plain[key]) for key in ("model", "data", "init") if plain.get(key)}
    return plain | {"rewards": {shown(name): weight for name, weight in tree["rewards"].items()}}


def shown(name: str) -> str:
    """A path as its last part; what is no path, such as a name on the hub, as it is."""
    local = name.startswith(("/", ".", "~")) or "\\" in name or Path(name.partition(":")[0]).exists()
    return Path(name).name if local else name
