"""Adapters (models/lora.py) on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

A checkpoint of a LoRA run is such a folder: `peft`, vLLM and transformers open it on the base that it names.
Read: LoRA adapters of the blocks' linear layers, all of one rank. What else PEFT can do is an error.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import lora, weights
from models.qwen_vl import QwenVL
from models.weights import RENAMED, OntoCPU, hub_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# the wrapper that PEFT puts around transformers' model
PREFIX = "base_model.model."
# what changes the computation and is not computed here: {key: the only value}
MUST = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "lora_bias": False}
MUST |= {"fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
MUST |= {"layer_replication": None, "trainable_token_indices": None, "target_parameters": None}


@dataclass
class Adapter:
    """All adapters of a policy. tensors: {"model.layers.0.self_attn.q_proj.lora_A.weight": (r, in), ...},
    with the hub's names of the layers."""

    rank: int
    alpha: float
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors."""
        return self.tensors

    def to(self, dtype: torch.dtype) -> "Adapter":
        """The same in another dtype."""
        return replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    @property
    def layers(self) -> list[str]:
        """The names of the adapted layers."""
        return sorted({name.partition(".lora_")[0] for name in self.tensors})

    def pairs(self, policy: QwenVL, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
        """{layer: (A, B)}, for `lora.attach`. Raises ValueError, naming the file and the tensor, for a layer
        that the policy has not, and for another shape."""
        layers = lora.candidates(policy)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.layers:
            layer = layers.get(name)
            if layer is None:
                raise ValueError(f"{folder / WEIGHTS}: the model has no linear layer {name!r} in its blocks")
            shapes = {"A": (self.rank, layer.in_features), "B": (layer.out_features, self.rank)}
            for part, shape in shapes.items():
                tensor = self.tensors.get(key := f"{name}.lora_{part}.weight")
                if tensor is None or tensor.shape != shape:
                    there = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                    raise ValueError(f"{folder / WEIGHTS}: tensor {key!r} of shape {shape} is {there}")
            found[name] = self.tensors[f"{name}.lora_A.weight"], self.tensors[f"{name}.lora_B.weight"]
        return found


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (folder / CONFIG).is_file()


def read_config(folder: Path) -> dict:
    """adapter_config.json. Raises ValueError, naming file and key, for what is not computed here."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("base_model_name_or_path"), str):
        raise ValueError(f"{path}: key 'base_model_name_or_path' must name the base model")
    for key, only in MUST.items():
        if values.get(key, only) not in (only, None, *([[]] if only is None else [])):
            raise ValueError(f"{path}: {key} is {values[key]!r}; only {only!r} is supported")
    for key, kind in (("r", int), ("lora_alpha", (int, float))):
        if isinstance(values.get(key), bool) or not isinstance(values.get(key), kind) or values[key] <= 0:
            raise ValueError(f"{path}: {key} must be a number above 0, got {values.get(key)!r}")
    return values


def read(folder: Path) -> Adapter:
    """The adapter of a folder. Raises ValueError that names the file."""
    values = read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS}: missing or damaged ({error})") from error
    found = {hub_name(key.removeprefix(PREFIX)): tensor for key, tensor in tensors.items()}
    for name in found or [""]:
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(f"{folder / WEIGHTS}: tensor {name!r} is not of a LoRA adapter")
    return Adapter(values["r"], float(values["lora_alpha"]), found)


def write(policy: QwenVL | Adapter, folder: Path, base: Path) -> list[Path]:
    """Write a policy as `weights.save` does, or an adapter of the model in the folder `base`. -> the files
    written. An adapter on the meta device belongs to another rank."""
    if isinstance(policy, QwenVL):
        return weights.save(policy, folder)
    if any(tensor.is_meta for tensor in policy.tensors.values()):
        return []
    tensors = {peft_name(name): tensor.contiguous() for name, tensor in policy.tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    alpha = int(policy.alpha) if policy.alpha == int(policy.alpha) else policy.alpha
    layers = [peft_name(name).removeprefix(PREFIX) for name in policy.layers]
    values = {"peft_type": "LORA", "task_type": None, **base_name(base), "r": policy.rank}
    values |= {"lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": layers}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return [folder / WEIGHTS, folder / CONFIG]


def peft_name(name: str) -> str:
    """PEFT's name of a tensor: transformers' name in memory, in PEFT's wrapper."""
    theirs, ours = next(pair for pair in RENAMED if name.startswith(pair[1]))
    return PREFIX + theirs + name.removeprefix(ours)


def base_name(base: Path) -> dict[str, str | None]:
    """The hub's name and commit of a folder in its cache (models--OWNER--NAME/snapshots/COMMIT), or the path
    of another folder."""
    if base.parent.name != "snapshots":
        return {"base_model_name_or_path": str(base.absolute()), "revision": None}
    name = base.parent.parent.name.removeprefix("models--").replace("--", "/")
    return {"base_model_name_or_path": name, "revision": base.name}


def copy(policy: QwenVL, rank: int, ranks: int, onto_cpu: OntoCPU, **layout) -> QwenVL | Adapter:
    """What a rank saves of a policy: `weights.rank_copy`; of one with adapters, rank 0 has them on the CPU,
    and other ranks on the meta device. Every rank holds them whole (grpo/parallel/fsdp.py)."""
    if not (layers := lora.adapted(policy)):
        return weights.rank_copy(policy, rank, ranks, onto_cpu, **layout)
    tensors = {}
    for name, layer in layers.items():
        for part, inner in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            key = f"{name}.{part}.weight"
            tensors[key] = inner.weight.detach().to("meta") if rank else onto_cpu(key, inner.weight)
    layer = next(iter(layers.values()))
    return Adapter(layer.lora_A.out_features, layer.scale * layer.lora_A.out_features, tensors)
