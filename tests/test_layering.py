"""Imports go one way, between folders and between files: read from the source.

train.py, evaluate.py, bridge -> run -> monitor -> evaluation -> config -> storage -> the algorithm (the files
directly in grpo/, and rewards/) -> serving -> parallel -> models, data. models/ and data/ do not import
each other.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = {"grpo", "models", "data", "train", "evaluate", "tests"}
STDLIB = set(sys.stdlib_module_names)
FOLDERS = [
    *("parallel", "serving", ""),
    *("rewards", "storage", "config", "plan", "evaluation", "monitor", "run", "bridge"),
]
"""The folders of grpo/ from the lowest up; "" is grpo/ itself. A file imports from its own and lower ones."""

ENTRIES = {"export", "report", "words"}
"""Files directly in grpo/ that are programs (python -m grpo.NAME): they may import every folder."""

MOST_AT_THE_ROOT = 18
ALGORITHM = sorted(
    path.stem for path in (ROOT / "grpo").glob("*.py") if path.stem not in {*ENTRIES, "__init__"}
)


def files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import; write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def modules(path) -> set[Path]:
    """Files of the program that a file imports, without packages."""
    found = set()
    for dotted in imports(path):
        parts = dotted.split(".")
        for count in (len(parts), len(parts) - 1):
            file = ROOT.joinpath(*parts[:count]).with_suffix(".py") if count else None
            if file is not None and parts[0] in OWN and file.exists():
                found.add(file)
    return found


def folder_of(dotted: str) -> str | None:
    """The folder of grpo/ that a dotted name belongs to; None for a name outside grpo."""
    parts = dotted.split(".")
    if parts[0] != "grpo":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else ""


def cases(paths):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


# ---- folder against folder


def test_every_folder_has_its_place():
    found = {path.parent.name for path in (ROOT / "grpo").glob("*/__init__.py")}
    assert found == {*FOLDERS} - {""}


@pytest.mark.parametrize("path", cases(files("grpo")))
def test_a_file_imports_its_own_folder_and_lower_ones(path):
    place = path.relative_to(ROOT / "grpo").parts
    if len(place) == 1 and path.stem in ENTRIES:
        return
    own = FOLDERS.index(place[0] if len(place) > 1 else "")
    above = sorted(
        name
        for name in imports(path)
        if (folder := folder_of(name)) is not None and FOLDERS.index(folder) > own
    )
    assert not above, f"{path.relative_to(ROOT)} is in a lower folder than what it imports"


@pytest.mark.parametrize("path", cases(files("grpo")))
def test_grpo_does_not_import_programs(path):
    assert not tops(path) & {"train", "evaluate", "tests"}
    assert not {f"grpo.{name}" for name in ENTRIES} & {
        ".".join(name.split(".")[:2]) for name in imports(path)
    }


def test_no_files_import_each_other_in_a_circle():
    """Whatever a file imports, and what that imports, never leads back to the file."""
    graph = {path: modules(path) for path in files("grpo", "models", "data")}
    while free := {path for path, needs in graph.items() if not needs & graph.keys()}:
        for path in free:
            del graph[path]
    assert not graph, sorted(str(path.relative_to(ROOT)) for path in graph)


def test_the_root_of_grpo_is_what_a_student_reads():
    found = [path.name for path in (ROOT / "grpo").glob("*.py") if path.name != "__init__.py"]
    assert len(found) <= MOST_AT_THE_ROOT, sorted(found)


# ---- models and data


@pytest.mark.parametrize("path", cases(files("models")))
def test_models_import_torch_and_safetensors_only(path):
    assert tops(path) <= STDLIB | {"torch", "safetensors", "models"}


@pytest.mark.parametrize("path", cases(files("data")))
def test_data_knows_no_model_and_no_algorithm(path):
    assert not tops(path) & (OWN - {"data"})
    assert not any(name.startswith("torch.nn") for name in imports(path)), (
        "data/ makes tensors; it has no layers"
    )


# ---- files with a rule of their own


@pytest.mark.parametrize("name", ["objective", "sampling", "schedule"])
def test_the_mathematics_is_pure(name):
    """torch and the standard library; no model, no data, no configuration, nothing of its own package."""
    assert tops(ROOT / "grpo" / f"{name}.py") <= STDLIB | {"torch"}


def test_variants_import_the_objective_and_never_the_other_way_round():
    """The paper's GRPO is complete without its variants, which are as pure."""
    found = {name for name in imports(ROOT / "grpo" / "variants.py") if name.split(".")[0] not in STDLIB}
    assert all(name.startswith(("torch", "grpo.objective.")) for name in found)


@pytest.mark.parametrize("name", [*ALGORITHM, "rewards/rules"])
def test_configuration_stops_at_the_entry_points(name):
    path = ROOT / "grpo" / f"{name}.py"
    words = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not words & {"cfg", "config"}, "functions take values, never a configuration"


@pytest.mark.parametrize("path", cases([*files("grpo", "models", "data"), *sorted(ROOT.glob("*.py"))]))
def test_transformers_is_for_tests(path):
    """The model, the tokenizer's chat format and the loop are written by hand; `transformers` is what the
    tests compare them with."""
    assert "transformers" not in tops(path)


@pytest.mark.parametrize("number", range(1, 8))
def test_each_equation_stands_above_exactly_one_function(number):
    marks = [
        (path, i)
        for path in files("grpo")
        for i, line in enumerate(path.read_text().splitlines())
        if f"[Eq. {number}]" in line
    ]
    assert len(marks) == 1, f"[Eq. {number}] must mark one function of grpo/, found {marks}"
    path, line = marks[0]
    below = (text for text in path.read_text().splitlines()[line + 1 :] if not text.startswith("@"))
    assert next(below).startswith("def "), f"{path.name}:{line + 1} marks no function"
