"""Files that a kill or a full disk leaves as they were: written whole or not at all, or a line longer or
not at all."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Put `content` (text as UTF-8) in the place of a file, on the disk and at once. Raises OSError with
    the file as it was."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def append_line(path: Path, line: bytes) -> None:
    """Append a line, its newline included, in one system call; a kill within it can still tear a long one.
    Raises OSError (a full disk, say) with the file as it was."""
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError(f"{path}: the disk took only part of a line of {len(line)} bytes; is it full?")
        except OSError:
            file.truncate(before)
            raise
