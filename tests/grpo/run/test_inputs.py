"""What a run is made of: a changed file is named, a copied one is the same; one writer a folder; a dry run
writes nothing. The table of docs/results/reliability.md is measured by tests/faults/changes.py."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data.images import open_picture
from data.shapes.world import Shapes
from data.sources.table import SOURCES
from grpo.config import ConfigError
from grpo.parallel.ranks import Ranks
from grpo.run import inputs, lock
from grpo.storage.checkpoint import complete

RANKS = Ranks(0, 1, torch.device("cpu"))
REWARD = """
import beside
from package import inner

def pay(text, example, length):
    import late
    return 1.0
"""


@pytest.fixture
def place(tmp_path, base):
    """Questions with pictures, rewards with imports, and a model: everything that a run may be made of."""
    shutil.copytree(base, tmp_path / "model")
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    rows = []
    for number in range(4):
        (data / "images" / f"{number}.png").write_bytes(bytes([number]) * 100)
        rows.append({"question": f"How many, {number}?", "answer": "1", "picture": f"images/{number}.png"})
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "heldout.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (data / "notes.md").write_text("not read")
    (tmp_path / "mine.yaml").write_text("text: '{pictures}{asked}'")
    files = {"pay.py": REWARD, "beside.py": "import deeper", "deeper.py": "", "late.py": "", "other.py": ""}
    files |= {"package/__init__.py": "", "package/inner.py": "from . import twin", "package/twin.py": ""}
    for name, text in files.items():
        path = tmp_path / "rewards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def record(place, accepted=(), found=True):
    """The record of a start. Raises ConfigError where the start is refused."""
    cfg = SimpleNamespace(
        init=None,
        data=str(place / "data"),
        task="jsonl",
        template=str(place / "mine.yaml"),
        method="grpo",
        rewards={f"{place / 'rewards' / 'pay.py'}:pay": 1.0, "length": 1.0},
    )
    examples = SOURCES["jsonl"](cfg.data, "train", None, 0)
    step = place / "run" / "checkpoints" / "step_000002"
    made = inputs.Record(place / "run", step if found else None, [])
    made.compare(inputs.inputs_of(cfg, place / "model", examples), RANKS, accepted)
    (place / "run").mkdir(exist_ok=True)
    made.write()
    return made


def edited(path: Path) -> None:
    """Other contents of the same size."""
    old = path.read_bytes()
    path.write_bytes(bytes([old[0] ^ 1]) + old[1:])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def reordered(path: Path) -> None:
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(True))))


def copied(path: Path) -> None:
    """The same contents at another time, as after a copy."""
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))


@pytest.mark.parametrize(
    "name, change, setting",
    [
        ("data/train.jsonl", longer, "data: train.jsonl has"),
        ("data/train.jsonl", reordered, "data: train.jsonl has other contents"),
        ("data/train.jsonl", copied, None),
        ("data/heldout.jsonl", edited, "data: heldout.jsonl has other contents"),
        ("data/images/3.png", edited, "data: images/3.png has other contents"),
        ("data/images/3.png", Path.unlink, "data: images/3.png is gone"),
        ("data/images/3.png", copied, None),
        ("data/notes.md", longer, None),
        ("mine.yaml", longer, "mine.yaml has"),
        ("rewards/pay.py", longer, "pay.py has"),
        ("rewards/pay.py", copied, None),
        ("rewards/beside.py", longer, "beside.py has"),
        ("rewards/deeper.py", longer, "deeper.py has"),
        ("rewards/late.py", longer, "late.py has"),
        ("rewards/package/__init__.py", longer, "package/__init__.py has"),
        ("rewards/package/twin.py", longer, "package/twin.py has"),
        ("rewards/other.py", longer, None),
        ("model/model.safetensors", edited, "model: model.safetensors has other contents"),
        ("model/model.safetensors", copied, None),
        ("model/tokenizer.json", longer, "model: tokenizer.json has"),
        ("model/preprocessor_config.json", longer, "model: preprocessor_config.json has"),
    ],
)
def test_a_changed_file_is_named_and_a_copied_one_is_the_same(place, name, change, setting, capsys):
    record(place, found=False)
    before = (place / "run" / "inputs.json").read_text()
    change(place / name)
    if setting is None:
        assert record(place).values["changed"] == []
        # known by the new time from now on
        assert record(place).values["changed"] == []
        return
    with pytest.raises(ConfigError, match="holds a run that was made of other files") as error:
        record(place)
    key = "template" if name == "mine.yaml" else name.partition("/")[0]
    assert setting in str(error.value) and f"accept it with change={key}," in str(error.value)
    assert (place / "run" / "inputs.json").read_text() == before
    [note] = record(place, accepted=[key]).values["changed"]
    assert note["step"] == 2 and setting in note["changed"][0]
    assert "changed after step 2: " in capsys.readouterr().err
    # accepted once, and for the file as it is now; the note stays
    assert record(place).values["changed"] == [note]


def test_a_run_without_a_checkpoint_starts_anew_with_what_is_there(place):
    record(place, found=False)
    longer(place / "data" / "train.jsonl")
    assert record(place, found=False).values["changed"] == [] == record(place).values["changed"]


def test_all_changes_are_named_at_once_and_each_setting_in_a_line(place):
    record(place, found=False)
    for number in range(4):
        edited(place / "data" / "images" / f"{number}.png")
    longer(place / "data" / "train.jsonl")
    longer(place / "model" / "config.json")
    with pytest.raises(ConfigError) as error:
        record(place, accepted=["rewards"])
    assert "images/2.png has other contents and 2 more; model: config.json" in str(error.value)
    assert "change=rewards,data,model" in str(error.value)


def test_pictures_of_a_large_set_are_known_by_size_and_time(place, monkeypatch):
    """Their contents are not read, so a hundred thousand of them cost seconds; a copy is then named."""
    monkeypatch.setattr(inputs, "PICTURES", 4 * (100 + inputs.OPENING) - 1)
    real, read = inputs.checksum, []
    monkeypatch.setattr(inputs, "checksum", lambda path: read.append(path.suffix) or real(path))
    record(place, found=False)
    assert ".png" not in read and ".jsonl" in read
    read.clear()
    record(place)
    # of the same size and time: not read again, but for those that were new at the first start
    assert ".png" not in read
    monkeypatch.setattr(inputs, "RECENT", 0)
    record(place)
    read.clear()
    record(place)
    assert read == []
    copied(place / "data" / "images" / "1.png")
    with pytest.raises(ConfigError, match=r"images/1.png has another time"):
        record(place)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "", "\0", "\ud800", "x" * 300, ".", "images"])
def test_a_row_names_no_file_outside_its_folder(place, name):
    (place / "secret").write_text("x")
    row = json.dumps({"question": "?", "answer": "1", "picture": name})
    (place / "data" / "train.jsonl").write_text(row + "\nnot JSON\n")
    found = inputs.question_files(SimpleNamespace(data=str(place / "data"), task="jsonl"), source(place))
    assert sorted(found) == ["heldout.jsonl", "train.jsonl"]


def source(place):
    return SOURCES["jsonl"](str(place / "data"), "train", None, 0)


def test_other_versions_and_threads_are_noted_in_one_line(place, monkeypatch, capsys):
    record(place, found=False)
    monkeypatch.setattr(inputs, "version", lambda name: "0.1")
    monkeypatch.setattr(inputs.torch, "get_num_threads", lambda: 77)
    assert record(place).values["changed"] == []
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("note: since the last start torch ") and "-> 0.1, " in line and "-> 77; " in line
    record(place)
    assert capsys.readouterr().err == ""


def test_a_broken_record_is_named(place):
    record(place, found=False)
    (place / "run" / "inputs.json").write_text("{")
    with pytest.raises(ConfigError, match=r"inputs.json: is not JSON .*; remove it"):
        record(place)


# ---- one writer


def test_a_second_writer_is_refused_and_a_dead_one_is_none(tmp_path):
    folder = tmp_path / "runs" / "mine"
    if not (child := os.fork()):
        lock.claim(folder)
        (tmp_path / "ready").touch()
        time.sleep(60)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match=rf"process {child} on \S+ writes to {folder}.* one writer.*out=DIR"):
        lock.claim(folder)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (folder / "lock").exists()
    lock.claim(folder)
    with pytest.raises(ValueError, match=rf"process {os.getpid()} on"):
        lock.claim(folder)
    lock.leave()
    assert list(folder.iterdir()) == []


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder, left in (
        (tmp_path / "a" / "b", tmp_path / "a"),
        (tmp_path / "mine" / "b", tmp_path / "mine"),
    ):
        lock.claim(folder)
        lock.leave()
        assert left.exists() == (left.name == "mine")
    lock.claim(tmp_path / "mine")
    (tmp_path / "mine" / "config.yaml").touch()
    lock.leave()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["config.yaml"]


def test_where_nothing_can_be_locked_the_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    lock.claim(tmp_path)
    lock.leave()
    assert "warning: " in (said := capsys.readouterr().err) and "cannot be locked" in said


# ---- through train.py

QUICK = "seed=1 steps=3 prompts=2 group=3 cap=6 optim.lr=1e-3 eval.items=0 save.every=1 save.keep=0 "
QUICK += "report.every=0 device=cpu task=jsonl optim.warmup=0"


@pytest.fixture
def stopped(base, tmp_path, monkeypatch, in_process):
    """A command of questions and a reward of one's own, and its run, stopped after step 2 of 3."""
    (tmp_path / "pay.py").write_text("def pay(text, example, length):\n    return length + 1.0\n")
    world = Shapes("train", 24, seed=0)
    for number in range(24):
        open_picture(world[number].pictures[0], name="x").save(tmp_path / f"{number}.png")
    rows = [{"question": "Which?", "answer": "1", "picture": f"{number}.png"} for number in range(24)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["shapes", *QUICK.split(), f"model={base}", f"data={tmp_path / 'q.jsonl'}"]
    command += [f"rewards={{{tmp_path / 'pay.py'}:pay: 1.0}}", f"out={tmp_path / 'run'}"]
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2)
        assert train.main(command) == 143
    assert [path.name for path in complete(tmp_path / "run")] == ["step_000001", "step_000002"]
    return command


