"""A run's settings from YAML recipes and `key=value` arguments, and the text of --help and --list.

    defaults  <  what goes with the model (by_model)  <  base recipe  <  recipe  <  command line

The settings themselves are in `grpo/config/settings.py`, and the beginning of --help is in `help.txt`. Each
mistake raises a ConfigError that names the file or the argument, and the nearest right key, recipe or value.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo.config import by_model, typed
from grpo.config.renamed import replacement
from grpo.config.settings import HEADINGS, Config, differences
from grpo.config.typed import ConfigError, Typed, assign, convert, flatten, leaves, nearest
from grpo.storage.atomic import write_whole

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
HELP = Path(__file__).with_name("help.txt")
# of a run folder, in its config.yaml; one higher whenever an older folder can't be continued
FORMAT = 2
# settings and groups that may change when a run is continued: they do not change a gradient
FREE = (
    "name.",
    "out.",
    "recompute.",
    "device.",
    "timeout.",
    "max_rows.",
    "cuda_graphs.",
    "loss.reference_on.",
    "optim.states_on.",
)
FREE += ("loss.micro_tokens.", "loss.logits_mib.", "eval.", "save.", "report.", "log.")
# of these a change is noted: what is evaluated before and after it does not compare
NOTED = ("eval.items", "eval.cap", "eval.task", "eval.data")


@dataclass(frozen=True)
class Flags:
    """What to do instead of training."""

    help: bool = False
    list: bool = False
    # number of ranks to plan for
    plan: int = 0
    dry_run: bool = False
    # settings whose change is accepted when a run is continued
    change: tuple[str, ...] = ()
    # a line for each setting that has two values on the command line
    repeated: tuple[str, ...] = ()


OPTIONS = {"--help": "help", "-h": "help", "--list": "list", "--plan": "plan", "--dry-run": "dry_run"}


def parse_args(argv: Iterable[str]) -> tuple[Config, Flags]:
    """[RECIPE or FILE.yaml] [key=value ...] [change=KEY,...] [--list] [--plan[=RANKS]] [--dry-run] [--help].
    With --help or --list the other arguments are not read, so a wrong one does not hide the help. Raises
    ConfigError."""
    argv = list(argv)
    given: dict[str, Any] = {OPTIONS[a]: True for a in argv if a in OPTIONS}
    given["plan"] = int("--plan" in argv)
    if given.get("help") or given.get("list"):
        return Config(), Flags(**given)
    recipe = None
    overrides: list[str] = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if argument in OPTIONS:
            continue
        if key == "--plan":
            if not value.isdecimal() or not int(value):
                raise ConfigError(f"argument {argument!r}: give the number of ranks, as in --plan=8")
            given["plan"] = int(value)
        elif key.startswith("-"):
            setting = key.lstrip("-").replace("-", "_")
            wrong = f"unknown option{nearest(key, OPTIONS)}; options are {', '.join(OPTIONS)}"
            wrong = replacement(setting).removeprefix("; ") or wrong
            if setting in leaves(Config):
                wrong = f"settings are written without dashes: {setting}={value or 'VALUE'}"
            raise ConfigError(f"argument {argument!r}: {wrong}")
        elif key == "change":
            given["change"] = (*given.get("change", ()), *_accepted(value, f"argument {argument!r}"))
        elif equals:
            overrides.append(argument)
        elif recipe is not None:
            wrong = f"the recipe is already {recipe!r}; settings are written key=value"
            raise ConfigError(f"argument {argument!r}: {wrong}")
        else:
            recipe = argument
    return load(recipe or "shapes", overrides), Flags(**given, repeated=_repeated(overrides))


def _accepted(keys: str, where: str) -> list[str]:
    """The settings of change=KEY,KEY. Raises ConfigError for an unknown one."""
    found = [key.strip() for key in keys.split(",") if key.strip()]
    for key in found:
        if key not in typed.names(Config):
            raise typed.unknown(Config, key, where)
    return found


def _repeated(overrides: list[str]) -> tuple[str, ...]:
    """A line for each setting that the command line gives two values. The last one counts."""
    values: dict[str, list[str]] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        values.setdefault(key.strip(), []).append(value.strip())
    said = "{}: given {} times, as {}; the last one counts"
    twice = {key: each for key, each in values.items() if len({*each}) > 1}
    return tuple(said.format(key, len(each), " and ".join(each)) for key, each in twice.items())


def load(recipe: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A recipe (a name or a YAML file) with `key=value` over it. Fills in `name` and `out`. Raises
    ConfigError, with `by_model` also if there is no such model."""
    path = recipe_path(recipe)
    named = {file: name for name, file in _files().items()}.get(path.resolve(), path.stem)
    flat = {"recipe": named} | _layers(path)
    given: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"argument {text!r}: settings are written key=value")
        given |= assign(Config, key.strip(), Typed(value.strip()), f"argument {text!r}", flat | given)
    try:
        _refuse_two_lengths(given)
        flat = _over(flat, given)
        config = typed.build(Config, by_model.filled(flat) if flat.get("by_model") else flat)
    except ValueError as error:
        changed = " with " + " ".join(overrides) if overrides else ""
        raise ConfigError(f"{path.name}{changed}: {error}") from None
    return dataclasses.replace(config, name=config.name or config.folder.name, out=str(config.folder))


