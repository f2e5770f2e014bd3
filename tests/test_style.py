"""How the code is written: formatter, linter and types are clean, and the limits of CONTRIBUTING.md hold.

A rule is a function that yields what it finds in a file. The tests of tests/ are held to fewer rules than the
program.
"""

import ast
import json
import re
import shutil
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("grpo", "models", "data")
PROGRAM = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
PROGRAM += [ROOT / "train.py", ROOT / "evaluate.py"]
EVERYWHERE = [*PROGRAM, *(ROOT / "tests").rglob("*.py")]
COLUMNS = 110
LINES = 400
STATEMENTS = 40
PARAMETERS = 8
RIDDLES = ("so many", "as they are", "of which", "whoever", "nobody", "the living", "the dead", "is told")
MEANT_BEHIND_CODE = re.compile(r"# (\(|noqa: |fmt: |pyrefly: ignore)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def nodes(path: Path, *kinds: type[ast.AST]) -> Iterator:
    return (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds))


def tokens(path: Path, *kinds: int) -> Iterator[tokenize.TokenInfo]:
    with path.open("rb") as file:
        yield from (token for token in tokenize.tokenize(file.readline) if token.type in kinds)


# ---- rules


def columns(path: Path) -> Iterator[str]:
    """No line is wider than 110 columns."""
    yield from (f"line {n}" for n, line in enumerate(lines(path), 1) if len(line) > COLUMNS)


def arrows(path: Path) -> Iterator[str]:
    """`->` is the one arrow."""
    yield from (f"line {n}" for n, line in enumerate(lines(path), 1) if "\N{RIGHTWARDS ARROW}" in line)


def riddles(path: Path) -> Iterator[str]:
    """Plain English: these words are signs that a sentence wants rewriting."""
    if path == Path(__file__):
        return
    for token in tokens(path, tokenize.STRING, tokenize.COMMENT):
        text = " ".join(token.string.lower().split())
        yield from (
            f"line {token.start[0]}: {words!r}" for words in RIDDLES if re.search(rf"\b{words}\b", text)
        )


def file_length(path: Path) -> Iterator[str]:
    """A file has at most 400 lines."""
    if (count := len(lines(path))) > LINES:
        yield f"{count} lines"


def statements(path: Path) -> Iterator[str]:
    """A function has at most 40 statements, those of its inner functions included; its docstring is none."""
    for node in nodes(path, ast.FunctionDef):
        inside = sum(isinstance(each, ast.stmt) for each in ast.walk(node)) - 1
        if (count := inside - (ast.get_docstring(node) is not None)) > STATEMENTS:
            yield f"{node.name} has {count} statements"


def parameters(path: Path) -> Iterator[str]:
    """A function has at most 8 parameters, without self, cls, *these and **those (as ruff counts)."""
    for node in nodes(path, ast.FunctionDef):
        found = node.args
        every = [*found.posonlyargs, *found.args, *found.kwonlyargs]
        count = sum(each.arg not in ("self", "cls") for each in every)
        if count > PARAMETERS:
            yield f"{node.name} has {count} parameters"


def tuples(path: Path) -> Iterator[str]:
    """No assignment of unrelated values, such as `a, b = 1, []`; a swap such as `a, b = b, None` is none."""
    for node in nodes(path, ast.Assign):
        if isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple):
            kinds = {type(value) for value in node.value.elts}
            swap = {ast.unparse(value) for value in node.value.elts} & {
                ast.unparse(target) for target in node.targets[0].elts
            }
            mixed = len(kinds) > 1 and kinds != {ast.Constant, ast.BinOp}
            if mixed and not swap and kinds & {ast.Constant, ast.List, ast.Dict, ast.Set}:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def behind_code(path: Path) -> Iterator[str]:
    """A comment stands above its line; only a shape stands behind code."""
    for token in tokens(path, tokenize.COMMENT):
        if token.line[: token.start[1]].strip() and not MEANT_BEHIND_CODE.match(token.string):
            yield f"line {token.start[0]}: {token.string}"


