"""Real tokens or rows, flat, and the padded shapes that attention wants them in."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packing:
    """T real things of a padded shape. index: (T,) long, their places in the flattened shape; None if they are all of it, in order."""

    index: Tensor | None
    shape: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return torch.Size(self.shape).numel() if self.index is None else len(self.index)

    @classmethod
    def of(cls, length: Tensor, longest: int) -> "Packing":
        """length (...) long, real tokens at the front of each line of `longest` places."""
        mask = torch.arange(longest, device=length.device) < length[..., None]
        index = mask.flatten().nonzero()[:, 0]
        return cls(None if len(index) == mask.numel() else index, tuple(mask.shape))

    @classmethod
    def lines(cls, line: Tensor, count: int) -> "Packing":
        """T things in any order, each in one of `count` lines: line (T,) long. A line is as long as the fullest of them."""
        order = line.argsort(stable=True)
        each = line.bincount(minlength=count)  # (count,)
        longest = max(int(each.max()), 1)
        member = torch.empty_like(line)
        member[order] = torch.arange(len(line), device=line.device) - (each.cumsum(0) - each)[line[order]]
        index = line * longest + member
        whole = len(line) == count * longest and bool((index == torch.arange(len(line), device=line.device)).all())
        return cls(None if whole else index, (count, longest))

    def pack(self, x: Tensor) -> Tensor:
        """(*shape, ...) → (T, ...)."""
        x = x.flatten(0, len(self.shape) - 1)
        return x if self.index is None else x.index_select(0, self.index)

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) → (*shape, ...), 0 in the padding."""
        if self.index is not None:
            places = torch.Size(self.shape).numel()
            x = x.new_zeros(places, *x.shape[1:]).index_copy_(0, self.index, x)
        return x.view(*self.shape, *x.shape[1:])
