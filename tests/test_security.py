"""What comes from outside is data: no pickle is read, no code of a model, a data set or a completion runs,
no path leaves its folder. The report: tests/grpo/monitor/test_report.py."""

import ast
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import evaluate
import train
from data.sources.table import SOURCES, open_source
from data.types import BadRow, Example
from grpo.rewards import rules, user_code
from grpo.storage import checkpoint
from models import weights

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    ROOT / "train.py",
    ROOT / "evaluate.py",
    *sorted(path for folder in ("grpo", "models", "data") for path in (ROOT / folder).rglob("*.py")),
]
QUICK = [
    "shapes",
    "steps=1",
    "prompts=2",
    "group=2",
    "cap=6",
    "rewards={length: 100}",
    "eval.items=0",
    "report.every=0",
    "limit=20",
    "device=cpu",
]


pytestmark = pytest.mark.usefixtures("in_process")


class Planted:
    """Unpickling it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """-> (the file that must not appear, a function that puts pickles and code of every usual name into a
    folder)."""
    mark = tmp_path / "it-ran"
    harm = pickle.dumps(Planted(mark))
    pickle.loads(harm)
    assert mark.exists(), "the trap does not work"
    mark.unlink()
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"

    def lay(folder):
        for name in (
            "pytorch_model.bin",
            "model.pt",
            "model.pth",
            "optimizer.pt",
            "optimizer.bin",
            "training_args.bin",
            "state.pkl",
            "scheduler.pt",
            ".metadata",
            "tokenizer.pkl",
        ):
            (folder / name).write_bytes(harm)
        for name in (
            "modeling_evil.py",
            "tokenization_evil.py",
            "processing_evil.py",
            "configuration_evil.py",
            "__init__.py",
            "mine.py",
            "sitecustomize.py",
        ):
            (folder / name).write_text(code)
        return folder

    return mark, lay


def add(path, **values):
    """Change a JSON file."""
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def test_pickles_and_code_in_a_model_folder_are_not_touched(base, trap, tmp_path, monkeypatch):
    """Trained, gone on with, evaluated: with auto_map in each config, and a template that would fail if it
    were rendered."""
    mark, lay = trap
    folder = lay(Path(shutil.copytree(base, tmp_path / "model")))
    for name, classes in (
        (
            "config.json",
            {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
        ),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.Evil", None]}),
        ("preprocessor_config.json", {"AutoProcessor": "processing_evil.Evil"}),
    ):
        add(folder / name, auto_map=classes, trust_remote_code=True)
    add(
        folder / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}{% include '/etc/passwd' %}",
    )
    (folder / "chat_template.jinja").write_text("{{ raise_exception('rendered') }}")
    monkeypatch.chdir(folder)
    out = tmp_path / "run"
    assert train.main([*QUICK, f"model={folder}", f"out={out}"]) == 0
    lay(checkpoint.complete(out)[-1])
    assert train.main([*QUICK, f"model={folder}", f"out={out}"]) == 0
    assert evaluate.main(["--model", str(out), "--items", "2", "--cap", "2", "--device", "cpu"]) == 0
    assert not mark.exists() and not {
        "modeling_evil",
        "tokenization_evil",
        "processing_evil",
        "configuration_evil",
    } & set(sys.modules)


def test_weights_that_are_only_there_as_a_pickle_are_refused(base, trap, tmp_path, capsys):
    mark, lay = trap
    folder = lay(Path(shutil.copytree(base, tmp_path / "model")))
    (folder / "model.safetensors").unlink()
    assert train.main([*QUICK, f"model={folder}", f"out={tmp_path / 'run'}"]) == 2
    assert "only safetensors weights are read" in capsys.readouterr().err and not mark.exists()
    # under a better name
    (folder / "model.safetensors").write_bytes((folder / "pytorch_model.bin").read_bytes())
    assert train.main([*QUICK, f"model={folder}", f"out={tmp_path / 'run'}"]) == 2
    assert "model.safetensors: damaged or truncated" in capsys.readouterr().err and not mark.exists()


def test_pickles_and_code_in_a_data_folder_are_not_touched(trap, tmp_path):
    mark, lay = trap
    folder = lay(tmp_path / "mine") if (tmp_path / "mine").mkdir() is None else None
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    (folder / "train.jsonl").write_text(
        '{"question": "Q?", "answer": "yes", "picture": "a.png"}\n{"question": "Q?", "answer": "no", '
        '"picture": "state.pkl"}\n'
    )
    (folder / "heldout.jsonl").write_text('{"question": "R?", "answer": "no"}\n')
    found, _ = open_source("jsonl", str(folder), limit=None, seed=0, items=1)
    assert found[0].answer == "yes" and len(found) == 2 and not mark.exists()
    with pytest.raises(ValueError, match="cannot be read"):
        from data.images import open_picture

        open_picture(found[1].pictures[0], name="x")
    with pytest.raises(ValueError):
        open_source("jsonl", str(folder / "state.pkl"), limit=None, seed=0, items=1)[0][0]
    assert not mark.exists()


FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "cloudpickle",
    "tarfile",
    "zipfile",
    "unpack_archive",
    "os.system",
    "popen",
    "subprocess",
    "Popen",
    "import_module",
    "sympify",
    "parse_expr",
    "AutoModel",
    "AutoTokenizer",
    "AutoProcessor",
    "trust_remote_code",
    "jinja2",
    "unsafe_load",
    "full_load",
    "UnsafeLoader",
    "FullLoader",
}


# a model's own chat template is a jinja program; this file renders it in jinja's sandbox
SANDBOXED = ROOT / "data" / "templates.py"


def forbidden(source):
    """Names of FORBIDDEN that a source uses: called, imported or as an attribute (re.compile, Module.eval and
    a field `system` are not those); torch.load without weights_only; an import whose name is no constant."""
    tree = ast.parse(source)
    constant = {
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "importlib.import_module"
        and [type(argument) for argument in node.args] == [ast.Constant]
    }
    for node in ast.walk(tree):
        used = []
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used = [node.id]
        elif (
            isinstance(node, ast.Attribute) and node.attr not in ("compile", "eval") and node not in constant
        ):
            used = [node.attr, ast.unparse(node)]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", "") or ""
            used = [part for alias in node.names for part in alias.name.split(".")] + module.split(".")
            used += [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.keyword):
            used = [node.arg or ""]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load")
        ):
            strict = {word.arg: ast.unparse(word.value) for word in node.keywords}
            safe = strict.get("weights_only") == "True" or strict.get("allow_pickle") == "False"
            used = [] if safe else ["an unpickling load"]
        yield from (name for name in used if name in FORBIDDEN or name.startswith("an "))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_runs_what_it_reads_is_used(path):
    allowed = ["jinja2"] * 2 if path == SANDBOXED else []
    assert list(forbidden(path.read_text("utf-8"))) == allowed


def test_chat_templates_run_in_a_sandbox():
    """tests/data/test_templates.py has the attacks."""
    named = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(SANDBOXED.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jinja2")
        for alias in node.names
    }
    assert named == {"jinja2.sandbox.ImmutableSandboxedEnvironment", "jinja2.TemplateError"}


def test_what_is_forbidden_is_found():
    for bad in (
        "eval(x)",
        "import pickle",
        "from shutil import unpack_archive",
        "os.system(x)",
        "from os import system",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "f(trust_remote_code=True)",
        "import importlib; importlib.import_module(x)",
        "from sympy.parsing import parse_expr",
        "__import__(x)",
    ):
        assert list(forbidden(bad)), bad
    for good in (
        "re.compile(x); model.eval(); torch.load(p, weights_only=True)",
        "self.system",
        "importlib.import_module('openai')",
    ):
        assert not list(forbidden(good)), good


# ---- paths


def rows_of(folder, *rows):
    (folder / "mine.jsonl").write_text(
        "".join(json.dumps({"question": "Q?", "answer": "yes"} | row) + "\n" for row in rows)
    )
    return SOURCES["jsonl"](folder / "mine.jsonl", "all", None, 0)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path):
    """A file, a folder, a chain of two; a link within the folder is fine, and so is a folder that is one."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        Image.new("RGB", (30, 30)).save(folder / "own.png")
    (inside / "file.png").symlink_to(outside / "own.png")
    (inside / "folder").symlink_to(outside)
    (inside / "chain.png").symlink_to(inside / "file.png")
    (inside / "fine.png").symlink_to("own.png")
    found = rows_of(
        inside,
        *({"picture": name} for name in ("file.png", "folder/own.png", "chain.png", "fine.png", "own.png")),
    )
    for number in range(3):
        with pytest.raises(
            BadRow,
            match=rf"mine.jsonl, line {number + 1}: picture: .* is a link that leaves the folder .*copy the "
            r"picture there",
        ):
            found[number]
    assert [found[number].pictures[0].name for number in (3, 4)] == ["fine.png", "own.png"]
    (tmp_path / "other").symlink_to(inside)
    assert rows_of(tmp_path / "other", {"picture": "own.png"})[0].pictures


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../../../../etc/passwd",
        "x/../../own.png",
        "file:///etc/passwd",
        "~/own.png",
        "http://example.com/x.png",
        "//host/share",
    ],
)
def test_paths_in_a_line_stay_in_the_folder(tmp_path, name):
    with pytest.raises(BadRow, match="leaves the folder of the file|no file"):
        rows_of(tmp_path, {"pictures": [name]})[0]


