"""The decoder: grouped-query attention and gated MLP over two streams, prompts and completions.

A group's completions share one prompt. The prompt attends to itself; each completion attends to the prompt's
keys and values, which exist once, and to itself. A group costs S + G·C tokens instead of G·(S + C), and the
outputs and gradients are those of G repeated prompts.
Linear layers see a flat list of real tokens, prompts first. Padded shapes exist only inside attention.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import layers
from models.cache import KVCache, Places
from models.config import ModelConfig
from models.layers import GatedMLP, RMSNorm, Rope, causal_attention, decode_attention, group_attention
from models.packing import Packing

# Completions share a part if each is at least this long, relative to the part's longest.
MIN_LENGTH_RATIO = 0.8


@dataclass
class Streams:
    """The T tokens of one forward: `prompt_tokens` of the prompts (P, S), then those of the completions
    (P, G, C); a prefill has none. Every block uses it.

    completion: the parts of `by_length`, in the order of their tokens, each with its `group_mask`.
    """

    prompt: Packing
    prompt_tokens: int
    completion: list[tuple[Packing, Tensor]] = field(default_factory=list)


def by_length(length: Tensor, longest: int) -> tuple[Packing, list[Packing]]:
    """Split completions into parts of similar length, so that attention pads each only to its part's longest.

    length (P, G) long; longest = C. -> all T tokens as places in (P, G, C), part by part; and the parts, each
    of shape (P, its rows of a group, its longest).
    """
    (P, G), device = length.shape, length.device
    length, row = length.sort(dim=1, descending=True, stable=True)
    columns = length.amax(0).tolist()  # (G,)
    parts, places = [], []
    first = 0
    for end in range(1, G + 1):
        if end < G and columns[end] >= MIN_LENGTH_RATIO * columns[first]:
            continue
        part = Packing.of(length[:, first:end], max(columns[first], 1))
        rows = torch.arange(P, device=device)[:, None] * G + row[:, first:end]  # (P, rows)
        places.append(part.pack(rows[..., None] * longest + torch.arange(part.shape[2], device=device)))
        parts.append(part)
        first = end
    index = torch.cat(places)
    complete = len(parts) == 1 and len(index) == P * G * longest
    return Packing(None if complete else index, (P, G, longest)), parts


def text_rope(positions: Tensor, config: ModelConfig) -> Rope:
    """M-RoPE: a head's first angles turn with time, the next with height, the last with width. In Qwen3-VL
    the axes take turns, while height and width have angles left. positions (3, ...) long -> (..., 1, E)."""
    section = torch.tensor(config.mrope_section, device=positions.device)
    axis = torch.arange(3, device=positions.device).repeat_interleave(section)
    if config.qwen3:
        angle = torch.arange(len(axis), device=positions.device)
        axis = torch.where(angle < 3 * section[angle % 3], angle % 3, 0)
    frequency = layers.inverse_frequencies(config.rope_theta, config.head_size, positions.device)
    return layers.rope_from_angles(positions.movedim(0, -1)[..., axis] * frequency)


class Embedding(nn.Embedding):
    """Rows of a table. Under autocast the result is float32, and so is the residual stream, even if the table
    is bfloat16 (a frozen reference's)."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) long -> (..., D)."""
        x = super().forward(input)
        return layers.to_float32(x) if torch.is_autocast_enabled(x.device.type) else x


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key heads, R = H / K each.

    joined: weight and bias of q, k and v as one matrix, for `decode`. `join` makes them; a forward drops
    them: the weights may change before the next rollout.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.size, width = config.head_size, config.hidden_size
        bias = not config.qwen3
        self.q_proj = nn.Linear(width, self.heads * self.size, bias)
        self.k_proj = nn.Linear(width, self.key_heads * self.size, bias)
        self.v_proj = nn.Linear(width, self.key_heads * self.size, bias)
        # Qwen3 normalises each head's query and key before it is rotated.
        self.q_norm = RMSNorm(self.size, config.rms_norm_eps) if config.qwen3 else nn.Identity()
        self.k_norm = RMSNorm(self.size, config.rms_norm_eps) if config.qwen3 else nn.Identity()
        self.o_proj = nn.Linear(self.heads * self.size, width, bias=False)
        self.joined: tuple[Tensor, ...] = ()

    def query(self, x: Tensor, rope: Rope) -> Tensor:
        """(T, D) -> rotated (T, H, E)."""
        return layers.rotate(self.q_norm(self.q_proj(x).view(-1, self.heads, self.size)), rope)

    def key_value(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """(T, D) -> rotated keys and values (T, K, E)."""
        shape = (-1, self.key_heads, self.size)
        return layers.rotate(self.k_norm(self.k_proj(x).view(shape)), rope), self.v_proj(x).view(shape)

    def forward(self, x: Tensor, rope: Rope, streams: Streams, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, D) -> (T, D), or only the completions' part if `last`; and the prompts' k, v (P, S, K, E)."""
        self.joined = ()
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
        for part, mask in streams.completion:
            tokens = part.tokens
            part_q, part_k, part_v = (part.pad(each[:tokens]) for each in (q, k, v))
            out.append(part.pack(group_attention(part_q, part_k, part_v, prompt_k, prompt_v, mask)))
            q, k, v = q[tokens:], k[tokens:], v[tokens:]
        return self.o_proj(torch.cat(out).flatten(1)), prompt_k, prompt_v

    def join(self) -> None:
        """Join the weights of q, k and v, so that `decode` needs one product instead of three."""
        linears = self.q_proj, self.k_proj, self.v_proj
        biases: list[Tensor] = [x.bias for x in linears if x.bias is not None]
        joined = torch.cat([x.weight for x in linears])
        self.joined = (joined, torch.cat(biases)) if biases else (joined,)

    def decode(self, x: Tensor, places: Places, cache: KVCache, layer: int) -> Tensor:
        """One new token per slot: x (B, D) -> (B, D). Writes to the cache, at `KVCache.next_places`."""
        rope, bias, place = places
        H, K = self.heads, self.key_heads
        qkv = F.linear(x, *self.joined).view(-1, H + 2 * K, self.size)
        qk, v = qkv[:, : H + K], qkv[:, H + K :]
        if not isinstance(self.q_norm, nn.Identity):
            qk = torch.cat((self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])), 1)
        qk = layers.rotate(qk, rope)
        k, v = cache.write(layer, qk[:, H:], v, place)
        q = qk[:, :H].unflatten(1, (K, -1))  # (B, K, R, E)
        prompt_k, prompt_v = cache.prompt_k[layer], cache.prompt_v[layer]
        return self.o_proj(decode_attention(q, k, v, prompt_k, prompt_v, cache.groups, bias).flatten(1))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, streams: Streams, last: bool = False) -> tuple[Tensor, ...]:
        """x (T, D) -> (T, D), and the prompts' k, v (P, S, K, E). last: return only the completions' part.
        Nothing reads the prompts' output of the last block."""
        out, prompt_k, prompt_v = self.self_attn(self.input_layernorm(x), rope, streams, last)
        x = (x[streams.prompt_tokens :] if last else x) + out
        return x + self.mlp(self.post_attention_layernorm(x)), prompt_k, prompt_v

    def keys(self, x: Tensor, rope: Rope, streams: Streams) -> tuple[Tensor, Tensor]:
        """All that the last block of a prefill computes: the prompts' k, v. x (T, D) -> (P, S, K, E) each."""
        k, v = self.self_attn.key_value(self.input_layernorm(x), rope)
        return streams.prompt.pad(k), streams.prompt.pad(v)

    def decode(self, x: Tensor, places: Places, cache: KVCache, layer: int) -> Tensor:
        """One new token per slot: x (B, D) -> (B, D)."""
        x = x + self.self_attn.decode(self.input_layernorm(x), places, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm; the names are the hub's `model.*`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        blocks = (Block(config) for _ in range(config.num_hidden_layers))
        self.layers: list[Block] = nn.ModuleList(blocks)  # pyrefly: ignore[bad-assignment]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
