"""Processor files: read as transformers reads them, wrong values named, the run's limits written back."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.images import preprocess
from data.processor import NESTED, PLAIN, picture_settings, with_pixels

# As on the hub (Qwen2-VL-2B-Instruct), with smaller pictures.
HUB = {
    "min_pixels": 3136,
    "max_pixels": 50176,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
EDGES = {"shortest_edge": 3136, "longest_edge": 12544}


def folder_of(folder, plain=None, nested=None):
    for name, values in ((PLAIN, plain), (NESTED, nested and {"image_processor": nested})):
        if values is not None:
            (folder / name).write_text(json.dumps(values))
    return folder


def picture(width=300, height=170):
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


def same_as_transformers(folder):
    """One picture through the folder's settings, in both programs."""
    theirs = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[picture()], return_tensors="np")
    patches, grid = preprocess(picture(), **asdict(picture_settings(folder)))
    assert grid.tolist() == theirs["image_grid_thw"][0].tolist()
    np.testing.assert_allclose(patches, theirs["pixel_values"], atol=2e-6)
    return grid.prod()


VARIATIONS = {
    "the hub's": HUB,
    "edges": {**HUB, "min_pixels": None, "max_pixels": None, "size": EDGES},
    "edges alone": {"size": EDGES},
    "both, and the older keys count": {**HUB, "size": EDGES},
    "one of the older keys": {"size": EDGES, "max_pixels": 6272},
    "limits alone": {"min_pixels": 3136, "max_pixels": 6272},
    "no size": {**HUB, "size": None},
    "mean and deviation of all channels": {**HUB, "image_mean": 0.5, "image_std": 0.5},
    "whole numbers": {**HUB, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]},
    "Qwen3-VL's": {**HUB, "patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": EDGES},
    "other sizes": {**HUB, "patch_size": 8, "merge_size": 3, "temporal_patch_size": 1},
    "all settings": {**HUB, "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    | {"rescale_factor": 0.00392156862745098, "do_convert_rgb": True},
    "the fast class": {**HUB, "image_processor_type": "Qwen2VLImageProcessorFast"},
}


@pytest.mark.parametrize("name", VARIATIONS)
@pytest.mark.parametrize("layout", ["plain", "nested"])
def test_variations_are_read_as_by_transformers(tmp_path, name, layout):
    assert same_as_transformers(folder_of(tmp_path, **{layout: VARIATIONS[name]})) > 0


def test_the_first_layout_had_pixels_in_size(tmp_path):
    """transformers 4.45 wrote `size` with these names beside the same keys; alone they are clear, too."""
    folder_of(tmp_path, {"size": {"min_pixels": 3136, "max_pixels": 6272}})
    settings = picture_settings(tmp_path)
    assert (settings.min_pixels, settings.max_pixels) == (3136, 6272)
    folder_of(tmp_path, {**HUB, "size": {"min_pixels": 3136, "max_pixels": 50176}})
    same_as_transformers(tmp_path)


def test_of_two_files_the_one_that_transformers_reads(tmp_path):
    same_as_transformers(folder_of(tmp_path, HUB, {**HUB, "max_pixels": 6272}))
    assert picture_settings(tmp_path).max_pixels == 6272
    # a processor_config.json of before version 5 has no image_processor
    (tmp_path / NESTED).write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
    same_as_transformers(tmp_path)
    assert picture_settings(tmp_path).max_pixels == 50176


WHOLE = [None, "14", 14.0, True, [14], {}, 0, -14, 10**12, float("nan")]
CHANNELS = [None, [], [0.5], [0.5] * 2, [0.5] * 4, "0.5", ["a"] * 3, [None] * 3, True, {}]
CHANNELS += [[0.5, 0.5, float("nan")], [float("inf")] * 3]
FLAGS = [None, False, 0, 1, "true", []]
WRONG = {
    "patch_size": WHOLE,
    "merge_size": WHOLE,
    "temporal_patch_size": WHOLE,
    # null: `size` counts
    "min_pixels": WHOLE[1:],
    "max_pixels": WHOLE[1:],
    "size": [[1, 2], 5, "x", True, {"shortest_edge": "1"}, {"longest_edge": 1.5}, {"min_pixels": -1}],
    "image_mean": [*CHANNELS, [-1, 0, 0], [10**400] * 3],
    "image_std": [*CHANNELS, 0, [0.5, 0, 0.5], [0.5, 0.5, -0.5]],
    "do_resize": FLAGS,
    "do_rescale": FLAGS,
    "do_normalize": FLAGS,
    "rescale_factor": [None, 1, 0, "1/255", 0.5, True, []],
    "resample": [None, 2, "bicubic", True, [], 3.5],
    "image_processor_type": ["CLIPImageProcessor", 3, [], {}],
}


@pytest.mark.parametrize("layout", ["plain", "nested"])
@pytest.mark.parametrize("key", WRONG)
def test_a_value_of_a_wrong_kind_is_named(tmp_path, key, layout):
    for value in WRONG[key]:
        # the older keys come first
        values = {k: v for k, v in HUB.items() if key != "size" or not k.endswith("pixels")}
        folder_of(tmp_path, **{layout: {**values, key: value}})
        inner = next(iter(value)) if key == "size" and isinstance(value, dict) else key
        with pytest.raises(ValueError, match=inner) as error:
            picture_settings(tmp_path)
        said = str(error.value)
        assert said.startswith(str(tmp_path / {"plain": PLAIN, "nested": NESTED}[layout])), said
        assert "\n" not in said and len(said) < 250 + len(str(tmp_path))


@pytest.mark.parametrize(
    "values", [{}, {"size": {}}, {"max_pixels": 9}, {"min_pixels": 9, "max_pixels": 8}], ids=str
)
def test_limits_that_are_missing_or_cross(tmp_path, values):
    folder_of(tmp_path, {"patch_size": 14, **values})
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: min_pixels is .*max_pixels is"):
        picture_settings(tmp_path)


@pytest.mark.parametrize("nested", [[], "x", 3], ids=str)
def test_an_image_processor_that_is_no_object(tmp_path, nested):
    (tmp_path / NESTED).write_text(json.dumps({"image_processor": nested}))
    with pytest.raises(ValueError, match=r"processor_config\.json: image_processor is"):
        picture_settings(tmp_path)


@pytest.mark.parametrize("text", ["[" * 10**5, "{", "", "[]", '{"a": \\ud800}'], ids=lambda text: text[:20])
@pytest.mark.parametrize("name", [PLAIN, NESTED])
def test_a_file_that_is_no_json_object(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        picture_settings(tmp_path)


# ---- the run's limits, for the next reader of the folder


@pytest.mark.parametrize("name", VARIATIONS)
@pytest.mark.parametrize("layout", ["plain", "nested", "both"])
def test_limits_of_a_run_are_what_transformers_reads(tmp_path, name, layout):
    values = VARIATIONS[name]
    folder_of(tmp_path, values if layout != "nested" else None, values if layout != "plain" else None)
    before = picture_settings(tmp_path)
    for file, text in with_pixels(tmp_path, 3136, 8000).items():
        (tmp_path / file).write_text(text)
    after = picture_settings(tmp_path)
    assert asdict(after) == asdict(before) | {"min_pixels": 3136, "max_pixels": 8000}
    assert same_as_transformers(tmp_path) * after.patch**2 <= 8000
