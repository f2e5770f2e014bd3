"""The policy: vision tower, decoder, head; three ways to run it.

`forward` scores given completions (training), `prefill` and `decode` write new ones (rollout). All compute a
prompt once for its whole group.
The fork is one token before the end of the prompt: each row's inputs are the prompt's last token and its
completion without the last one, so hidden state c predicts completion token c everywhere.
"""

from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.cache import KVCache
from models.config import ModelConfig
from models.decoder import Decoder, Streams, by_length, text_rope
from models.layers import attention_dtype, group_mask, to_float32
from models.packing import Packing
from models.vision import VisionTower


@dataclass
class PromptBatch:
    """P prompts, right-padded to S tokens, with the pictures of all of them.

    tokens (P, S) long; length (P,) long, at least 2; positions (P, 3, S) and next_position (P,) long, of
    `mrope_positions`; image_slot (P, S) long, the row of the feature matrix that replaces the token's
    embedding, -1 for text; patches (N, patch_dim) float and grid (I, 3) long, all pictures in order (N = 0:
    none).
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
        """(P,) long: the prompts' last tokens, the first a rollout feeds to `decode`."""
        return self.tokens.gather(1, self.length[:, None] - 1)[:, 0]


@cache
def ids_on(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Token ids on a device, sent there once: a copy for every token would make it wait."""
    # whoever asks first may be a rollout, and what is made there is no good for gradients
    with torch.inference_mode(False):
        return torch.tensor(ids, device=device)


class QwenVL(nn.Module):
    """Qwen2-VL or Qwen2.5-VL, parameters named as on the hub.

    recompute: keep only each decoder block's input for the backward pass, which then runs the block again:
    less memory, a third more time. (`visual.recompute` does it for the vision tower.)
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
        self, prompts: PromptBatch, completions: Tensor, length: Tensor | None = None, *, whole: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states that predict given completions.

        completions (P, G, C) long, right-padded; length (P, G) long, real tokens per row (None: all C).
        → (P, G, C, D): `[..., c, :]` predicts completion token c; 0 beyond `length`.
        whole: the prompts' own hidden states beside it, (P, S - 1, D): `[:, s]` predicts prompt token s + 1;
        0 in the padding.
        """
        P, G, C = completions.shape
        length = torch.full((P, G), C, device=completions.device) if length is None else length
        own, parts = by_length(length, C)
        x, positions, prompt = self._prompts(prompts)
        inputs = torch.cat((prompts.last[:, None, None].expand(P, G, 1), completions[..., :-1]), -1)
        # (P, C), the same on all three axes
        places = prompts.next_position[:, None] - 1 + torch.arange(C, device=length.device)
        own_positions = own.pack(places[:, None].expand(P, G, C))
        x = torch.cat((x, self.model.embed_tokens(own.pack(inputs))))
        rope = text_rope(torch.cat((positions, own_positions.expand(3, -1)), 1), self.config)
        repeat = self.config.num_attention_heads // self.config.num_key_value_heads
        masks = [
            group_mask(prompts.length - 1, prompt.shape[1], part.shape[2], repeat, attention_dtype(x))
            for part in parts
        ]
        streams = Streams(prompt, positions.shape[1], list(zip(parts, masks)))
        for block in self.model.layers:
            x = self._run(block, x, rope, streams, block is self.model.layers[-1] and not whole)
        x = self.model.norm(x)
        if whole:
            return own.pad(x[streams.prompt_tokens :]), prompt.pad(x[: streams.prompt_tokens])
        return own.pad(x)

    def prefill(
        self, prompts: PromptBatch, group: int, capacity: int, max_rows: int | None = None
    ) -> KVCache:
        """Run the prompts but for their last tokens, once each, and make room for `group` rows of `capacity`
        own tokens.

        max_rows: of these P·group rows only the first so many (None: all); `KVCache.begin` gives a slot to a
        later one. Row p·group + g is of prompt p. Call it without gradients; then feed `decode` the prompts'
        last tokens.
        """
        x, positions, prompt = self._prompts(prompts)
        streams, rope = Streams(prompt, len(x)), text_rope(positions, self.config)
        keys = []
        for block in self.model.layers[:-1]:
            x, *kv = block(x, rope, streams)
            keys.append(kv)
        keys.append(self.model.layers[-1].keys(x, rope, streams))
        start = prompts.next_position - 1
        places = torch.arange(int(start.max()) + capacity, device=x.device)
        rows = torch.arange(min(max_rows or len(start) * group, len(start) * group), device=x.device)
        return KVCache.empty(
            keys,
            rows // group,
            capacity,
            prompts.length - 1,
            start,
            text_rope(places.expand(3, -1), self.config),
            [block.self_attn.joined() for block in self.model.layers],
        )

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """One more token for every slot. tokens (B,) long → hidden (B, D) that predicts the next ones; the
        rows grow by one.

        Call it without gradients. Raises ValueError if the cache is full.
        """
        places, x = cache.next_places(), self.model.embed_tokens(tokens)
        for number, block in enumerate(self.model.layers):
            x = block.decode(x, places, cache, number)
        cache.filled += 1
        return self.model.norm(x)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the head's weight, which is the embedding's where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """hidden (..., D) → (..., V) float32. head: `head_weight` in another dtype (None: as it is).

        The picture placeholders get the lowest number, in rollouts and in training alike: they can't be
        drawn, and the policy that samples stays the policy in the loss.
        """
        logits = to_float32(F.linear(hidden, self.head_weight if head is None else head))
        return logits.index_fill_(
            -1, ids_on(self.config.placeholder_ids, logits.device), torch.finfo(torch.float32).min
        )

    def _prompts(self, prompts: PromptBatch) -> tuple[Tensor, Tensor, Packing]:
        """Each prompt but for its last token: embeddings with the pictures' features in place (T, D),
        positions (3, T), packing."""
        prompt = Packing.of(prompts.length - 1, prompts.tokens.shape[1] - 1)
        x = self.model.embed_tokens(prompt.pack(prompts.tokens[:, :-1]))
        if len(prompts.patches):
            features = self.visual(prompts.patches, prompts.grid)
            slot = prompt.pack(prompts.image_slot[:, :-1])
            place = (slot >= 0).nonzero()[:, 0]
            x = x.index_copy(0, place, features.index_select(0, slot[place]).to(x.dtype))
        positions = prompt.pack(prompts.positions[..., :-1].transpose(1, 2)).T
        return x, positions, prompt

    def _run(self, block: nn.Module, x: Tensor, rope: tuple, streams: Streams, last: bool) -> Tensor:
        """One block of `forward`, recomputed in the backward pass if asked."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x, rope, streams, last, use_reentrant=False)[0]
        return block(x, rope, streams, last)[0]
