"""How much may be decoded together: a number of tokens, or what fits into the memory that is free.

What a question takes is bounded from the model's config: keys and values of its prompt (once) and of its rows, what the vision tower and the
decoder hold of a prompt while they read it, and the logits of a row. A bound is no promise, so whoever runs out of memory all the same
halves the room and goes on (`grpo/evaluation.py`). Neither changes an answer in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WAVE = 1 << 16        # tokens of the rows decoded together: 400 short rows of the built-in model, 1.9 GB of keys and values for Qwen2-VL-2B
SHARE = 0.8           # of the free memory that is used; the rest is for libraries and fragments
COPIED = 1.6          # a cache, and the copy that compaction makes of it at most (`grpo/rollout.py:COMPACT_AT`)


@dataclass
class Room:
    """Room for `size` units, of which a token of a prompt, a token of a completion and a row take so many. Plain: tokens, rows free.

    say: told when the room turned out to be too large.
    """

    size: float = WAVE
    prompt: float = 1.0
    completion: float = 1.0
    row: float = 0.0
    say: Callable[[str], Any] = print

    def holds(self, prompts: int, longest: int, samples: int, cap: int) -> bool:
        """Whether `prompts` prompts, the longest of `longest` tokens, fit with `samples` completions of `cap` tokens each."""
        return prompts * (longest * self.prompt + samples * (cap * self.completion + self.row)) <= self.size

    def halve(self, prompts: int) -> None:
        """After running out of memory with so many prompts: half of the room, and say so."""
        self.size /= 2
        self.say(f"out of memory with {prompts} questions at a time: going on with half as many")


def measured(policy, free: int | None = None, say: Callable[[str], Any] = print) -> Room:
    """The room that `free` bytes give (None: those that are free now on the policy's device). On a CPU WAVE tokens at most: more are no faster."""
    weight, model = next(policy.parameters()), policy.config
    bytes_of = token_bytes(model, weight.element_size())
    size = SHARE * (free_memory(weight.device) if free is None else free)
    if weight.device.type == "cpu" and size >= WAVE * max(bytes_of["prompt"], bytes_of["completion"] + bytes_of["row"]):
        return Room(say=say)
    return Room(size, **bytes_of, say=say)


def token_bytes(model, size: int) -> dict[str, float]:
    """At most: {"prompt": bytes of a prompt's token, "completion": of a completion's, "row": of a row}. model: ModelConfig; size: of a number.

    A prompt's token counts as a picture's: so many patches pass through the vision tower, and it through the decoder, one block at a time.
    """
    vision, width = model.vision, model.hidden_size
    cache = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_size * size
    # Of a block: the norm's input in float32, its output, q, k, v, their rotation in float32, attention, gate, up, their product, the sum.
    reading = width * (8 * size + 16) + 3 * model.intermediate_size * size
    patch = vision.width * (8 * size + 16) + 3 * vision.intermediate_size * size + 2 * 4 * vision.patch_dim
    return {"prompt": COPIED * cache + max(reading, vision.spatial_merge_size**2 * patch), "completion": COPIED * cache,
            "row": 3 * 4 * model.vocab_size}                              # logits, their softmax and its sums


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: on a GPU with what PyTorch holds in reserve, on a CPU what the kernel calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 << 30                                                        # not Linux: enough for WAVE tokens of the built-in model
