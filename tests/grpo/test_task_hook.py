"""A second task with its own measurement and set: metrics, evaluation, tables and report need no change."""

import json

import pytest
import torch

from data.sources import table
from data.types import Example, TaskHook
from grpo.batch import Groups
from grpo.evaluation.scores import flat_scores, read_completion, scores
from grpo.evaluation.tables import before_after, score_table
from grpo.monitor import report
from grpo.monitor.step_metrics import completion_rows, step_metrics
from grpo.parallel.rows import Share
from grpo.rollout import Rollout

TEXTS = ("<think> 1 + 1 </think> <answer> 2 </answer>", "<think> hm </think> <answer> 3 </answer>")


def measure(text, example):
    """Does it add, and is the sum that of the example? The second does not apply where it does not add."""
    return {"adds": "+" in text, "adds_rightly": "1 + 1" in text if "+" in text else None}


HOOK = TaskHook(
    measure=measure,
    columns={"adds": "adds"},
    charts=(("Adding", "Share of completions that add.", {"adds": "adds"}),),
    sets={"harder": "harder sums"},
)


def sums(path, split, limit, seed):
    return [Example(f"sums/{split}/{n}", "1 + 1?", (), "2", task="sum") for n in range(limit)]


@pytest.fixture(autouse=True)
def task(monkeypatch):
    monkeypatch.setitem(table.SOURCES, "sums", sums)
    monkeypatch.setitem(table.SPLITS, "sums", ("train", "heldout", "harder"))
    monkeypatch.setitem(table.HOOKS, "sums", HOOK)


def test_its_sets_are_held_out():
    examples, heldout = table.open_source("sums", None, limit=3, seed=0, items=2)
    assert len(examples) == 3 and list(heldout) == ["heldout", "harder"]
    assert [example.uid for example in heldout["harder"]] == ["sums/harder/0", "sums/harder/1"]
    # a task without a hook has the held-out set alone and measures nothing
    assert not table.hook_of("blink").sets and table.hook_of("blink").measure("1 + 1", examples[0]) == {}


def test_its_measurements_are_metrics_of_a_step():
    examples = sums(None, "train", 2, 0)
    tokens, length = torch.ones(2, 2, 3, dtype=torch.long), torch.full((2, 2), 3)
    rollout = Rollout(tokens, length, torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2, 3))
    reward = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    texts = [list(TEXTS), [TEXTS[1], TEXTS[1]]]
    groups = Groups(examples, [], rollout, texts, reward, {"accuracy": reward}, 0, Share.whole(2, 2))
    found = step_metrics(completion_rows(groups, measure))
    assert (found["aha/adds"], found["aha/adds_rightly"], found["accuracy"]) == (0.25, 1.0, 0.25)
    assert "aha/looking" not in found


def test_its_measurements_are_scores_and_columns():
    examples = sums(None, "heldout", 2, 0)
    answers = [[read_completion(e, t, [1], True, measure=measure)] for e, t in zip(examples, TEXTS)]
    found = scores(answers)
    assert found["measured"] == {"adds": 0.5, "adds_rightly": 1.0}
    assert flat_scores(found)["adds"] == 0.5
    header, *_, last, note = score_table(found, hook=HOOK).splitlines()
    assert header.split()[-1] == "adds" and last.split()[-1] == "50.0"
    assert note == "in percent: adds rightly 100.0"
    shown = before_after(
        {"harder/accuracy": 0.25, "sampled/adds": 0.5}, {"harder/accuracy": 1, "sampled/adds": 1}, HOOK
    )
    assert [line.split() for line in shown.splitlines()[1:]] == [
        ["accuracy,", "harder", "sums", "25.0%", "100.0%"],
        ["adds,", "sampled", "50.0%", "100.0%"],
    ]


def test_its_charts_are_in_the_report(tmp_path):
    (tmp_path / "config.yaml").write_text("task: sums\n")
    rows = [{"step": step, "aha/adds": 0.1 * step, "aha/looking": 0.5} for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = report.collect(tmp_path)
    assert [chart["title"] for chart in found["charts"]] == ["Adding"]
    assert found["charts"][0]["lines"][0]["y"] == pytest.approx([0, 0.1, 0.2, 0.3])
