"""grpo/monitor/loggers.py: the rows of metrics.jsonl and pictures of a few groups, in TensorBoard, W&B and
trackio. The libraries are extras; where one is missing, a stand-in with its functions takes its place."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_run import group, question

import train
from grpo.monitor import loggers
from grpo.monitor.loggers import Loggers
from grpo.storage.jsonl import Metrics, read

ROOT = Path(__file__).resolve().parents[3]
# what W&B and trackio have in common, as far as it is used here; each call is a line of calls.jsonl
STAND_IN = """
import json, os
def note(**call):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")
class Image:
    def __init__(self, picture, caption): self.shown = [picture.size, caption]
class Run:
    def finish(self, exit_code=0): note(finish=exit_code)
def init(**how):
    note(init=how)
    return Run()
def log(row, step):
    if "broken" in row: raise RuntimeError("no network")
    note(step=step, row={k: v.shown if isinstance(v, Image) else v for k, v in row.items()})
def finish(): note(finish=None)
"""
QUICK = (
    "shapes steps=4 prompts=2 group=3 cap=8 limit=40 eval.items=2 "
    "eval.every=2 report.every=2 report.prompts=1"
)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts stand-ins of wandb and trackio in place. -> a function that reads what was called."""
    for name in ("wandb", "trackio"):
        (tmp_path / "libraries" / name).mkdir(parents=True)
        (tmp_path / "libraries" / name / "__init__.py").write_text(STAND_IN)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "libraries")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.jsonl"))
    calls = tmp_path / "calls.jsonl"
    yield lambda: [json.loads(line) for line in calls.read_text().splitlines()]
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def start(folder, names, step=0):
    """One start of a run that goes on after `step`, and what it says."""
    metrics, samples = (
        Metrics(folder / name).resume(step or -1) for name in ("metrics.jsonl", "samples.jsonl")
    )
    run = SimpleNamespace(folder=folder, metrics=metrics, samples=samples, step=step)
    cfg = SimpleNamespace(log=names, to_dict=lambda: {"steps": 9, "rewards": {"format": 1.0}})
    said = []
    return run, Loggers(cfg, run, said.append), said


def steps(run, *which):
    """Write the rows and groups of these steps."""
    for step in which:
        run.samples.write(
            question(1, "heldout", step) | {"completions": group(1, step, 0.5, 2)["completions"]}
        )
        run.metrics.write(
            {"step": step, "reward": step / 10, "kl": float("nan"), "guard/nonfinite_uids": ["u"]}
        )


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_continues_the_same_logged_run(tmp_path, stand_in, name):
    folder = tmp_path / "run"
    folder.mkdir()
    # checkpoints at 2; killed after 4, after 3 and after 6
    for step, done in ((0, (0, 1, 2, 3, 4)), (2, (3,)), (2, (3, 4, 5, 6))):
        run, logged, _ = start(folder, [name], step)
        steps(run, *done)
    logged.close(failed=False)
    calls = stand_in()
    began = [call["init"] for call in calls if "init" in call]
    assert len(began) == 3 and began[0] == began[1] == began[2]
    assert began[0]["resume"] == "allow" and began[0]["config"]["rewards"] == {"format": 1.0}
    rows = [(call["step"], call["row"]["reward"]) for call in calls if "reward" in call.get("row", {})]
    # every step once, in order, and with what metrics.jsonl has
    assert rows == [(row["step"], row["reward"]) for row in read(folder / "metrics.jsonl")]
    assert all(set(call["row"]) in ({"reward"}, {"heldout/1"}) for call in calls if "row" in call)
    size, caption = next(call["row"]["heldout/1"] for call in calls if "heldout/1" in call.get("row", {}))
    assert size == [84, 84] and "right: on its left" in caption and caption.count("reward ") == 2
    assert "finish" in calls[-1]
    # another run has another name
    (tmp_path / "other").mkdir()
    start(tmp_path / "other", [name])
    assert stand_in()[-1]["init"] != began[0]


def test_a_logger_that_fails_is_left_out_and_the_others_go_on(tmp_path, stand_in):
    run, _, said = start(tmp_path, ["wandb", "trackio"])
    sys.modules["wandb"].log = lambda row, step: (_ for _ in ()).throw(RuntimeError("no network"))
    steps(run, 0, 1)
    assert said == ["log: wandb failed, and gets nothing more: no network"]
    assert [call["step"] for call in stand_in() if "reward" in call.get("row", {})] == [0, 1]


def test_a_logger_that_cannot_start_is_named(tmp_path, stand_in, monkeypatch):
    (tmp_path / "libraries" / "wandb" / "__init__.py").write_text("def init(**how): raise OSError('no key')")
    with pytest.raises(ValueError, match="log: wandb cannot start: no key"):
        start(tmp_path, ["wandb"])


def test_a_missing_library_is_named_before_anything_is_written(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "run"
    assert train.main([*QUICK.split(), f"model={base}", f"out={out}", "log=[trackio]"]) == 2
    assert (
        capsys.readouterr().err.count("log: trackio is not installed; pip install") == 1 and not out.exists()
    )


def test_a_run_logs_the_very_rows_of_its_metrics(base, tmp_path, stand_in):
    out = tmp_path / "run"
    assert train.main([*QUICK.split(), f"model={base}", f"out={out}", "log=[wandb]"]) == 0
    calls = stand_in()
    rows = {
        call["step"]: call["row"] for call in calls if "row" in call and "/1" not in str(list(call["row"]))
    }
    numbers = lambda row: {k: v for k, v in row.items() if type(v) in (int, float) and k != "step"}
    assert rows == {row["step"]: numbers(row) for row in read(out / "metrics.jsonl")}
    shown = {
        (call["step"], name) for call in calls for name in call.get("row", {}) if name.endswith(("/1", "/2"))
    }
    assert shown >= {(0, "heldout/1"), (0, "heldout/2"), (1, "train/1"), (3, "train/1"), (4, "heldout/2")}
    assert calls[-1] == {"finish": 0}


# ---- the libraries themselves


def test_tensorboard_reads_the_event_files_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step, done in ((0, (0, 1, 2, 3, 4)), (2, (3, 4, 5))):
        run, logged, _ = start(tmp_path, ["tensorboard"], step)
        steps(run, *done)
        logged.close(failed=False)
    found = EventAccumulator(
        str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0}
    ).Reload()
    assert found.Tags()["scalars"] == ["reward"] and found.Tags()["images"] == ["heldout/1"]
    assert [event.step for event in found.Scalars("reward")] == [0, 1, 2, 3, 4, 5]
    assert [event.value for event in found.Scalars("reward")] == pytest.approx([s / 10 for s in range(6)])
    assert [event.step for event in found.Images("heldout/1")] == [0, 1, 2, 3, 4, 5]


OFFLINE = """
import sys
sys.path[:0] = ["tests/grpo/monitor", "tests", "."]
from pathlib import Path
from test_loggers import start, steps
folder = Path(sys.argv[2])
for step, done in ((0, (0, 1, 2, 3, 4)), (2, (3, 4, 5))):
    run, logged, said = start(folder, [sys.argv[1]], step)
    steps(run, *done)
    logged.close(failed=False)
    assert not said, said
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_library_takes_it_without_a_network(tmp_path, name):
    pytest.importorskip(name)
    folder = tmp_path / "run"
    folder.mkdir()
    own = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    script = [sys.executable, "-c", OFFLINE, name, str(folder)]
    done = subprocess.run(script, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if name == "wandb":
        assert len(list((folder / "wandb").glob("offline-run-*"))) == 2
    else:
        assert list((tmp_path / "trackio").glob("*.db"))