def recipe_path(recipe: str | Path, beside: Path | None = None, folder: Path = RECIPES) -> Path:
    """The YAML file of a recipe, by its name in `folder`, or by path (relative to the folder `beside`).
    Raises ConfigError."""
    name = str(recipe)
    if name in (known := _files(folder)):
        return known[name]
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = (beside or Path()) / name
        if path.is_file():
            return path
        raise ConfigError(f"recipe {name!r}: there is no such file{nearest(name, known)}")
    choice = f"there are {', '.join(known)} (or give the path of a .yaml file)"
    raise ConfigError(f"unknown recipe {name!r}{nearest(name, known)}; {choice}")


def recipes(folder: Path = RECIPES) -> dict[str, str]:
    """{name: its `about:` line} of the recipes in a folder, and of those in its folder mini."""
    return {name: str(read_recipe(path).get("about", "")) for name, path in _files(folder).items()}


def _files(folder: Path = RECIPES) -> dict[str, Path]:
    """{name: file} of the recipes; mini/rl is the name of one in the folder mini."""
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("mini/*.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def _layers(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe over its base, and so on, as one checked flat dict. above: the recipes that led here."""
    if path.resolve() in above:
        names = " -> ".join(p.stem for p in (*above, path))
        raise ConfigError(f"{path.name}: `base:` goes round in a circle: {names}")
    tree = read_recipe(path)
    # config.yaml of a run has both
    if "format" not in tree:
        _refuse_two_lengths(tree, f"{path.name}: ")
    tree = {key: value for key, value in tree.items() if key not in ("about", "format")}
    flat = {}
    if (base := tree.pop("base", None)) is not None:
        base = convert(base, str, f"{path.name}: base")
        flat = _layers(recipe_path(base, beside=path.parent), (*above, path.resolve()))
    return _over(flat, flatten(Config, tree, path.name))


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` merged over `below`. A revision belongs to its model, so another model does not inherit it; and
    `steps` and `epochs` replace each other."""
    cleared: dict[str, Any] = {}
    if "model" in above and above["model"] != below.get("model"):
        cleared["revision"] = None
    if "steps" in above:
        cleared["epochs"] = None
    elif above.get("epochs") is not None:
        # until the questions are counted
        cleared["steps"] = 0
    return below | cleared | above


def _refuse_two_lengths(given: Mapping[str, Any], where: str = "") -> None:
    """Raise ConfigError for a run whose length is given twice."""
    if given.get("steps") is not None and given.get("epochs") is not None:
        raise ConfigError(f"{where}steps and epochs both say how long the run is; give one of them")


def read_recipe(path: Path) -> dict[str, Any]:
    """The tree of a YAML file. Raises ConfigError."""
    try:
        tree = typed.read_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, (dict, type(None))):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(tree).__name__}")
    return tree or {}


def save(config: Config, folder: str | Path) -> Path:
    """Write config.yaml, whole or not at all. `load` and `load_run` read an equal Config. -> its path."""
    path = Path(folder) / "config.yaml"
    tree = {"format": FORMAT} | config.to_dict()
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if chosen := "".join(f"# {line}\n" for line in by_model.explained(config)):
        text = f"# chosen for {config.model}, because nothing else said them:\n{chosen}{text}"
    write_whole(path, text)
    return path


def load_run(folder: str | Path) -> Config:
    """The settings of a run folder. Raises ConfigError for a run of another version."""
    path = Path(folder) / "config.yaml"
    if (found := read_recipe(path).get("format", 1)) != FORMAT:
        wrong = f"holds a run of another version of Glimpse (format {found}, here {FORMAT})"
        ways = (
            "name another folder with out=DIR, or use that version; its checkpoints still load with model=DIR"
        )
        raise ConfigError(f"{folder} {wrong}: {ways}")
    return load(path)


def check_same_run(config: Config, folder: str | Path, accepted: Iterable[str] = ()) -> list[str]:
    """Compare the settings with those of the run in `folder`. -> a line for each change that is `accepted` or
    NOTED, and for a larger `steps`. Settings that cannot change a gradient differ freely (FREE). Raises
    ConfigError for other changes, and for a run of another version."""
    if not (Path(folder) / "config.yaml").is_file():
        return []
    before = load_run(folder)
    changed = {text.partition(":")[0]: text for text in differences(before, config)}
    kept = [key for key in changed if key in NOTED or not f"{key}.".startswith(FREE)]
    changed = {key: changed[key] for key in kept}
    named = {*accepted, *NOTED}
    if config.steps > before.steps:
        named.add("steps")
        if config.optim.decay == "constant":
            del changed["steps"]
    refused = [key for key in changed if not named & {key, key.rpartition(".")[0]}]
    if refused:
        wrong = "; ".join(changed[key] for key in refused[:4]) + (" ..." if len(refused) > 4 else "")
        accept = f"accept it with change={','.join([*accepted, *refused])}"
        ways = f"name another folder with out=DIR, remove this one, or {accept}"
        raise ConfigError(f"{folder} holds a run with other settings ({wrong}): {ways}")
    if "steps" in changed and config.steps > before.steps:
        decay = (
            f"optim.decay={config.optim.decay} ends there now, so the learning rate is larger from here on"
        )
        changed["steps"] += f" ({decay})"
    return list(changed.values())


def help_text() -> str:
    """The text of --help: the idea, examples, and every setting with its default, below its heading."""
    lines = [HELP.read_text("utf-8").rstrip("\n")]
    heading = ""
    for key in leaves(Config):
        if (new := HEADINGS.get(key.partition(".")[0])) and new != heading:
            heading = new
            lines.append(f"\n{heading}")
        lines += setting_help(Config, key)
    return "\n".join(lines) + "\n"


def setting_help(cls: type, key: str, width: int = 110) -> list[str]:
    """The lines of --help about one setting of a tree."""
    kind, default, text = leaves(cls)[key]
    words = typed.described(kind)
    choices = f" [{words.removeprefix('one of ')}]" if words.startswith("one of ") else ""
    label = f"  {key}={_plain(default)}"
    body = textwrap.wrap(text + choices, width - 30, break_on_hyphens=False)
    first = [f"{label:<30}{body[0]}"] if len(label) < 29 else [label, f"{'':30}{body[0]}"]
    return [*first, *(f"{'':30}{line}" for line in body[1:])]


def list_text() -> str:
    """The text of --list: one line per recipe."""
    known = recipes()
    wide = max(map(len, known), default=0)
    return "\n".join(f"  {name:<{wide}}  {about}" for name, about in known.items()) + "\n"


def markdown_table(prefix: str = "", cls: type = Config) -> str:
    """The table of the docs: setting, default and help of each key that starts with `prefix`."""
    table = ["| setting | default | meaning |", "|---|---|---|"]
    for key, (_, default, text) in leaves(cls).items():
        if key.startswith(prefix):
            table.append(f"| `{key}` | `{_plain(default)}` | {text} |")
    return "\n".join(table)


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
