"""Writes that a kill or a full disk cannot leave half done: a whole file, or one more line."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in pieces, which replaces `path` at the end of the block, flushed to disk. If the block
    raises, the file is as before."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file by `content` (text: UTF-8), flushed to disk. After an OSError the file is as before."""
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def append_line(path: Path, line: bytes, sync: bool = False) -> int:
    """Append a line (with its newline) in one system call; a kill during the call can still cut a long line.
    sync: return when it is on the disk. -> where it begins. If it raises OSError (for example, a full disk),
    the file is as before."""
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError(f"{path}: the disk took only part of a line of {len(line)} bytes; is it full?")
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise
        return before
