"""The vision tower of Qwen2-VL and Qwen2.5-VL: patches of all pictures in, one feature per 2x2 patches out.

Attention is within a picture, or within a window of it (Qwen2.5-VL). Patches are put in an order in which
segments of equal length lie side by side, so that each length is one attention call without mask or padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import VisionConfig
from models.layers import GatedMLP, QuickMLP, RMSNorm, Rope, inverse_frequencies, rope_from_angles, rotate


@dataclass
class Segments:
    """Which patches attend to each other.

    sizes: (how many, patches each) for each length, shortest first, in the order in which they lie side by
    side once reordered.
    order, back: (N,) long, the reordering and its inverse; None if they lie so already.
    """

    sizes: list[tuple[int, int]]
    order: Tensor | None = None
    back: Tensor | None = None


def group_by_length(segment: Tensor, unit: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Bring segments of equal length together, each in one piece.

    segment: (M,) long, the segment number of each merged token; unit: patches per merged token.  → order of
    the tokens (M,) long, `sizes`.
    """
    count = segment.bincount()
    length = count[segment]
    lengths, tokens = length.unique(return_counts=True)
    sizes = [(t // n, n * unit) for n, t in zip(lengths.tolist(), tokens.tolist())]
    return torch.argsort(length * len(count) + segment, stable=True), sizes


def patches_of(tokens: Tensor, unit: int) -> Tensor:
    """(M,) long merged tokens → (M · unit,) long, their patches: those of a merged token follow each
    other."""
    return (tokens[:, None] * unit + torch.arange(unit)).flatten()


def lay_out(grid: Tensor, config: VisionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Place of every merged token. grid (I, 3) long, on the CPU, frames, rows, columns in patches.

    → positions (N, 2) long, row and column of each patch; frame (M,) and window (M,) long, its segment
    numbers.
    """
    merge = config.spatial_merge_size
    frames, rows, columns = grid[:, 0], grid[:, 1] // merge, grid[:, 2] // merge
    tokens = frames * rows * columns
    picture = torch.arange(len(grid)).repeat_interleave(tokens)
    at = torch.arange(len(picture)) - (tokens.cumsum(0) - tokens)[picture]
    f, r, c = at // (rows * columns)[picture], at // columns[picture] % rows[picture], at % columns[picture]
    frame = (frames.cumsum(0) - frames)[picture] + f
    inner = torch.arange(merge)
    row = (r[:, None, None] * merge + inner[:, None]).expand(-1, merge, merge)
    column = (c[:, None, None] * merge + inner).expand(-1, merge, merge)
    positions = torch.stack((row, column), -1).reshape(-1, 2)
    if not config.window_size:
        return positions, frame, frame
    side = config.window_size // merge // config.patch_size
    high, wide = -(-rows // side), -(-columns // side)
    windows = frames * high * wide
    window = (
        (windows.cumsum(0) - windows)[picture] + (f * high[picture] + r // side) * wide[picture] + c // side
    )
    return positions, frame, window


class VisionAttention(nn.Module):
    """Attention without a mask inside each segment."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, rope: Rope, segments: Segments) -> Tensor:
        """x (N, W) → (N, W)."""
        # (N, H, E) each
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        q, k = rotate(q, rope), rotate(k, rope)
        if segments.order is not None:
            q, k, v = (t.index_select(0, segments.order) for t in (q, k, v))
        parts = [count * length for count, length in segments.sizes]
        out = []
        for size, *part in zip(segments.sizes, q.split(parts), k.split(parts), v.split(parts)):
            out.append(
                F.scaled_dot_product_attention(*(t.unflatten(0, size).transpose(1, 2) for t in part))
                .transpose(1, 2)
                .flatten(0, 1)
            )
        out = torch.cat(out)
        if segments.back is not None:
            out = out.index_select(0, segments.back)
        return self.proj(out.flatten(1))


class VisionBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        norm = RMSNorm if config.gated else nn.LayerNorm
        self.norm1 = norm(config.width, eps=1e-6)
        self.norm2 = norm(config.width, eps=1e-6)
        self.attn = VisionAttention(config)
        sizes = (config.width, config.intermediate_size)
        self.mlp = GatedMLP(*sizes, bias=True) if config.gated else QuickMLP(*sizes)

    def forward(self, x: Tensor, rope: Rope, segments: Segments) -> Tensor:
        """x (N, W) → (N, W)."""
        x = x + self.attn(self.norm1(x), rope, segments)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """merge x merge neighbouring patches become one feature of the decoder's width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.ln_q = (RMSNorm if config.gated else nn.LayerNorm)(config.width, eps=1e-6)
        wide = config.width * config.spatial_merge_size**2
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, config.hidden_size))
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        """(N, W) → (M, D)."""
        return self.mlp(self.ln_q(x).view(-1, self.wide))


class PatchEmbed(nn.Module):
    """The hub stores a 3-D convolution whose stride is its kernel; on patches that are already cut out it
    is one matrix product."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        size = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Module()
        self.proj.weight = nn.Parameter(torch.empty(config.width, *size))

    def forward(self, patches: Tensor) -> Tensor:
        """(N, patch_dim) → (N, W), in the dtype of the weights."""
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class VisionTower(nn.Module):
    """Patches of I pictures → features for the decoder. `recompute` keeps only each block's input for the
    backward pass."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.recompute = False
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        """patches (N, patch_dim) float, one picture after the other, each in merge-block order; grid (I, 3)
        long → (M, D), M = N / merge².

        Raises ValueError if there are not as many patches as the grid says.
        """
        config, device, unit = self.config, patches.device, self.config.spatial_merge_size**2
        grid = grid.cpu()
        if int(grid.prod(1).sum()) != len(patches):
            raise ValueError(
                f"{len(patches)} patches for pictures of {grid.prod(1).tolist()} patches (grid "
                f"{grid.tolist()})"
            )
        positions, frame, window = lay_out(grid, config)
        # Patches stay in the order that most blocks want; Qwen2.5-VL's few full blocks reorder for
        # themselves.
        tokens, sizes = group_by_length(window, unit)
        home = patches_of(tokens, unit)
        usual = full = Segments(sizes)
        if config.window_size:
            order, sizes = group_by_length(frame[tokens], unit)
            order = patches_of(order, unit)
            full = Segments(sizes, order.to(device), order.argsort().to(device))
        rope = self._rope(positions[home].to(device))
        x = self.patch_embed(patches.index_select(0, home.to(device)))
        for number, block in enumerate(self.blocks):
            segments = full if number in config.fullatt_block_indexes else usual
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, segments, use_reentrant=False)
            else:
                x = block(x, rope, segments)
        return self.merger(x).index_select(0, tokens.argsort().to(device))

    def _rope(self, positions: Tensor) -> Rope:
        """2-D rotary: the first half of a head's angles is the row's, the second the column's.  (N, 2)
        long → (N, 1, E)."""
        frequency = inverse_frequencies(10000.0, self.config.head_size // 2, positions.device)
        return rope_from_angles((positions[..., None] * frequency).flatten(1))
