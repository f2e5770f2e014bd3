"""grpo.export: a checkpoint as a folder to hand on, whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small import small_folder, small_policy

from grpo import export
from grpo.optim import Optimizer
from grpo.storage import checkpoint
from models import weights


@pytest.fixture
def run(tmp_path):
    """A run folder with one checkpoint."""
    policy = small_policy()
    optimizer = Optimizer(policy, name="adamw", lr=1e-2, beta2=0.99, weight_decay=0.1)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    checkpoint.save(tmp_path / "run", 3, policy, optimizer, base=small_folder(tmp_path / "base"), keep=0)
    return tmp_path / "run"


def test_weights_and_tokenizer_and_nothing_else(run, tmp_path, capsys):
    assert export.main([str(run), str(tmp_path / "out" / "mine")]) == 0
    out, saved = tmp_path / "out" / "mine", checkpoint.complete(run)[0]
    assert capsys.readouterr().out == f"{out}\n"
    assert {path.name for path in saved.iterdir()} - {path.name for path in out.iterdir()} == {
        "optimizer.safetensors",
        "state.json",
    }
    assert all(path.read_bytes() == (saved / path.name).read_bytes() for path in out.iterdir()) and [
        path.name for path in out.parent.iterdir()
    ] == ["mine"]


def test_half_the_size_loads_in_transformers(run, tmp_path):
    import transformers

    out, saved = (
        export.export(str(checkpoint.complete(run)[0]), tmp_path / "half", torch.bfloat16),
        load_file(checkpoint.complete(run)[0] / "model.safetensors"),
    )
    half = load_file(out / "model.safetensors")
    assert (
        json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
        and half.keys() == saved.keys()
    )
    assert all(
        value.dtype == torch.bfloat16 and torch.equal(value, saved[key].bfloat16())
        for key, value in half.items()
    )
    _, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_what_it_refuses(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    damaged = checkpoint.complete(run)[0] / "model.safetensors"
    monkeypatch.setattr(
        export.weights, "save", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    for args, words in (
        ([run, tmp_path / "full"], ("full is there already",)),
        ([tmp_path / "nowhere", tmp_path / "out"], ("nowhere",)),
        ([run, tmp_path / "out"], ("No space left",)),
    ):
        assert export.main([str(arg) for arg in args]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("grpo.export: ") and all(word in line for word in words)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0\0")
    assert export.main([str(run), str(tmp_path / "out")]) == 2 and "damaged: " in capsys.readouterr().err
    monkeypatch.undo()
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert (
        export.main([str(tmp_path / "base"), str(tmp_path / "out")]) == 2
        and "MB are needed, 0.0 MB are free" in capsys.readouterr().err
    )
    assert (
        not (tmp_path / "out").exists()
        and not (tmp_path / "out.tmp").exists()
        and (tmp_path / "full" / "notes.txt").exists()
    )
    monkeypatch.undo()
    assert (
        export.main([str(tmp_path / "base"), str(tmp_path / "empty")]) == 0
        and len(weights.load(tmp_path / "empty").state_dict()) > 10
    )
