"""What a run is made of beside its settings: questions, pictures, rewards and what they import, base weights.

`inputs.json` in the run folder holds the size, the time and a checksum of each file. When a run is continued,
a file of the same size and time counts as the same. Of the others the contents are compared, so a copied
or touched file is the same file. It also holds versions and threads, whose changes are only noted.
"""

import ast
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from os.path import commonpath, relpath
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from data.sources.jsonl import JsonlShard
from data.sources.table import LAYOUTS
from data.templates import is_file
from data.types import BadRow
from grpo.config import Config, ConfigError
from grpo.rewards.user_code import names_a_file
from grpo.storage.atomic import write_whole
from grpo.storage.checkpoint import SIDE_FILES, checksum
from grpo.storage.model_folder import base_folder

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "pillow", "numpy")
MODEL_FILES = (*SIDE_FILES, "config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json")
# of pictures: beyond this many bytes they are known by size and time alone. Opening one costs as much as
# reading OPENING bytes.
PICTURES = 250_000_000
OPENING = 25_000
# nanoseconds
RECENT = 2_000_000_000
# rows of a larger file of questions are not read for the pictures that they name
QUESTIONS = 250_000_000
# changed files of one setting that a message names
NAMED = 3


class Input(NamedTuple):
    """A file. read: whether its contents are compared, too."""

    path: str | Path
    read: bool = True


# {setting: {name of a file: [bytes, nanoseconds, checksum or ""]}}
Files = Mapping[str, Mapping[str, Sequence[Any]]]


def inputs_of(cfg: Config, start: Path, examples: Sequence) -> dict[str, dict[str, Input]]:
    """The files behind the settings `data`, `template`, `rewards` and `model` (or `init`): {setting: {name:
    file}}."""
    # an adapter after its base
    folders = dict.fromkeys((base_folder(start), start))
    files = [
        path for base in folders for pattern in MODEL_FILES for path in base.glob(pattern) if path.is_file()
    ]
    # the optimizer of a checkpoint is not read
    model = {path.name: Input(path) for path in files if not path.name.startswith("optimizer")}
    found = {"init" if cfg.init else "model": model}
    if getattr(examples, "shards", ()):
        found["data"] = question_files(cfg, examples)
    if is_file(cfg.template):
        found["template"] = {cfg.template: Input(Path(cfg.template).absolute())}
    for name in cfg.rewards if cfg.method == "grpo" else ():
        if names_a_file(name):
            found.setdefault("rewards", {}).update(reward_files(name.rpartition(":")[0]))
    return found


def question_files(cfg: Config, examples) -> dict[str, Input]:
    """The files that a source reads, and the pictures that their rows name."""
    files = [shard.path.absolute() for shard in examples.shards]
    if not Path(cfg.data or "").is_file():
        held = [
            part for parts in LAYOUTS[cfg.task].files.get("heldout", ()) for part in re.split("[ |]", parts)
        ]
        files += [
            path for part in held for folder in {file.parent for file in files} for path in folder.glob(part)
        ]
    sizes: dict[str, int] = {}
    for shard in examples.shards:
        # `OwnShard` reads JSON lines, too; parquet holds its pictures
        lines = shard if isinstance(shard, JsonlShard) else getattr(shard, "_file", None)
        if isinstance(lines, JsonlShard) and lines.path.stat().st_size <= QUESTIONS:
            sizes |= named_files(lines, examples.beside)
    read = sum(sizes.values()) + OPENING * len(sizes) <= PICTURES
    found = {path: Input(path, read) for path in sizes} | {str(path): Input(path) for path in files}
    root = commonpath([path.parent for path in files])
    return {path.removeprefix(f"{root}/"): file for path, file in found.items()}


def texts(value: Any) -> Iterator[str]:
    """The texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts(each)


def named_files(shard: JsonlShard, beside: Path | None) -> Iterator[tuple[str, int]]:
    """(path, bytes) of each file in the folder of a file of questions (or in `beside`) that a row names, in
    any field."""
    names = set()
    for number in range(len(shard)):
        # a bad row is named when it is asked
        with suppress(BadRow):
            names.update(texts(shard.row(number)))
    folder = (beside or shard.path.parent).absolute()
    for name in sorted(names):
        path = name.replace("\\", "/")
        if 0 < len(path) <= 255 and path[0] != "/" and ".." not in path:
            # ValueError: a name that no file can have
            with suppress(OSError, ValueError):
                stat = os.stat(full := f"{folder}/{path}")
                if S_ISREG(stat.st_mode):
                    yield full, stat.st_size


def reward_files(source: str) -> dict[str, Input]:
    """A file of rewards, and the modules in its folder that it imports, also in a function or by a text."""
    folder = Path(source).parent.absolute()
    todo = [Path(source).absolute()]
    found: dict[str, Input] = {}
    while todo:
        file = todo.pop()
        name = str(Path(source).parent / relpath(file, folder))
        if name not in found:
            found[name] = Input(file)
            named = imported(file, folder)
            todo += [path for path in named if path.is_relative_to(folder) and os.path.isfile(path)]
    return found


def imported(file: Path, folder: Path) -> Iterator[Path]:
    """Where the modules that a module imports would be, if they were in its folder. Texts count, too, for
    `importlib.import_module("beside")`."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        # if it is imported, then inside a `try`: the rewards have been loaded
        return
    for node in ast.walk(tree):
        base = folder
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1] if node.level else folder
            names = [f"{node.module or ''}.{alias.name}".lstrip(".") for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) <= 255:
            names = [node.value.removesuffix(".py").replace("/", ".")]
        for parts in (name.split(".") for name in names):
            for path in (base.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)):
                yield from (path / "__init__.py", path.parent / f"{path.name}.py")


