"""What small states and bfloat16 weights change, on the built-in model:  python tests/bench/optimizers.py

*Way kept*: AdamW at a learning rate of 1e-6, 200 steps, gradients of one direction and four times as much
noise. How far the weights went along AdamW's own way in float32, as a share of it: with bfloat16 weights
rounded to nearest, and rounded at random (adamw_bf16).

*Apart*: 30 steps with gradients of very different sizes in a row. The distance between AdamW's weights and
those of moments of one byte, as a share of AdamW's way: with the root of the second moment (adamw_8bit), and
with the second moment itself, as it is usually kept.

Prints a table with seconds a step; the last line is one JSON object.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo.parallel.openmp

import torch
from torch import Tensor

from grpo.optim import AdamW8bit, Bytes, Optimizer, dynamic_values
from grpo.run.setup import matrices_in_bfloat16
from grpo.storage.model_folder import BUILT_IN
from models import weights
from tests.bench.timing import finish, parser

Gradient = Callable[[Tensor, torch.Generator], Tensor]


class Squares(Bytes):
    """Bytes of the square of what is written: of the second moment, for its root."""

    def __init__(self):
        super().__init__(signed=False)
        values = dynamic_values(signed=False)
        self.edges = (values[1:] + values[:-1]) / 2

    def write(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().write(x.square())

    def read(self, codes: Tensor, scale: Tensor) -> Tensor:
        return super().read(codes, scale).sqrt()


def drifting(p: Tensor, random: torch.Generator) -> Tensor:
    """One direction, and noise."""
    return 1 + 4 * torch.randn(p.shape, generator=random)


def uneven(p: Tensor, random: torch.Generator) -> Tensor:
    """Sizes that differ by factors of hundreds."""
    return torch.randn(p.shape, generator=random) * torch.exp(2 * torch.randn(p.shape, generator=random))


def way(policy, optimizer, steps: int, gradient: Gradient) -> tuple[Tensor, float]:
    """Where the matrices went in `steps` steps, as one vector, and the mean seconds of a step."""
    matrices = [p for p in policy.parameters() if p.dim() > 1]
    before = torch.cat([p.detach().double().flatten() for p in matrices])
    random, seconds = torch.Generator().manual_seed(0), 0.0
    for _ in range(steps):
        for p in policy.parameters():
            p.grad = gradient(p, random).to(p.dtype)
        start = time.perf_counter()
        optimizer.step()
        seconds += time.perf_counter() - start
        policy.zero_grad(set_to_none=True)
    after = torch.cat([p.detach().double().flatten() for p in matrices])
    return after - before, seconds / steps


def main(argv: list[str] | None = None) -> dict:
    """Measure and print."""
    args = parser(__doc__, 1).parse_args(argv)
    few, many = (2, 3) if args.quick else (30, 200)
    load = lambda low: matrices_in_bfloat16(weights.load(BUILT_IN)) if low else weights.load(BUILT_IN)
    rates = {"beta2": 0.999, "weight_decay": 0.0}

    def went(name: str, low: bool, steps: int, gradient: Gradient, lr: float, change=None):
        policy = load(low)
        optimizer = Optimizer(policy, name=name, lr=lr, **rates)
        for part, _ in optimizer.parts:
            if change and isinstance(part, AdamW8bit):
                part.root = change()
        return way(policy, optimizer, steps, gradient)

    rows, found = [], {}

    def note(key: str, label: str, value: float, seconds: float) -> None:
        rows.append([label, value, seconds])
        found[key] = {"share": float(f"{value:.4g}"), "seconds": round(seconds, 4)}

    # The base is in float32; a bfloat16 model begins at its rounding.
    full, seconds = went("adamw", False, many, drifting, 1e-6)
    note("float32", "way kept, adamw: float32 weights", 1.0, seconds)
    for key, name, label in (
        ("nearest", "adamw", "way kept, adamw on bfloat16 weights: rounded to nearest"),
        ("random", "adamw_bf16", "way kept, adamw_bf16: rounded at random"),
    ):
        moved, seconds = went(name, True, many, drifting, 1e-6)
        note(key, label, float(moved @ full / (full @ full)), seconds)

    full, _ = went("adamw", False, few, uneven, 1e-3)
    for key, change, label in (
        ("root", None, "apart, adamw_8bit: the root of the second moment"),
        ("square", Squares, "apart, the second moment itself"),
    ):
        moved, seconds = went("adamw_8bit", False, few, uneven, 1e-3, change)
        note(key, label, float((moved - full).norm() / full.norm()), seconds)
    return finish("optimizers", ["", "share of AdamW's way", "seconds a step"], rows, found, args)


if __name__ == "__main__":
    main()