def interrupt_after(monkeypatch, step):
    real, calls = train.generate, []

    def generate(*args, **how):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **how)

    monkeypatch.setattr(train, "generate", generate)


def listing(folder):
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in (folder, *folder.rglob("*"))
    }


def test_a_changed_run_says_so(stopped, tmp_path, capsys):
    """F8: other questions and another reward. A start that is refused writes nothing, nor does a dry run."""
    run = tmp_path / "run"
    capsys.readouterr()
    before = listing(tmp_path)
    assert train.main([*stopped, "--dry-run"]) == 0
    assert listing(tmp_path) == before
    for path in (tmp_path / "pay.py", tmp_path / "q.jsonl"):
        longer(path)
    before = listing(run)
    for flags in ([], ["--dry-run"], ["change=rewards"]):
        assert train.main([*stopped, *flags]) == 2
        said = capsys.readouterr().err.strip()
        assert (
            "\n" not in said
            and "data: q.jsonl has" in said
            and ("pay.py has" in said) == (flags != ["change=rewards"])
        )
        assert {name: of for name, of in listing(run).items() if name != "."} == {
            name: of for name, of in before.items() if name != "."
        }
    assert train.main([*stopped, "change=rewards,data"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2, 3] and len(rows[2]["changed"]) == 2
    # the same command again: nothing has changed since
    assert train.main([*stopped, "change=rewards,data"]) == 0
    assert [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == rows


def test_settings_of_a_run_that_goes_on(stopped, tmp_path, capsys):
    """A larger cap only by name; a longer run freely, and with a decay it is said what that does."""
    capsys.readouterr()
    assert train.main([*stopped, "cap=9"]) == 2
    assert "cap: 6 -> 9" in (said := capsys.readouterr().err) and "change=cap" in said
    assert (
        train.main([*stopped, "cap=9", "change=cap", "steps=4", "loss.micro_tokens=99", "eval.items=0"]) == 0
    )
    said = capsys.readouterr().err
    assert "changed after step 2: " in said and "cap: 6 -> 9" in said
    assert "steps: 3 -> 4 (optim.decay=linear ends there now, so the learning rate is larger" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4] and rows[2]["changed"][-1] == "cap: 6 -> 9"
    # what was accepted is the run's own now
    assert train.main([*stopped, "cap=9", "steps=4"]) == 0
