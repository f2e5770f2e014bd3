"""A run's settings from YAML recipes and `key=value` arguments, and the text of --help and --list.

    defaults  <  base recipe  <  recipe  <  command line

The settings themselves, with their defaults and help, are in `grpo/config/settings.py`. Every mistake is a
ConfigError that says where it is (the file or the argument) and names the nearest right key, recipe or value.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo.config.settings import (
    HEADINGS,
    Config,
    Evaluate,
    Loss,
    Optim,
    Report,
    Save,
    Stage,
    differences,
    value_of,
)
from grpo.config.typed import (
    ConfigError,
    Typed,
    assign,
    build,
    convert,
    described,
    flatten,
    leaves,
    nearest,
    read_yaml,
)
from grpo.storage.atomic import write_whole

__all__ = [
    "Config",
    "ConfigError",
    "Evaluate",
    "Flags",
    "Loss",
    "Optim",
    "Report",
    "Save",
    "Stage",
    "check_same_run",
    "differences",
    "help_text",
    "list_text",
    "load",
    "markdown_table",
    "parse",
    "recipes",
    "save",
    "value_of",
]

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Flags:
    """What to do instead of training, or about it."""

    help: bool = False
    list: bool = False
    # of how many ranks
    plan: int = 0
    dry_run: bool = False


def parse(argv: Iterable[str]) -> tuple[Config, Flags]:
    """[RECIPE or FILE.yaml] [key=value ...] [--list] [--plan[=RANKS]] [--dry-run] [--help]. Raises
    ConfigError.

    With --help or --list nothing else is looked at: someone who asks for help must get it.
    """
    argv, known = (
        list(argv),
        {"--" + f.name.replace("_", "-"): f.name for f in dataclasses.fields(Flags)} | {"-h": "help"},
    )
    flags = Flags(
        **{known[a]: True for a in argv if a in known and a != "--plan"}, plan=int("--plan" in argv)
    )
    if flags.help or flags.list:
        return Config(), flags
    recipe, overrides = None, []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if argument in known:
            continue
        if key == "--plan":
            if not value.isdecimal() or not int(value):
                raise ConfigError(f"argument {argument!r}: give the number of ranks, as in --plan=8")
            flags = dataclasses.replace(flags, plan=int(value))
            continue
        if key.startswith("-"):
            setting = key.lstrip("-").replace("-", "_")
            if setting in leaves(Config):
                raise ConfigError(
                    f"argument {argument!r}: settings are written without dashes: "
                    f"{setting}={value or 'VALUE'}"
                )
            raise ConfigError(
                f"argument {argument!r}: unknown option{nearest(key, known)}; options are {', '.join(known)}"
            )
        if equals:
            overrides.append(argument)
        elif recipe is not None:
            raise ConfigError(
                f"argument {argument!r}: the recipe is {recipe!r} already; settings are written key=value"
            )
        else:
            recipe = argument
    return load(recipe or "shapes", overrides), flags


def load(recipe: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A recipe's name or a YAML file, and `key=value` strings that go over it -> Config with `out` filled
    in. Raises ConfigError."""
    path = _recipe_path(recipe)
    flat = {"recipe": path.stem} | _layers(path)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"argument {text!r}: settings are written key=value")
        flat |= assign(Config, key.strip(), Typed(value.strip()), f"argument {text!r}", flat)
    try:
        config = build(Config, flat)
    except ConfigError as error:
        raise ConfigError(
            f"{path.name}{' with ' + ' '.join(overrides) if overrides else ''}: {error}"
        ) from None
    return dataclasses.replace(config, out=str(config.folder))


def _recipe_path(recipe: str | Path, beside: Path | None = None) -> Path:
    """The YAML file of a recipe: a built-in name, or a path (relative to the folder `beside`, if given).
    Raises ConfigError."""
    name = str(recipe)
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = (beside / name) if beside else Path(name)
        if path.is_file():
            return path
        raise ConfigError(f"recipe {name!r}: there is no such file")
    if name not in (known := recipes()):
        raise ConfigError(
            f"unknown recipe {name!r}{nearest(name, known)}; there are {', '.join(known)} (or give the "
            "path of a .yaml file)"
        )
    return RECIPES / f"{name}.yaml"


