"""Every command of README.md and docs/ runs, on a tiny twin of its model and files in the layout of its data.

In the suite all training commands are planned, and the QUICK commands are run. The others are run by
`pytest -m slow tests/test_commands.py` (two minutes).
"""

import importlib
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import evaluate
import train
from data.sources import hub
from grpo import export
from grpo.bridge import __main__ as bridge
from grpo.config import parse

pytest.importorskip("pyarrow", reason="reading parquet is an optional extra")
from documented import Workplace, all_commands, small_evaluation

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [shlex.join(words) for words in all_commands()]
PROGRAMS = ("train.py", "evaluate.py", "-m")
# the files of pip, the tests and the benchmarks: what is not run here, and the test that checks it
OTHERS = r"pip install |pytest|hf |python (docs/minimal.py|tests/(bench|faults)/|-m (venv|tests\.docs_sync))"
RUN = [text for text in COMMANDS if {*shlex.split(text)} & {*PROGRAMS} and not re.match(OTHERS, text)]
# one of each kind
QUICK = (
    r"-m |train.py (own|sat_sft_paper|visualthinker_sat_paper|.*--plan)|--help|runs/mine|--model Qwen2-VL-2B"
)
TRAINING = [text for text in RUN if "train.py" in text]

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def there(workplace, monkeypatch):
    """In the folder of the commands, with twins in place of the hub."""
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr(hub, "snapshot", workplace.snapshot)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is there?\n"))
    monkeypatch.setattr(export, "push", lambda folder, name: f"hub:{name}")
    return workplace


def parts(text: str) -> tuple[str, list[str]]:
    """The program of a command, and its arguments; torchrun's own are read by torchrun's parser."""
    words = shlex.split(text)
    if words[0] == "torchrun":
        read = get_args_parser().parse_args(words[1:])
        return read.training_script, read.training_script_args
    assert words[0] == "python", text
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


def task_of(program: str, argv: list[str]) -> str:
    """The task whose data a command reads."""
    if program == "train.py":
        return parse.parse_args([word for word in argv if "runs/" not in word])[0].task
    if "--task" in argv:
        return argv[argv.index("--task") + 1]
    return "chains" if program == "grpo.words" else "jsonl"


def run(there, text: str, tmp_path: Path) -> int:
    """Run a command in this process, small. -> exit status."""
    program, argv = parts(text)
    argv = there.filled(argv, task_of(program, argv))
    if program == "train.py":
        if not {"--plan", "--help", "--list"} & {*argv} and not any("--plan=" in word for word in argv):
            return trained(there, [*argv, f"out={tmp_path / 'run'}"])
        return train.main(argv)
    if program == "evaluate.py":
        if "--judge" in argv:
            # it asks a server: tests/grpo/evaluation/test_judge.py runs it beside one
            return 0 if evaluate.arguments(argv) else 1
        return evaluate.main(argv if argv == ["--help"] else small_evaluation(argv))
    if program == "grpo.export":
        # an export of an earlier command, and nothing else
        assert argv[1] in ("mine-policy", "merged")
        shutil.rmtree(argv[1], ignore_errors=True)
    if program == "grpo.bridge":
        return bridged([*argv, f"out={tmp_path / 'bridge'}"])
    if program == "data.shapes.example":
        argv = [str(tmp_path / "mine")]
    return importlib.import_module(program).main(argv)


def bridged(argv: list[str]) -> int:
    """The built-in recipe is run. What asks servers is opened (tests/grpo/bridge runs it beside one)."""
    if "--help" in argv:
        return bridge.main(argv)
    recipe, given, _ = bridge.arguments(argv)
    if recipe == "shapes":
        return bridge.main([*argv, "limit=4"])
    data = [] if any(word.startswith("data=") for word in given) else ["data=mine.jsonl"]
    return 0 if len(bridge.open_examples(bridge.load(recipe, [*given, *data]))) else 1


def trained(there, argv: list[str]) -> int:
    """Train small. A change is one of a run that is there."""
    changed = [word.partition("=")[2] for word in argv if word.startswith("change=")]
    before = [word for word in argv if word.partition("=")[0] not in ("change", *changed)]
    if changed and (status := train.main(there.small(before))):
        return status
    return train.main(there.small(argv) + ["steps=2"] * bool(changed))


def test_every_command_is_known():
    """It is run here, or another test checks it."""
    unknown = [text for text in COMMANDS if text not in RUN and not re.match(OTHERS, text)]
    assert not unknown
    assert len(RUN) > 80
    programs = {parts(text)[0] for text in RUN}
    assert programs <= {
        "train.py",
        "evaluate.py",
        "data.check",
        "data.shapes.example",
        "grpo.bridge",
        "grpo.export",
        "grpo.report",
        "grpo.words",
    }


@pytest.mark.parametrize("text", TRAINING)
def test_it_is_planned(text, there, capsys):
    """With the twin in place of a run that there would be."""
    argv = [re.sub("^model=(runs/.*|FOLDER)", "model=Qwen2-VL-2B", word) for word in parts(text)[1]]
    argv = [word for word in argv if not word.startswith("--")]
    assert train.main([*argv, "--plan"]) == 0
    assert "peak: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", [pytest.param(text, marks=[] if re.search(QUICK, text) else pytest.mark.slow) for text in RUN]
)
def test_it_runs(text, there, tmp_path):
    try:
        status = run(there, text, tmp_path)
    except SystemExit as left:
        status = left.code
    assert status == 0
