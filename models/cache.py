"""Keys and values during a rollout: each prompt's once, each row's own in a slot, which later rows reuse."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.layers import Rope, to_attention_dtype
from models.packing import PromptGroups

# Keys and values of one layer, (P, S, K, E) each.
KeyValue = tuple[Tensor, Tensor]
# What a decode step needs: rotary (B, 1, E) twice, bias (B, 1, 1, S + span), flat places (B·K,).
Places = tuple[Rope, Tensor, Tensor]


@dataclass
class KVCache:
    """What `prefill` returns and `decode` extends: P prompts of S tokens, B slots of `capacity` tokens. Each
    slot holds one row, a completion.

    prompt_k, prompt_v: per layer (P, K, S, E), in the dtype of `to_attention_dtype`. completion_k,
    completion_v: per layer (B, K, capacity, E). prompt (B,) long: the prompt of each slot's row. filled (B,)
    long: tokens in each slot; the first is the prompt's last token. prompt_bias (P, S) is added to attention
    scores: 0 at tokens, the lowest number at padding. start (P,) long: the position of a row's first token.
    rope (positions, 2, E): cosine and sine. bias (B, S + capacity): `prompt_bias` of each row, then 0 at
    written tokens, else the lowest number. span: how many cached tokens a decode step reads, fixed for the
    next `left` steps, so that shapes do not change. groups: the slots by prompt. first (B, K) long: flat
    place of each slot's and head's first token.
    """

    prompt_k: list[Tensor]
    prompt_v: list[Tensor]
    completion_k: list[Tensor]
    completion_v: list[Tensor]
    prompt: Tensor
    filled: Tensor
    prompt_bias: Tensor
    start: Tensor
    rope: Tensor
    span: int = 0
    left: int = 0
    bias: Tensor = field(init=False)
    groups: PromptGroups = field(init=False)
    first: Tensor = field(init=False)

    def __post_init__(self) -> None:
        S = self.prompt_bias.shape[1]
        self.bias = self.prompt_bias.new_empty(len(self.prompt), S + self.capacity)
        self._empty(slice(None))
        self._group()

    @classmethod
    def empty(
        cls, keys: list[KeyValue], prompt: Tensor, capacity: int, length: Tensor, start: Tensor, rope: Rope
    ) -> "KVCache":
        """Empty slots for rows of the prompts `prompt` (B,). keys: the prompts', per layer. length (P,) long:
        tokens of each prompt in them. rope: (positions, 1, E) each."""
        P, S, K, E = keys[0][0].shape
        # Zeros: a row also reads places behind its end. Their weight is 0, but 0 x NaN of raw memory is NaN.
        own_k, own_v = ([x.new_zeros(len(prompt), K, capacity, E) for x, _ in keys] for _ in range(2))
        k, v = ([to_attention_dtype(x).transpose(1, 2).contiguous() for x in each] for each in zip(*keys))
        padding = torch.arange(S, device=length.device) >= length[:, None]
        bias = k[0].new_zeros(P, S).masked_fill(padding, torch.finfo(k[0].dtype).min)
        filled = torch.zeros_like(prompt)
        return cls(k, v, own_k, own_v, prompt, filled, bias, start, torch.cat(rope, -2))

    @property
    def capacity(self) -> int:
        """Tokens that fit in each slot: the prompt's last one and all but the last of the completion."""
        return self.completion_k[0].shape[2]

    def begin(self, slots: Tensor, prompt: Tensor) -> None:
        """Start new rows in `slots` (n,): completions of the prompts `prompt` (n,)."""
        self.prompt[slots] = prompt
        self.filled[slots] = 0
        self._empty(slots)
        self._group()

    def spread(self, source: Tensor) -> None:
        """Make len(source) slots: slot i becomes a copy of slot `source[i]`."""
        for cached in (self.completion_k, self.completion_v):
            for layer, x in enumerate(cached):
                cached[layer] = x.new_zeros(len(source), *x.shape[1:])
                cached[layer][:, :, : self.span] = x[source, :, : self.span]
        self.prompt, self.filled, self.bias = self.prompt[source], self.filled[source], self.bias[source]
        self._group()

    def _group(self) -> None:
        B, K, capacity, _ = self.completion_k[0].shape
        self.groups = PromptGroups.of(self.prompt, len(self.prompt_bias), K)
        self.first = torch.arange(0, B * K * capacity, capacity, device=self.prompt.device).view(B, K)

    def _empty(self, slots: Tensor | slice) -> None:
        S = self.prompt_bias.shape[1]
        self.bias[slots, :S] = self.prompt_bias[self.prompt[slots]]
        self.bias[slots, S:] = torch.finfo(self.bias.dtype).min

    def reach(self, steps: int = 1, multiple: int = 1) -> int:
        """Fix the span for at most `steps` next steps, to a multiple of `multiple` tokens. -> how many steps
        it serves. Waits for the device, unlike a decode step. Raises ValueError if a slot is full."""
        filled = int(self.filled.max())
        if filled == self.capacity:
            full = f"the cache holds {self.capacity} tokens a row and is full"
            raise ValueError(f"{full}; prefill with a larger capacity")
        self.left = min(steps, self.capacity - filled)
        self.span = min(-(-(filled + self.left) // multiple) * multiple, self.capacity)
        return self.left

    def next_places(self) -> Places:
        """Where the next token of each slot goes, what it may see, and its rotary. Calls `reach` if no step
        is left. Raises ValueError if a slot is full."""
        if not self.left:
            self.reach()
        self.left -= 1
        S = self.prompt_bias.shape[1]
        self.bias.scatter_(1, (S + self.filled)[:, None], 0.0)
        rope = self.rope[self.start[self.prompt] + self.filled]
        visible = self.bias[:, None, None, : S + self.span]
        return (rope[:, :1], rope[:, 1:]), visible, (self.first + self.filled[:, None]).flatten()

    def write(self, layer: int, k: Tensor, v: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, K, E) of a layer's new tokens. -> all completions', (B, K, span, E)."""
        for cached, new in ((self.completion_k[layer], k), (self.completion_v[layer], v)):
            cached.flatten(0, 2).index_copy_(0, place, new.flatten(0, 1))
        return self.completion_k[layer][:, :, : self.span], self.completion_v[layer][:, :, : self.span]

    def keep(self, running: Tensor, most: int) -> Tensor:
        """Keep `most` slots, which hold all `running` (B,) rows. -> (most,) long, the old slot of each. Only
        running rows in slots >= `most` are copied, into free slots below. Unused prompts are dropped."""
        slot = torch.arange(len(running), device=running.device)
        moved = slot[most:][running[most:]]
        into = (~running[:most]).nonzero().flatten()[: len(moved)]
        slot[into] = moved
        slot = slot[:most]
        for cached in (self.completion_k, self.completion_v):
            for layer, x in enumerate(cached):
                x[into, :, : self.span] = x[moved, :, : self.span]
                cached[layer] = x[:most]
        prompts, self.prompt = self.prompt[slot].unique(return_inverse=True)
        self.filled, self.bias = self.filled[slot], self.bias[slot]
        if len(prompts) < len(self.prompt_bias):
            self.prompt_k, self.prompt_v = ([x[prompts] for x in xs] for xs in (self.prompt_k, self.prompt_v))
            self.prompt_bias, self.start = self.prompt_bias[prompts], self.start[prompts]
        self._group()
        return slot
