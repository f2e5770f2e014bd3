"""tests/bench/same.py notices what it must notice. The comparison itself takes minutes and is run by hand."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.bench import same


def run_folder(place, **changed):
    """A run folder of two lines of metrics and one checkpoint."""
    row = {"reward": 0.5, "time/learn": 1.0, **changed.get("row", {})}
    checkpoint = place / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    lines = [json.dumps({"step": step, **row}) for step in (0, 1)]
    (place / "metrics.jsonl").write_text("\n".join(lines[: changed.get("lines", 2)]) + "\n")
    save_file(changed.get("weights", {"a": torch.ones(3)}), checkpoint / changed.get("file", "m.safetensors"))
    return place


def differences(tmp_path, **changed):
    found = same.Found()
    folders = run_folder(tmp_path / "before"), run_folder(tmp_path / "now", **changed)
    same.compare_metrics(*folders, found)
    same.compare_weights(*folders, found)
    return found.differences


def test_seconds_may_differ(tmp_path):
    assert differences(tmp_path, row={"time/learn": 2.0}) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"row": {"reward": 0.5000001}},
        {"row": {"new": 1}},
        {"lines": 1},
        {"weights": {"a": torch.tensor([1.0, 1.0, 1.0 + 2**-23])}},
        {"weights": {"b": torch.ones(3)}},
        {"weights": {"a": torch.ones(3, dtype=torch.float64)}},
        {"file": "n.safetensors"},
    ],
    ids=str,
)
def test_everything_else_is_noticed(tmp_path, changed):
    assert differences(tmp_path, **changed)


def test_what_is_listed_may_differ(tmp_path, monkeypatch):
    monkeypatch.setitem(same.RENAMED, "reward", "reward/mean")
    monkeypatch.setitem(same.CHANGED, "shares", "now a count")
    before, now = run_folder(tmp_path / "before", row={"shares": 0.5}), run_folder(tmp_path / "now")
    text = (now / "metrics.jsonl").read_text()
    (now / "metrics.jsonl").write_text(text.replace('"reward"', '"reward/mean"'))
    found = same.Found()
    same.compare_metrics(before, now, found)
    assert found.differences == [] and found.intended == {"shares: now a count"}
    (now / "metrics.jsonl").write_text(text.replace('"reward": 0.5', '"reward/mean": 0.25'))
    same.compare_metrics(before, now, found)
    assert found.differences


def test_each_tree_gets_settings_that_it_knows(tmp_path):
    case = same.CASES["two ranks, dynamic"]
    words = same.command(case, "  sampling=fixed   fixed or dynamic sampling\n  max_rounds=4", tmp_path)
    assert "sampling=dynamic" in words and "--nproc-per-node=2" in words
    words = same.command(case, "  max_rounds=1   above 1 is dynamic sampling", tmp_path)
    assert "sampling=dynamic" not in words and "max_rounds=3" in words
