"""The decoder: grouped-query attention and gated MLP over two streams, the prompts and the completions of
their groups (DESIGN §4.2).

Both streams run through the linear layers as one flat list of real tokens, prompts first; padded shapes exist
only inside attention.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cache import KVCache
from models.config import ModelConfig
from models.layers import (
    GatedMLP,
    RMSNorm,
    Rope,
    causal_attention,
    decode_attention,
    group_attention,
    inverse_frequencies,
    rope_from_angles,
    rotate,
    to_float32,
)
from models.packing import Packing

# completions at least so many times as long as the longest of a part belong to it
LIKE = 0.8


@dataclass
class Streams:
    """One forward's T tokens: `prompt_tokens` of the prompts (P, S), then those of the completions (P, G, C),
    none in a prefill.

    own: the completions' parts (`by_length`), in the order of their tokens, each with its mask of
    `group_mask`. Everything here is computed once per forward and used by every block.
    """

    prompt: Packing
    prompt_tokens: int
    own: list[tuple[Packing, Tensor]] = field(default_factory=list)


def by_length(length: Tensor, longest: int) -> tuple[Packing, list[Packing]]:
    """Completions in parts of like length, so that attention pads a short one to the longest of its part
    only. Linear layers see no padding anyway.

    length (P, G) long; longest = C.  → all T tokens, in the order of the parts, as places in (P, G, C); and
    the parts, each of shape (P, its rows of a group, its longest).
    """
    (P, G), device = length.shape, length.device
    length, row = length.sort(dim=1, descending=True, stable=True)
    # the longest first, in each group
    columns, parts, first = length.amax(0).tolist(), [], 0
    for column in range(1, G + 1):
        if column == G or columns[column] < LIKE * columns[first]:
            parts.append(Packing.of(length[:, first:column], max(columns[first], 1)))
            first = column
    index, first = [], 0
    for part in parts:
        rows, most = part.shape[1:]
        places = (torch.arange(P, device=device)[:, None] * G + row[:, first : first + rows])[
            ..., None
        ] * longest + torch.arange(most, device=device)
        index.append(part.pack(places))
        first += rows
    index = torch.cat(index)
    return Packing(
        None if len(parts) == 1 and len(index) == P * G * longest else index, (P, G, longest)
    ), parts


def text_rope(positions: Tensor, config: ModelConfig) -> Rope:
    """M-RoPE: a head's first angles are of time, the next of height, the last of width. positions (3, ...)
    long → (..., 1, E)."""
    axis = torch.arange(3, device=positions.device).repeat_interleave(
        torch.tensor(config.mrope_section, device=positions.device)
    )
    frequency = inverse_frequencies(config.rope_theta, config.head_size, positions.device)
    return rope_from_angles(positions.movedim(0, -1)[..., axis] * frequency)


class Embedding(nn.Embedding):
    """Rows of a table. Under autocast they come in float32, and with them the residual stream, even of a
    table that is kept in bfloat16 (a frozen reference's)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) long → (..., D)."""
        x = super().forward(tokens)
        return to_float32(x) if torch.is_autocast_enabled(x.device.type) else x


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key heads, R = H / K each."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.key_heads, self.size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_size,
        )
        width = config.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.size)
        self.k_proj = nn.Linear(width, self.key_heads * self.size)
        self.v_proj = nn.Linear(width, self.key_heads * self.size)
        self.o_proj = nn.Linear(self.heads * self.size, width, bias=False)

    def query(self, x: Tensor, rope: Rope) -> Tensor:
        """(T, D) → rotated (T, H, E)."""
        return rotate(self.q_proj(x).view(-1, self.heads, self.size), rope)

    def key_value(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """(T, D) → rotated keys and values (T, K, E)."""
        shape = (-1, self.key_heads, self.size)
        return rotate(self.k_proj(x).view(shape), rope), self.v_proj(x).view(shape)

    def forward(self, x: Tensor, rope: Rope, streams: Streams, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, D) → (T, D), or the completions' part of it if `last`; and the prompts' keys and values
        (P, S, K, E)."""
        n = streams.prompt_tokens
        k, v = self.key_value(x, rope)
        prompt_k, prompt_v = streams.prompt.pad(k[:n]), streams.prompt.pad(v[:n])
        out = []
        if last:
            q = self.query(x[n:], (rope[0][n:], rope[1][n:]))
        else:
            q = self.query(x, rope)
            out.append(streams.prompt.pack(causal_attention(streams.prompt.pad(q[:n]), prompt_k, prompt_v)))
            q = q[n:]
        k, v = k[n:], v[n:]
        for part, mask in streams.own:
            tokens = part.tokens
            own = (part.pad(x[:tokens]) for x in (q, k, v))
            out.append(part.pack(group_attention(*own, prompt_k, prompt_v, mask)))
            q, k, v = q[tokens:], k[tokens:], v[tokens:]
        return self.o_proj(torch.cat(out).flatten(1)), prompt_k, prompt_v

    def joined(self) -> tuple[Tensor, Tensor]:
        """The weights of q, k and v below each other, and their biases, for `decode`: one product instead of
        three."""
        each = self.q_proj, self.k_proj, self.v_proj
        return torch.cat([x.weight for x in each]), torch.cat([x.bias for x in each])

    def decode(self, x: Tensor, places: tuple, cache: KVCache, layer: int) -> Tensor:
        """x (B, D), one new token per slot → (B, D); its keys and values go into the cache. places: of
        `KVCache.next_places`."""
        (rope, bias, place), H, K = places, self.heads, self.key_heads
        qkv = F.linear(x, *cache.joined[layer]).view(-1, H + 2 * K, self.size)
        qk, v = rotate(qkv[:, : H + K], rope), qkv[:, H + K :]
        own_k, own_v = cache.write(layer, qk[:, H:], v, place)
        q = qk[:, :H].unflatten(1, (K, -1))  # (B, K, R, E)
        return self.o_proj(
            decode_attention(
                q, own_k, own_v, cache.prompt_k[layer], cache.prompt_v[layer], cache.lines, bias
            ).flatten(1)
        )


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: Rope, streams: Streams, last: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, D) → (T, D) and the prompts' keys and values (P, S, K, E).

        The last block gives the completions' part only, since nothing reads more of the prompts than their
        keys and values there.
        """
        out, prompt_k, prompt_v = self.self_attn(self.input_layernorm(x), rope, streams, last)
        x = (x[streams.prompt_tokens :] if last else x) + out
        return x + self.mlp(self.post_attention_layernorm(x)), prompt_k, prompt_v

    def keys(self, x: Tensor, rope: Rope, streams: Streams) -> tuple[Tensor, Tensor]:
        """The last block of a prefill: x (T, D) → the prompts' keys and values (P, S, K, E), and nothing
        else."""
        k, v = self.self_attn.key_value(self.input_layernorm(x), rope)
        return streams.prompt.pad(k), streams.prompt.pad(v)

    def decode(self, x: Tensor, places: tuple, cache: KVCache, layer: int) -> Tensor:
        """One new token per slot: x (B, D) → (B, D)."""
        x = x + self.self_attn.decode(self.input_layernorm(x), places, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm; the names are the hub's `model.*`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
