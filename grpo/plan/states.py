"""Bytes of weights and of the optimizer's states, from the shapes of a model's parameters."""

from collections.abc import Iterable, Sequence

import torch

from grpo.optim import OPTIMIZERS, AdamW8bit, trained_by_muon
from models.config import ModelConfig
from models.qwen_vl import QwenVL

# Bytes of a float32.
FLOAT = 4
WHY = {
    "adamw": "AdamW: two moments in float32",
    "adamw_8bit": "AdamW: two moments of a matrix, a byte a number and their scales",
    "adamw_bf16": "AdamW: two moments of a matrix, a byte a number and their scales",
    "muon": "Muon: one moment of the blocks' matrices, AdamW: two of the rest",
}


def parameter_shapes(model: ModelConfig, frozen: Sequence[str] = ()) -> dict[str, torch.Size]:
    """{name: shape} of a policy's parameters, without those of frozen parts (vision, llm)."""
    with torch.device("meta"):
        policy = QwenVL(model)
    part = lambda name: "vision" if name.startswith("visual.") else "llm"
    return {name: p.shape for name, p in policy.named_parameters() if part(name) not in frozen}


def weight_bytes(optimizer: str, shapes: Iterable[torch.Size]) -> int:
    """Bytes of weights, or of their gradients: adamw_bf16 has matrices in bfloat16."""
    matrix = 2 if optimizer == "adamw_bf16" else FLOAT
    return sum(shape.numel() * (matrix if len(shape) > 1 else FLOAT) for shape in shapes)


def state_bytes(optimizer: str, shapes: dict[str, torch.Size]) -> int:
    """Bytes of the states of trained parameters, without their counts of steps."""

    def of(name: str, shape: torch.Size) -> int:
        if len(shape) > 1 and OPTIMIZERS[optimizer] is AdamW8bit:
            state = AdamW8bit.blank(torch.empty(shape, device="meta"))
            return sum(tensor.nbytes for tensor in state.values() if tensor.dim())
        moments = 1 if optimizer == "muon" and trained_by_muon(name, len(shape)) else 2
        return moments * FLOAT * shape.numel()

    return sum(of(name, shape) for name, shape in shapes.items())
