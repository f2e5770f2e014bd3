"""The files of a model folder agree, and a folder that we write shows a picture as the run saw it."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen import qwen_folder
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.chat_template_utils import _compile_jinja_template

import evaluate
import train
from data.chat import Chat
from data.types import Example
from grpo import export
from grpo.evaluation.evaluated_model import Overrides, evaluated_model
from grpo.evaluation.protocols import PROTOCOLS
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
        ("config.json", {"vocab_size": 120}, "token 139, vocab_size is 120"),
        ("generation_config.json", {"eos_token_id": [0, 140]}, "token 140, vocab_size is 140"),
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


def test_a_policy_is_asked_as_it_was_trained_wherever_its_folder_is(base, tmp_path, in_process, monkeypatch):
    """With a template of one's own: the checkpoint, and its export, when run and template file are gone."""
    own = tmp_path / "mine.yaml"
    own.write_text('text: "{pictures}{system} User: {asked}\\nAssistant: <think>"\nopening: <think>\n')
    out = tmp_path / "run"
    args = [f"model={base}", f"out={out}", "steps=1", "prompts=1", "group=2", "cap=5", "eval.items=0"]
    args += [f"template={own}", "system=User: User:", "max_prompt=999", "max_pixels=4000", "device=cpu"]
    assert train.main(["shapes", *args]) == 0
    exported = export.export(str(out), tmp_path / "exported")
    own.unlink()
    (checkpoint.complete(out)[-1]).rename(saved := tmp_path / "moved")
    strict, asked = PROTOCOLS["strict"], Example("u", "Is it red?", ("yes", "no"), "no")
    for folder in (exported, saved):
        model = evaluated_model(str(folder), strict, Overrides(), "cpu", False)
        assert (model.template, model.cap, model.max_prompt, model.max_pixels) == ("trained", 5, 999, 4000)
        assert model.trained_on == "shapes"
        text = model.open("cpu")[1].prompt(asked).text
        assert text == f"User: User: User: {asked.asked}\nAssistant: <think>"
        source = (folder / "chat_template.jinja").read_text()
        user = [{"role": "user", "content": [{"type": "text", "text": asked.asked}]}]
        assert _compile_jinja_template(source).render(messages=user) == text
    (exported / "trained_with.json").write_text('{"settings": {"cap": "many"}, "template": {}}')
    with pytest.raises(ValueError, match=r"trained_with.json.*cap.*many"):
        evaluated_model(str(exported), strict, Overrides(), "cpu", False)


# ---- any value at any place of any file

VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    1.5,
    1e300,
    float("nan"),
    float("inf"),
    10**60,
    "",
    "x",
    "14",
    [],
    [1],
]
VALUES += [[0.5] * 3, [1, 2, 3], [[]], ["a"], [None], {}, {"a": 1}, {"content": "<|im_end|>"}, "a" * 5000]
FILES = ["config.json", "preprocessor_config.json", "tokenizer_config.json", "generation_config.json"]
EXTRA = ["text_config", "rope_parameters", "head_dim", "size", "eos_token", "eos_token_id", "layer_types"]
EXTRA += ["added_tokens_decoder", "extra_special_tokens", "quantization_config", "image_processor_type"]


def places(values, path=()):
    """The path of every value of a JSON file."""
    inner = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in inner:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def any_folder(request, tmp_path_factory):
    return qwen_folder(tmp_path_factory.mktemp("any") / request.param, request.param)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_is_read_or_named(any_folder, data):
    """A folder with one value replaced, removed or added opens, or is refused in one line that names it."""
    file = any_folder / data.draw(st.sampled_from(FILES))
    whole = file.read_text()
    values = json.loads(whole)
    *path, key = data.draw(st.sampled_from([*places(values), *((each,) for each in EXTRA)]))
    inner = values
    for each in path:
        inner = inner[each]
    if isinstance(inner, dict) and data.draw(st.booleans()):
        inner.pop(key, None)
    else:
        inner[key] = data.draw(st.sampled_from(VALUES))
    file.write_text(json.dumps(values))
    try:
        check_agreement(Chat(any_folder, template="chatml"), ModelConfig.from_folder(any_folder))
    except ValueError as error:
        said = str(error)
        assert said.startswith(str(any_folder)) and "\n" not in said and len(said) < 300 + len(str(file)), (
            said
        )
    finally:
        file.write_text(whole)
