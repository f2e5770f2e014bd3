"""How much may be decoded together: a number of tokens, or what fits into the memory that is free.

What a question takes is bounded from the model's config: keys and values of its prompt (once) and of its
rows, what the vision tower and the decoder hold of a prompt while they read it, and the logits of a row. A
bound is no promise, so whoever runs out of memory all the same halves the room and goes on
(`grpo/evaluation/answers.py`). Neither changes an answer in float32.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from grpo.parallel.ranks import rank

Result = TypeVar("Result")

# tokens of the rows decoded together: 400 short rows of the built-in model, 1.9 GB of keys and values for
# Qwen2-VL-2B
WAVE = 1 << 16
# of the free memory that is used; the rest is for libraries and fragments
SHARE = 0.8


@dataclass
class Room:
    """Room for `size` units, of which a token of a prompt, a token of a completion and a row take so many.
    Plain: tokens, rows free.

    say: told when the room turned out to be too large.
    """

    size: float = WAVE
    prompt: float = 1.0
    completion: float = 1.0
    row: float = 0.0
    say: Callable[[str], Any] = print

    def holds(self, prompts: int, longest: int, samples: int, cap: int) -> bool:
        """Whether `prompts` prompts, the longest of `longest` tokens, fit with `samples` completions of
        `cap` tokens each."""
        return prompts * (longest * self.prompt + samples * (cap * self.completion + self.row)) <= self.size

    def halve(self, prompts: int) -> None:
        """After running out of memory with so many prompts: half of the room, and say so."""
        self.size /= 2
        self.say(f"out of memory with {prompts} questions at a time: going on with half as many")


def measured(policy, free: int | None = None, say: Callable[[str], Any] = print) -> Room:
    """The room that `free` bytes give (None: those that are free now on the policy's device). On a CPU
    WAVE tokens at most: more are no faster."""
    weight, model = next(policy.parameters()), policy.config
    bytes_of = token_bytes(model, number_size(weight), weight.device.type)
    size = SHARE * (free_memory(weight.device) if free is None else free)
    if weight.device.type == "cpu" and size >= WAVE * max(
        bytes_of["prompt"], bytes_of["completion"] + bytes_of["row"]
    ):
        return Room(say=say)
    return Room(size, **bytes_of, say=say)


def rows_that_fit(
    policy, prompts, group: int, cap: int, most: int | None = None, free: int | None = None
) -> int:
    """How many of the P·group rows of a rollout can decode at the same time: at least one, at most `most`
    (None: all).

    prompts: PromptBatch. free: bytes for prompts and rows (None: what is free now on the policy's device).
    """
    (P, S), weight = prompts.tokens.shape, next(policy.parameters())
    size = number_size(weight)
    bytes_of = token_bytes(policy.config, size, weight.device.type)
    left = SHARE * (free_memory(weight.device) if free is None else free) - P * S * bytes_of["prompt"]
    row = cap * bytes_of["completion"] + S * attention_size(size, weight.device.type) + bytes_of["row"]
    return min(most or P * group, P * group, max(1, int(left / row)))


def number_size(weight: torch.Tensor) -> int:
    """Bytes of a key's number: of what linear layers give under these weights, here and now."""
    device = weight.device.type
    return (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype).itemsize


def attention_size(size: int, device: str) -> int:
    """Bytes of a number in attention, which sums in float64 on a CPU (`to_attention_dtype`)."""
    return 8 if size == 4 and device == "cpu" else size


def token_bytes(model, size: int, device: str = "cpu") -> dict[str, float]:
    """At most: {"prompt": bytes of a prompt's token, "completion": of a completion's, "row": of a row}.
    model: ModelConfig; size: of a number.

    A prompt's token counts as a picture's: so many patches pass through the vision tower, and it through the
    decoder, one block at a time. A completion's has its keys, its values and a number that says whether it is
    there yet.
    """
    vision, width = model.vision, model.hidden_size
    numbers, attention = (
        2 * model.num_hidden_layers * model.num_key_value_heads * model.head_size,
        attention_size(size, device),
    )
    # Of a block: the norm's input in float32, its output, q, k, v, their rotation in float32, attention,
    # gate, up, their product, the sum.
    reading = width * (8 * size + 16) + 3 * model.intermediate_size * size
    patch = vision.width * (8 * size + 16) + 3 * vision.intermediate_size * size + 2 * 4 * vision.patch_dim
    # while they are converted, both exist
    kept = numbers * (attention + (size if attention != size else 0))
    # logits, their softmax and its sums
    return {
        "prompt": kept + max(reading, vision.spatial_merge_size**2 * patch),
        "completion": numbers * size + attention,
        "row": 3 * 4 * model.vocab_size,
    }


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: on a GPU with what PyTorch holds in reserve, on a CPU what the kernel
    calls available."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # not Linux: enough for WAVE tokens of the built-in model
    return 4 << 30


def retry_with_fewer_rows(write: Callable[[int], Result], rows: int) -> Result:
    """Run `write(rows)`. After an out-of-memory error, halve the rows, print a line and try again: the
    completions are the same.

    Raises torch.OutOfMemoryError if one row does not fit.
    """
    while True:
        try:
            return write(rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        # Outside the handler: the exception keeps the failed attempt's tensors alive.
        rows //= 2
        gc.collect()
        torch.cuda.empty_cache()
        tqdm.write(
            f"out of memory (rank {rank()}) while sampling: retrying with max_rows={rows}; the completions "
            "are the same",
            file=sys.stderr,
        )
