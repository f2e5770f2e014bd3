"""A random policy small enough for a test to train it, in a folder that train.py can start from."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from data.chat import Chat
from data.shapes import tokenizer
from data.shapes.world import Shapes
from grpo.batch import Batch, Cut, MicroBatch
from models import weights
from models.config import ModelConfig, VisionConfig

# a dozen words that end a completion, so that a random policy stops after ten tokens or so
STOPS = tuple(range(40, 52))


def small_config(tied: bool = True) -> ModelConfig:
    """D = 32, H = 2, K = 1, E = 16, two blocks, and a vision tower of one; the vocabulary of the built-in
    model."""
    values = tokenizer.model_config(tokenizer.build().get_vocab_size())
    values |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": tied,
    }
    values["vision_config"] |= {
        "depth": 1,
        "embed_dim": 16,
        "num_heads": 1,
        "hidden_size": 32,
        "mlp_ratio": 2,
    }
    return ModelConfig.from_dict(values)


def qwen3_config(tied: bool = True) -> ModelConfig:
    """The same decoder and vocabulary as Qwen3-VL, with DeepStack after the first of two vision blocks."""
    tower = dict(depth=2, width=16, num_heads=1, intermediate_size=32, hidden_size=32)
    vision = VisionConfig(**tower, num_position_embeddings=36, deepstack_visual_indexes=(0,))
    changed = dict(architecture="qwen3_vl", head_dim=16, mrope_section=(4, 2, 2), vision=vision)
    return replace(small_config(tied), **changed)


CONFIGS = {"qwen2_vl": small_config, "qwen3_vl": qwen3_config}


def small_policy(seed: int = 0, tied: bool = True, architecture: str = "qwen2_vl", **changed):
    """Random, and far from indifferent: every parameter matters, and the next token depends on what was
    seen. changed: fields of its config."""
    policy = weights.init(replace(CONFIGS[architecture](tied), **changed), seed)
    random = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.25)
    return policy


def small_folder(
    folder: Path, seed: int = 0, stops: tuple[int, ...] = STOPS, architecture: str = "qwen2_vl", **changed
) -> Path:
    """A model folder in Hugging Face layout. changed: fields of its config."""
    tokenizer.write(folder)
    weights.save(small_policy(seed, architecture=architecture, **changed), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(stops)}))
    return folder


def small_prompts(folder: Path, indices=(0, 1, 2, 3), **how) -> list:
    """Prompts of the built-in world; 0-3 ask one question of each kind, in words of different number."""
    chat, world = Chat(folder, template="shapes"), Shapes("train", 100, seed=5)
    return [chat.prompt(world[i], **how) for i in indices]


def batch_of(prompts, tokens: torch.Tensor, length: torch.Tensor, **values) -> Batch:
    """A batch of these completions, tokens (P, G, C) and length (P, G); values: advantage, weight, ..."""
    batch = Batch.of_documents([], list(prompts), tokens, length)
    for name, value in values.items():
        setattr(batch, name, value)
    return batch


def micro_batch(batch: Batch, image_token: int, cut: Cut | None = None, append=None) -> MicroBatch:
    """A micro-batch on the CPU; cut: None for the whole batch."""
    cut = cut or Cut(list(range(len(batch.prompts))), slice(None))
    return batch.micro_batch(cut, image_token=image_token, merge=2, device="cpu", append=append)


def full(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded. All ranks call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value
