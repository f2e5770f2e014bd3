"""One writer a run folder: a lock (flock of the file `lock`) that ends with its process, however it ends."""

import contextlib
import fcntl
import os
import socket
import sys
from pathlib import Path

from tqdm import tqdm

# (descriptor of the lock, its path, the folders that `claim` made)
_held: list[tuple[int, Path, list[Path]]] = []


def claim(folder: Path) -> None:
    """Make this process the only writer of a run folder, until `leave` or its end. Makes the folder. Raises
    ValueError if another process writes there, and OSError."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # a writer that leaves removes the file, and the folder if it is empty
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = os.read(descriptor, 200).decode("utf-8", "replace") or "another process"
                os.close(descriptor)
                ways = "wait until it ends, or name another folder with out=DIR"
                raise ValueError(f"{who} writes to {folder}, and a run has one writer: {ways}") from None
            except OSError as error:
                alone = "so nothing stops a second run from writing there"
                tqdm.write(f"warning: {path} cannot be locked ({error}), {alone}", file=sys.stderr)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
            os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held.append((descriptor, path, made))


def leave() -> None:
    """Give up the locks of this process. Removes their files, and folders that `claim` made for nothing."""
    while _held:
        descriptor, path, made = _held.pop()
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
