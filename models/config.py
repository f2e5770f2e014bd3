"""The shape of a policy, read from and written to the `config.json` of a Hugging Face folder.

Field names are the hub's. Only what changes the computation is kept. A value that this code does not compute
(another activation, a sliding window, another rotary type) is an error: ignoring it would give a wrong model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
OPTIONAL = ("rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "initializer_range")
OTHERS = ("rope_theta", "tie_word_embeddings")
VISION = ("depth", "num_heads", "in_channels", "patch_size", "spatial_merge_size", "temporal_patch_size")
PLACEHOLDERS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    width: channels of a patch (`embed_dim` in Qwen2-VL's file, `hidden_size` in Qwen2.5-VL's).
    hidden_size: width D of the decoder's features (`out_hidden_size` in Qwen2.5-VL's file).
    gated: Qwen2.5-VL's RMSNorm and gated SiLU instead of LayerNorm and quick GELU.
    window_size: side of an attention window in pixels (0: none). Blocks in `fullatt_block_indexes` see the
    whole picture.
    """

    depth: int
    width: int
    num_heads: int
    intermediate_size: int
    hidden_size: int
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3
    gated: bool = False
    window_size: int = 0
    fullatt_block_indexes: tuple[int, ...] = ()

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channels x frames x pixels x pixels."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads


@dataclass(frozen=True)
class ModelConfig:
    """The whole policy: the decoder, the four placeholder token ids, and `vision`.

    In the letters of the docs: V = vocab_size, D = hidden_size, L = num_hidden_layers, H =
    num_attention_heads, K = num_key_value_heads.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vision: VisionConfig
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    image_token_id: int = PLACEHOLDERS["image_token_id"]
    video_token_id: int = PLACEHOLDERS["video_token_id"]
    vision_start_token_id: int = PLACEHOLDERS["vision_start_token_id"]
    vision_end_token_id: int = PLACEHOLDERS["vision_end_token_id"]
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    initializer_range: float = 0.02

    @property
    def head_size(self) -> int:
        """Channels E of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def placeholder_ids(self) -> tuple[int, int, int, int]:
        """The ids that mark pictures in a prompt. A completion can't contain them."""
        return self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `config.json` of a Hugging Face folder, or that file itself. Raises ValueError that names
        the file and the key."""
        path = Path(folder)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file; a model folder holds config.json and safetensors weights"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        return cls.from_dict(values, name=str(path))

    @classmethod
    def from_dict(cls, values: dict, *, name: str = "config") -> "ModelConfig":
        """From a parsed `config.json`, in the hub's flat layout or with the `text_config` of transformers 5.

        name: stands in error messages. Raises ValueError for another architecture, a missing key, sizes that
        don't fit together, or a value that this code does not compute.
        """
        architecture = values.get("model_type")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"{name}: model_type is {architecture!r}; this repository has {' and '.join(ARCHITECTURES)}"
            )
        # The decoder's keys are at the top, or in `text_config`, which then wins.
        text = _Keys({**values, **(values.get("text_config") or {})}, name)
        rope = {**(text.values.get("rope_scaling") or {}), **(text.values.get("rope_parameters") or {})}
        if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
            raise ValueError(f"{name}: rotary type {rope!r} is not supported; only plain M-RoPE is")
        text.must("hidden_act", "silu")
        text.must("use_sliding_window", False)
        section = tuple(rope.get("mrope_section") or cls.mrope_section)
        tied = values.get("tie_word_embeddings") or text.values.get("tie_word_embeddings")
        config = cls(
            architecture=architecture,
            **{key: text.need(key) for key in NEEDED},
            **{key: text.values.get(key, getattr(cls, key)) for key in OPTIONAL},
            mrope_section=section,  # pyrefly: ignore[bad-argument-type]
            rope_theta=float(rope.get("rope_theta") or text.values.get("rope_theta") or cls.rope_theta),
            tie_word_embeddings=bool(tied),
            **{key: values.get(key, default) for key, default in PLACEHOLDERS.items()},
            vision=_read_vision(architecture, text.need("vision_config"), text.need("hidden_size"), name),
        )
        config._check(name)
        return config

    def to_dict(self) -> dict:
        """The content of `config.json` in the hub's layout, which `transformers` (4 and 5) and vLLM read."""
        v = self.vision
        vision = {"model_type": self.architecture} | {key: getattr(v, key) for key in VISION}
        if v.gated:
            vision |= dict(
                hidden_size=v.width,
                intermediate_size=v.intermediate_size,
                out_hidden_size=v.hidden_size,
                hidden_act="silu",
                window_size=v.window_size,
                fullatt_block_indexes=list(v.fullatt_block_indexes),
            )
        else:
            ratio = v.intermediate_size // v.width
            vision |= dict(
                embed_dim=v.width, hidden_size=v.hidden_size, mlp_ratio=ratio, hidden_act="quick_gelu"
            )
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            **{key: getattr(self, key) for key in (*NEEDED, *OPTIONAL, *OTHERS, *PLACEHOLDERS)},
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_scaling": {"type": "mrope", "mrope_section": list(self.mrope_section)},
            "vision_config": vision,
        }

    def _check(self, name: str) -> None:
        """Refuse sizes that don't fit together."""
        v, half = self.vision, self.head_size // 2
        checks = {
            "hidden_size must be a multiple of num_attention_heads, and that of num_key_value_heads": (
                self.hidden_size % self.num_attention_heads
                or self.num_attention_heads % self.num_key_value_heads
            ),
            f"mrope_section {list(self.mrope_section)} must add up to half the head size, {half}": (
                sum(self.mrope_section) * 2 != self.head_size
            ),
            "the vision width must be a multiple of num_heads, and its head size a multiple of 4": (
                v.width % v.num_heads or v.head_size % 4
            ),
            f"the vision tower gives width {v.hidden_size}, the decoder takes {self.hidden_size}": (
                v.hidden_size != self.hidden_size
            ),
            "Qwen2-VL's mlp_ratio must be a whole number": not v.gated and v.intermediate_size % v.width,
        }
        for key in PLACEHOLDERS:
            number = getattr(self, key)
            checks[f"{key} {number} is not below vocab_size {self.vocab_size}"] = not (
                0 <= number < self.vocab_size
            )
        if wrong := [text for text, holds in checks.items() if holds]:
            raise ValueError(f"{name}: " + "; ".join(wrong))


