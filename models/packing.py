"""Real tokens or rows as a flat list, and the padded shapes that attention needs."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass
class Packing:
    """T real entries of a padded shape. index (T,) long: their flat places in it; None if all are real."""

    index: Tensor | None
    shape: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return prod(self.shape) if self.index is None else len(self.index)

    @classmethod
    def of(cls, length: Tensor, longest: int) -> "Packing":
        """length (...) long: real tokens at the front of each line of `longest` places."""
        mask = torch.arange(longest, device=length.device) < length[..., None]
        index = mask.flatten().nonzero()[:, 0]
        return cls(None if len(index) == mask.numel() else index, tuple(mask.shape))

    def pack(self, x: Tensor) -> Tensor:
        """(*shape, ...) -> (T, ...)."""
        x = x.flatten(0, len(self.shape) - 1)
        return x if self.index is None else x.index_select(0, self.index)

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) -> (*shape, ...), 0 in the padding."""
        if self.index is not None:
            x = x.new_zeros(prod(self.shape), *x.shape[1:]).index_copy_(0, self.index, x)
        return x.view(*self.shape, *x.shape[1:])


@dataclass
class PromptGroups:
    """Groups the B rows by prompt, so that one matrix product serves a whole group. W is the size of the
    largest group; smaller ones are padded. The K heads of a row count as K rows.

    into (P·K·W,) long: the row at each padded position, any in the padding. back (B·K,) long: the inverse.
    count: P·K.
    """

    into: Tensor
    back: Tensor
    count: int

    @classmethod
    def of(cls, prompt: Tensor, prompts: int, heads: int) -> "PromptGroups":
        """prompt (B,) long: the prompt of each row, in any order. prompts = P; heads = K."""
        rows, device = len(prompt), prompt.device
        size = prompt.bincount(minlength=prompts)
        order = prompt.argsort(stable=True)
        member = torch.empty_like(prompt)
        member[order] = torch.arange(rows, device=device) - (size.cumsum(0) - size)[prompt[order]]
        head = torch.arange(heads, device=device)
        width = max(int(size.max()), 1)
        back = ((prompt[:, None] * heads + head) * width + member[:, None]).flatten()
        into = back.new_zeros(prompts * heads * width)
        into[back] = torch.arange(rows * heads, device=device)
        return cls(into, back, prompts * heads)

    def group_by_prompt(self, x: Tensor) -> Tensor:
        """(B·K, n, E) -> (P·K, W·n, E)."""
        return x.flatten(1).index_select(0, self.into).view(self.count, -1, x.shape[-1])

    def ungroup(self, x: Tensor, n: int) -> Tensor:
        """(P·K, W·n, E) -> (B·K, n, E)."""
        return x.view(len(self.into), -1).index_select(0, self.back).view(len(self.back), n, -1)
