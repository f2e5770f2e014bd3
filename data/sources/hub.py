"""Files of the Hugging Face hub by their id: downloaded once into its cache, found there ever after, with or
without a network.

`huggingface_hub` does the work: it goes on with a download that was cut off, checks what it got and knows the
user's token. Added here: a folder counts only if every file that is wanted is in it, and whatever goes wrong
is one line that says what to do.
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
# a name that ends so is a file of this machine, misspelt perhaps
_FILES = (".parquet", ".jsonl", ".json", ".yaml", ".safetensors")


class HubError(BadSource):
    """What was asked of the hub is not there, or the hub is out of reach and the cache does not hold it."""


class NoMatch(HubError):
    """The folder or the repository is there, and none of its files is what was asked for."""


def parts_of(name: str | Path) -> tuple[str, str | None, tuple[str, ...]] | None:
    """`owner/name`, `owner/name@revision` or `owner/name:file,file` → (repository, revision, files or
    patterns); None if it is no id."""
    found = _ID.fullmatch(str(name))
    if not found or ".." in str(name) or (found["repo"].endswith(_FILES) and not found["files"]):
        return None
    return found["repo"], found["revision"], tuple(found["files"].split(",")) if found["files"] else ()


def snapshot(
    repo_id: str,
    patterns: Sequence[str],
    kind: Literal["dataset", "model"] = "dataset",
    revision: str | None = None,
) -> Path:
    """The local folder of a hub repository with those of its files that match `patterns` (as `fnmatch`: `*`
    also matches a slash).

    The folder may hold other files of the repository, from earlier calls. `revision` is a commit, tag or
    branch; without one it is the newest that can be had. Raises HubError.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise HubError(
            f"{repo_id}: files of the hub need huggingface_hub: pip install huggingface_hub, or give a "
            "local path"
        ) from error
    what = f"{kind} {repo_id}" + (f" at revision {revision}" if revision else "")
    try:
        folder = Path(
            snapshot_download(repo_id, repo_type=kind, revision=revision, allow_patterns=list(patterns))
        )
    except GatedRepoError as error:
        raise HubError(
            f"{what}: its owner wants to be asked first; accept the terms on its page and log in with "
            "`hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{what}: the repository is there, the revision is not") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise HubError(
            f"{what}: the hub has none of that name, or it is private (then log in with `hf auth login`)"
        ) from error
    # its network library changes from version to version, and with it what is raised
    except Exception as error:
        raise HubError(
            f"{what}: the hub is out of reach and the cache does not hold it "
            f"({type(error.__cause__ or error).__name__}); "
            "download it where there is a network, or give a local path"
        ) from error
    if not matching(folder, patterns):
        raise NoMatch(f"{what}: no file matches {' '.join(patterns)}; in {folder} there are {some(folder)}")
    return folder


def resolve(
    data: str | Path, patterns: Sequence[str], revision: str | None = None, also: Sequence[str] = ()
) -> list[Path]:
    """The files that `data` names, sorted: itself; or, if it is a folder or a dataset of the hub, those in it
    that match.

    `patterns` are alternatives of one or more patterns with spaces between: the first whose every pattern
    matches something counts. Files named in an id (`owner/name:file,file`) are taken instead. `also` is
    downloaded with them: what they name, as pictures. Raises HubError.
    """
    path, named = Path(data), parts_of(data)
    if path.is_file():
        return [path]
    if not path.is_dir() and not named:
        raise HubError(f"{data}: no such file or folder")
    if not path.is_dir() and named[2]:
        patterns = [" ".join(named[2])]
    last = NoMatch(f"{data}: no pattern to look for")
    for pattern in patterns:
        try:
            folder = (
                path
                if path.is_dir()
                else snapshot(named[0], [*pattern.split(), *also], revision=named[1] or revision)
            )
            found = [matching(folder, [part]) for part in pattern.split()]
            if all(found):
                return sorted({file for files in found for file in files})
            last = NoMatch(f"{data}: no file matches {pattern}; in {folder} there are {some(folder)}")
        except NoMatch as error:
            last = error
    raise last


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in and below a folder whose name, from there, matches one of the patterns; sorted. Hidden
    ones are left out."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return [
        file
        for name, file in sorted(files.items())
        if not any(part.startswith(".") for part in name.split("/"))
        and any(fnmatch(name, pattern) for pattern in patterns)
    ]


def some(folder: Path, most: int = 8) -> str:
    """A few names of what is in a folder, for a message."""
    names = [file.relative_to(folder).as_posix() for file in matching(folder, ["*"])]
    return ", ".join(names[:most] + ["…"] * (len(names) > most)) or "no files"