class _Keys:
    """A file's dictionary, with errors that name the file and the key."""

    def __init__(self, values: dict, name: str):
        self.values, self.name = values, name

    def need(self, key: str):
        """The value of a key that must be there."""
        if self.values.get(key) is None:
            raise ValueError(f"{self.name}: key {key!r} is missing")
        return self.values[key]

    def must(self, key: str, only) -> None:
        """Raise for any value but `only`. An absent key means `only`."""
        if self.values.get(key, only) not in (only, None):
            raise ValueError(f"{self.name}: {key} is {self.values[key]!r}; only {only!r} is supported")


def _read_vision(architecture: str, values: dict, hidden_size: int, name: str) -> VisionConfig:
    """`vision_config` of either architecture. The hub's files say `in_chans`, transformers' `in_channels`."""
    keys = _Keys(values, f"{name}: vision_config")
    gated = architecture == "qwen2_5_vl"
    keys.must("hidden_act", "silu" if gated else "quick_gelu")
    found = {key: values.get(key, getattr(VisionConfig, key, None)) for key in VISION}
    found |= {key: keys.need(key) for key in ("depth", "num_heads")}
    found["in_channels"] = values.get("in_channels", values.get("in_chans", 3))
    if gated:
        return VisionConfig(
            **found,
            width=keys.need("hidden_size"),
            intermediate_size=keys.need("intermediate_size"),
            hidden_size=keys.need("out_hidden_size"),
            gated=True,
            window_size=keys.need("window_size"),
            fullatt_block_indexes=tuple(keys.need("fullatt_block_indexes")),
        )
    width = keys.need("embed_dim")
    return VisionConfig(
        **found,
        width=width,
        intermediate_size=int(width * values.get("mlp_ratio", 4)),
        hidden_size=values.get("hidden_size", hidden_size),
    )
