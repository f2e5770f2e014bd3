"""The vision tower of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches of all pictures in, features of every 2x2
patches out.

Attention stays within a segment: a picture, or a window of it (Qwen2.5-VL). Patches are sorted so that
segments of equal length are adjacent. Then each length is one attention call, without mask or padding.
"""

from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import layers
from models.config import VisionConfig
from models.layers import GatedMLP, QuickMLP, RMSNorm, Rope, TanhMLP


@dataclass
class Segments:
    """Which patches attend to each other. sizes: (segments, patches each) of each length, shortest first.
    order, back (N,) long: sorts the patches by segment length, and the inverse; None if they are sorted."""

    sizes: list[tuple[int, int]]
    order: Tensor | None = None
    back: Tensor | None = None


def group_by_length(segment: Tensor, unit: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Sort merged tokens by the length of their segment, then by segment. segment (M,) long: of each merged
    token; unit: patches per merged token. -> order (M,) long, and `Segments.sizes`."""
    count = segment.bincount()
    length = count[segment]
    lengths, tokens = length.unique(return_counts=True)
    sizes = [(t // n, n * unit) for n, t in zip(lengths.tolist(), tokens.tolist())]
    return torch.argsort(length * len(count) + segment, stable=True), sizes


def patches_of(tokens: Tensor, unit: int) -> Tensor:
    """Merged tokens (M,) long -> their patches (M · unit,) long. A merged token's patches are adjacent."""
    return (tokens[:, None] * unit + torch.arange(unit)).flatten()


def lay_out(grid: Tensor, config: VisionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Where every patch is. grid (I, 3) long, on the CPU: frames, rows, columns of each picture, in patches.
    -> positions (N, 2) long: row and column of each patch; frame, window (M,) long: the tokens' segments."""
    merge = config.spatial_merge_size
    frames, rows, columns = grid[:, 0], grid[:, 1] // merge, grid[:, 2] // merge
    tokens = frames * rows * columns
    picture = torch.arange(len(grid)).repeat_interleave(tokens)
    at = torch.arange(len(picture)) - (tokens.cumsum(0) - tokens)[picture]
    f = at // (rows * columns)[picture]
    r = at // columns[picture] % rows[picture]
    c = at % columns[picture]
    frame = (frames.cumsum(0) - frames)[picture] + f
    inner = torch.arange(merge)
    row = (r[:, None, None] * merge + inner[:, None]).expand(-1, merge, merge)
    column = (c[:, None, None] * merge + inner).expand(-1, merge, merge)
    positions = torch.stack((row, column), -1).reshape(-1, 2)
    if not config.window_size:
        return positions, frame, frame
    side = config.window_size // merge // config.patch_size
    down, across = -(-rows // side), -(-columns // side)
    windows = frames * down * across
    window = (f * down[picture] + r // side) * across[picture] + c // side
    return positions, frame, (windows.cumsum(0) - windows)[picture] + window


class VisionAttention(nn.Module):
    """Attention without a mask inside each segment."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, rope: Rope, segments: Segments) -> Tensor:
        """x (N, W) -> (N, W)."""
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # (N, H, E) each
        q, k = layers.rotate(q, rope), layers.rotate(k, rope)
        if segments.order is not None:
            q, k, v = (t.index_select(0, segments.order) for t in (q, k, v))
        patches = [count * length for count, length in segments.sizes]
        out = []
        for size, *part in zip(segments.sizes, q.split(patches), k.split(patches), v.split(patches)):
            part_q, part_k, part_v = (t.unflatten(0, size).transpose(1, 2) for t in part)
            out.append(F.scaled_dot_product_attention(part_q, part_k, part_v).transpose(1, 2).flatten(0, 1))
        found = torch.cat(out)
        if segments.back is not None:
            found = found.index_select(0, segments.back)
        return self.proj(found.flatten(1))


class VisionBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        norm = RMSNorm if config.gated else nn.LayerNorm
        self.norm1 = norm(config.width, eps=1e-6)
        self.norm2 = norm(config.width, eps=1e-6)
        self.attn = VisionAttention(config)
        sizes = (config.width, config.intermediate_size)
        plain = TanhMLP if config.num_position_embeddings else QuickMLP
        self.mlp = GatedMLP(*sizes, bias=True) if config.gated else plain(*sizes)

    def forward(self, x: Tensor, rope: Rope, segments: Segments) -> Tensor:
        """x (N, W) -> (N, W)."""
        x = x + self.attn(self.norm1(x), rope, segments)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """merge x merge adjacent patches become one feature of the decoder's width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.ln_q = (RMSNorm if config.gated else nn.LayerNorm)(config.width, eps=1e-6)
        W = self.width = config.width * config.spatial_merge_size**2
        self.mlp = nn.Sequential(nn.Linear(W, W), nn.GELU(), nn.Linear(W, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """(N, W) -> (M, D)."""
        return self.mlp(self.ln_q(x).view(-1, self.width))


class Qwen3Merger(nn.Module):
    """Qwen3-VL's merger. deep: of an inner block's features (DeepStack); it normalises after merging."""

    def __init__(self, config: VisionConfig, deep: bool = False):
        super().__init__()
        W = self.width = config.width * config.spatial_merge_size**2
        self.norm = nn.LayerNorm(W if deep else config.width, eps=1e-6)
        self.linear_fc1 = nn.Linear(W, W)
        self.linear_fc2 = nn.Linear(W, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, W) -> (M, D)."""
        x = self.norm(x.view(-1, *self.norm.normalized_shape)).view(-1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


def interpolated(positions: Tensor, grid: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """A table of side x side learned positions, stretched over each picture corner to corner: the four
    entries next to each patch, and their bilinear weights.

    positions (N, 2) long, from `lay_out`; grid (I, 3) long. -> entries (N, 4) long, weights (N, 4).
    """
    size = grid[:, 1:].repeat_interleave(grid.prod(1), 0)  # (N, 2)
    at = positions * (side - 1) / (size - 1).clamp(min=1)
    low = at.floor()
    entries = torch.stack((low, low + 1), -1).clamp(max=side - 1).long()  # (N, 2, 2)
    weights = torch.stack((low + 1 - at, at - low), -1)
    entries = entries[:, 0, :, None] * side + entries[:, 1, None]
    return entries.flatten(1), (weights[:, 0, :, None] * weights[:, 1, None]).flatten(1)


class PatchProjection(nn.Module):
    """A 3-D convolution whose stride is its kernel: on patches already cut out, one matrix product."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        size = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.weight = nn.Parameter(torch.empty(config.width, *size))
        self.bias = nn.Parameter(torch.empty(config.width)) if config.num_position_embeddings else None

    def forward(self, patches: Tensor) -> Tensor:
        """(N, patch_dim) -> (N, W), in the dtype of the weights."""
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class VisionTower(nn.Module):
    """Patches of I pictures -> features for the decoder. recompute: keep only blocks' inputs for backward."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.recompute = False
        self.patch_embed = nn.ModuleDict({"proj": PatchProjection(config)})
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger: nn.Module = Merger(config)
        if config.num_position_embeddings:
            self.pos_embed = nn.Embedding(config.num_position_embeddings, config.width)
            self.merger = Qwen3Merger(config)
            mergers = (Qwen3Merger(config, deep=True) for _ in config.deepstack_visual_indexes)
            self.deepstack_merger_list = nn.ModuleList(mergers)

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        """patches (N, patch_dim) float, picture after picture, each in merge-block order; grid (I, 3) long
        -> (1 + n, M, D), M = N / merge²: the features that replace embeddings, and n DeepStack features
        (Qwen3-VL: 3). Raises ValueError if the number of patches is not the grid's."""
        config, device = self.config, patches.device
        unit, grid = config.spatial_merge_size**2, grid.cpu()
        if int(grid.prod(1).sum()) != len(patches):
            needed = f"{grid.prod(1).tolist()} patches (grid {grid.tolist()})"
            raise ValueError(f"{len(patches)} patches for pictures of {needed}")
        positions, frame, window = lay_out(grid, config)
        # Patches stay in the order that most blocks need. Qwen2.5-VL's few full blocks reorder them.
        tokens, sizes = group_by_length(window, unit)
        order = patches_of(tokens, unit)
        usual = full = Segments(sizes)
        if config.window_size:
            whole, sizes = group_by_length(frame[tokens], unit)
            by_frame = patches_of(whole, unit)
            full = Segments(sizes, by_frame.to(device), by_frame.argsort().to(device))
        # 2-D rotary: the first half of a head's angles is the row's, the second the column's.
        frequency = layers.inverse_frequencies(10000.0, config.head_size // 2, device)
        rope = layers.rope_from_angles((positions[order].to(device)[..., None] * frequency).flatten(1))
        x = self.patch_embed["proj"](patches.index_select(0, order.to(device)))
        if config.num_position_embeddings:
            entries, weights = interpolated(positions, grid, isqrt(config.num_position_embeddings))
            learned = self.pos_embed(entries[order].to(device)) * weights[order].to(device)[..., None]
            x = x + learned.sum(1).to(x.dtype)
        inner = []
        for number, block in enumerate(self.blocks):
            segments = full if number in config.fullatt_block_indexes else usual
            if self.recompute and torch.is_grad_enabled():
                how = {"use_reentrant": False, "preserve_rng_state": False}
                x = checkpoint(block, x, rope, segments, **how)
            else:
                x = block(x, rope, segments)
            if number in config.deepstack_visual_indexes:
                at = config.deepstack_visual_indexes.index(number)
                inner.append(self.deepstack_merger_list[at](x))
        return torch.stack((self.merger(x), *inner)).index_select(1, tokens.argsort().to(device))
