"""The shape of a policy, read from and written to the `config.json` of a Hugging Face folder.

Field names are the hub's. Only what changes the computation is kept. A value that this code does not compute
(another activation, a sliding window, another rotary type) is an error: ignoring it would give a wrong model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

from models.config_values import Values, shown

ARCHITECTURES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
NEEDED = ("vocab_size", "hidden_size", "intermediate_size")
NEEDED += ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
OPTIONAL = ("rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "initializer_range")
OTHERS = ("rope_theta", "tie_word_embeddings")
VISION = ("depth", "num_heads", "in_channels", "patch_size", "spatial_merge_size", "temporal_patch_size")
# The vision tower of Qwen2.5-VL and Qwen3-VL: {our name: the hub's}.
TOWER = dict(width="hidden_size", intermediate_size="intermediate_size", hidden_size="out_hidden_size")
PLACEHOLDERS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# The only keys of a rotary setting that is computed here.
ROPE = ("type", "rope_type", "mrope_section", "mrope_interleaved", "rope_theta")
# What transformers takes for a key that the file does not have.
QWEN2 = dict(rms_norm_eps=1e-5, max_position_embeddings=32768, rope_theta=1e6)
QWEN2 |= dict(initializer_range=0.02, mrope_section=(16, 24, 24))
QWEN3 = dict(rms_norm_eps=1e-6, max_position_embeddings=128000, rope_theta=5e5)
QWEN3 |= dict(initializer_range=0.02, mrope_section=(24, 20, 20))


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    width: channels of a patch (`embed_dim` in Qwen2-VL's file, `hidden_size` in the others').
    hidden_size: width D of the decoder's features (`out_hidden_size` in the others').
    gated: Qwen2.5-VL's RMSNorm and gated SiLU instead of LayerNorm and quick GELU.
    window_size: side of an attention window in pixels (0: none). Blocks in `fullatt_block_indexes` see the
    whole picture.
    num_position_embeddings: Qwen3-VL's square table of learned positions (0: none).
    deepstack_visual_indexes: Qwen3-VL's blocks whose features go into the decoder's first blocks.
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
    num_position_embeddings: int = 0
    deepstack_visual_indexes: tuple[int, ...] = ()

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
    """The whole policy: decoder, the four placeholder token ids, and `vision`. In the letters of the docs:
    V = vocab_size, D = hidden_size, L = num_hidden_layers, H = num_attention_heads, K = num_key_value_heads
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
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    initializer_range: float = 0.02
    head_dim: int | None = None

    @property
    def head_size(self) -> int:
        """Channels E of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def qwen3(self) -> bool:
        """Whether the decoder is Qwen3's: queries and keys are normalised and have no biases, the axes of
        M-RoPE take turns, and DeepStack features go into the first blocks."""
        return self.architecture == "qwen3_vl"

    @property
    def placeholder_ids(self) -> tuple[int, int, int, int]:
        """The ids that mark pictures in a prompt. A completion can't contain them."""
        return self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `config.json` of a folder, or that file itself. Raises ValueError with file and key."""
        path = Path(folder)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a model folder has config.json and safetensors weights")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        return cls.from_dict(values, name=str(path))

    @classmethod
    def from_dict(cls, values: dict, *, name: str = "config") -> "ModelConfig":
        """From a parsed `config.json`, in the hub's flat layout or with the `text_config` of transformers 5.

        name: stands in error messages. Raises ValueError for another architecture, a missing key, a value of
        a wrong type or out of range, sizes that don't fit together, or one that this code does not compute.
        """
        top = Values(values, name)
        architecture = top.values.get("model_type")
        if architecture not in tuple(ARCHITECTURES):
            known = " and ".join(ARCHITECTURES)
            raise ValueError(f"{name}: model_type is {shown(architecture)}; this repository has {known}")
        top.only("quantization_config", None)
        # Where there is a `text_config`, transformers reads the decoder's keys from it alone.
        nested = top.get("text_config")
        text = top if nested is None else Values(nested, f"{name}: text_config")
        rope = Values(
            text.get("rope_scaling") or text.get("rope_parameters") or {}, f"{name}: rotary setting"
        )
        for key, value in rope.values.items():
            if key not in ROPE or (key.endswith("type") and value not in ("default", "mrope")):
                wrong = f"rotary type {shown(rope.values)} is not supported; only plain M-RoPE is"
                raise ValueError(f"{name}: {wrong}")
        text.only("hidden_act", "silu")
        text.only("use_sliding_window", False)
        text.only("layer_types", ["full_attention"] * text.need("num_hidden_layers"))
        qwen3 = architecture == "qwen3_vl"
        absent = QWEN3 if qwen3 else QWEN2
        flags = (top,) if qwen3 else (top, text)
        if qwen3:
            text.only("attention_bias", False)
        config = cls(
            architecture=architecture,
            **{key: text.need(key) for key in NEEDED},
            **{key: text.get(key, absent.get(key)) for key in OPTIONAL},
            mrope_section=tuple(rope.get("mrope_section", absent["mrope_section"])),
            rope_theta=float(rope.get("rope_theta", text.get("rope_theta", absent["rope_theta"]))),
            tie_word_embeddings=any(each.get("tie_word_embeddings", False) for each in flags),
            **{key: top.get(key, getattr(cls, key)) for key in PLACEHOLDERS},
            vision=_read_vision(architecture, top.need("vision_config"), text.need("hidden_size"), name),
            head_dim=text.get("head_dim", 128) if qwen3 else None,
        )
        text.only("head_dim", config.head_size)
        if wrong := list(config._faults()):
            raise ValueError(f"{name}: " + "; ".join(wrong))
        return config

    def to_dict(self) -> dict:
        """The content of `config.json` in the hub's layout, which `transformers` (4 and 5) and vLLM read."""
        v = self.vision
        vision = {"model_type": self.architecture} | {key: getattr(v, key) for key in VISION}
        if v.gated or self.qwen3:
            vision |= {theirs: getattr(v, ours) for ours, theirs in TOWER.items()}
            vision["hidden_act"] = "gelu_pytorch_tanh" if self.qwen3 else "silu"
        if self.qwen3:
            vision["num_position_embeddings"] = v.num_position_embeddings
            vision["deepstack_visual_indexes"] = list(v.deepstack_visual_indexes)
        elif v.gated:
            vision |= dict(window_size=v.window_size, fullatt_block_indexes=list(v.fullatt_block_indexes))
        else:
            vision |= dict(embed_dim=v.width, hidden_size=v.hidden_size)
            vision |= dict(mlp_ratio=v.intermediate_size // v.width, hidden_act="quick_gelu")
        text = {key: getattr(self, key) for key in (*NEEDED, *OPTIONAL, *OTHERS)} | {"hidden_act": "silu"}
        top = {
            "architectures": [f"{ARCHITECTURES[self.architecture]}ForConditionalGeneration"],
            "model_type": self.architecture,
            **{key: getattr(self, key) for key in PLACEHOLDERS},
            "vision_config": vision,
        }
        section = list(self.mrope_section)
        if not self.qwen3:
            rope = {"type": "mrope", "mrope_section": section}
            return {**top, **text, "use_sliding_window": False, "rope_scaling": rope}
        rope = {"rope_type": "default", "mrope_section": section, "mrope_interleaved": True}
        text |= {"model_type": "qwen3_vl_text", "head_dim": self.head_size, "attention_bias": False}
        text["rope_scaling"] = rope
        return {**top, "tie_word_embeddings": self.tie_word_embeddings, "text_config": text}

    def _faults(self) -> Iterator[str]:
        """Sizes that don't fit together."""
        v, half = self.vision, self.head_size // 2
        heads, keys = self.num_attention_heads, self.num_key_value_heads
        if (not self.head_dim and self.hidden_size % heads) or heads % keys:
            yield "hidden_size must be a multiple of num_attention_heads, and that of num_key_value_heads"
        if sum(self.mrope_section) * 2 != self.head_size:
            yield f"mrope_section {list(self.mrope_section)} must add up to half the head size, {half}"
        if v.width % v.num_heads or v.head_size % 4:
            yield "the vision width must be a multiple of num_heads, and its head size a multiple of 4"
        if v.hidden_size != self.hidden_size:
            yield f"the vision tower gives width {v.hidden_size}, the decoder takes {self.hidden_size}"
        if self.architecture == "qwen2_vl" and v.intermediate_size % v.width:
            yield "Qwen2-VL's mlp_ratio must be a whole number"
        if v.gated and v.window_size < (side := v.spatial_merge_size * v.patch_size):
            yield f"window_size {v.window_size} is below {side}, the side of a merged patch"
        if any(number >= v.depth for number in v.fullatt_block_indexes):
            yield f"fullatt_block_indexes {list(v.fullatt_block_indexes)} are not all below depth {v.depth}"
        if isqrt(v.num_position_embeddings) ** 2 != v.num_position_embeddings:
            yield f"num_position_embeddings {v.num_position_embeddings} is no square"
        deep = list(v.deepstack_visual_indexes)
        if len({*deep}) < len(deep) or max(deep, default=0) >= v.depth or len(deep) >= self.num_hidden_layers:
            yield f"deepstack_visual_indexes {deep} must differ, be below depth, and be fewer than the layers"
        for key in (*PLACEHOLDERS, "bos_token_id", "eos_token_id"):
            number = getattr(self, key)
            for each in number if isinstance(number, list) else [] if number is None else [number]:
                if each >= self.vocab_size:
                    yield f"{key} {each} is not below vocab_size {self.vocab_size}"
        if len(set(self.placeholder_ids)) < len(PLACEHOLDERS):
            yield f"{', '.join(PLACEHOLDERS)} are not four different tokens: {self.placeholder_ids}"


def _read_vision(architecture: str, values: dict, hidden_size: int, name: str) -> VisionConfig:
    """`vision_config` of any architecture. hidden_size: the decoder's, Qwen2-VL's default."""
    vision, qwen3 = Values(values, f"{name}: vision_config"), architecture == "qwen3_vl"
    acts = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}
    vision.only("hidden_act", acts[architecture])
    vision.only("in_chans", 3)
    vision.only("in_channels", 3)
    rope = Values(vision.get("rope_parameters") or {}, f"{vision.name}: rope_parameters")
    rope.only("rope_theta", 10000.0)
    found = {key: vision.need(key) for key in ("depth", "num_heads")}
    found |= {key: vision.get(key, getattr(VisionConfig, key)) for key in VISION if key not in found}
    if architecture != "qwen2_vl":
        found |= {ours: vision.need(theirs) for ours, theirs in TOWER.items()}
    if qwen3:
        found["patch_size"] = vision.get("patch_size", 16)
        places, deep = vision.need("num_position_embeddings"), tuple(vision.need("deepstack_visual_indexes"))
        return VisionConfig(**found, num_position_embeddings=places, deepstack_visual_indexes=deep)
    if architecture == "qwen2_5_vl":
        full = tuple(vision.need("fullatt_block_indexes"))
        window = vision.need("window_size")
        return VisionConfig(**found, gated=True, window_size=window, fullatt_block_indexes=full)
    width = vision.need("embed_dim")
    hidden = int(width * vision.get("mlp_ratio", 4))
    out = vision.get("hidden_size", hidden_size)
    return VisionConfig(**found, width=width, intermediate_size=hidden, hidden_size=out)
