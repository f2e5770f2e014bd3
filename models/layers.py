"""What both towers are made of: norms, rotary, MLPs, and the three attentions of the decoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.packing import PromptGroups

# Cosine and signed sine, float32, broadcastable to (..., heads, E).
Rope = tuple[Tensor, Tensor]
# On Hopper and newer PyTorch would prefer cuDNN's attention, which plans every new shape for 25 ms to 1 s. A
# step makes fifty new shapes, because completions differ in length. The other kernels plan nothing.
torch.backends.cuda.enable_cudnn_sdp(False)
_exact = True


def to_float32(x: Tensor) -> Tensor:
    """x in float32. Float64 stays (tests run in it)."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@contextmanager
def attention_sums(exact: bool) -> Iterator[None]:
    """While the context lasts, attention on a CPU sums in a wider dtype than its operands' (exact), as it
    does outside, or in theirs."""
    global _exact
    before, _exact = _exact, exact
    try:
        yield
    finally:
        _exact = before


def attention_size(size: int, device: str) -> int:
    """Bytes of a number in attention, where products have numbers of `size` bytes."""
    return 8 if _exact and device == "cpu" else size


def to_attention_dtype(x: Tensor) -> Tensor:
    """x in the dtype in which attention sums: on a CPU float64; else unchanged, and so is float32 under
    autocast.

    Sampling and training compute a token's attention in other shapes and orders. In float32 they differ by a
    rounding, which sharp attention magnifies to 1e-5 in a log-prob. Summed in float64 and rounded once, they
    are equal, also where they are rounded to bfloat16. Rows of linear layers do not depend on each other on
    one thread; several threads cut a product by its rows, and other cuts round otherwise. In bfloat16
    PyTorch's fused kernel also has a fast exponential, which is off by 1e-3.
    """
    if attention_size(x.element_size(), x.device.type) == x.element_size():
        return x
    return x if x.dtype == torch.float32 and torch.is_autocast_enabled("cpu") else x.double()


def attend(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """PyTorch's fused attention, in the dtype of its operands also under autocast."""
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, **how)


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, two matrices or two batches of them, with a result in float32, whatever their dtype. Float64
    stays. A result in bfloat16 would round a logit of 20 to a multiple of 0.125."""
    if a.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(a.device.type):
        return a @ b
    if a.device.type == "cuda":
        product = torch.mm if a.dim() == 2 else torch.bmm
        return product(a, b, out_dtype=torch.float32)
    # A CPU has no such kernel. Products of bfloat16 numbers are exact in float32.
    with torch.autocast(a.device.type, enabled=False):
        return to_float32(a) @ to_float32(b)


def linear_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of operands in autocast's dtype, else the weight's, with a result in float32. x (..., D),
    weight (V, D) -> (..., V)."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if dtype in (torch.float32, torch.float64):
        return F.linear(x, weight)
    found = product_in_float32(x.to(dtype).reshape(-1, x.shape[-1]), weight.to(dtype).T)
    return found.view(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), same dtype."""
        return F.rms_norm(to_float32(x), self.weight.shape, to_float32(self.weight), self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate x) · up x): the decoder's MLP, and with biases Qwen2.5-VL's vision MLP."""

    def __init__(self, width: int, hidden: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias)
        self.up_proj = nn.Linear(width, hidden, bias)
        self.down_proj = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class QuickMLP(nn.Module):
    """fc2(quick_gelu(fc1 x)), quick_gelu(x) = x · sigmoid(1.702 x): Qwen2-VL's vision MLP."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class TanhMLP(nn.Module):
    """linear_fc2(gelu(linear_fc1 x)), gelu in its tanh form: Qwen3-VL's vision MLP."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear_fc1 = nn.Linear(width, hidden)
        self.linear_fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


def rope_from_angles(angle: Tensor) -> Rope:
    """Half a head's angles (..., E/2) -> cosine and signed sine (..., 1, E), with a dimension for heads."""
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)


def inverse_frequencies(theta: float, size: int, device: torch.device) -> Tensor:
    """theta^(-2i/size) for i < size/2, float32. No buffer: it would have to survive meta device and casts."""
    return 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair (i, i + E/2) of x (..., heads, E) by its angle, in float32: one roll, two products."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each token sees itself and those before it. q (P, S, H, E); k, v (P, S, K, E) -> (P, S, H, E).
    Right padding needs no mask: no real token follows it."""
    q_heads, k_heads, v_heads = (to_attention_dtype(x).transpose(1, 2) for x in (q, k, v))
    out = attend(q_heads, k_heads, v_heads, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).to(q.dtype)


def attention_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which attention over hidden states x sums: `to_attention_dtype`'s for autocast's dtype,
    else for that of x."""
    device, none = x.device.type, x[:0]
    products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return to_attention_dtype(none.to(products)).dtype


