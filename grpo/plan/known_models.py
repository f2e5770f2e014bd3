"""The shapes of the models that the recipes name, so that --plan works before anything is fetched.

The numbers are those of each model's config.json and preprocessor_config.json on the hub. Tests compare the
number of parameters with the size of the hub's files.
"""

from models.config import ModelConfig, VisionConfig

# Pixels of a picture where a recipe sets no limit: the value in the processors of these models.
MAX_PIXELS = {"qwen2_vl": 12845056, "qwen2_5_vl": 12845056, "qwen3_vl": 16777216}
# Qwen2.5-VL's tower is gated and has windows; four of its blocks see the whole picture.
WINDOWS = dict(gated=True, window_size=112, fullatt_block_indexes=(7, 15, 23, 31))


def _model(
    words: int, width: int, mlp: int, blocks: int, heads: int, keys: int, tied: bool, new: bool = False
) -> ModelConfig:
    """Qwen2-VL, or Qwen2.5-VL if `new`. keys: key heads. tied: the head is the embedding."""
    tower = (32, 1280, 16, 3420 if new else 5120, width)
    vision = VisionConfig(*tower, **WINDOWS) if new else VisionConfig(*tower)
    kind, places = ("qwen2_5_vl", 128000) if new else ("qwen2_vl", 32768)
    shape = (kind, words, width, mlp, blocks, heads, keys, vision)
    return ModelConfig(*shape, max_position_embeddings=places, tie_word_embeddings=tied)


def _qwen3(width: int, mlp: int, blocks: int, heads: int, tied: bool, large: bool = False) -> ModelConfig:
    """Qwen3-VL. large: the tower of the 8B model."""
    tower = (27, 1152, 16, 4304, width) if large else (24, 1024, 16, 4096, width)
    deep = (8, 16, 24) if large else (5, 11, 17)
    places = {"num_position_embeddings": 2304, "deepstack_visual_indexes": deep}
    vision = VisionConfig(*tower, patch_size=16, **places)
    shape = ("qwen3_vl", 151936, width, mlp, blocks, heads, 8, vision, (24, 20, 20), 5e6)
    return ModelConfig(*shape, max_position_embeddings=262144, tie_word_embeddings=tied, head_dim=128)


SMALL = _model(151936, 1536, 8960, 28, 12, 2, tied=True)
LARGE = _model(152064, 3584, 18944, 28, 28, 4, tied=False)

KNOWN: dict[str, ModelConfig] = {
    "Qwen/Qwen2-VL-2B": SMALL,
    "Qwen/Qwen2-VL-2B-Instruct": SMALL,
    "Qwen/Qwen2-VL-7B": LARGE,
    "Qwen/Qwen2-VL-7B-Instruct": LARGE,
    "Qwen/Qwen2.5-VL-3B-Instruct": _model(151936, 2048, 11008, 36, 16, 2, tied=True, new=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _model(152064, 3584, 18944, 28, 28, 4, tied=False, new=True),
}
for _kind in ("Instruct", "Thinking"):
    KNOWN[f"Qwen/Qwen3-VL-2B-{_kind}"] = _qwen3(2048, 6144, 28, 16, tied=True)
    KNOWN[f"Qwen/Qwen3-VL-4B-{_kind}"] = _qwen3(2560, 9728, 36, 32, tied=True)
    KNOWN[f"Qwen/Qwen3-VL-8B-{_kind}"] = _qwen3(4096, 12288, 36, 32, tied=False, large=True)
