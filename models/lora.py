"""LoRA (Hu et al. 2021): train two thin matrices beside a weight, and leave the weight as it is.

    y = (W + (alpha / r) B A) x        A (r, in) random, B (out, r) zero at first (Eq. 9)

Only A and B have gradients and optimizer states. So W can be in bfloat16, and the policy without its adapters
is the frozen reference: no second model is loaded.

How this departs from the paper: it computes W x + (alpha / r) B (A x). Here training multiplies by the sum,
rounded to the dtype of the products, and so does a rollout, which makes it once. So a sampled token costs
what it costs without adapters, and the policy that samples is the policy in the loss, to the last bit.

On disk an adapter is a folder in the layout of PEFT (grpo/storage/adapter.py).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.layers import to_float32
from models.qwen_vl import QwenVL


# [Eq. 9]
@torch.no_grad()
def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W + scale · B A, (out, in), added up in float32 and rounded once to `dtype`. scale: alpha / r."""
    wide = to_float32(a).dtype
    with torch.autocast(weight.device.type, enabled=False):
        return weight.to(wide, copy=True).addmm_(b.to(wide), a.to(wide), alpha=scale).to(dtype)


class _Adapted(torch.autograd.Function):
    """x (T, in) -> (T, out) by the merged weight, which is made again in the backward pass and not kept. A
    gradient of the whole weight is never made: those of A and B come from x and the output's gradient."""

    @staticmethod
    def forward(ctx, *args):  # pyrefly: ignore[bad-override]
        x, weight, bias, a, b, ctx.scale = args
        ctx.save_for_backward(x, weight, a, b)
        return F.linear(x, merged(weight, a, b, ctx.scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyrefly: ignore[bad-override]
        g = grad_outputs[0]  # (T, out)
        x, weight, a, b = ctx.saved_tensors
        scale = ctx.scale
        with torch.autocast(x.device.type, enabled=False):
            of_x = g @ merged(weight, a, b, scale, x.dtype) if ctx.needs_input_grad[0] else None
            of_a = scale * ((g @ b.to(x.dtype)).T @ x)  # (r, in)
            of_b = scale * (g.T @ (x @ a.to(x.dtype).T))  # (out, r)
        return of_x, None, None, of_a.to(a.dtype), of_b.to(b.dtype), None


class LoRALinear(nn.Linear):
    """A frozen linear layer with an adapter. The parameters are named as in PEFT: `lora_A.weight` (r, in) and
    `lora_B.weight` (out, r). scale: alpha / r. active: whether a forward adds the adapter."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, scale: float):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.lora_A = nn.Linear(*reversed(a.shape), bias=False, device="meta")
        self.lora_B = nn.Linear(*reversed(b.shape), bias=False, device="meta")
        for layer, value in ((self.lora_A, a), (self.lora_B, b)):
            layer.weight = nn.Parameter(value.to(device=linear.weight.device, dtype=torch.float32))
        self.scale = scale
        self.active = True

    def forward(self, input: Tensor) -> Tensor:
        """input (T, in) -> (T, out)."""
        if not self.active:
            return F.linear(input, self.weight, self.bias)
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        pair = self.lora_A.weight, self.lora_B.weight
        return _Adapted.apply(input.to(dtype), self.weight, bias, *pair, self.scale)

    def merged(self, dtype: torch.dtype) -> Tensor:
        """W + scale · B A in `dtype`, (out, in)."""
        return merged(self.weight, self.lora_A.weight, self.lora_B.weight, self.scale, dtype)


def adapted(policy: nn.Module) -> dict[str, LoRALinear]:
    """{name: layer} of all layers with an adapter."""
    return {name: layer for name, layer in policy.named_modules() if isinstance(layer, LoRALinear)}


def candidates(policy: QwenVL, frozen: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """{name: layer} of the linear layers that can get an adapter: those of the blocks of all parts but the
    `frozen` ones ("vision", "llm")."""
    parts = {"vision": "visual.blocks.", "llm": "model.layers."}
    wanted = tuple(start for part, start in parts.items() if part not in frozen)
    linears = ((name, layer) for name, layer in policy.named_modules() if isinstance(layer, nn.Linear))
    return {name: layer for name, layer in linears if name.startswith(wanted) and ".lora_" not in name}


def chosen(policy: QwenVL, targets: Sequence[str], frozen: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """The candidates whose last name is one of `targets`. Raises ValueError for a target that is no layer."""
    found = candidates(policy, frozen)
    known = {name.rpartition(".")[2] for name in found}
    if wrong := [target for target in targets if target not in known]:
        where = f" beside freeze={list(frozen)}" if frozen else ""
        raise ValueError(f"lora.targets: no layer {wrong[0]!r}{where}; there are {', '.join(sorted(known))}")
    return {name: layer for name, layer in found.items() if name.rpartition(".")[2] in targets}


def attach(policy: QwenVL, pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> None:
    """Freeze the policy, and give the named layers adapters (A, B), in place. Call it before the optimizer is
    made, and before the policy is sharded."""
    policy.requires_grad_(False)
    for name, (a, b) in pairs.items():
        parent, _, leaf = name.rpartition(".")
        layer = LoRALinear(policy.get_submodule(name), a, b, scale)  # pyrefly: ignore[bad-argument-type]
        setattr(policy.get_submodule(parent), leaf, layer)


def fresh(layers: dict[str, nn.Linear], rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Adapters that change nothing yet: A uniform up to 1 / sqrt(in), as in PEFT, and B zero. A is a function
    of the seed and the layers' order."""
    random = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, layer in layers.items():
        bound = 1 / math.sqrt(layer.in_features)
        a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=random)
        pairs[name] = a, torch.zeros(layer.out_features, rank)
    return pairs


@contextmanager
def adapters_off(policy: nn.Module) -> Iterator[None]:
    """Run the policy without its adapters while the context lasts. A policy without any is not changed."""
    layers = adapted(policy).values()
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def merged_weights(policy: QwenVL, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the policy without adapters that computes the same. Merged ones are new tensors in
    `dtype` (None: their own), one at a time; all others are the policy's own. None has a gradient."""
    layers = adapted(policy)
    for name, parameter in policy.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith((".lora_A", ".lora_B")):
            continue
        is_merged = leaf == "weight" and owner in layers
        yield name, layers[owner].merged(dtype or parameter.dtype) if is_merged else parameter.detach()


def merge(policy: QwenVL) -> None:
    """Add the adapters to the weights, in the weights' dtype, and remove them, in place."""
    for name, layer in adapted(policy).items():
        parent, _, leaf = name.rpartition(".")
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(layer.merged(layer.weight.dtype))
        plain.bias = layer.bias
        setattr(policy.get_submodule(parent), leaf, plain)
