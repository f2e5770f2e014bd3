"""config.json: the hub's files and transformers 5's are read alike, what we write is read by both, and
what we can't compute is refused."""

import json

import pytest
from zoo import ARCHITECTURES, TWINS, tiny_config

from models.config import NEEDED, OPTIONAL, ModelConfig

# As on the hub. What both files have:
COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
COMMON_VISION = {
    "depth": 32,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
}
QWEN2_VL_2B = {
    **COMMON,
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
    "vision_config": {**COMMON_VISION, "embed_dim": 1280, "mlp_ratio": 4, "hidden_size": 1536},
}
QWEN2_5_VL_3B = {
    **COMMON,
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "max_window_layers": 70,
    "max_position_embeddings": 128000,
    "vision_config": {
        **COMMON_VISION,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    },
}
HUB = {"qwen2_vl": QWEN2_VL_2B, "qwen2_5_vl": QWEN2_5_VL_3B}


def test_hub_file_of_qwen2_vl():
    config = ModelConfig.from_dict(QWEN2_VL_2B)
    assert (config.hidden_size, config.num_hidden_layers, config.head_size, config.tie_word_embeddings) == (
        1536,
        28,
        128,
        True,
    )
    vision = config.vision
    assert (vision.width, vision.intermediate_size, vision.hidden_size, vision.gated) == (
        1280,
        5120,
        1536,
        False,
    )
    assert config.placeholder_ids == (151655, 151656, 151652, 151653) and vision.patch_dim == 1176


def test_hub_file_of_qwen2_5_vl():
    config = ModelConfig.from_dict(QWEN2_5_VL_3B)
    assert (config.hidden_size, config.num_hidden_layers, config.mrope_section, config.rope_theta) == (
        2048,
        36,
        (16, 24, 24),
        1e6,
    )
    vision = config.vision
    assert (vision.width, vision.intermediate_size, vision.hidden_size, vision.gated, vision.window_size) == (
        1280,
        3420,
        2048,
        True,
        112,
    )
    assert vision.fullatt_block_indexes == (7, 15, 23, 31)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_we_write_means_the_same_to_transformers(architecture):
    """Through our file or the hub's own, transformers sees the same fields; and its own nested file is
    read back by us."""
    config = ModelConfig.from_dict(HUB[architecture])
    read = TWINS[architecture].config_class.from_dict
    theirs, again = (read(json.loads(json.dumps(values))) for values in (HUB[architecture], config.to_dict()))
    for key in (*NEEDED, *OPTIONAL, "rope_parameters"):
        assert getattr(theirs.text_config, key) == getattr(again.text_config, key), key
    mine, other = theirs.vision_config.to_dict(), again.vision_config.to_dict()
    ignored = {"in_chans", "spatial_patch_size", "tokens_per_second", "model_type", "transformers_version"}
    assert {k: v for k, v in mine.items() if k not in ignored} == {
        k: v for k, v in other.items() if k not in ignored
    }
    assert theirs.tie_word_embeddings == again.tie_word_embeddings is True
    assert ModelConfig.from_dict(theirs.to_dict()) == config
    assert "text_config" in theirs.to_dict()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(architecture, tied):
    config = tiny_config(architecture, tied)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "change, why",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"vision_config": None}, "'vision_config' is missing"),
        ({"vision_config": {"depth": 2, "num_heads": 2}}, "vision_config: key 'embed_dim' is missing"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rotary type"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 23]}},
            "must add up to half the head size, 64",
        ),
        ({"num_attention_heads": 10}, "multiple of num_attention_heads"),
        ({"num_key_value_heads": 5}, "multiple of num_attention_heads"),
        ({"vocab_size": 1000}, "image_token_id 151655 is not below vocab_size 1000"),
    ],
)
def test_what_we_cannot_compute_is_refused(tmp_path, change, why):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**QWEN2_VL_2B, **change}))
    with pytest.raises(ValueError, match=why) as error:
        ModelConfig.from_folder(tmp_path)
    assert str(file) in str(error.value)


def test_absent_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="config.json: no such file"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        ModelConfig.from_folder(tmp_path)
