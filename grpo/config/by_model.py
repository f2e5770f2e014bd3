"""Settings that go with the model, for recipes with `by_model: true`: template, pixels, lengths, rate.

    defaults  <  by_model.yaml  <  base recipe  <  recipe  <  command line

The table is a list of rules with a reason each. What it chose is printed when a run starts, and written with
its reasons into config.yaml.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from data import templates
from grpo.storage import adapter
from grpo.storage.model_folder import model_folder
from models.config import ModelConfig
from models.qwen_vl import QwenVL

if TYPE_CHECKING:
    from grpo.config.settings import Config

RULES: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
# of a model: what says its size and how it is asked
FILES = ("config.json", "adapter_config.json", templates.RECORD, *templates.FILES)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)B\b")


@dataclass(frozen=True)
class Facts:
    """What the rules ask of a model. size: billions of parameters. kind: built-in, base, instruct, thinking.
    template: what a trained policy was asked with, "" for other models."""

    size: float
    kind: str
    family: str
    template: str = ""


@functools.lru_cache(maxsize=8)
def facts_of(model: str, revision: str | None = None) -> Facts:
    """The facts of a model of the setting `model`. A name on the hub that says its size ("2B") is not looked
    up. Raises ValueError."""
    if model == "tiny":
        return Facts(_billions(model_folder(model)), "built-in", "qwen2")
    if not Path(model).exists() and (named := _SIZE.search(model)):
        kinds = [kind for kind in ("thinking", "instruct") if kind in model.lower()]
        family = "qwen3" if "qwen3" in model.lower() else "qwen2"
        return Facts(float(named[1]), kinds[0] if kinds else "base", family)
    folder = model_folder(model, revision, files=FILES)
    trained = templates.record(folder).get("settings", {}).get("template", "")
    if adapter.is_adapter(folder):
        values = adapter.read_config(folder)
        base = facts_of(values["base_model_name_or_path"], values.get("revision"))
        return Facts(base.size, base.kind, base.family, trained or base.template)
    family = "qwen3" if ModelConfig.from_folder(folder).architecture == "qwen3_vl" else "qwen2"
    return Facts(_billions(folder), _kind(folder), family, trained)


def _billions(folder: Path) -> float:
    with torch.device("meta"):
        policy = QwenVL(ModelConfig.from_folder(folder))
    return sum(parameter.numel() for parameter in policy.parameters()) / 1e9


def _kind(folder: Path) -> str:
    if not templates.renders_turns(folder):
        return "base"
    with suppress(ValueError):
        if templates.open_template(templates.OWN, folder).opening:
            return "thinking"
    return "instruct"


def choices(facts: Facts, rank: int | None = None) -> dict[str, tuple[Any, str]]:
    """{key: (value, why)} of all rules that hold.  rank: the setting lora.rank, None if nothing says it."""
    found: dict[str, tuple[Any, str]] = {}
    for rule in RULES:
        adapters = bool(found.get("lora.rank", (0, ""))[0] if rank is None else rank)
        if all(_holds(name, wanted, facts, adapters) for name, wanted in rule["if"].items()):
            found |= {key: (value, rule["why"]) for key, value in rule["set"].items()}
    if facts.template:
        found["template"] = (facts.template, "what the policy was trained with")
    return found


def _holds(name: str, wanted: Any, facts: Facts, adapters: bool) -> bool:
    if name in ("above", "below"):
        return (facts.size >= wanted) == (name == "above")
    return (adapters if name == "adapters" else getattr(facts, name)) == wanted


def filled(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings over those that go with their model. Raises ValueError."""
    # config.yaml of a run has all of them
    if all(key in flat for rule in RULES for key in rule["set"]):
        return dict(flat)
    facts = facts_of(flat.get("model", "tiny"), flat.get("revision"))
    chosen = choices(facts, flat.get("lora.rank"))
    return {key: value for key, (value, _) in chosen.items()} | dict(flat)


def explained(config: Config) -> list[str]:
    """A line for each reason, "key=value key=value: why", of the settings that went with the model, without
    those that a recipe or the command line changed. Raises ValueError."""
    if not config.by_model:
        return []
    lines: dict[str, list[str]] = {}
    for key, (value, why) in choices(facts_of(config.model, config.revision), config.lora.rank).items():
        found: Any = config
        for name in key.split("."):
            found = getattr(found, name)
        if found == value:
            text = yaml.safe_dump(value, default_flow_style=True).partition("\n")[0]
            lines.setdefault(why, []).append(f"{key}={text}")
    return [f"{' '.join(settings)}: {why}" for why, settings in lines.items()]