def fingerprints(files: Mapping[str, Mapping[str, Input]], known: Files) -> dict[str, dict[str, list]]:
    """`Files` of these inputs. A file that has the size and the time of `known` is not read again."""
    found: dict[str, dict[str, list]] = {}
    # a file may change twice within its file system's clock, so a time as new as this is not kept
    recent = time.time_ns() - RECENT
    unread: list[tuple[list, Path]] = []
    for setting, named in files.items():
        found[setting] = {}
        for name, file in named.items():
            stat = os.stat(file.path)
            mark: list[Any] = [stat.st_size, stat.st_mtime_ns, ""]
            before = list(known.get(setting, {}).get(name, ()))
            if before[:2] == mark[:2]:
                mark = before
            elif file.read:
                mark[1] = mark[1] if mark[1] < recent else 0
                unread.append((mark, Path(file.path)))
            found[setting][name] = mark
    with ThreadPoolExecutor() as pool:
        for (mark, _), digest in zip(unread, pool.map(checksum, [path for _, path in unread])):
            mark[2] = digest
    return found


def changes(before: Files, now: Files) -> dict[str, str]:
    """{setting: a line on which of its files have changed, and how}."""
    found = {}
    for setting in sorted({*before, *now}):
        old = before.get(setting, {})
        new = now.get(setting, {})
        pairs = ((name, change(old.get(name), new.get(name))) for name in sorted({*old, *new}))
        if said := [f"{name} {how}" for name, how in pairs if how]:
            more = f" and {len(said) - NAMED} more" if len(said) > NAMED else ""
            found[setting] = f"{setting}: {', '.join(said[:NAMED])}{more}"
    return found


def change(old: Sequence | None, new: Sequence | None) -> str:
    """How a file has changed, in words; "" if it has not."""
    if old is None or new is None:
        return "is new" if old is None else "is gone"
    if old[0] != new[0]:
        return f"has {new[0]} bytes and had {old[0]}"
    if old[2] and new[2]:
        return "has other contents" if old[2] != new[2] else ""
    return "has another time" if old[1] != new[1] else ""


def made_with(ranks) -> dict[str, Any]:
    """Versions, threads and device, and a checksum of this program: they may change the last bits."""
    code = hashlib.blake2b(digest_size=8)
    for path in sorted(path for part in ("data", "grpo", "models") for path in (ROOT / part).rglob("*.py")):
        code.update(path.read_bytes())
    found = {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES}
    return found | {"threads": torch.get_num_threads(), "device": ranks.device.type, "code": code.hexdigest()}


class Record:
    """inputs.json of a run folder: what the run is made of, and which changes were accepted after which step.

    found: the checkpoint to go on from. Without one the run starts anew, and nothing is compared. changed: a
    line for each accepted change.
    """

    def __init__(self, folder: Path, found: Path | None, changed: list[str]):
        self.path = folder / "inputs.json"
        self.found = found
        self.changed = changed
        self.values: dict[str, Any] = {}

    def compare(self, files: Mapping[str, Mapping[str, Input]], ranks, accepted: Sequence[str]) -> None:
        """Compare the files with those that the run was made of. Print a line on accepted changes, and one on
        versions and threads. Raises ConfigError for a change that is not `accepted`."""
        before = self.read() if self.found else {}
        known = before.get("files", {})
        self.values = {"files": fingerprints(files, known), "with": made_with(ranks)}
        was = before.get("with", {})
        pairs = ((key, was.get(key, value), value) for key, value in self.values["with"].items())
        if noted := [f"{key} {old} -> {value}" for key, old, value in pairs if old != value]:
            said = "the next steps may differ in the last bits from those of an undisturbed run"
            tqdm.write(f"note: since the last start {', '.join(noted)}; {said}", file=sys.stderr)
        found = changes(known, self.values["files"]) if known else {}
        for setting in {"model", "init"} & {*found}:
            # a base that is a run: of its newest checkpoint
            found[setting] += f" in {Path(next(iter(files[setting].values())).path).parent}"
        if refused := [setting for setting in found if setting not in accepted]:
            what = f"{self.path.parent} holds a run that was made of other files"
            lines = "; ".join(found[setting] for setting in refused)
            accept = f"accept it with change={','.join([*accepted, *refused])}"
            ways = f"put them back, {accept}, or name another folder with out=DIR"
            raise ConfigError(f"{what} ({lines}): {ways}")
        self.changed += found.values()
        history = before.get("changed", [])
        if self.found and self.changed:
            note = {"step": int(self.found.name.rpartition("_")[2]), "changed": self.changed}
            history += [note] if note not in history else []
            tqdm.write(f"changed after step {note['step']}: {'; '.join(self.changed)}", file=sys.stderr)
        self.values["changed"] = history

    def read(self) -> dict[str, Any]:
        """What an earlier start has written, {} if nothing. Raises ConfigError."""
        try:
            return json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        except ValueError as error:
            said = "remove it, and this start does not notice changed files"
            raise ConfigError(f"{self.path}: is not JSON ({error}); {said}") from error

    def write(self) -> None:
        """Write inputs.json."""
        write_whole(self.path, json.dumps(self.values, indent=1) + "\n")

    def unwritten(self, rows: Sequence[Mapping[str, Any]], step: int) -> list[dict[str, Any]]:
        """The lines on accepted changes that metrics.jsonl, of these rows, lacks."""
        there = [row.get("changed") for row in rows]
        notes = [note["changed"] for note in self.values["changed"]]
        return [{"step": step, "changed": note} for note in notes if note not in there]
