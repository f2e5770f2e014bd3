"""What can be looked at while a run lives, and after it ended in another way than at its last step."""

import re

import pytest

import train
from grpo.monitor import report
from grpo.run import lifecycle
from grpo.storage.jsonl import read

pytestmark = pytest.mark.usefixtures("in_process")
QUICK = (
    "shapes steps=5 prompts=2 group=3 cap=8 limit=40 eval.items=2 "
    "eval.every=2 report.every=2 report.prompts=1"
)


@pytest.fixture
def pages(monkeypatch):
    """A list of (last step, state, why) for each page that a run writes."""
    monkeypatch.setattr(lifecycle, "SHOW_SECONDS", 0.0)
    real, found = report.write_report, []

    def write_report(folder, ended=""):
        state = report.collect(folder, ended)
        found.append((state["step"], state["state"]["name"], ended))
        return real(folder, ended)

    monkeypatch.setattr(report, "write_report", write_report)
    return found


def test_the_page_is_written_at_every_evaluation_and_steps_are_lines(base, tmp_path, pages, capsys):
    out = tmp_path / "run"
    assert train.main([*QUICK.split(), f"model={base}", f"out={out}"]) == 0
    assert pages == [(0, "running", ""), (2, "running", ""), (4, "running", ""), (5, "finished", "")]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 5 and not any("\r" in line for line in lines)
    for number, (line, row) in enumerate(zip(lines, read(out / "metrics.jsonl")[1:]), 1):
        place, *parts = re.fullmatch(r"step (\d+/5)((?: \w+=\S+)+)", line).groups()
        shown = {name: float(value) for name, value in (part.split("=") for part in parts[0].split())}
        assert place == f"{number}/5" and shown["reward"] == pytest.approx(row["reward"], rel=1e-2, abs=1e-9)
        assert {"acc", "len", "cut", "gap", "loss", "seconds"} <= set(shown)


def test_without_evaluations_it_is_written_with_the_checkpoints(base, tmp_path, pages):
    argv = [*QUICK.split(), "eval.items=0", "save.every=3", f"model={base}", f"out={tmp_path / 'run'}"]
    assert train.main(argv) == 0
    assert [(step, name) for step, name, _ in pages] == [(3, "running"), (5, "finished")]


def test_an_evaluation_a_moment_after_the_last_page_writes_none(base, tmp_path, pages, monkeypatch):
    monkeypatch.setattr(lifecycle, "SHOW_SECONDS", 1000.0)
    assert train.main([*QUICK.split(), f"model={base}", f"out={tmp_path / 'run'}"]) == 0
    assert pages == [(5, "finished", "")]


@pytest.mark.parametrize("error", [ValueError("a bad row"), OSError("no disk"), KeyError("x"), MemoryError()])
def test_a_run_that_ends_with_an_error_leaves_a_page(base, tmp_path, pages, monkeypatch, error, capsys):
    real, calls = train.generate, []

    def generate(*args, **how):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return real(*args, **how)

    monkeypatch.setattr(train, "generate", generate)
    argv = [*QUICK.split(), f"model={base}", f"out={tmp_path / 'run'}"]
    if isinstance(error, (ValueError, OSError)):
        assert train.main(argv) == 2
    else:
        with pytest.raises(type(error)):
            train.main(argv)
    assert pages[-1] == (3, "stopped", f"ended with an error: {error or type(error).__name__}")


def test_a_page_that_cannot_be_written_does_not_end_the_run(base, tmp_path, pages, monkeypatch, capsys):
    def full(*_):
        raise OSError("the disk is full")

    real = report.write_report
    monkeypatch.setattr(
        report, "write_report", lambda *a: full() if len(pages) < 2 and pages.append(1) is None else real(*a)
    )
    assert train.main([*QUICK.split(), f"model={base}", f"out={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().err.count("report.html: the disk is full") == 2
