"""Keys and values during a rollout: each prompt's once, each row's own in a slot, which another row gets
when that one is done."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.layers import Rope, to_attention_dtype
from models.packing import Lines


@dataclass
class KVCache:
    """What `prefill` returns and `decode` appends to. P prompts of S tokens, B slots of `capacity` tokens;
    one row, a completion, is written in each slot.

    joined: of each layer the weights and biases of q, k and v as one product takes them.
    prompt_k, prompt_v: of each layer (P, K, S, E), once per prompt, in the dtype in which attention adds up.
    own_k, own_v: of each layer (B, K, capacity, E). prompt (B,) long: whose completion is in the slot.
    filled (B,) long: its tokens so far, of which the first is the prompt's last.
    span: a step reads so many places of each slot, for the `left` steps that `reach` made room for.
    lines: the slots, prompt by prompt, for what they share.  first (B, K) long: the first place of each slot
    and head among all of them. seen (P, S) and bias (B, S + capacity): 0 where a row may look, the lowest
    number at padding and at places not written yet. start (P,) long: the position of a row's first token.
    rope: cosine and sine of each position, (positions, 2, E).
    """

    joined: list[tuple[Tensor, Tensor]]
    prompt_k: list[Tensor]
    prompt_v: list[Tensor]
    own_k: list[Tensor]
    own_v: list[Tensor]
    prompt: Tensor
    filled: Tensor
    seen: Tensor
    bias: Tensor
    start: Tensor
    rope: Tensor
    span: int = 0
    left: int = 0
    lines: Lines = field(init=False)
    first: Tensor = field(init=False)

    @classmethod
    def empty(
        cls,
        keys: list[tuple[Tensor, Tensor]],
        prompt: Tensor,
        capacity: int,
        length: Tensor,
        start: Tensor,
        rope: Rope,
        joined: list[tuple[Tensor, Tensor]],
    ) -> "KVCache":
        """Slots for rows of the prompts `prompt` (B,). keys: of each layer (P, S, K, E) twice; length (P,)
        long, tokens of each prompt in them.

        rope: cosine and sine of each position, (positions, 1, E).
        """
        (P, S, K, E), layers = keys[0][0].shape, range(len(keys))
        # Zeros, because a row may be shorter than the span: what is there counts 0 times, which for a NaN in
        # fresh memory would be NaN.
        own_k, own_v = (
            [keys[layer][0].new_zeros(len(prompt), K, capacity, E) for layer in layers] for _ in "kv"
        )
        prompt_k, prompt_v = (
            [to_attention_dtype(each[which]).transpose(1, 2).contiguous() for each in keys]
            for which in (0, 1)
        )
        low = torch.finfo(prompt_k[0].dtype).min
        seen = (
            prompt_k[0]
            .new_zeros(P, S)
            .masked_fill(torch.arange(S, device=length.device) >= length[:, None], low)
        )
        cache = cls(
            joined,
            prompt_k,
            prompt_v,
            own_k,
            own_v,
            prompt.clone(),
            torch.zeros_like(prompt),
            seen,
            seen.new_empty(len(prompt), S + capacity),
            start,
            torch.cat(rope, -2),
        )
        cache._line_up()
        cache._forget(slice(None))
        return cache

    @property
    def capacity(self) -> int:
        """Tokens each slot can hold: the prompt's last one and all but one of the completion."""
        return self.own_k[0].shape[2]

    def begin(self, slots: Tensor, prompt: Tensor) -> None:
        """New rows in some slots: completions of the prompts `prompt`, as many as `slots` (n,)."""
        self.prompt[slots], self.filled[slots] = prompt, 0
        self._forget(slots)
        self._line_up()

    def spread(self, slot: Tensor) -> None:
        """Go on with as many slots as `slot` (n,) long has numbers: each stands where the slot of that
        number stood."""
        for own in (self.own_k, self.own_v):
            for layer, x in enumerate(own):
                own[layer] = x.new_zeros(len(slot), *x.shape[1:])
                own[layer][:, :, : self.span] = x[slot, :, : self.span]
        self.prompt, self.filled, self.bias = self.prompt[slot], self.filled[slot], self.bias[slot]
        self._line_up()

    def _line_up(self) -> None:
        B, K, capacity, _ = self.own_k[0].shape
        self.lines = Lines.of(self.prompt, len(self.seen), K)
        self.first = torch.arange(0, B * K * capacity, capacity, device=self.prompt.device).view(B, K)

    def _forget(self, slots: Tensor | slice) -> None:
        S = self.seen.shape[1]
        self.bias[slots, :S] = self.seen[self.prompt[slots]]
        self.bias[slots, S:] = torch.finfo(self.bias.dtype).min

    def reach(self, steps: int = 1, multiple: int = 1) -> int:
        """Make room for the next steps: all of them read as many places, in multiples of `multiple`, so that
        their shapes are the same. → how many there is room for.

        Waits for the device, which a step does not. Raises ValueError if a slot is full.
        """
        filled = int(self.filled.max())
        if filled == self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens a row and is full; prefill with a larger capacity"
            )
        self.left = min(steps, self.capacity - filled)
        self.span = min(-(-(filled + self.left) // multiple) * multiple, self.capacity)
        return self.left

    def next_places(self) -> tuple[Rope, Tensor, Tensor]:
        """One more token in each slot: its rotary (B, 1, E), what it may see (B, 1, 1, S + span), and where
        it goes (B·K,), for `write`.

        Makes room by itself where `reach` was not called. Raises ValueError if a slot is full.
        """
        if not self.left:
            self.reach()
        self.left -= 1
        S, position = self.seen.shape[1], self.start[self.prompt] + self.filled
        self.bias.scatter_(1, (S + self.filled)[:, None], 0.0)
        rope = self.rope[position]
        return (
            (rope[:, :1], rope[:, 1:]),
            self.bias[:, None, None, : S + self.span],
            (self.first + self.filled[:, None]).flatten(),
        )

    def write(self, layer: int, k: Tensor, v: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Put the keys and values (B, K, E) of a layer's new tokens in their places. → those of all own
        tokens, (B, K, span, E)."""
        for own, new in ((self.own_k[layer], k), (self.own_v[layer], v)):
            own.flatten(0, 2).index_copy_(0, place, new.flatten(0, 1))
        return self.own_k[layer][:, :, : self.span], self.own_v[layer][:, :, : self.span]

    def keep(self, running: Tensor, most: int) -> Tensor:
        """Go on with `most` of the slots, among them all that are `running` (B,) bool. → (most,) long, which
        slot each of them was.

        The living of the slots that go are moved into those of the dead that stay, so nothing is copied but
        those few. Prompts without a slot go as well.
        """
        slot = torch.arange(len(running), device=running.device)
        moved = slot[most:][running[most:]]
        into = (~running[:most]).nonzero().flatten()[: len(moved)]
        slot[into] = moved
        slot = slot[:most]
        for own in (self.own_k, self.own_v):
            for layer, x in enumerate(own):
                x[into, :, : self.span] = x[moved, :, : self.span]
                own[layer] = x[:most]
        prompts, self.prompt = self.prompt[slot].unique(return_inverse=True)
        self.filled, self.bias = self.filled[slot], self.bias[slot]
        if len(prompts) < len(self.seen):
            self.prompt_k, self.prompt_v = ([x[prompts] for x in xs] for xs in (self.prompt_k, self.prompt_v))
            self.seen, self.start = self.seen[prompts], self.start[prompts]
        self._line_up()
        return slot
