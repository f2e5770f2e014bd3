"""The vision tower of Qwen2-VL and Qwen2.5-VL: patches of all pictures in, one feature per 2x2 patches out.

Attention is within a picture, or within a window of it (Qwen2.5-VL). Patches are kept in an order in which segments of equal length lie side by side, so each length is one
unmasked, unpadded attention call.
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
    """Which patches attend to each other. order: (N,) long that brings equal lengths together, None if they already are; back: its inverse.  sizes: (count, length) per length."""

    order: Tensor | None
    back: Tensor | None
    sizes: list[tuple[int, int]]

    @classmethod
    def of(cls, segment: Tensor, unit: int) -> "Segments":
        """segment: (M,) long, the segment number of each merged token; unit: patches per merged token."""
        count = segment.bincount()
        length = count[segment]
        order = torch.argsort(length * (len(count) + 1) + segment, stable=True)
        lengths, tokens = length.unique(return_counts=True)
        sizes = [(t // n, n * unit) for n, t in zip(lengths.tolist(), tokens.tolist())]
        if torch.equal(order, torch.arange(len(order))):
            return cls(None, None, sizes)
        order = patches_of(order, unit)
        return cls(order, order.argsort(), sizes)

    def to(self, device: torch.device) -> "Segments":
        """The same on another device."""
        return self if self.order is None else Segments(self.order.to(device), self.back.to(device), self.sizes)


def patches_of(tokens: Tensor, unit: int) -> Tensor:
    """(M,) long merged tokens → (M · unit,) long, their patches (the patches of a merged token follow each other)."""
    return (tokens[:, None] * unit + torch.arange(unit)).flatten()


def lay_out(grid: Tensor, config: VisionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Place of every merged token. grid (I, 3) long, on the CPU, frames, rows, columns in patches.

    → positions (N, 2) long, row and column of each patch; frame (M,) and window (M,) long, its segment numbers.
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
    window = (windows.cumsum(0) - windows)[picture] + (f * high[picture] + r // side) * wide[picture] + c // side
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
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # (N, H, E) each
        q, k = rotate(q, rope), rotate(k, rope)
        if segments.order is not None:
            q, k, v = (t.index_select(0, segments.order) for t in (q, k, v))
        lengths = [count * length for count, length in segments.sizes]
        pieces = []
        for (count, length), *qkv in zip(segments.sizes, q.split(lengths), k.split(lengths), v.split(lengths)):
            q_, k_, v_ = (t.unflatten(0, (count, length)).transpose(1, 2) for t in qkv)
            pieces.append(F.scaled_dot_product_attention(q_, k_, v_).transpose(1, 2).flatten(0, 1))
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
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
        self.mlp = GatedMLP(config.width, config.intermediate_size, bias=True) if config.gated else QuickMLP(config.width, config.intermediate_size)

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
    """The hub stores a 3-D convolution whose stride is its kernel; on patches that are already cut out it is one matrix product."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        size = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Module()
        self.proj.weight = nn.Parameter(torch.empty(config.width, *size))

    def forward(self, patches: Tensor) -> Tensor:
        """(N, patch_dim) → (N, W), in the dtype of the weights."""
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class VisionTower(nn.Module):
    """patches (N, patch_dim) of I pictures → features (M, D), M = N / merge². `recompute` keeps only each block's input for the backward pass."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.recompute = False
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        """patches (N, patch_dim) float, pictures one after the other, each in merge-block order; grid (I, 3) long.  → (M, D), in the order of the patches. Raises ValueError if N ≠ grid."""
        config, device = self.config, patches.device
        unit = config.spatial_merge_size**2
        grid = grid.cpu()
        if int(grid.prod(1).sum()) != len(patches):
            raise ValueError(f"{len(patches)} patches for pictures of {grid.prod(1).tolist()} patches (grid {grid.tolist()})")
        positions, frame, window = lay_out(grid, config)
        # Keep the patches in the order most blocks want; the others reorder for themselves.
        usual = Segments.of(window, unit)
        if config.window_size:
            full = Segments.of(frame if usual.order is None else frame[usual.order[::unit] // unit], unit).to(device)
        home, usual = usual, Segments(None, None, usual.sizes)
        rope = self._rope(positions if home.order is None else positions[home.order], device)
        x = self.patch_embed(patches if home.order is None else patches.index_select(0, home.order.to(device)))
        for number, block in enumerate(self.blocks):
            segments = full if config.window_size and number in config.fullatt_block_indexes else usual
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, segments, use_reentrant=False)
            else:
                x = block(x, rope, segments)
        x = self.merger(x)
        return x if home.back is None else x.index_select(0, (home.back[::unit] // unit).to(device))

    def _rope(self, positions: Tensor, device: torch.device) -> Rope:
        """2-D rotary: a quarter of each head turns with the row, a quarter with the column, and both again in the second half of the head."""
        frequency = inverse_frequencies(10000.0, self.config.head_size // 2, device)
        return rope_from_angles((positions.to(device)[..., None] * frequency).flatten(1))
