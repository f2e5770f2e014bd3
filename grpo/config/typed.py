"""From YAML to a tree of dataclasses. Names and types are checked; an error says where, and suggests a name.

No setting is named here (see `grpo/config/settings.py`). Settings travel as a flat dict of dotted keys,
{"optim.lr": 1e-6, ...}, so that recipes and the command line are merged as dicts.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import textwrap
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from grpo.config.renamed import replacement

Flat = dict[str, Any]


class ConfigError(ValueError):
    """A wrong setting. The message says where it is and what to do."""


@dataclasses.dataclass(frozen=True)
class Typed:
    """A value from the command line. It is parsed as YAML, unless the setting has type str."""

    text: str

    def __str__(self) -> str:
        return self.text


class StrictLoader(yaml.SafeLoader):
    """YAML that refuses a repeated key, where SafeLoader silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {name!r} is given twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, also for an impossible date and too deep nesting."""
    try:
        return yaml.load(text, StrictLoader)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the most similar name, else "". `lr` also finds `optim.lr`."""
    ends = {n.rpartition(".")[2]: n for n in reversed(list(names))}
    end = name.rpartition(".")[2]
    close = [ends[end]] if end in ends else difflib.get_close_matches(name, ends.values(), n=1, cutoff=0.55)
    # a misspelt last part: loss.kl_coeff, kl_ceof
    close = close or [ends[e] for e in difflib.get_close_matches(end, ends, n=1, cutoff=0.55)]
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(cls: type, key: str, where: str) -> ConfigError:
    """The error for a key that is no setting, with the right name if there is one."""
    return ConfigError(f"{where}: unknown key {key!r}{replacement(key) or nearest(key, names(cls))}")


@functools.cache
def leaves(cls: type, prefix: str = "") -> dict[str, tuple[Any, Any, str]]:
    """{dotted key: (type, default, help)} of a dataclass tree, in order. A dataclass in it is a branch."""
    hints = get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        key, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            found |= leaves(kind, key + ".")
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        found[key] = (kind, default, field_help(cls).get(field.name, ""))
    return found


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """{field: help}. The help is the string below the field in the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


def flatten(cls: type, tree: Mapping, where: str, prefix: str = "", root: type | None = None) -> Flat:
    """Nested mapping -> checked flat dict.  where: the file, for errors.  root: the whole tree's class, if
    `cls` is a branch of it.  Raises ConfigError."""
    root = root or cls
    flat: Flat = {}
    if not isinstance(tree, Mapping):
        under = prefix.rstrip(".") or "the top"
        raise ConfigError(f"{where}: expected `key: value` lines under {under}, got {_shown(tree)}")
    hints = get_type_hints(cls)
    for key, value in tree.items():
        name = f"{prefix}{key}"
        # a file may also hold dotted keys
        if "." in str(key):
            flat |= assign(root, name, value, where, flat)
        elif key not in hints:
            raise unknown(root, name, where)
        elif dataclasses.is_dataclass(hints[key]):
            flat |= flatten(hints[key], value, where, name + ".", root)
        else:
            flat[name] = convert(value, hints[key], f"{where}: {name}")
    return flat


def assign(cls: type, key: str, value: Any, where: str, current: Mapping[str, Any]) -> Flat:
    """One dotted key -> checked {key: value}. `rewards.format` sets one entry of the dict `rewards`, over
    the entries in `current`. Raises ConfigError."""
    known = leaves(cls)
    if key in known:
        return {key: convert(value, known[key][0], f"{where}: {key}")}
    table, _, entry = key.rpartition(".")
    if table in known and get_origin(known[table][0]) is dict:
        before = current.get(table, known[table][1])
        return {table: before | {entry: convert(value, get_args(known[table][0])[1], f"{where}: {key}")}}
    if key in names(cls):
        inner = [n for n in known if n.startswith(key + ".")]
        raise ConfigError(f"{where}: {key!r} is a group of settings; set one of {', '.join(inner)}")
    raise unknown(cls, key, where)


def names(cls: type) -> list[str]:
    """All dotted keys of the tree, with the branches (`optim`)."""
    found = list(leaves(cls))
    return found + sorted({key[:i] for key in found for i, letter in enumerate(key) if letter == "."})


def build(cls: type, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """Flat dict -> dataclass tree. A missing key takes its default."""
    values = {}
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            values[name] = build(kind, flat, f"{prefix}{name}.")
        elif prefix + name in flat:
            values[name] = flat[prefix + name]
    return cls(**values)


def convert(value: Any, kind: Any, where: str) -> Any:
    """`value` checked as `kind` (bool, int, float, str, Literal, X | None, list[X], dict[str, X], dataclass).
    Raises ConfigError."""
    kind, optional = unwrapped(kind)
    if isinstance(value, Typed):
        if kind is str and value.text not in ("null", "~", ""):
            return value.text
        try:
            value = read_yaml(value.text)
        except yaml.YAMLError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{where}: {value.text!r} is not valid YAML ({reason})") from None
    if value is None and optional:
        return None
    origin = get_origin(kind)
    inner = get_args(kind)
    if origin is Literal and value in inner and not isinstance(value, bool):
        return value
    if origin is list and isinstance(value, list):
        return [convert(item, inner[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(k): convert(item, inner[1], f"{where}.{k}") for k, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        flat = flatten(kind, value, where)
        for field in dataclasses.fields(kind):
            if field.name not in flat and field.default is dataclasses.MISSING:
                raise ConfigError(f"{where}: {field.name!r} is missing; it must be {described(kind)}")
        return build(kind, flat)
    if kind is float and (number := _number(value)) is not None:
        return number
    # exact type: Python's bool is an int
    if kind in (str, bool, int) and type(value) is kind:
        return value
    hint = nearest(str(value), map(str, inner)) if origin is Literal else ""
    wanted = described(kind) + (" or null" if optional else "")
    raise ConfigError(f"{where}: expected {wanted}, got {_shown(value)}{hint}")


def unwrapped(kind: Any) -> tuple[Any, bool]:
    """X | None -> (X, True); X -> (X, False)."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    return next(k for k in get_args(kind) if k is not type(None)), True


def described(kind: Any) -> str:
    """A type in words: `a whole number`, `one of clip, gspo, cispo`."""
    kind = unwrapped(kind)[0]
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if dataclasses.is_dataclass(kind):
        return "a mapping with " + ", ".join(f.name for f in dataclasses.fields(kind))
    simple = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if get_origin(kind) is dict:
        return f"a mapping of names to {'names' if get_args(kind)[1] is str else 'numbers'}"
    return simple.get(kind) or "a list"


def _number(value: Any) -> float | None:
    """A finite number, or None. YAML parses `1e-6` (no dot) as a string; here it is a number."""
    try:
        number = float(value) if type(value) in (int, float, str) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
