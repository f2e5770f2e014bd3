"""The shapes of the models that the recipes name, so that --plan works before anything is fetched.

The numbers are those of each model's config.json and preprocessor_config.json on the hub. Tests compare the
number of parameters with the size of the hub's files.
"""

from models.config import ModelConfig, VisionConfig

# Pixels of a picture where a recipe sets no limit: the value in the processors of all of these.
MAX_PIXELS = 12845056


def _qwen2_vl(vocabulary: int, width: int, mlp: int, heads: int, keys: int, tied: bool) -> ModelConfig:
    """28 blocks over a vision tower of 32."""
    vision = VisionConfig(depth=32, width=1280, num_heads=16, intermediate_size=5120, hidden_size=width)
    return ModelConfig("qwen2_vl", vocabulary, width, mlp, 28, heads, keys, vision, tie_word_embeddings=tied)


def _qwen2_5_vl(
    vocabulary: int, width: int, mlp: int, blocks: int, heads: int, keys: int, tied: bool
) -> ModelConfig:
    """The gated tower with windows; four of its blocks see the whole picture."""
    sizes = dict(depth=32, width=1280, num_heads=16, intermediate_size=3420, hidden_size=width)
    windows = dict(gated=True, window_size=112, fullatt_block_indexes=(7, 15, 23, 31))
    vision = VisionConfig(**sizes, **windows)
    shape = (vocabulary, width, mlp, blocks, heads, keys, vision)
    return ModelConfig("qwen2_5_vl", *shape, max_position_embeddings=128000, tie_word_embeddings=tied)


SMALL = _qwen2_vl(151936, 1536, 8960, 12, 2, tied=True)
LARGE = _qwen2_vl(152064, 3584, 18944, 28, 4, tied=False)

KNOWN: dict[str, ModelConfig] = {
    "Qwen/Qwen2-VL-2B": SMALL,
    "Qwen/Qwen2-VL-2B-Instruct": SMALL,
    "Qwen/Qwen2-VL-7B": LARGE,
    "Qwen/Qwen2-VL-7B-Instruct": LARGE,
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(151936, 2048, 11008, 36, 16, 2, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(152064, 3584, 18944, 28, 28, 4, tied=False),
}
