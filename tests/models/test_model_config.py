"""config.json: the hub's files and transformers 5's are read alike, what we write is read by both, and
what we can't compute is refused."""

import json
from dataclasses import replace
from functools import cache

import pytest
from zoo import ARCHITECTURES, TWINS, tiny_config

from models.config import NEEDED, OPTIONAL, PLACEHOLDERS, VISION, ModelConfig
from models.config_values import KIND

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
QWEN3_VL_2B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
HUB = {"qwen2_vl": QWEN2_VL_2B, "qwen2_5_vl": QWEN2_5_VL_3B, "qwen3_vl": QWEN3_VL_2B}


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


def test_hub_file_of_qwen3_vl():
    from grpo.plan.known_models import KNOWN

    assert ModelConfig.from_dict(QWEN3_VL_2B) == replace(
        KNOWN["Qwen/Qwen3-VL-2B-Instruct"], bos_token_id=151643, eos_token_id=151645
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_we_write_means_the_same_to_transformers(architecture):
    """Through our file or the hub's own, transformers sees the same fields; and its own nested file is
    read back by us."""
    config = ModelConfig.from_dict(HUB[architecture])
    read = TWINS[architecture].config_class.from_dict
    theirs, again = (read(json.loads(json.dumps(values))) for values in (HUB[architecture], config.to_dict()))
    own = ("head_dim",) if architecture == "qwen3_vl" else ()
    for key in (*NEEDED, *OPTIONAL, *own, "rope_parameters"):
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


# ---- values of a wrong kind, in every key that is read

FILES = [f"{name} {layout}" for name in HUB for layout in ("flat", "nested")]
WRONG = {
    "number above": [None, "1e-6", True, [], {}, 0, -1e-6, float("nan"), float("inf"), 10**400],
    "a token id": ["151643", 3.0, True, {}, -1, [1, "2"], [[1]], float("nan"), 10**30],
    "true or false": [None, "false", 0, 1, [], {}],
    "three whole": [None, "16", 16, [16, 24], [16, 24, 24, 0], [16, 24, "24"], [32, 32.0, 0], [65, -1, 0]],
    "a list of whole": [None, 7, "7", [7.0], ["7"], [-1], [True], {}],
    "whole number": [None, "128", 128.0, True, [], {}, 0, -1, 10**30, float("nan")],
    "an object": ["x", 3, [], [1], True],
}


@cache
def file_text(name):
    architecture, layout = name.split()
    values = HUB[architecture]
    if layout == "nested":
        values = TWINS[architecture].config_class.from_dict(json.loads(json.dumps(values))).to_dict()
    return json.dumps(values)


def hub_file(name):
    """A copy of the hub's file, or as transformers writes it, with `text_config`."""
    return json.loads(file_text(name))


TIED = "tie_word_embeddings"


def objects_of(values, path=()):
    """The path of each object of a file that is read."""
    yield path
    for key in ("text_config", "vision_config", "rope_scaling", "rope_parameters"):
        if isinstance(values.get(key), dict) and path != ("vision_config",):
            yield from objects_of(values[key], (*path, key))


def places_of(values):
    """Every place of a file whose value is read."""
    for path in objects_of(values):
        inner = values
        for key in path:
            inner = inner[key]
        for key in inner:
            shadowed = not path and "text_config" in values and key not in (*PLACEHOLDERS, "vision_config")
            # transformers' file has the decoder's keys in `text_config`, and a tower's own start
            unread = path == ("vision_config",) and key in ("initializer_range", "rope_parameters")
            # Qwen3-VL's is at the top
            unread |= path == ("text_config",) and key == TIED and values["model_type"] == "qwen3_vl"
            if key in KIND and not unread and (not shadowed or key.endswith(("config", "embeddings"))):
                yield (*path, key)


@pytest.mark.parametrize("name", FILES)
def test_a_value_of_a_wrong_kind_is_named(name):
    """Each key that is read, with each kind of wrong value: an error of one line that names the key."""
    tried = 0
    for path in places_of(hub_file(name)):
        _, what = KIND[path[-1]]
        wrong = next(values for words, values in WRONG.items() if words in what)
        for value in wrong:
            values = hub_file(name)
            inner = values
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            with pytest.raises(ValueError, match=path[-1]) as error:
                ModelConfig.from_dict(values, name="here/config.json")
            said = str(error.value)
            assert said.startswith("here/config.json") and "\n" not in said and len(said) < 250, said
            tried += 1
    assert tried > 150


@pytest.mark.parametrize("values", [[], None, "x", 3, [{}]], ids=str)
def test_a_file_that_holds_no_object(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json: holds .*, not an object"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    "architecture, change, why",
    [
        ("qwen2_vl", {"model_type": ["qwen2_vl"]}, "model_type is"),
        ("qwen2_vl", {"quantization_config": {"quant_method": "awq"}}, "quantization_config is"),
        ("qwen2_vl", {"num_key_value_heads": 24}, "multiple of num_attention_heads"),
        ("qwen2_vl", {"image_token_id": 151656}, "are not four different tokens"),
        ("qwen2_vl", {"eos_token_id": [151645, 151936]}, "eos_token_id 151936 is not below vocab_size"),
        ("qwen2_vl", {"bos_token_id": 151936}, "bos_token_id 151936 is not below vocab_size"),
        ("qwen2_vl", {"head_dim": 64}, "head_dim is 64; only 128"),
        ("qwen2_vl", {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types is"),
        ("qwen2_vl", {"rope_scaling": {"full_attention": {"mrope_section": [16, 24, 24]}}}, "rotary type"),
        ("qwen2_vl", {"rope_scaling": {"type": "mrope", "factor": 4.0}}, "rotary type"),
        ("qwen2_vl", {"vision_config": {"in_chans": 1}}, "in_chans is 1"),
        ("qwen2_vl", {"vision_config": {"in_channels": 4}}, "in_channels is 4"),
        ("qwen2_vl", {"vision_config": {"mlp_ratio": 4.3}}, "mlp_ratio must be a whole number"),
        ("qwen2_vl", {"vision_config": {"num_heads": 7}}, "multiple of num_heads"),
        ("qwen2_vl", {"vision_config": {"hidden_size": 1280}}, "the vision tower gives width 1280"),
        ("qwen2_vl", {"vision_config": {"rope_parameters": {"rope_theta": 5e5}}}, "rope_theta is 500000.0"),
        ("qwen2_5_vl", {"vision_config": {"window_size": 27}}, "window_size 27 is below 28"),
        ("qwen2_5_vl", {"vision_config": {"fullatt_block_indexes": [7, 32]}}, "not all below depth 32"),
        ("qwen2_5_vl", {"vision_config": {"hidden_act": "quick_gelu"}}, "hidden_act is 'quick_gelu'"),
    ],
)
def test_values_that_contradict_each_other(architecture, change, why):
    values = hub_file(f"{architecture} flat")
    for key, value in change.items():
        inner = isinstance(value, dict) and key == "vision_config"
        values[key] = values[key] | value if inner else value
    with pytest.raises(ValueError, match=why):
        ModelConfig.from_dict(values)


# ---- valid variations mean what they mean to transformers


# in transformers' modelling files
DEFAULT_SECTION = {"qwen2_vl": (16, 24, 24), "qwen2_5_vl": (16, 24, 24), "qwen3_vl": (24, 20, 20)}


def seen_by_transformers(architecture, values):
    """The numbers that decide the computation, as transformers reads them."""
    config = TWINS[architecture].config_class.from_dict(json.loads(json.dumps(values)))
    text, vision, rope = config.text_config, config.vision_config, config.text_config.rope_parameters
    keys = [key for key in (*NEEDED, *OPTIONAL) if not key.endswith("token_id")]
    seen = {key: getattr(text, key) for key in keys}
    seen |= {key: getattr(vision, key) for key in VISION}
    seen |= {key: getattr(config, key) for key in (*PLACEHOLDERS, "tie_word_embeddings")}
    return seen | {
        "mrope_section": tuple(rope.get("mrope_section", DEFAULT_SECTION[architecture])),
        "rope_theta": rope["rope_theta"],
    }


def seen_by_us(values):
    config = ModelConfig.from_dict(values)
    keys = [key for key in (*NEEDED, *OPTIONAL) if not key.endswith("token_id")]
    keys += [*PLACEHOLDERS, "tie_word_embeddings", "mrope_section", "rope_theta"]
    return {key: getattr(config, key) for key in keys} | {key: getattr(config.vision, key) for key in VISION}


ABSENT_KEYS = ["rms_norm_eps", "initializer_range", "max_position_embeddings", "rope_theta", "rope_scaling"]
ABSENT_KEYS += [*PLACEHOLDERS, "bos_token_id", "eos_token_id", "use_sliding_window", "hidden_act"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_absent_keys_have_transformers_defaults(architecture):
    for key in ABSENT_KEYS:
        values = hub_file(f"{architecture} flat")
        for inner in (values, values.get("text_config", {})):
            inner.pop(key, None)
        assert seen_by_us(values) == seen_by_transformers(architecture, values), key
    for key in ("in_chans", "patch_size", "spatial_merge_size", "temporal_patch_size", "mlp_ratio"):
        values = hub_file(f"{architecture} flat")
        values["vision_config"].pop(key, None)
        assert seen_by_us(values) == seen_by_transformers(architecture, values), key


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "default", "mrope_section": [20, 22, 22], "rope_theta": 5e5}},
        {"rope_scaling": None, "rope_parameters": {"mrope_section": [20, 22, 22], "rope_theta": 5e5}},
        {"rope_parameters": {"mrope_section": [20, 22, 22], "rope_theta": 5e5}},
        {"rope_theta": 10000},
        {"use_sliding_window": None},
        {"eos_token_id": [151645, 151643]},
        {"eos_token_id": None, "bos_token_id": None},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_variations_of_the_hubs_file(architecture, change):
    values = hub_file(f"{architecture} flat")
    top = "tie_word_embeddings" in change
    (values if top else values.get("text_config", values)).update(change)
    assert seen_by_us(values) == seen_by_transformers(architecture, values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("top", [None, True, False])
@pytest.mark.parametrize("text", [None, True, False])
def test_tied_or_not_as_in_transformers(architecture, top, text):
    """The flag may stand in `text_config`, at the top, or both."""
    values = hub_file(f"{architecture} nested")
    for inner, flag in ((values, top), (values["text_config"], text)):
        inner.pop("tie_word_embeddings", None)
        inner |= {} if flag is None else {"tie_word_embeddings": flag}
    assert seen_by_us(values) == seen_by_transformers(architecture, values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_config_counts_alone(architecture):
    """Decoder keys beside a `text_config` are ignored, as in transformers; they may be of another model."""
    values = hub_file(f"{architecture} nested") | {"hidden_size": 64, "rms_norm_eps": 1.0, "rope_theta": 7}
    assert seen_by_us(values) == seen_by_transformers(architecture, values)
    del values["text_config"]["hidden_size"]
    with pytest.raises(ValueError, match="text_config: key 'hidden_size' is missing"):
        ModelConfig.from_dict(values)
