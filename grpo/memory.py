"""How many rows and tokens can decode at the same time in the memory that is free.

What a token costs is bounded from the model's config (`TokenCost`, also for `--plan`). After an out-of-memory
error the rollout retries with fewer rows, and an evaluation with half the budget
(`grpo/evaluation/answers.py`). Neither changes an answer in float32.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from grpo.parallel.ranks import rank
from models.config import ModelConfig
from models.layers import attention_size

Result = TypeVar("Result")

# Tokens that decode at the same time: 400 short rows of the built-in model, 1.9 GB of keys and values for
# Qwen2-VL-2B.
WAVE = 1 << 16
# The share of the free memory that is used. The rest is for libraries and fragmentation.
SHARE = 0.8


class TokenCost(NamedTuple):
    """Bytes of a rollout, at most.

    prompt_kv, completion_kv: keys and values of one token. reading: what else exists per prompt token while
    the prompt is read. mask: one place of one row. logits: one row's logits, their softmax and its sums.
    """

    prompt_kv: int
    completion_kv: int
    reading: int
    mask: int
    logits: int

    @classmethod
    def of(cls, model: ModelConfig, size: int, device: str = "cpu") -> "TokenCost":
        """size: bytes of a number in matrix products."""
        vision, width = model.vision, model.hidden_size
        numbers = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_size
        attention = attention_size(size, device)
        # One block at a time: the norm's input in float32, its output, q, k, v, their rotation in float32,
        # attention, gate, up, their product, the sum. Every prompt token counts as a picture's, which stands
        # for merge x merge patches.
        block = width * (8 * size + 16) + 3 * model.intermediate_size * size
        patch = vision.width * (8 * size + 16) + 3 * vision.intermediate_size * size
        patches = vision.spatial_merge_size**2 * (patch + 2 * 4 * vision.patch_dim)
        # Keys and values exist twice while they are converted.
        converted = numbers * size if attention != size else 0
        deep = len(vision.deepstack_visual_indexes) * width * size
        kv = (numbers * attention, numbers * size)
        reading = converted + deep + max(block, patches)
        return cls(*kv, reading, mask=attention, logits=3 * 4 * model.vocab_size)


@dataclass
class MemoryBudget:
    """A memory budget. `prompt`, `completion` and `row` are the costs of a prompt token, a completion token
    and a row: in bytes, or by default in tokens, with rows free. say: called with a line when it halves."""

    size: float = WAVE
    prompt: float = 1.0
    completion: float = 1.0
    row: float = 0.0
    say: Callable[[str], Any] = print

    def holds(self, prompts: int, longest: int, samples: int, cap: int) -> bool:
        """Whether `prompts` prompts of at most `longest` tokens fit, with `samples` completions of `cap`
        tokens each."""
        return prompts * (longest * self.prompt + samples * (cap * self.completion + self.row)) <= self.size

    def halve(self, prompts: int) -> None:
        """Halve the budget after an out-of-memory error with `prompts` prompts, and say so."""
        self.size /= 2
        self.say(f"out of memory with {prompts} questions at a time: going on with half as many")


def memory_budget(policy, free: int | None = None, say: Callable[[str], Any] = print) -> MemoryBudget:
    """The budget of `free` bytes (None: what is free now on the policy's device). On a CPU at most WAVE
    tokens: more are no faster."""
    size, cost = _size_and_cost(policy, free)
    prompt, completion = cost.prompt_kv + cost.reading, cost.completion_kv + cost.mask
    on_cpu = next(policy.parameters()).device.type == "cpu"
    if on_cpu and size >= WAVE * max(prompt, completion + cost.logits):
        return MemoryBudget(say=say)
    return MemoryBudget(size, prompt, completion, cost.logits, say)


def _size_and_cost(policy, free: int | None) -> tuple[float, TokenCost]:
    weight = next(policy.parameters())
    cost = TokenCost.of(policy.config, number_size(weight), weight.device.type)
    return SHARE * (free_memory(weight.device) if free is None else free), cost


def rows_that_fit(
    policy, prompts, group: int, cap: int, most: int | None = None, free: int | None = None
) -> int:
    """How many of the P·group rows of a rollout can decode at the same time: at least one, at most `most`
    (None: all). free: bytes for prompts and rows (None: what is free now on the policy's device)."""
    P, S = prompts.tokens.shape
    size, cost = _size_and_cost(policy, free)
    size -= P * S * (cost.prompt_kv + cost.reading)
    row = cap * (cost.completion_kv + cost.mask) + S * cost.mask + cost.logits
    return min(most or P * group, P * group, max(1, int(size / row)))


def retry_with_fewer_rows(write: Callable[[int], Result], rows: int) -> Result:
    """Run `write(rows)`. After an out-of-memory error, halve the rows, print a line and try again: the
    completions are the same. Raises torch.OutOfMemoryError if one row does not fit."""
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
        retry = f"retrying with max_rows={rows}; the completions are the same"
        tqdm.write(f"out of memory (rank {rank()}) while sampling: {retry}", file=sys.stderr)


def number_size(weight: torch.Tensor) -> int:
    """Bytes of a number that linear layers return under these weights and the autocast in force."""
    device = weight.device.type
    return (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype).itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that are still free: on a GPU with PyTorch's reserve, on a CPU what the kernel says."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Not Linux: enough for WAVE tokens of the built-in model.
    return 4 << 30
