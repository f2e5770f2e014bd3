"""Keys and values during a rollout: each prompt's once, each row's own behind it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """What `prefill` returns and `step` appends to.

    prompt_k, prompt_v (L, P, K, S, E): once per prompt.  own_k, own_v (L, P, K, G, capacity, E): of the rows, `filled` tokens each.
    bias (P, 1, 1, 1, S): 0 for a prompt's tokens, the lowest number for its padding; None if no prompt is padded.
    cos, sin (P, capacity, 1, 1, E): rotary of each own place, which depends on the prompt only. Place 0 is the prompt's last token's.
    """

    prompt_k: Tensor
    prompt_v: Tensor
    own_k: Tensor
    own_v: Tensor
    bias: Tensor | None
    cos: Tensor
    sin: Tensor
    filled: int = 0

    @property
    def capacity(self) -> int:
        """Tokens each row can hold: the prompt's last one and all but one of the completion."""
        return self.own_k.shape[4]

    def compact(self, rows: Tensor) -> "KVCache":
        """Keep some rows, in any order: a new cache of P' prompts and groups of G'.

        rows: (P', G') long, flat row numbers p·G + g. The rows of one line must come from one prompt; they may repeat.
        """
        group = self.own_k.shape[3]
        prompt = rows[:, 0] // group  # (P',)
        heads = torch.arange(self.own_k.shape[2], device=rows.device)[:, None]
        line, member = (rows // group)[:, None], (rows % group)[:, None]  # (P', 1, G')

        def keep(own: Tensor) -> Tensor:
            kept = own.new_empty(own.shape[0], len(rows), own.shape[2], rows.shape[1], *own.shape[4:])
            for layer in range(len(own)):  # layer by layer, so that the copy needs no second whole cache
                kept[layer, ..., : self.filled, :] = own[layer, line, heads, member, : self.filled]
            return kept

        return KVCache(
            prompt_k=self.prompt_k[:, prompt], prompt_v=self.prompt_v[:, prompt], own_k=keep(self.own_k), own_v=keep(self.own_v),
            bias=None if self.bias is None else self.bias[prompt], cos=self.cos[prompt], sin=self.sin[prompt], filled=self.filled)
