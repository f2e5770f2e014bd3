"""The files of a model folder agree, and a folder that we write shows a picture as the run saw it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import evaluate
import train
from data.chat import Chat
from data.types import Example
from grpo import export
from grpo.storage import checkpoint
from grpo.storage.model_folder import check_agreement
from models.config import ModelConfig


def change(file, values):
    found = json.loads(file.read_text())
    for key, value in values.items():
        found[key] = found[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(found))


TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@pytest.mark.parametrize(
    "file, values, words",
    [
        (
            "preprocessor_config.json",
            {"patch_size": 16},
            "patch_size is 16, and patch_size in config.json is 14",
        ),
        ("preprocessor_config.json", {"merge_size": 1}, "merge_size is 1, and spatial_merge_size"),
        ("preprocessor_config.json", {"temporal_patch_size": 1}, "temporal_patch_size is 1, and"),
        ("config.json", {"vision_config": {"patch_size": 16}}, "and patch_size in config.json is 16"),
        *[("config.json", {key: 100}, f"and {key} in config.json is 100") for key in TOKENS],
        ("config.json", {"vocab_size": 120}, "token 126, vocab_size is 120"),
        ("generation_config.json", {"eos_token_id": [0, 127]}, "token 127, vocab_size is 127"),
    ],
)
def test_files_of_another_model(base, tmp_path, file, values, words):
    folder = shutil.copytree(base, tmp_path / "model")
    check_agreement(Chat(folder, template="shapes"), ModelConfig.from_folder(folder))
    change(folder / file, values)
    with pytest.raises(ValueError, match=r"; take all files from one model") as error:
        check_agreement(Chat(folder, template="shapes"), ModelConfig.from_folder(folder))
    assert words in str(error.value) and str(folder) in str(error.value)


def test_train_and_evaluate_check_it(base, tmp_path, in_process, capsys):

    folder = shutil.copytree(base, tmp_path / "model")
    change(folder / "preprocessor_config.json", {"temporal_patch_size": 1})
    for main, args in (
        (train.main, ["shapes", f"model={folder}", f"out={tmp_path / 'run'}", "eval.items=0"]),
        (evaluate.main, ["--model", str(folder), "--items", "2", "--cap", "2", "--device", "cpu"]),
    ):
        assert main(args) == 2
        assert (
            "temporal_patch_size is 1, and temporal_patch_size in config.json is 2" in capsys.readouterr().err
        )
    assert not (tmp_path / "run").exists()


def tokens_seen(folder, picture):
    """Picture tokens as transformers' processor counts them."""
    grid = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[picture])["image_grid_thw"]
    return int(np.prod(grid)) // 4


@pytest.mark.parametrize("layout", ["preprocessor_config.json", "processor_config.json"])
def test_a_checkpoint_and_an_export_have_the_pixels_of_the_run(base, tmp_path, in_process, layout):
    """transformers sees as many picture tokens as the run saw, in either layout of the base's file."""
    folder = shutil.copytree(base, tmp_path / "model")
    if layout == "processor_config.json":
        nested = {"image_processor": json.loads((folder / "preprocessor_config.json").read_text())}
        (folder / layout).write_text(json.dumps(nested))
        (folder / "preprocessor_config.json").unlink()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    out = tmp_path / "run"
    args = [f"model={folder}", f"out={out}", "steps=1", "prompts=1", "group=2", "cap=4", "eval.items=0"]
    assert train.main(["shapes", *args, "max_pixels=4000", "min_pixels=800", "device=cpu"]) == 0
    chat = Chat(folder, template="shapes", min_pixels=800, max_pixels=4000)
    seen = (
        chat.prompt(Example("u", "Is it?", (), "3", pictures=(lambda: picture,))).tokens == chat.image_token
    ).sum()
    assert 1 < seen < tokens_seen(folder, picture)
    saved = checkpoint.complete(out)[-1]
    assert tokens_seen(saved, picture) == seen
    assert tokens_seen(export.export(str(out), tmp_path / "exported"), picture) == seen
    again = Chat(saved, template="shapes")
    assert (again.pictures.min_pixels, again.pictures.max_pixels) == (800, 4000)
    assert not checkpoint.damage(saved)
