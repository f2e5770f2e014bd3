"""Real tokens or rows, flat, and the padded shapes that attention wants them in."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packing:
    """T real things of a padded shape. index: (T,) long, their places in the flattened shape; None if they
    are all of it, in order."""

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


@dataclass
class Lines:
    """B rows of P prompts, with K heads each, head by head and prompt by prompt: P·K lines of W places, W the
    most rows of a prompt.

    into (P·K·W,) long: which of the B·K heads of rows is at each place; at a place that nobody has, any.
    back (B·K,) long: the place of each.
    """

    into: Tensor
    back: Tensor
    count: int

    @classmethod
    def of(cls, prompt: Tensor, prompts: int, heads: int) -> "Lines":
        """prompt (B,) long: whose each row is, in any order."""
        rows, device = len(prompt), prompt.device
        each, order = prompt.bincount(minlength=prompts), prompt.argsort(stable=True)
        member = torch.empty_like(prompt)
        member[order] = torch.arange(rows, device=device) - (each.cumsum(0) - each)[prompt[order]]
        head = torch.arange(heads, device=device)
        places = max(int(each.max()), 1)
        back = ((prompt[:, None] * heads + head) * places + member[:, None]).flatten()
        into = back.new_zeros(prompts * heads * places)
        into[back] = torch.arange(rows * heads, device=device)
        return cls(into, back, prompts * heads)

    def together(self, x: Tensor) -> Tensor:
        """(B·K, n, E) → (P·K, W·n, E)."""
        return x.flatten(1).index_select(0, self.into).view(self.count, -1, x.shape[-1])

    def apart(self, x: Tensor, n: int) -> Tensor:
        """(P·K, W·n, E) → (B·K, n, E)."""
        return x.view(len(self.into), -1).index_select(0, self.back).view(len(self.back), n, -1)
