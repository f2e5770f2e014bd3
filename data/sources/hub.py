"""Files of the Hugging Face hub by their id: downloaded once into its cache, later found there without a
network.

`huggingface_hub` resumes and checks downloads and knows the user's token. This file checks that every wanted
file is there, and turns each error into one line that says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from data.types import BadSource

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?(?::(?P<files>\S+))?"
)
# a name with such an ending is a local file, perhaps misspelt
_FILES = (".parquet", ".jsonl", ".json", ".gz", ".arrow", ".yaml", ".safetensors")
Kind = Literal["dataset", "model"]


class HubError(BadSource):
    """The hub has no such file, or the hub is out of reach and the file is not in the cache."""


class NoMatch(HubError):
    """The folder or repository exists, and none of its files matches."""


def parts_of(name: str | Path) -> tuple[str, str | None, tuple[str, ...]] | None:
    """`owner/name`, `owner/name@revision` or `owner/name:file,file` -> (repository, revision, files or
    patterns); None if it is no id."""
    found = _ID.fullmatch(str(name))
    if not found or ".." in str(name) or (found["repo"].endswith(_FILES) and not found["files"]):
        return None
    return found["repo"], found["revision"], tuple(found["files"].split(",")) if found["files"] else ()


def snapshot(
    repo_id: str, patterns: Sequence[str], kind: Kind = "dataset", revision: str | None = None
) -> Path:
    """The local folder with the files of a hub repository that match `patterns` (`fnmatch`: `*` also matches
    a slash).

    It may hold other files from earlier calls. revision: a commit, tag or branch; None: the newest there is.
    Raises HubError.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        said = "the hub's files need huggingface_hub: pip install huggingface_hub, or give a local path"
        raise HubError(f"{repo_id}: {said}") from error
    what = f"{kind} {repo_id}" + (f" at revision {revision}" if revision else "")
    wanted = dict(repo_type=kind, revision=revision, allow_patterns=list(patterns))
    try:
        folder = Path(snapshot_download(repo_id, **wanted))
    # the types of its network errors change from version to version
    except Exception as error:
        if isinstance(error, errors.GatedRepoError):
            said = "its owner gives access on request; accept the terms on its page and log in with "
            said += "`hf auth login`"
        elif isinstance(error, errors.RevisionNotFoundError):
            said = "the repository is there, the revision is not"
        elif isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
            said = "the hub has none of that name, or it is private (then log in with `hf auth login`)"
        else:
            raised = type(error.__cause__ or error).__name__
            said = f"the hub is out of reach and the cache does not hold it ({raised}); "
            said += "download it where there is a network, or give a local path"
        raise HubError(f"{what}: {said}") from error
    if not matching(folder, patterns):
        raise NoMatch(f"{what}: no file matches {' '.join(patterns)}; in {folder} there are {some(folder)}")
    return folder


def resolve(
    data: str | Path, patterns: Sequence[str], revision: str | None = None, also: Sequence[str] = ()
) -> list[Path]:
    """The files that `data` names, sorted: itself, or the matching files of a folder or hub dataset.

    Each of `patterns` is one or more parts with spaces between, and a part is alternatives with "|" between.
    The first of `patterns` counts whose parts all match some file. Files named in an id
    (`owner/name:file,file`) replace them. also: further files to download, such as pictures that rows name.
    Raises HubError.
    """
    path, named = Path(data), parts_of(data)
    _refuse_arrow(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        named = None
    elif named is None:
        raise HubError(f"{data}: no such file or folder")
    elif named[2]:
        patterns = [" ".join(named[2])]
    last = NoMatch(f"{data}: no pattern to look for")
    for pattern in patterns:
        try:
            folder = path
            if named:
                wanted = re.split(r"[ |]", pattern)
                folder = snapshot(named[0], [*wanted, *also], revision=named[1] or revision)
            found = [matching(folder, part.split("|")) for part in pattern.split()]
            if all(found):
                return sorted({file for files in found for file in files})
            last = NoMatch(f"{data}: no file matches {pattern}; in {folder} there are {some(folder)}")
        except NoMatch as error:
            last = error
    raise last


def _refuse_arrow(path: Path) -> None:
    """Raise NoMatch for a folder of `datasets.save_to_disk`, or one of its files, with a line that converts
    it."""
    if path.suffix == ".arrow":
        path = path.parent
    elif not path.is_dir() or not matching(path, ["*.arrow"]) or matching(path, ["*.parquet", "*.jsonl"]):
        return
    split = '["train"]' if (path / "dataset_dict.json").is_file() else ""
    line = f'datasets.load_from_disk("{path}"){split}.to_parquet("{path.name}.parquet")'
    raise NoMatch(
        f"{path}: was written by datasets.save_to_disk; write it as parquet with the one line {line}"
    )


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in and below a folder whose path from there matches a pattern, in any case; sorted, no hidden
    ones."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return [
        file
        for name, file in sorted(files.items())
        if not any(part.startswith(".") for part in name.split("/"))
        and any(fnmatch(name.lower(), pattern.lower()) for pattern in patterns)
    ]


def some(folder: Path, most: int = 8) -> str:
    """The first names in a folder, for a message."""
    names = [file.relative_to(folder).as_posix() for file in matching(folder, ["*"])]
    return ", ".join(names[:most] + ["…"] * (len(names) > most)) or "no files"
