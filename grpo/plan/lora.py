"""--plan of a run with adapters (models/lora.py): from the plan of a run that trains all weights."""

from dataclasses import replace
from math import prod

import torch

from grpo.config.parse import Config
from grpo.plan.items import Item
from grpo.plan.ranks import ADAPTERS, BASE, MERGED, SAMPLER
from grpo.plan.states import FLOAT, WHY, state_bytes
from models import lora
from models.config import ModelConfig
from models.qwen_vl import QwenVL


def adapted_layers(cfg: Config, model: ModelConfig) -> dict[str, torch.nn.Linear]:
    """{name: layer} of the layers that get an adapter, on the meta device. Raises ValueError."""
    with torch.device("meta"):
        policy = QwenVL(model)
    return lora.chosen(policy, cfg.lora.targets, cfg.freeze)


def with_frozen_tower(cfg: Config, model: ModelConfig) -> Config:
    """The settings, with a frozen tower if it has no adapter: then it keeps no activations."""
    seen = "vision" in cfg.freeze or any(name.startswith("visual.") for name in adapted_layers(cfg, model))
    return cfg if seen else replace(cfg, freeze=[*cfg.freeze, "vision"])


def with_adapters(plan, cfg: Config, model: ModelConfig):
    """The `Plan` of a run with adapters."""
    layers = adapted_layers(cfg, model).values()
    count = sum(plan.parameters.values())
    sides = [(cfg.lora.rank, layer.in_features) for layer in layers]
    sides += [(layer.out_features, cfg.lora.rank) for layer in layers]
    pairs = sum(map(prod, sides))
    states = state_bytes(cfg.optim.name, {str(i): torch.Size(side) for i, side in enumerate(sides)})
    matrices = sum(layer.weight.numel() for layer in layers)
    size = 2 if plan.dtype == "bfloat16" else FLOAT
    on_host = states if plan.on_host else 0
    millions = f"{pairs / 1e6:.1f} M numbers"
    base = Item(BASE, size * count, f"{count / 1e9:.2f} B x {size} bytes")
    adapters = Item(
        ADAPTERS, FLOAT * pairs + states - on_host, f"{millions} x {FLOAT} bytes; {WHY[cfg.optim.name]}"
    )
    reference = Item("reference", 0, "the policy without its adapters")
    in_rollout = Item(MERGED, size * matrices, f"of layers with an adapter, added up once: x {size} bytes")
    gradients = Item("gradients of adapters", FLOAT * pairs, f"{millions} x {FLOAT} bytes")

    def of_stage(stage):
        rollout = tuple(each for each in stage.rollout if each.name != SAMPLER)
        # the first line is that of the base's gradients
        learning = {moment: (gradients, *items[1:]) for moment, items in stage.learning.items()}
        rollout = (in_rollout, *rollout) if rollout else ()
        return replace(stage, rollout=rollout, learning=learning)

    held = (base, adapters, reference, *plan.held[3:])
    return replace(plan, held=held, stages=tuple(map(of_stage, plan.stages)), on_host=on_host)
