"""Counts of a model's parameters, and bytes of weights and of the optimizer's states."""

from collections.abc import Iterable, Sequence

import torch

from grpo.optim import AT_ONCE, OPTIMIZERS, AdamW8bit, trained_by_muon
from models.config import ModelConfig, VisionConfig
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


def merger_parameters(vision: VisionConfig) -> int:
    """Parameters of the matrices of the merger and of the DeepStack mergers."""
    width = vision.width * vision.spatial_merge_size**2
    return (1 + len(vision.deepstack_visual_indexes)) * width * (width + vision.hidden_size)


def largest_block(parts: dict[str, int], model: ModelConfig) -> int:
    """Parameters of a decoder block or of a vision block, whichever has more. parts: parameters of each."""
    return max(parts["decoder"] // model.num_hidden_layers, parts["vision"] // model.vision.depth)


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


def update_bytes(optimizer: str, shapes: dict[str, torch.Size], on_host: bool) -> int:
    """Bytes beside weights and gradients in an update: of the rows that AdamW8bit works on, in float32, and
    of the parameter whose states have come from the host."""
    work = 0
    if OPTIMIZERS[optimizer] is AdamW8bit:
        rows = min(AT_ONCE, max(shape.numel() for shape in shapes.values()))
        work = 10 * FLOAT * rows
    return work + on_host * max(state_bytes(optimizer, {name: shape}) for name, shape in shapes.items())
