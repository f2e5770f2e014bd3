"""The parts both towers are made of: norms, rotary, MLPs, and the three attentions of the decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.packing import Lines

# cosine and signed sine, float32, broadcastable to (..., heads, E)
Rope = tuple[Tensor, Tensor]


def to_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is (tests run in float64)."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def to_attention_dtype(x: Tensor) -> Tensor:
    """x in the dtype in which attention adds up: float64 for float32 on a CPU, else as it is.

    A token's attention is computed in other shapes and orders when it is sampled than when it is trained on.
    In float32 the two differ by a rounding, which sharp attention magnifies to 1e-5 in a log-prob; rounded
    from float64 they are the same number. Linear layers need no such help: their rows do not depend on each
    other.
    """
    return (
        x.double()
        if x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        else x
    )


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in float32 whatever the dtype of x (Zhang & Sennrich 2019).  (..., D) → (...,
    D)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D), same dtype."""
        return F.rms_norm(to_float32(x), self.weight.shape, to_float32(self.weight), self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate x) · up x): the decoder's MLP, and with biases Qwen2.5-VL's vision MLP."""

    def __init__(self, width: int, hidden: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias)
        self.up_proj = nn.Linear(width, hidden, bias)
        self.down_proj = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class QuickMLP(nn.Module):
    """fc2(quick_gelu(fc1 x)), quick_gelu(x) = x · sigmoid(1.702 x): Qwen2-VL's vision MLP."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


def rope_from_angles(angle: Tensor) -> Rope:
    """Half a head's angles (..., E/2) → cosine and signed sine (..., 1, E), with a dimension for the
    heads."""
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)


def inverse_frequencies(theta: float, size: int, device: torch.device) -> Tensor:
    """theta^(-2i/size) for i < size/2, float32. Computed when needed: a buffer would have to survive the
    meta device and dtype casts."""
    return 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (i, i + E/2) of x (..., heads, E) by its angle, in float32. The signed sine makes it
    one roll and two products."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each token sees itself and what is before it. Right padding needs no mask: no real token comes after
    it.

    q (P, S, H, E); k, v (P, S, K, E) → (P, S, H, E).
    """
    out = F.scaled_dot_product_attention(
        *(to_attention_dtype(x).transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2).to(q.dtype)


def attention_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the attention of hidden states x sums: autocast's, or that of
    `to_attention_dtype`."""
    device = x.device.type
    return (
        torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device)
        else to_attention_dtype(x[:0]).dtype
    )


def group_mask(length: Tensor, longest: int, completion: int, repeat: int, dtype: torch.dtype) -> Tensor:
    """Who sees whom in `group_attention`: a completion token sees its prompt's first `length` tokens, and its
    completion up to itself.

    length (P,) long; longest = S; completion = C; repeat = R, query heads per key head.  → (P, 1, R·C, S +
    C), 0 = visible, -inf = not. As numbers of attention's own dtype, all blocks share it; from truth values
    each would make numbers of its own and keep them for its backward pass.
    """
    device = length.device
    prompt = torch.arange(longest, device=device) >= length[:, None, None]
    own = torch.ones(completion, completion, dtype=torch.bool, device=device).triu(1)
    mask = torch.zeros(len(length), 1, repeat, completion, longest + completion, dtype=dtype, device=device)
    mask[..., :longest].masked_fill_(prompt[:, None, None], -torch.inf)
    mask[..., longest:].masked_fill_(own, -torch.inf)
    return mask.flatten(2, 3)


def group_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, mask: Tensor
) -> Tensor:
    """G completions attend to one prompt, and each to itself.

    q (P, G, C, H, E); k, v (P, G, C, K, E) of the completions; prompt_k, prompt_v (P, S, K, E), shared by the
    group; mask of `group_mask`.  → (P, G, C, H, E).

    The R query heads of a key head become R·C queries of it, so keys are not repeated per head and the fused
    kernels take the mask on every device (`enable_gqa` beside a mask can leave a GPU only the kernel that
    writes all scores out). The rows of a group become heads of its prompt, so one mask serves them all. What
    else was tried, and what it took: docs/results/speed.md.
    """
    (P, G, C, H, E), K = q.shape, k.shape[3]

    def join(shared: Tensor, own: Tensor) -> Tensor:  # (P, G·K, S + C, E)
        return to_attention_dtype(
            torch.cat(
                (shared.transpose(1, 2)[:, None].expand(P, G, K, -1, E), own.transpose(2, 3)), 3
            ).flatten(1, 2)
        )

    rows = q.view(P, G, C, K, H // K, E).permute(0, 1, 3, 4, 2, 5).reshape(P, G * K, H // K * C, E)
    out = F.scaled_dot_product_attention(
        to_attention_dtype(rows), join(prompt_k, k), join(prompt_v, v), attn_mask=mask
    ).to(q.dtype)
    return out.view(P, G, K, H // K, C, E).permute(0, 1, 4, 2, 3, 5).reshape(P, G, C, H, E)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, lines: Lines, bias: Tensor
) -> Tensor:
    """One new token per row attends to its prompt, which is read once for all of its rows, and to its own
    tokens so far.

    q (B, K, R, E), R = H / K query heads per key head; k, v (B, K, n, E), own tokens with the new one;
    prompt_k, prompt_v (P, K, S, E);
    lines: of the rows of each prompt; bias (B, 1, 1, S + n): 0, or the lowest number where nothing is.  → (B,
    K, R, E).

    The prompts' keys and values are in the dtype in which attention adds up. The W rows of a prompt and their
    R query heads are W·R queries of one product.
    """
    shape, dtype, (R, E), S = q.shape, q.dtype, q.shape[2:], prompt_k.shape[2]
    q, k, v, prompt_k, prompt_v = (
        x.flatten(0, 1)
        for x in (
            to_attention_dtype(q) * E**-0.5,
            to_attention_dtype(k),
            to_attention_dtype(v),
            prompt_k,
            prompt_v,
        )
    )
    score = torch.cat((lines.apart(lines.together(q) @ prompt_k.mT, R), q @ k.mT), -1)  # (B·K, R, S + n)
    weight = to_float32(score.view(*shape[:3], -1).add_(bias)).softmax(-1).to(v.dtype).flatten(0, 1)
    of_prompt = lines.apart(lines.together(weight)[..., :S] @ prompt_v, R)
    return of_prompt.baddbmm_(weight[..., S:], v).to(dtype).view(shape)
