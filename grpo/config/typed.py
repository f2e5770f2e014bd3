"""From YAML to a tree of dataclasses: names, types and values are checked, and an error says where, and what
was probably meant.

Nothing here knows what is configured (that is `grpo/config/parse.py`). A configuration travels as a flat dict
of dotted keys, {"optim.lr": 1e-6, ...}, so that "defaults, then the recipe, then the command line" is three
`dict.update`.
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


class ConfigError(ValueError):
    """What is wrong with a configuration, where, and what to do about it."""


@dataclasses.dataclass(frozen=True)
class Typed:
    """A value as typed on the command line: YAML, unless a string is wanted; then it is taken to the
    letter."""

    text: str

    def __str__(self) -> str:
        return self.text


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {name!r} stands there twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, also for what only looks like a date or a number
    (2026-13-01), and for a thousand brackets."""
    try:
        return yaml.load(text, StrictLoader)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the name most like `name`, "" if none is like it. `lr` also finds
    `optim.lr`."""
    names = list(names)
    tails = [n for n in names if n.rpartition(".")[2] == name.rpartition(".")[2]]
    close = tails or difflib.get_close_matches(name, names, n=1, cutoff=0.55)
    # a misspelt last part: loss.kl_coeff, kl_ceof
    if not close:
        ends = {n.rpartition(".")[2]: n for n in names}
        close = [
            ends[e] for e in difflib.get_close_matches(name.rpartition(".")[2], list(ends), n=1, cutoff=0.55)
        ]
    return f" (did you mean {close[0]!r}?)" if close else ""


@functools.cache
def leaves(cls: type, prefix: str = "") -> dict[str, tuple[Any, Any, str]]:
    """{dotted key: (type, default, help)} of a dataclass tree, in order. A field that is a dataclass is a
    branch."""
    hints, helps, found = get_type_hints(cls), field_help(cls), {}
    for field in dataclasses.fields(cls):
        key, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            found |= leaves(kind, key + ".")
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[key] = (kind, default, helps.get(field.name, ""))
    return found


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """{field: help}, where the help is the string that follows the field in the source: text, code and
    docs in one place."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {
        a.target.id: " ".join(b.value.value.split())
        for a, b in itertools.pairwise(body)
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)
    }


def flatten(
    cls: type, tree: Mapping, where: str, prefix: str = "", root: type | None = None
) -> dict[str, Any]:
    """Nested mapping -> checked flat dict. `where` names the file in errors. Raises ConfigError."""
    root, flat = root or cls, {}
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"{where}: expected `key: value` lines under {prefix.rstrip('.') or 'the top'}, got "
            f"{_shown(tree)}"
        )
    hints = get_type_hints(cls)
    for key, value in tree.items():
        name = f"{prefix}{key}"
        # dotted keys are as good in a file as on the command line
        if "." in str(key):
            flat |= assign(root, name, value, where, flat)
        elif key not in hints:
            raise ConfigError(f"{where}: unknown key {name!r}{nearest(name, names(root))}")
        elif dataclasses.is_dataclass(hints[key]):
            flat |= flatten(hints[key], value, where, name + ".", root)
        else:
            flat[name] = convert(value, hints[key], f"{where}: {name}")
    return flat


def assign(cls: type, key: str, value: Any, where: str, current: Mapping[str, Any]) -> dict[str, Any]:
    """One dotted key -> checked {key: value}. `table.name` sets one entry of a dict field. Raises
    ConfigError."""
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
    raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, names(cls))}")


def names(cls: type) -> list[str]:
    """Every dotted key of the tree, branches (`optim`) included."""
    found = list(leaves(cls))
    return found + sorted({key[:i] for key in found for i, letter in enumerate(key) if letter == "."})


def build(cls: type, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """Flat dict -> dataclass tree; what is missing takes its default."""
    values, hints = {}, get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = build(hints[field.name], flat, key + ".")
        elif key in flat:
            values[field.name] = flat[key]
    return cls(**values)


def convert(value: Any, kind: Any, where: str) -> Any:
    """`value` as `kind` (bool, int, float, str, Literal, X | None, list[X], dict[str, X], dataclass).
    Raises ConfigError."""
    kind, optional = unwrapped(kind)
    if isinstance(value, Typed):
        value = _parsed(value.text, kind, where)
    if value is None and optional:
        return None
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal and value in inner and not isinstance(value, bool):
        return value
    if origin is list and isinstance(value, list):
        return [convert(item, inner[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(k): convert(item, inner[1], f"{where}.{k}") for k, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _record(kind, value, where)
    if kind is float and (number := _number(value)) is not None:
        return number
    # bool is an int to Python, not to a reader
    if kind in (str, bool, int) and type(value) is kind:
        return value
    hint = nearest(str(value), map(str, inner)) if origin is Literal else ""
    raise ConfigError(
        f"{where}: expected {described(kind)}{' or null' if optional else ''}, got {_shown(value)}{hint}"
    )


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
    return simple.get(kind) or {list: "a list", dict: "a mapping of names to numbers"}[get_origin(kind)]


def _record(cls: type, value: Mapping, where: str) -> Any:
    flat = flatten(cls, value, where)
    absent = [
        f.name for f in dataclasses.fields(cls) if f.name not in flat and f.default is dataclasses.MISSING
    ]
    if absent:
        raise ConfigError(f"{where}: {absent[0]!r} is missing; it must be {described(cls)}")
    return build(cls, flat)


def _parsed(text: str, kind: Any, where: str) -> Any:
    if kind is str and text not in ("null", "~", ""):
        return text
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {text!r} is not valid YAML ({str(error).splitlines()[0]})") from None


def _number(value: Any) -> float | None:
    """YAML reads `1e-6` (no dot) as a string; here it is the number that it looks like. None: not a finite
    number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
