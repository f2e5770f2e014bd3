"""The vision tower of Qwen2-VL and Qwen2.5-VL: patches of all pictures in, one feature per 2x2 patches out.

Attention stays within a segment: a picture, or a window of it (Qwen2.5-VL). Patches are sorted so that
segments of equal length are adjacent. Then each length is one attention call, without mask or padding.
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
        q, k = rotate(q, rope), rotate(k, rope)
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
        self.mlp = GatedMLP(*sizes, bias=True) if config.gated else QuickMLP(*sizes)

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


class PatchProjection(nn.Module):
    """A 3-D convolution whose stride is its kernel: on patches already cut out, one matrix product."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        size = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.weight = nn.Parameter(torch.empty(config.width, *size))

    def forward(self, patches: Tensor) -> Tensor:
        """(N, patch_dim) -> (N, W), in the dtype of the weights."""
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1))


class VisionTower(nn.Module):
    """Patches of I pictures -> features for the decoder. recompute: keep only blocks' inputs for backward."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.recompute = False
        self.patch_embed = nn.ModuleDict({"proj": PatchProjection(config)})
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        """patches (N, patch_dim) float, picture after picture, each in merge-block order; grid (I, 3) long
        -> (M, D), M = N / merge². Raises ValueError if the number of patches is not the grid's."""
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
        frequency = inverse_frequencies(10000.0, config.head_size // 2, device)
        rope = rope_from_angles((positions[order].to(device)[..., None] * frequency).flatten(1))
        x = self.patch_embed["proj"](patches.index_select(0, order.to(device)))
        for number, block in enumerate(self.blocks):
            segments = full if number in config.fullatt_block_indexes else usual
            if self.recompute and torch.is_grad_enabled():
                how = {"use_reentrant": False, "preserve_rng_state": False}
                x = checkpoint(block, x, rope, segments, **how)
            else:
                x = block(x, rope, segments)
        return self.merger(x).index_select(0, tokens.argsort().to(device))
