"""The values of config.json: what each must be, checked where it is read."""

from collections.abc import Callable
from typing import Any

# Larger than in any model. A larger size would fill the memory before a shape is compared.
MOST, MOST_LAYERS = 10**7, 1000


def _count(value: Any, most: int = MOST) -> bool:
    return type(value) is int and 0 < value <= most


def _index(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _indexes(value: Any) -> bool:
    return type(value) is list and all(map(_index, value))


def _object_or_null(value: Any) -> bool:
    return value is None or type(value) is dict


# {what a value must be: (its test, the keys of such values)}
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    f"a whole number from 1 to {MOST}": (
        _count,
        "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads "
        "max_position_embeddings head_dim num_heads in_channels embed_dim out_hidden_size patch_size "
        "spatial_merge_size temporal_patch_size window_size num_position_embeddings",
    ),
    f"a whole number from 1 to {MOST_LAYERS}": (
        lambda value: _count(value, MOST_LAYERS),
        "num_hidden_layers depth",
    ),
    "a number above 0": (
        lambda value: type(value) in (int, float) and 0 < value < 1e30,
        "rms_norm_eps initializer_range rope_theta mlp_ratio",
    ),
    "a token id": (_index, "image_token_id video_token_id vision_start_token_id vision_end_token_id"),
    "a token id, a list of them or null": (
        lambda value: value is None or _index(value) or _indexes(value),
        "bos_token_id eos_token_id",
    ),
    "true or false": (lambda value: type(value) is bool, "tie_word_embeddings"),
    "three whole numbers": (lambda value: _indexes(value) and len(value) == 3, "mrope_section"),
    "a list of whole numbers": (_indexes, "fullatt_block_indexes deepstack_visual_indexes"),
    "an object": (lambda value: type(value) is dict, "vision_config"),
    "an object or null": (_object_or_null, "text_config rope_scaling rope_parameters"),
}
KIND = {key: (test, what) for what, (test, keys) in KINDS.items() for key in keys.split()}


class Values:
    """The values of a JSON object, each of the kind that `KINDS` asks for. name: stands in errors."""

    def __init__(self, values: Any, name: str):
        if type(values) is not dict:
            raise ValueError(f"{name}: holds {shown(values)}, not an object")
        self.values = values
        self.name = name

    def get(self, key: str, absent: Any = None) -> Any:
        """The value of a key; `absent` if the file does not have the key."""
        if key not in self.values:
            return absent
        test, what = KIND[key]
        if not test(self.values[key]):
            raise ValueError(f"{self.name}: {key} is {shown(self.values[key])}; it must be {what}")
        return self.values[key]

    def need(self, key: str) -> Any:
        """The value of a key that must be there."""
        if self.values.get(key) is None:
            raise ValueError(f"{self.name}: key {key!r} is missing")
        return self.get(key)

    def only(self, key: str, value: Any) -> None:
        """Raise for any other value. An absent key and null mean `value`."""
        if (found := self.values.get(key)) not in (value, None):
            raise ValueError(f"{self.name}: {key} is {shown(found)}; only {shown(value)} is supported")


def shown(value: Any) -> str:
    """A value as an error shows it: its first 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
