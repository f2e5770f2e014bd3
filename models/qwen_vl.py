"""The policy: vision tower, decoder and head; three ways to run it.

`forward` scores given completions (training). `prefill` and `decode` write new ones (rollout). All compute a
prompt once for its whole group.
The fork is one token before the end of the prompt: each row's inputs are the prompt's last token and its
completion without the last token. So hidden state c predicts completion token c everywhere.
"""

from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.cache import KVCache
from models.config import ModelConfig
from models.decoder import Decoder, Streams, by_length, text_rope
from models.layers import attention_dtype, group_mask, linear_in_float32
from models.packing import Packing
from models.vision import VisionTower


@dataclass
class PromptBatch:
    """P prompts, right-padded to S tokens, with the pictures of all of them.

    tokens (P, S) long; length (P,) long, at least 2; positions (P, 3, S) and next_position (P,) long, from
    `mrope_positions`; image_slot (P, S) long: the row of features that replaces the token's embedding, -1 for
    text; patches (N, patch_dim) float and grid (I, 3) long: all pictures in order (N = 0: none).
    """

    tokens: Tensor
    length: Tensor
    positions: Tensor
    next_position: Tensor
    image_slot: Tensor
    patches: Tensor
    grid: Tensor

    def to(self, device: torch.device | str) -> "PromptBatch":
        """The same on another device."""
        return PromptBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    @property
    def last(self) -> Tensor:
        """(P,) long: the prompts' last tokens, the first input of `decode`."""
        return self.tokens.gather(1, self.length[:, None] - 1)[:, 0]


class DeepStack(NamedTuple):
    """Qwen3-VL: features of inner vision blocks, which are added to the decoder's first hidden states.

    place (m,) long: the picture tokens among the prompts' tokens; features (n, m, D), n = 0 for the others.
    """

    place: Tensor
    features: Tensor

    def add(self, x: Tensor, block: int) -> Tensor:
        """Hidden states x (T, D) after that block -> (T, D)."""
        return x.index_add(0, self.place, self.features[block]) if block < len(self.features) else x


