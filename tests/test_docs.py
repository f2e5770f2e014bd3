"""Docs are executed: what README.md and docs/ quote, command, compute and point to is held against the code.

To repair what differs: python -m tests.docs_sync
"""

import ast
import doctest
import importlib.util
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import docs_sync
import numpy as np
import pytest
import torch

import evaluate
from data.shapes.world import Shapes
from data.sources.table import SOURCES
from grpo.batch import Batch
from grpo.bridge import __main__ as bridge
from grpo.bridge import settings
from grpo.config import parse
from grpo.evaluation.scores import Answers, read_completion
from grpo.gradient import UpdateStats
from grpo.parallel.ranks import Ranks
from grpo.plan import plan
from grpo.rewards.rules import REWARDS
from grpo.run import held_out
from grpo.run.lifecycle import Lifecycle
from grpo.timing import timed
from models.config import ModelConfig

ROOT = docs_sync.ROOT
DOCS = docs_sync.documents()
EVERYWHERE = [
    *DOCS,
    *(ROOT / name for name in ("pyproject.toml", "constraints.txt", ".ci/run", "train.py", "evaluate.py")),
    *(
        path
        for folder in ("grpo", "models", "data")
        for pattern in ("*.py", "*.yaml")
        for path in (ROOT / folder).rglob(pattern)
    ),
]
README_COMMANDS = (
    'pip install -c constraints.txt -e ".[plot]" && torchrun train.py        # the main job\n'
    'pip install -c constraints.txt -e ".[dev]" && pytest -n 2     # the tests, in two processes\n'
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    return path.read_text("utf-8")


def outside_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


# ---- what the docs quote


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_quoted_code_and_generated_tables_equal_the_source(path):
    assert docs_sync.synced(text_of(path)) == text_of(path), "out of date; run: python -m tests.docs_sync"


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_no_marker_is_misspelt(path):
    """docs_sync does not check a snippet whose marker it does not see."""
    text = text_of(path)
    seen = len(docs_sync.QUOTED.findall(text)) + len(docs_sync.GENERATED.findall(text))
    assert seen == len(re.findall(r"<!-- *(?:code|generated)\b", text))
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language == "python" and not body.startswith(">>>"):
            marked = [match["body"] for match in docs_sync.QUOTED.finditer(text)]
            assert body in marked, f"python without a marker above it:\n{body[:200]}"


def test_a_changed_source_would_be_noticed(tmp_path, monkeypatch):
    """The check itself can fail."""
    (tmp_path / "a.py").write_text(
        "X, Y = 1, 2\n\nclass A:\n    def f(self):\n        # here\n        return 1\n"
    )
    monkeypatch.setattr(docs_sync, "ROOT", tmp_path)
    good = "<!-- code: a.py:A.f -->\n```python\ndef f(self):\n    # here\n    return 1\n```"
    assert docs_sync.synced(good) == good
    assert docs_sync.synced(good.replace("return 1", "return 2")) == good
    assert docs_sync.source_of("a.py", "Y") == "X, Y = 1, 2\n"
    assert docs_sync.source_of("a.py", "A.f", "# here", "return") == "# here\n"
    for missing in (
        ("a.py", "B"),
        ("a.py", "A.g"),
        ("a.py", "A", "nowhere"),
        ("a.py", "A", "def", "nowhere"),
    ):
        with pytest.raises(ValueError, match="has no"):
            docs_sync.source_of(*missing)


@pytest.mark.parametrize("number", range(1, 11))
def test_each_equation_stands_once_in_the_docs_beside_its_code(number):
    found = [path for path in DOCS for _ in range(text_of(path).count(f"[Eq. {number}]"))]
    assert len(found) == 1, f"[Eq. {number}] stands in {[name(path) for path in found]}"
    [(path, function)] = [
        (path, match[1])
        for folder in ("grpo", "models")
        for path in (ROOT / folder).rglob("*.py")
        for match in re.finditer(rf"^# \[Eq\. {number}\]\n(?:@.*\n)*def (\w+)", text_of(path), re.MULTILINE)
    ]
    assert f"<!-- code: {name(path)}:{function} -->" in text_of(found[0])


@pytest.mark.parametrize("path", [path for path in DOCS if ">>> " in text_of(path)], ids=name)
def test_examples_give_what_they_say(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = [
        body
        for body in re.findall(r"^```python\n(.*?)^```$", text_of(path), re.MULTILINE | re.DOTALL)
        if body.startswith(">>>")
    ]
    names, said = {}, []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    for number, body in enumerate(blocks):
        test = doctest.DocTestParser().get_doctest(
            body, names, f"{name(path)}, example {number + 1}", str(path), 0
        )
        runner.run(test, out=said.append, clear_globs=False)
        names = test.globs
    assert not runner.failures, "".join(said)


# ---- what the docs tell people to type


def arguments_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(train.py or evaluate.py, its arguments), None for another program."""
    return next(
        ((word, words[i + 1 :]) for i, word in enumerate(words) if word in ("train.py", "evaluate.py")), None
    )


@pytest.mark.parametrize("path", [path for path in DOCS if "```bash" in text_of(path)], ids=name)
def test_commands_are_understood(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in docs_sync.commands(path):
        if (program := arguments_of(words)) is not None:
            assert words[0] in ("python", "torchrun"), words
            script, argv = program
            if script == "evaluate.py":
                evaluate.arguments(argv)
                continue
            cfg, flags = parse.parse_args(argv)
            if not (flags.help or flags.list):
                assert cfg.task in SOURCES and set(cfg.rewards) <= set(REWARDS), words
                assert "tiny" not in cfg.model or plan.text(cfg)
        elif words[:2] == ["pip", "install"]:
            wanted = re.fullmatch(r"\.\[(.*)\]", words[words.index("-e") + 1])[1].split(",")
            extras = (
                text_of(ROOT / "pyproject.toml")
                .partition("[project.optional-dependencies]")[2]
                .partition("\n[")[0]
            )
            assert all(re.search(rf"^{extra} = ", extras, re.MULTILINE) for extra in wanted)
            assert (ROOT / words[words.index("-c") + 1]).is_file()
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, words
            if words[2] == "grpo.bridge" and "--help" not in words:
                recipe, given, _ = bridge.arguments(words[3:])
                assert settings.load(recipe, given).task in SOURCES
        elif words[0] == "python" and words[1].startswith(("tests/bench/", "tests/faults/")):
            asked = {word for word in words[2:] if word.startswith("--")}
            assert asked <= set(re.findall(r'add_argument\("(--[\w-]+)"', text_of(ROOT / words[1]))), words
        elif words == ["python", "docs/minimal.py"]:
            assert (ROOT / "tests/test_minimal.py").is_file(), "this test runs the program"
        elif words[0] == "pytest":
            assert words[1:] in ([], ["-n", "2"], ["-m", "slow"]), words
        elif words[:2] == ["python", "docs/minimal.py"]:
            assert len(words) <= 3 and all(word.isdigit() for word in words[2:]), words
        else:
            assert words[:2] == ["hf", "download"], f"no test checks this command: {shlex.join(words)}"


def test_the_readme_has_the_two_commands_and_ci_runs_the_second():
    assert README_COMMANDS in text_of(ROOT / "README.md")
    script = text_of(ROOT / ".ci/run")
    assert os.access(ROOT / ".ci/run", os.X_OK) and "set -euo pipefail" in script
    pattern = re.search(r"grep -m 1 -E '([^']+)'", script)[1]
    found = [line for line in text_of(ROOT / "README.md").splitlines() if re.search(pattern, line)]
    assert found == [README_COMMANDS.splitlines()[1]]


def test_constraints_pin_everything_and_no_build_of_torch():
    lines = [line for line in text_of(ROOT / "constraints.txt").splitlines() if not line.startswith("#")]
    # no local version such as +cpu
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {line.partition("==")[0].lower() for line in lines}
    asked = re.findall(
        r'"([\w-]+)>=', text_of(ROOT / "pyproject.toml").partition("[tool")[0].partition("[project]")[2]
    )
    # loggers are left to pip: trackio needs a Pillow that is older than the pinned one
    asked = {each.lower() for each in asked} - {"tensorboard", "wandb", "trackio"}
    assert len(asked) > 10 and asked <= pinned


# ---- what the docs point to


def slug(heading: str) -> str:
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", outside_fences(text_of(path))):
        if target.startswith(("http://", "https://")):
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.is_file(), f"{name(path)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", outside_fences(text_of(file)), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name(path)} links to {target}#{anchor}"


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_files_and_tests_that_are_named_exist(path):
    for file, test in re.findall(r"`((?:grpo|models|data|tests|docs)/[\w./-]+)(?:::(\w+))?`", text_of(path)):
        assert (ROOT / file).exists(), f"{name(path)} names {file}"
        assert not test or re.search(rf"^def {test}\(", text_of(ROOT / file), re.MULTILINE), (
            f"{name(path)} names {file}::{test}"
        )


def test_the_readmes_map_has_every_folder_and_the_root_of_grpo():
    """docs/00-map.md has every file: that table is generated."""
    block = docs_sync.readme("map")
    folder, found = "", set()
    for indent, entry in re.findall(r"^(  )?([\w./]+) ", block, re.MULTILINE):
        folder = folder if indent else (entry if entry.endswith("/") else "")
        found.add((folder if indent else "") + entry)
    wanted = {"train.py", "evaluate.py", "grpo/", "models/", "data/"}
    wanted |= {f"{name(path.parent)}/" for path in (ROOT / "grpo").glob("*/__init__.py")}
    wanted |= {name(path) for path in (ROOT / "grpo").glob("*.py") if path.name != "__init__.py"}
    assert not wanted - found, "the map in README.md lacks these"
    gone = [entry for entry in found if not (ROOT / entry).exists()]
    assert not gone, "the map in README.md names what is not there"


@pytest.mark.parametrize("path", EVERYWHERE, ids=name)
def test_no_line_names_a_path_of_somebodys_machine(path):
    for number, line in enumerate(text_of(path).splitlines(), 1):
        assert not re.search(r"(?<![\w.:/])/(?:work|tmp|root|opt|home|Users|mnt)/", line), (
            f"{name(path)}:{number}: {line.strip()}"
        )


# ---- what the docs promise


class Lines(list):
    write = list.append


def written(monkeypatch, tmp_path) -> set[str]:
    """Every name in the lines of a run, by Lifecycle itself; the answers of evaluation are made up."""
    cfg = parse.load("shapes", ["report.every=0", "save.every=0", "eval.items=4", f"out={tmp_path}"])
    examples, other = list(Shapes("train", 4)), list(Shapes("pairs", 4))
    text = (
        "<think> look : a x 1 , so it is left . but wait , let me look again : a x 1 , so it is left . "
        "</think> <answer> (A) </answer>"
    )
    # without a word of reflection, and right where `text` is wrong
    terse = "<think> </think> <answer> (B) </answer>"

    def answer_all(policy, chat, asked, how, **options):
        answers = Answers()
        answers += [[read_completion(e, text, [1, 2, 3], True, measure=how.measure)] for e in asked]
        return answers

    monkeypatch.setattr(held_out, "answer_all", answer_all)
    run = SimpleNamespace(
        step=0,
        folder=tmp_path,
        policy=torch.nn.Module(),
        chat=SimpleNamespace(piece=str),
        metrics=Lines(),
        samples=Lines(),
        heldout={"heldout": examples, "pairs": other},
        optimizer=SimpleNamespace(skipped=1, lr=0.0),
    )
    log = Lifecycle(cfg, run, Ranks(0, 1, torch.device("cpu")), 0.0)
    P, G, C = 4, 2, 3
    tokens, length = torch.ones(P, G, C, dtype=torch.long), torch.full((P, G), C)
    sources = [SimpleNamespace(uid="one", tokens=np.zeros(5)) for _ in range(P)]
    batch = Batch.of_documents(examples, sources, tokens, length)
    batch.weight = torch.full((P * G, C), 1 / 24)
    batch.texts = [[text, terse]] * P
    batch.parts = {part: torch.zeros(P, G) for part in cfg.rewards}
    for phase in re.findall(
        r'@timed\("(\w+)"\)', "".join(map(text_of, [ROOT / "train.py", *(ROOT / "grpo").rglob("*.py")]))
    ):
        timed(phase)(int)()
    log.step(cfg.steps, batch, UpdateStats(), 0.0)
    batch.logp = torch.zeros(P * G, C)
    log.sft_step(1, batch, UpdateStats(), 0.0)
    return {key for row in run.metrics for key in row}


def test_every_metric_is_defined(monkeypatch, tmp_path):
    """In both directions: what a run writes is on the page, and what is on the page is written."""
    cells = re.findall(
        r"^\| `([^`]+)` \|",
        text_of(ROOT / "docs/metrics.md").partition("## The other files")[0],
        re.MULTILINE,
    )
    assert len(cells) > 50
    patterns = {
        cell: re.compile(re.sub(r"<\w+>", "[^/]+", re.escape(cell)).replace(r"\*", ".+") + "$")
        for cell in cells
    }
    found = written(monkeypatch, tmp_path)
    undefined = sorted(key for key in found if not any(pattern.match(key) for pattern in patterns.values()))
    assert not undefined, f"written, but not in docs/metrics.md: {undefined}"
    unwritten = [cell for cell, pattern in patterns.items() if not any(pattern.match(key) for key in found)]
    assert not unwritten, f"in docs/metrics.md, but never written: {unwritten}"


def test_numbers_in_the_text_are_those_of_the_code():
    million = sum(plan.parameters(ModelConfig.from_folder(ROOT / "models/tiny")).values()) / 1e6
    said = [number for path in DOCS for number in re.findall(r"([\d.]+) million parameters", text_of(path))]
    assert len(said) >= 2 and all(abs(float(number) - million) < 0.06 for number in said), (said, million)
    table = text_of(ROOT / "docs/04-rewards.md").partition("| part | value |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(REWARDS)
    tables = [docs_sync.source_of("tests/grpo/test_mutants.py", name) for name in ("OBJECTIVE", "VARIANTS")]
    mutants = sum(len(ast.parse(table).body[0].value.keys) for table in tables)
    assert 65 <= mutants <= 79, f"the docs say some seventy mutants, there are {mutants}"


def test_results_wait_only_where_results_belong():
    """`<!-- result: NAME -->` marks a number that is still to be measured; elsewhere a claim has to stand
    by itself."""
    for path in DOCS:
        assert name(path).startswith(("docs/results/", "README.md")) or "<!-- result:" not in text_of(path), (
            name(path)
        )
