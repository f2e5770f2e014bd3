"""Who imports whom, read from the source: train.py, evaluate.py -> grpo/ -> {models/, data/}, and the pure
files import torch only."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = {"grpo", "models", "data", "train", "evaluate", "tests"}
STDLIB = set(sys.stdlib_module_names)


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


def cases(paths):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


@pytest.mark.parametrize("path", cases(files("models")))
def test_models_import_torch_and_safetensors_only(path):
    assert tops(path) <= STDLIB | {"torch", "safetensors", "models"}


@pytest.mark.parametrize("path", cases(files("data")))
def test_data_knows_no_model_and_no_algorithm(path):
    assert not tops(path) & (OWN - {"data"})
    assert not any(name.startswith("torch.nn") for name in imports(path)), (
        "data/ makes tensors; it has no layers"
    )


@pytest.mark.parametrize("path", cases(files("grpo")))
def test_grpo_does_not_import_the_entry_points(path):
    assert not tops(path) & {"train", "evaluate", "tests"}


@pytest.mark.parametrize("name", ["objective", "sampling", "schedule"])
def test_the_mathematics_is_pure(name):
    """torch and the standard library; no model, no data, no configuration, nothing of its own package."""
    assert tops(ROOT / "grpo" / f"{name}.py") <= STDLIB | {"torch"}


def test_variants_import_the_objective_and_never_the_other_way_round():
    """The paper's GRPO is complete without its variants, which are as pure."""
    found = {name for name in imports(ROOT / "grpo" / "variants.py") if name.split(".")[0] not in STDLIB}
    assert all(name.startswith(("torch", "grpo.objective.")) for name in found)


@pytest.mark.parametrize(
    "name", ["objective", "variants", "sampling", "schedule", "logprobs", "rewards/rules", "rollout", "batch"]
)
def test_configuration_stops_at_the_entry_points(name):
    path = ROOT / "grpo" / f"{name}.py"
    assert not any(n.startswith(("grpo.config.parse", "grpo.config.settings")) for n in imports(path))
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