@cache
def ids_on(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Token ids on a device. Copied once: a copy per token would make it wait."""
    # The first caller may be a rollout, and autograd refuses tensors made in inference mode.
    with torch.inference_mode(False):
        return torch.tensor(ids, device=device)


class QwenVL(nn.Module):
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL, parameters named as on the hub for the first two.

    recompute: run each decoder block again in the backward pass instead of keeping more than its input: less
    memory, a third more time. `visual.recompute` does it for the vision tower.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute = False

    def forward(
        self,
        prompts: PromptBatch,
        completions: Tensor,
        length: Tensor | None = None,
        *,
        with_prompts: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states that predict given completions.

        completions (P, G, C) long, right-padded; length (P, G) long, real tokens per row (None: all C).
        -> (P, G, C, D): `[..., c, :]` predicts completion token c; 0 beyond `length`.
        with_prompts: also return the prompts' hidden states (P, S - 1, D): `[:, s]` predicts prompt token
        s + 1; 0 in the padding.
        """
        P, G, C = completions.shape
        length = torch.full((P, G), C, device=completions.device) if length is None else length
        completion, parts = by_length(length, C)
        inputs = torch.cat((prompts.last[:, None, None].expand(P, G, 1), completions[..., :-1]), -1)
        x, positions, prompt, deep = self._embed(prompts, completion.pack(inputs))
        # All three axes have the same positions.
        places = prompts.next_position[:, None] - 1 + torch.arange(C, device=length.device)  # (P, C)
        places = completion.pack(places[:, None].expand(P, G, C))
        rope = text_rope(torch.cat((positions, places.expand(3, -1)), 1), self.config)
        repeat = self.config.num_attention_heads // self.config.num_key_value_heads
        S, dtype = prompt.shape[1], attention_dtype(x)
        masks = [group_mask(prompts.length - 1, S, part.shape[2], repeat, dtype) for part in parts]
        streams = Streams(prompt, positions.shape[1], list(zip(parts, masks)))
        for number, block in enumerate(self.model.layers):
            last = block is self.model.layers[-1] and not with_prompts
            if self.recompute and torch.is_grad_enabled():
                # No block draws random numbers, so their state is not kept.
                how = {"use_reentrant": False, "preserve_rng_state": False}
                x = checkpoint(block, x, rope, streams, last, **how)[0]
            else:
                x = block(x, rope, streams, last)[0]
            x = deep.add(x, number)
        x = self.model.norm(x)
        if with_prompts:
            return completion.pad(x[streams.prompt_tokens :]), prompt.pad(x[: streams.prompt_tokens])
        return completion.pad(x)

    def prefill(
        self, prompts: PromptBatch, group: int, capacity: int, max_rows: int | None = None
    ) -> KVCache:
        """Read each prompt once, without its last token. Make slots of `capacity` tokens for `group` rows.

        max_rows: make slots for the first rows only (None: for all P·group). `KVCache.begin` gives a slot to
        a later row. Row p·group + g is of prompt p. Call it without gradients, then feed the prompts' last
        tokens to `decode`.
        """
        x, positions, prompt, deep = self._embed(prompts)
        streams = Streams(prompt, len(x))
        rope = text_rope(positions, self.config)
        keys = []
        for number, block in enumerate(self.model.layers[:-1]):
            x, k, v = block(x, rope, streams)
            x = deep.add(x, number)
            keys.append((k, v))
        keys.append(self.model.layers[-1].keys(x, rope, streams))
        for block in self.model.layers:
            block.self_attn.join()
        start = prompts.next_position - 1
        count = len(start) * group
        prompt_of_row = torch.arange(min(max_rows or count, count), device=x.device) // group
        places = torch.arange(int(start.max()) + capacity, device=x.device)
        rope = text_rope(places.expand(3, -1), self.config)
        return KVCache.empty(keys, prompt_of_row, capacity, prompts.length - 1, start, rope)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Decode one token in every slot. tokens (B,) long -> hidden (B, D), which predicts the next ones.
        Call it without gradients. Raises ValueError if the cache is full."""
        places = cache.next_places()
        x = self.model.embed_tokens(tokens)
        for number, block in enumerate(self.model.layers):
            x = block.decode(x, places, cache, number)
        cache.filled += 1
        return self.model.norm(x)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the head's weight, or the embedding's if the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """hidden (..., D) -> (..., V) float32. head: `head_weight` in another dtype (None: itself).

        The picture placeholders get the lowest number, in rollouts and in training alike. So they can't be
        drawn, and the policy that samples is the policy in the loss.
        """
        logits = linear_in_float32(hidden, self.head_weight if head is None else head)
        ids = ids_on(self.config.placeholder_ids, logits.device)
        return logits.index_fill_(-1, ids, torch.finfo(torch.float32).min)

    def _embed(
        self, prompts: PromptBatch, inputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Packing, DeepStack]:
        """The T tokens of the prompts without their last ones, then the n completion tokens `inputs` (n,):
        embeddings and picture features (T + n, D); the prompts' positions (3, T) and packing; and what is
        added to later hidden states.

        One call of the embedding makes one dense gradient (V, D) of it; two calls would make two.
        """
        prompt = Packing.of(prompts.length - 1, prompts.tokens.shape[1] - 1)
        tokens = prompt.pack(prompts.tokens[:, :-1])
        x = self.model.embed_tokens(tokens if inputs is None else torch.cat((tokens, inputs)))
        positions = prompt.pack(prompts.positions[..., :-1].transpose(1, 2)).T
        if not len(prompts.patches):
            return x, positions, prompt, DeepStack(positions[0, :0], x[:0, None])
        slot = prompt.pack(prompts.image_slot[:, :-1])
        place = (slot >= 0).nonzero()[:, 0]
        features = self.visual(prompts.patches, prompts.grid).index_select(1, slot[place]).to(x.dtype)
        return x.index_copy(0, place, features[0]), positions, prompt, DeepStack(place, features[1:])