def group_mask(length: Tensor, longest: int, completion: int, repeat: int, dtype: torch.dtype) -> Tensor:
    """The mask of `group_attention`: a completion token sees its prompt's first `length` tokens, and its
    completion up to itself. All blocks share it; a boolean one would be converted and kept once per block.

    length (P,) long; longest = S; completion = C; repeat = R, query heads per key head. -> (P, 1, R·C, S + C)
    in `dtype`: 0 = visible, -inf = not.
    """
    device = length.device
    padding = torch.arange(longest, device=device) >= length[:, None, None]
    later = torch.ones(completion, completion, dtype=torch.bool, device=device).triu(1)
    mask = torch.zeros(len(length), 1, repeat, completion, longest + completion, dtype=dtype, device=device)
    mask[..., :longest].masked_fill_(padding[:, None, None], -torch.inf)
    mask[..., longest:].masked_fill_(later, -torch.inf)
    return mask.flatten(2, 3)


def group_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, mask: Tensor
) -> Tensor:
    """G completions attend to one prompt, and each to itself.

    q (P, G, C, H, E); k, v (P, G, C, K, E) of the completions; prompt_k, prompt_v (P, S, K, E), shared by the
    group; mask from `group_mask`. -> (P, G, C, H, E).
    The R query heads of a key head become R·C queries of it. So keys are not repeated per head, and every
    device's fused kernels accept the mask (`enable_gqa` with a mask can leave a GPU only the kernel that
    stores all scores). A group's rows become heads of its prompt: one mask for all (docs/results/speed.md).
    """
    P, G, C, H, E = q.shape
    K = k.shape[3]

    def join(shared: Tensor, own: Tensor) -> Tensor:
        repeated = shared.transpose(1, 2)[:, None].expand(P, G, K, -1, E)
        return to_attention_dtype(torch.cat((repeated, own.transpose(2, 3)), 3).flatten(1, 2))

    rows = q.view(P, G, C, K, H // K, E).permute(0, 1, 3, 4, 2, 5).reshape(P, G * K, H // K * C, E)
    keys, values = join(prompt_k, k), join(prompt_v, v)  # (P, G·K, S + C, E)
    out = attend(to_attention_dtype(rows), keys, values, attn_mask=mask).to(q.dtype)
    return out.view(P, G, K, H // K, C, E).permute(0, 1, 4, 2, 3, 5).reshape(P, G, C, H, E)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, groups: PromptGroups, bias: Tensor
) -> Tensor:
    """One new token per row attends to its prompt and to its completion so far.

    q (B, K, R, E), R = H / K query heads per key head; k, v (B, K, n, E), the completion with the new token;
    prompt_k, prompt_v (P, K, S, E), in the dtype of `to_attention_dtype`; bias (B, 1, 1, S + n): 0, or the
    lowest number where no token is. -> (B, K, R, E).
    A prompt's keys and values are read once: the R query heads of its W rows are W·R queries of one product.
    """
    B, K, R, E = q.shape
    dtype, S = q.dtype, prompt_k.shape[2]
    q, k, v = (to_attention_dtype(x).flatten(0, 1) for x in (q, k, v))
    prompt_k, prompt_v = prompt_k.flatten(0, 1), prompt_v.flatten(0, 1)
    is_low = v.dtype not in (torch.float32, torch.float64)
    q = q if is_low else q * E**-0.5
    prompt_score = groups.ungroup(product_in_float32(groups.group_by_prompt(q), prompt_k.mT), R)
    score = torch.cat((prompt_score, product_in_float32(q, k.mT)), -1).view(B, K, R, -1)  # (B, K, R, S + n)
    most: Tensor | float = 1.0
    if is_low:
        # As the fused kernels of training: scores are scaled in float32, and the largest weight is 1, so that
        # only the others are rounded.
        weight = torch.add(bias, score, alpha=E**-0.5).softmax(-1)
        most = weight.amax(-1, keepdim=True)
        weight = (weight / most).to(v.dtype).flatten(0, 1)
    else:
        weight = score.add_(bias).softmax(-1).flatten(0, 1)
    out = groups.ungroup(product_in_float32(groups.group_by_prompt(weight)[..., :S], prompt_v), R)
    if is_low:
        out = (out + product_in_float32(weight[..., S:], v)).view(B, K, R, E) * most
    else:
        out.baddbmm_(weight[..., S:], v)
    return out.to(dtype).view(B, K, R, E)
