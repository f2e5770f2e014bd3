"""The shape of a policy, read from and written to the `config.json` of a Hugging Face folder.

Field names are the hub's. Only what changes the computation is kept; a value we can't compute with (another
activation, a sliding window, another rotary type) is refused, because ignoring it would give a model that
runs and is wrong.
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
PLACEHOLDERS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Widths and sizes in channels, pixels or blocks.

    width: channels of a patch (`embed_dim` in Qwen2-VL's file, `hidden_size` in Qwen2.5-VL's).
    hidden_size: width D of the features the decoder gets (`out_hidden_size` in Qwen2.5-VL's file).
    gated: Qwen2.5-VL's RMSNorm and gated SiLU instead of LayerNorm and quick GELU.
    window_size: side of an attention window in pixels; blocks in `fullatt_block_indexes` see the whole
    picture. 0: all blocks do.
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
        """The ids that mark pictures in a prompt and can't be part of a completion."""
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
        """A parsed `config.json`, in the hub's flat layout or with the `text_config` of transformers 5.
        `name` stands in error messages.

        Raises ValueError: another architecture, a missing key, sizes that don't fit together, a value we
        can't compute with.
        """
        architecture = values.get("model_type")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"{name}: model_type is {architecture!r}; this repository has {' and '.join(ARCHITECTURES)}"
            )
        # A flat file holds the decoder's keys beside the others; a nested one below `text_config`, which then
        # has the last word.
        text = _Keys({**values, **(values.get("text_config") or {})}, name)
        rope = {**(text.values.get("rope_scaling") or {}), **(text.values.get("rope_parameters") or {})}
        if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
            raise ValueError(f"{name}: rotary type {rope!r} is not supported; only plain M-RoPE is")
        text.must("hidden_act", "silu")
        text.must("use_sliding_window", False)
        config = cls(
            architecture=architecture,
            **{key: text.need(key) for key in NEEDED},
            **{key: text.values.get(key, getattr(cls, key)) for key in OPTIONAL},
            mrope_section=tuple(rope.get("mrope_section") or cls.mrope_section),
            rope_theta=float(rope.get("rope_theta") or text.values.get("rope_theta") or cls.rope_theta),
            tie_word_embeddings=bool(
                values.get("tie_word_embeddings") or text.values.get("tie_word_embeddings")
            ),
            **{key: values.get(key, default) for key, default in PLACEHOLDERS.items()},
            vision=_read_vision(architecture, text.need("vision_config"), text.need("hidden_size"), name),
        )
        config._check(name)
        return config

    def to_dict(self) -> dict:
        """The content of `config.json` in the hub's layout, which `transformers` (4 and 5) and vLLM read."""
        v = self.vision
        vision = dict(
            model_type=self.architecture,
            depth=v.depth,
            num_heads=v.num_heads,
            in_channels=v.in_channels,
            patch_size=v.patch_size,
            spatial_merge_size=v.spatial_merge_size,
            temporal_patch_size=v.temporal_patch_size,
        )
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
            vision |= dict(
                embed_dim=v.width,
                hidden_size=v.hidden_size,
                mlp_ratio=v.intermediate_size // v.width,
                hidden_act="quick_gelu",
            )
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            **{
                key: getattr(self, key)
                for key in (*NEEDED, *OPTIONAL, "rope_theta", "tie_word_embeddings", *PLACEHOLDERS)
            },
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_scaling": {"type": "mrope", "mrope_section": list(self.mrope_section)},
            "vision_config": vision,
        }

    def _check(self, name: str) -> None:
        """Refuse sizes that don't fit together."""
        wrong = []
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            wrong.append(
                "hidden_size must be a multiple of num_attention_heads, and that of num_key_value_heads"
            )
        if sum(self.mrope_section) * 2 != self.head_size:
            wrong.append(
                f"mrope_section {list(self.mrope_section)} must add up to half the head size, "
                f"{self.head_size // 2}"
            )
        if self.vision.width % self.vision.num_heads or self.vision.head_size % 4:
            wrong.append(
                "the vision width must be a multiple of num_heads, and its head size a multiple of 4"
            )
        if self.vision.hidden_size != self.hidden_size:
            wrong.append(
                f"the vision tower gives width {self.vision.hidden_size}, the decoder takes "
                f"{self.hidden_size}"
            )
        ids = {key: getattr(self, key) for key in PLACEHOLDERS}
        wrong += [
            f"{key} {i} is not below vocab_size {self.vocab_size}"
            for key, i in ids.items()
            if not 0 <= i < self.vocab_size
        ]
        if not self.vision.gated and self.vision.intermediate_size % self.vision.width:
            wrong.append("Qwen2-VL's mlp_ratio must be a whole number")
        if wrong:
            raise ValueError(f"{name}: " + "; ".join(wrong))


class _Keys:
    """A dictionary of a file, with errors that name the file and the key."""

    def __init__(self, values: dict, name: str):
        self.values, self.name = values, name

    def need(self, *keys: str):
        """The value of the first key that is there."""
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        raise ValueError(f"{self.name}: key {keys[0]!r} is missing")

    def must(self, key: str, only) -> None:
        """Refuse any value but the one we compute with; an absent key means that one."""
        if self.values.get(key, only) not in (only, None):
            raise ValueError(f"{self.name}: {key} is {self.values[key]!r}; only {only!r} is supported")


def _read_vision(architecture: str, values: dict, hidden_size: int, name: str) -> VisionConfig:
    """`vision_config` of either architecture. The hub's files say `in_chans`, transformers' say
    `in_channels`."""
    keys = _Keys(values, f"{name}: vision_config")
    gated = architecture == "qwen2_5_vl"
    common = dict(
        depth=keys.need("depth"),
        num_heads=keys.need("num_heads"),
        in_channels=values.get("in_channels", values.get("in_chans", 3)),
        **{
            key: values.get(key, getattr(VisionConfig, key))
            for key in ("patch_size", "spatial_merge_size", "temporal_patch_size")
        },
    )
    keys.must("hidden_act", "silu" if gated else "quick_gelu")
    if gated:
        return VisionConfig(
            width=keys.need("hidden_size"),
            intermediate_size=keys.need("intermediate_size"),
            hidden_size=keys.need("out_hidden_size"),
            gated=True,
            window_size=keys.need("window_size"),
            fullatt_block_indexes=tuple(keys.need("fullatt_block_indexes")),
            **common,
        )
    width, ratio = keys.need("embed_dim"), values.get("mlp_ratio", 4)
    return VisionConfig(
        width=width,
        intermediate_size=int(width * ratio),
        hidden_size=values.get("hidden_size", hidden_size),
        **common,
    )