def docstrings(path: Path) -> Iterator[str]:
    """Files, public classes, their public methods and public functions have docstrings. A method that a base
    class has needs none."""
    tree = ast.parse(path.read_text("utf-8"))
    if path.name != "__init__.py" and not ast.get_docstring(tree):
        yield "the file has none"
    classes = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.bases and not node.name.startswith("_")
    ]
    for node in [*tree.body, *(each for parent in classes for each in parent.body)]:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            yield f"{node.name} has none"


RULES = {
    columns: EVERYWHERE,
    arrows: EVERYWHERE,
    riddles: EVERYWHERE,
    file_length: PROGRAM,
    statements: PROGRAM,
    parameters: PROGRAM,
    tuples: PROGRAM,
    behind_code: PROGRAM,
    docstrings: PROGRAM,
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_file_breaks(rule):
    found = [f"{name(path)}: {each}" for path in RULES[rule] for each in rule(path)]
    assert not found, f"{rule.__doc__}\n" + "\n".join(found)


BROKEN = {
    columns: f"x = '{'x' * 105}'",
    arrows: '"""a \N{RIGHTWARDS ARROW} b"""',
    riddles: "# So\xa0many lines",
    file_length: "\n" * 401,
    statements: "def f():\n" + "    if x:\n        pass\n" * 21,
    parameters: "def f(self, a, b, c, d, e, f, *, g, h, i): ...",
    tuples: "a, b = 1, []",
    behind_code: "x = 1  # one",
    docstrings: '"""File."""\nclass A:\n    """A."""\n    def f(self): ...',
}
FINE = {
    columns: f"x = '{'x' * 104}'",
    arrows: '"""a -> b"""',
    riddles: "# Many lines",
    file_length: "\n" * 400,
    statements: 'def f():\n    """F."""\n' + "    if x:\n        pass\n" * 20,
    parameters: "def f(self, a, b, c, d, *e, f, g, h, i, **j): ...",
    tuples: "a, b = 1, 1 / 2\na, b = b, None\nc, d = f(a), f(b)",
    behind_code: "x = f()  # (B, C)",
    docstrings: '"""File."""\nclass A(B):\n    """A."""\n    def f(self): ...\ndef _g(): ...',
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_finds_what_it_must(rule, tmp_path):
    file = tmp_path / "file.py"
    for text, count in ((BROKEN[rule], 1), (FINE[rule], 0)):
        file.write_text(text + "\n", "utf-8")
        if rule is file_length:
            file.write_text(text, "utf-8")
        assert len(list(rule(file))) == count


# ---- tools


def tool(program: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run one of the tools of the extra `dev`; skip the test where it is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f'{program} is not installed: pip install -e ".[dev]"')
    return subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=250)


def test_the_loop_is_short():
    """What a student reads first: 40 lines with 12 names of its own, and no function inside."""
    loop = next(node for node in nodes(ROOT / "train.py", ast.FunctionDef) if node.name == "train_grpo")
    assert loop.end_lineno is not None and loop.end_lineno - loop.lineno < 40
    stored = {n.id for n in ast.walk(loop) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert len(stored) <= 12, stored
    assert not [
        node
        for node in ast.walk(loop)
        if node is not loop and isinstance(node, (ast.FunctionDef, ast.Lambda))
    ]


def test_the_formatter_changes_nothing():
    done = tool("ruff", "format", "--check", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_finds_nothing():
    done = tool("ruff", "check", "--output-format", "json", ".")
    found = json.loads(done.stdout)
    said = [f"{each['filename']}:{each['location']['row']}: {each['message']}" for each in found]
    assert not said, "\n".join(said)


def test_the_types_are_right():
    done = tool("pyrefly", "check", "--output-format", "json", "--min-severity", "error")
    found = json.loads(done.stdout)["errors"]
    said = [f"{each['path']}:{each['line']}: {each['concise_description']}" for each in found]
    assert not said, "\n".join(said)