def test_paths_in_a_parquet_file_are_not_followed(tmp_path):
    """`datasets` would open the path of a picture without bytes."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (30, 30)).save(secret)
    table = pyarrow.table(
        {
            "image": [
                {"bytes": None, "path": path} for path in (str(secret), "secret.png", "../../etc/passwd")
            ],
            "problem": ["<image>How many?"] * 3,
            "solution": ["3"] * 3,
        }
    )
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "data" / "x.parquet")
    found = SOURCES["clevr"](tmp_path / "data" / "x.parquet", "all", None, 0)
    for number in range(3):
        with pytest.raises(BadRow, match="holds no picture bytes"):
            found[number]


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/tmp/model.safetensors",
        "a/../../x.safetensors",
        "pytorch_model.bin",
        7,
        "..",
        "",
    ],
)
def test_shards_are_files_of_the_folder(base, tmp_path, name):
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    shutil.copy(base / "model.safetensors", tmp_path / "model.safetensors")
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=rf"{re.escape(repr(name))} is no safetensors file of this folder"):
        weights.load(folder)


# ---- what a completion says

CODE = [
    "__import__('pathlib').Path('{mark}').touch()",
    "open('{mark}', 'w')",
    "().__class__.__base__.__subclasses__()",
    "1+__import__('os').system('touch {mark}')",
    "\\boxed{{__import__('os').system('touch {mark}')}}",
    "$open('{mark}','w')$",
    "\\text{{open('{mark}','w')}}",
    "$$\\operatorname{{open}}('{mark}','w')$$",
    "\\input{{{mark}}}",
    "\\write18{{touch {mark}}}",
    "$(touch {mark})",
    "`touch {mark}`",
    "'; touch {mark}; '",
    "{{{{ cycler.__init__.__globals__.os.popen('touch {mark}') }}}}",
    "1 if open('{mark}','w') else 2",
    "(lambda: open('{mark}','w'))()",
    "3*(open('{mark}','w'))",
    "cos(open('{mark}', 'w'))",
    "final answer is (open('{mark}','w')). I hope",
]


@pytest.mark.parametrize("name", rules.REWARDS)
def test_code_in_a_completion_is_text(tmp_path, name):
    if name.endswith("math_verify"):
        pytest.importorskip("math_verify")
    mark = tmp_path / "it-ran"
    examples = [
        Example("c/1", "How many?", (), "3", extra={"kind": "number"}),
        Example("c/2", "What?", (), CODE[1].format(mark=mark)),
    ]
    for said in CODE:
        said = said.format(mark=mark)
        for text, example in (
            (said, examples[0]),
            (f"<think>{said}</think> <answer>{said}</answer>", examples[1]),
        ):
            assert rules.rule(name, 100)(text, example, 20) >= -1
    assert not mark.exists()


def test_what_math_verify_evaluates_is_arithmetic(monkeypatch):
    """Its search for an expression ends in sympy's parse_expr, which is Python's eval: what may come there
    are digits and signs, no names."""
    parser = pytest.importorskip("math_verify.parser")
    from grpo.rewards import math_verify

    seen, real = [], parser.parse_expr
    monkeypatch.setattr(parser, "parse_expr", lambda text, **how: seen.append(text) or real(text, **how))
    parser.parse_expr_cached.cache_clear()
    for said in [*CODE, "1+2", "(3)(4)", "2*open", "12+(7)x", "1+1.real", "3+0x10", "1+e", "5/2 = 2.5"]:
        for text in (said, f"{said}.", f" {said} ", f"the final answer is {said}. I hope"):
            math_verify.paper(text, Example("c/1", "How many?", (), "3"), None)
    assert "1+2" in [text.strip() for text in seen] and not [
        text for text in seen if re.search(r"[^\d.\s+*×/^()÷-]", text)
    ]


def test_a_reward_is_code_only_where_the_user_says_so():
    """Names in a recipe are looked up in a table; a file is loaded only as FILE.py:FUNCTION, which is the
    user's own."""
    for name in ("os.system", "eval", "__import__('os')", "../x", "x.py", "REWARDS.__class__"):
        assert not user_code.names_a_file(name)
        with pytest.raises(ValueError, match="reward"):
            rules.rule(name)
