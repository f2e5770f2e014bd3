"""grpo.export: a checkpoint as a folder to hand on, whole or not at all."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small import small_folder, small_policy

import train
from data.chat import Chat
from data.images import open_picture
from data.shapes import tokenizer
from data.shapes.world import Shapes
from data.sources.table import SOURCES
from grpo import export
from grpo.evaluation.answers import Asking, answer_all
from grpo.evaluation.statistics import wilson
from grpo.monitor import report
from grpo.monitor.card import card
from grpo.optim import Optimizer
from grpo.storage import checkpoint
from grpo.storage.jsonl import read
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


# ---- of a run: the model card, and what a reader does with it


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on questions of one's own."""
    place = tmp_path_factory.mktemp("own")
    # as in a real base, one stop token; a rollout also stops at <|im_end|>
    stop = tokenizer.build().token_to_id("<|endoftext|>")
    base = small_folder(place / "base", stops=(stop,))
    data = place / "my cups"
    data.mkdir()
    world = Shapes("train", 24, seed=3)
    asked = [world[i] for i in range(24)]
    lines = []
    for number, example in enumerate(asked):
        picture = f"{number}.png"
        open_picture(example.pictures[0], name=picture).save(data / picture)
        values = {"question": example.question, "choices": example.choices, "answer": example.answer}
        lines.append(json.dumps(values | {"picture": picture, "task": example.task}) + "\n")
    (data / "train.jsonl").write_text("".join(lines[:16]))
    (data / "heldout.jsonl").write_text("".join(lines[16:]))
    argv = "shapes task=jsonl steps=2 prompts=2 group=3 cap=24 eval.items=8 report.every=0 max_pixels=4000"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "write_curves", lambda folder, say=print: [])
        assert train.main([*argv.split(), f"model={base}", f"data={data}", f"out={place / 'run'}"]) == 0
    return place


def test_the_card_says_what_it_is_and_no_path_of_this_machine(trained, tmp_path):
    out = export.export(str(trained / "run"), tmp_path / "cups-model")
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["grpo", "reinforcement-learning", "vision", "glimpse"],
    }
    rows = [row for row in read(trained / "run" / "metrics.jsonl") if "eval/accuracy" in row]
    for row in (rows[0], rows[-1]):
        low, high = wilson(row["eval/accuracy"] * 8, 8)
        assert f"{100 * row['eval/accuracy']:.1f} % ({100 * low:.1f} … {100 * high:.1f})" in body
    assert "| accuracy | 8 |" in body and "for 2 steps on `my cups`" in body and "after step 2." in body
    assert "steps: 2" in body and "$" not in body
    for path in (trained, tmp_path, Path.cwd()):
        assert str(path) not in text
    # the limit of the run, where transformers looks for it
    assert json.loads((out / "preprocessor_config.json").read_text())["max_pixels"] == 4000


def test_the_snippet_of_the_card_answers_as_the_policy_does(trained, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    out = export.export(str(trained / "run"), tmp_path / "cups-model")
    snippet = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)[1]
    (tmp_path / "photo.jpg").write_bytes((trained / "my cups" / "0.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    chat = Chat(out, template="shapes")
    policy = weights.load(out)
    asked = SOURCES["jsonl"](trained / "my cups", "train", None, 0)
    for example in (asked[i] for i in range(6)):
        ours = answer_all(policy, chat, [example], Asking(24))[0][0].text.removeprefix("<think>")
        theirs = names["ask"](example.pictures[0], example.asked)
        # they leave out special tokens, which a random policy writes, and we show them
        words = re.sub(r"<\|\w+\|>|<unk>", "", ours).split()
        assert theirs.split() == words and len(words) > 10


def test_a_pinned_model_of_the_hub_is_the_base_of_the_card(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree |= {"model": "Qwen/Qwen2-VL-2B", "rewards": {"/home/me/mine.py:cups": 0.5, "accuracy": 1.0}}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    (run / "base.json").write_text(json.dumps({"model": "Qwen/Qwen2-VL-2B", "revision": "abc123"}))
    (run / "inputs.json").write_text(json.dumps({"with": {"torch": "2.13.0", "code": "f00"}}))
    text = card(checkpoint.complete(run)[-1], "mine")
    assert "\nbase_model: Qwen/Qwen2-VL-2B\n" in text and "commit `abc123`" in text and "torch 2.13.0" in text
    assert "/home/me" not in text and "`mine.py:cups` × 0.5, `accuracy` × 1" in text


def test_a_run_without_an_evaluation_says_so(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert "It was not evaluated." in card(checkpoint.complete(run)[-1], "mine")


def test_files_have_the_mode_of_any_new_file(trained, tmp_path):
    """safetensors writes 0600, which a server of another user cannot read."""
    out = export.export(str(trained / "run"), tmp_path / "out")
    (tmp_path / "any").touch()
    mode = (tmp_path / "any").stat().st_mode
    for folder in (out, checkpoint.complete(trained / "run")[-1]):
        assert [path.name for path in folder.iterdir() if path.stat().st_mode != mode] == []


def test_it_is_pushed_complete_or_named(run, tmp_path, monkeypatch, capsys):
    calls = []

    class HfApi:
        def create_repo(self, name, **how):
            calls.append((name, how))
            if name == "me/refused":
                raise RuntimeError("401\n  no token")
            return f"hub:{name}"

        def upload_folder(self, folder_path, repo_id, commit_message):
            calls.append((sorted(path.name for path in folder_path.iterdir()), repo_id))

    monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
    assert export.main([str(run), str(tmp_path / "a"), "--push", "me/mine"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "a"), "hub:me/mine"]
    assert calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert calls[1][1] == "me/mine" and "model.safetensors" in calls[1][0] and "state.json" not in calls[1][0]
    assert export.main([str(run), str(tmp_path / "b"), "--push", "me/refused"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "was not pushed to me/refused: 401 no token" in said