def recipes() -> dict[str, str]:
    """{name: its `about:` line} of the built-in recipes."""
    return {path.stem: str(_read(path).get("about", "")) for path in sorted(RECIPES.glob("*.yaml"))}


def _layers(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe over its base, over the base's base ..., as one checked flat dict."""
    if path.resolve() in above:
        raise ConfigError(
            f"{path.name}: `base:` goes round in a circle: {' -> '.join(p.stem for p in (*above, path))}"
        )
    tree = _read(path)
    tree.pop("about", None)
    base = tree.pop("base", None)
    flat = {}
    if base is not None:
        base = convert(base, str, f"{path.name}: base")
        flat = _layers(_recipe_path(base, beside=path.parent), (*above, path.resolve()))
    return flat | flatten(Config, tree, path.name)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, (dict, type(None))):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(tree).__name__}")
    return tree or {}


def save(config: Config, folder: str | Path) -> Path:
    """Write the resolved config as folder/config.yaml, which `load` reads back to an equal Config."""
    path = Path(folder) / "config.yaml"
    # of half a file a run could not go on
    write_whole(path, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    return path


def check_same_run(config: Config, folder: str | Path) -> None:
    """A run that was stopped goes on with the same settings. Raises ConfigError if `folder` holds a run of
    other ones.

    What is kept and shown may differ, and the place; what is computed may not.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        return
    changed = [
        d
        for d in differences(load(path), config)
        if not d.startswith(
            (
                "out:",
                "save.",
                "report.",
                "recompute:",
                "device:",
                "timeout:",
                "max_rows:",
                "cuda_graphs:",
                "loss.reference_on:",
            )
        )
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings "
            f"({'; '.join(changed[:4])}{' ...' if len(changed) > 4 else ''}): "
            "name another folder with out=DIR, or remove this one"
        )


IDEA = """\
Glimpse teaches a vision-language model to reason about what it sees, by reinforcement learning alone (GRPO):
let it answer each question several times, score the answers by rule, and make what did better than its group
more likely.

usage:  torchrun train.py [RECIPE | FILE.yaml] [key=value ...] [--plan[=RANKS]] [--dry-run] [--list] [--help]

  torchrun train.py                                 learn the built-in world; minutes on two CPU cores
  torchrun train.py shapes seed=1 out=runs/second   the same with another seed, in another folder
  torchrun train.py shapes loss.kl_coef=0 rewards.format=0.5
  torchrun train.py my.yaml                         your recipe; `base: shapes` in it inherits all the rest
  python   train.py shapes --plan                   what it will need: bytes, tokens, steps. Loads nothing
  python   train.py shapes --dry-run                everything up to the first step, then stop
  python   train.py --list                          the recipes

The same command continues a run that was stopped. Everything it writes is in its folder (out=DIR):
config.yaml, metrics.jsonl, samples.jsonl, summary.json, curves.png, report.html (open it!) and checkpoints/,
which load in transformers as they are.
"""


def help_text(width: int = 110) -> str:
    """What --help prints: the idea, examples, and every setting with its default, grouped."""
    lines = [IDEA, "Settings (key=value; null, true and lists are written as in YAML), with their defaults:"]
    for key, (kind, default, text) in leaves(Config).items():
        if (heading := HEADINGS.get(key.partition(".")[0])) and f"\n{heading}" not in lines:
            lines.append(f"\n{heading}")
        choices = (
            f" [{described(kind).removeprefix('one of ')}]" if described(kind).startswith("one of ") else ""
        )
        label = f"  {key}={_plain(default)}"
        body = textwrap.wrap(text + choices, width - 30, break_on_hyphens=False)
        lines.append(f"{label:<30}{body[0]}" if len(label) < 29 else f"{label}\n{'':30}{body[0]}")
        lines += [f"{'':30}{line}" for line in body[1:]]
    return "\n".join(lines) + "\n"


def list_text() -> str:
    """What --list prints: one line a recipe."""
    known = recipes()
    wide = max(map(len, known), default=0)
    return "\n".join(f"  {name:<{wide}}  {about}" for name, about in known.items()) + "\n"


def markdown_table(prefix: str = "") -> str:
    """The table of the docs: every setting whose key starts with `prefix`, its default, its meaning."""
    rows = [
        f"| `{key}` | `{_plain(default)}` | {text} |"
        for key, (_, default, text) in leaves(Config).items()
        if key.startswith(prefix)
    ]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
