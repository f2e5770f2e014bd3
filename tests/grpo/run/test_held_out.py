"""Held-out questions of another task during a run, and weights kept apart from checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small import small_policy

import train
from data.images import open_picture
from data.shapes.world import Shapes
from grpo.evaluation.evaluated_model import Overrides, evaluated_model
from grpo.evaluation.protocols import PROTOCOLS
from grpo.storage.checkpoint import complete
from grpo.storage.jsonl import read
from models import weights

pytestmark = pytest.mark.usefixtures("in_process")
QUICK = "shapes steps=4 prompts=2 group=3 cap=8 limit=40 report.every=0 device=cpu".split()
QUICK += ["rewards={length: 100}", "optim.lr=1e-3"]


@pytest.fixture(scope="module")
def cups(tmp_path_factory):
    """Ten questions in a folder of one's own."""
    folder, world = tmp_path_factory.mktemp("cups"), Shapes("train", 10, seed=3)
    lines = []
    for number in range(10):
        example = world[number]
        open_picture(example.pictures[0], name="x").save(folder / f"{number}.png")
        row = {"question": example.question, "choices": example.choices, "answer": example.answer}
        lines.append(json.dumps(row | {"picture": f"{number}.png", "task": "Cups"}) + "\n")
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def test_a_run_is_evaluated_on_another_task(base, cups, tmp_path):
    argv = [*QUICK, "eval.task=jsonl", f"eval.data={cups}", "eval.items=7", "eval.every=2", f"model={base}"]
    assert train.main([*argv, f"out={tmp_path / 'run'}"]) == 0
    rows = read(tmp_path / "run" / "metrics.jsonl")
    asked = [row for row in rows if "eval/accuracy" in row]
    assert [row["step"] for row in asked] == [0, 2, 4]
    assert all(row["eval/questions"] == row["eval/questions/Cups"] == 7 for row in asked)
    assert not any(key.startswith("eval/pairs") or key == "eval/looking" for key in asked[-1])
    # it trains on its own task
    assert "accuracy/Cups" not in rows[1]


def test_one_s_own_task_with_other_data(base, cups, tmp_path):
    own = ["task=jsonl", f"data={cups / 'train.jsonl'}", f"eval.data={cups}", "eval.items=3"]
    assert train.main([*QUICK, *own, "steps=1", f"model={base}", f"out={tmp_path / 'run'}"]) == 0
    assert read(tmp_path / "run" / "metrics.jsonl")[0]["eval/questions"] == 3


@pytest.mark.parametrize(
    "settings, said",
    [
        (["eval.task=cvbanch"], "(eval.task, eval.data): no task 'cvbanch'"),
        (["eval.task=cvbench"], "cvbench"),
        (["eval.data=nowhere"], "nowhere"),
    ],
)
def test_what_is_no_source_is_named(base, tmp_path, capsys, settings, said):
    assert train.main([*QUICK, *settings, f"model={base}", f"out={tmp_path / 'run'}"]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_weights_alone_are_all_kept_and_asked_as_the_run_asked(base, tmp_path):
    out = tmp_path / "run"
    argv = [
        "eval.items=0",
        "save.weights_every=2",
        "save.every=2",
        "save.keep=1",
        f"model={base}",
        f"out={out}",
    ]
    assert train.main([*QUICK, *argv]) == 0
    first, last = sorted((out / "weights").iterdir())
    assert (first.name, last.name) == ("step_000002", "step_000004")
    saved = complete(out)[-1]
    names = {path.name for path in saved.iterdir()} - {"optimizer.safetensors", "state.json"}
    assert {path.name for path in first.iterdir()} == {path.name for path in last.iterdir()} == names
    assert all((last / name).read_bytes() == (saved / name).read_bytes() for name in names)
    assert (first / "model.safetensors").read_bytes() != (last / "model.safetensors").read_bytes()
    model = evaluated_model(str(first), PROTOCOLS["strict"], Overrides(), "cpu", built_in=False)
    assert (model.template, model.cap, model.trained_on) == ("shapes", 8, "shapes")


def test_in_bfloat16_they_are_rounded_once(base, tmp_path):
    out = tmp_path / "run"
    argv = [
        "eval.items=0",
        "save.weights_every=1",
        "steps=1",
        "dtype=bfloat16",
        f"model={base}",
        f"out={out}",
    ]
    assert train.main([*QUICK, *argv]) == 0
    whole = load_file(complete(out)[-1] / "model.safetensors")
    half = load_file(out / "weights" / "step_000001" / "model.safetensors")
    assert whole.keys() == half.keys()
    assert all(torch.equal(whole[key].bfloat16(), value) for key, value in half.items())


def test_ranks_divide_the_files_alike_in_both_types():
    """Each rank takes its tensors by the sizes in float32 and writes them by those of the saved type."""
    policy = small_policy()
    whole = weights.file_layout(policy, 40_000)
    assert weights.file_layout(policy.bfloat16(), 20_000) == whole and len(whole) > 2
