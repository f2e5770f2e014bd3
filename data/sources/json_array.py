"""A JSON array of objects, read on demand: where each object of a file begins and ends.

Files of several gigabytes are published as one array (LLaMA-Factory's layout, Vision-R1-cold). They are
scanned once, at some 100 MB a second, and the index is kept in a cache. Memory holds 16 bytes an object.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from data.types import BadSource, short

# up to the next bracket that is in no string
BRACKET = re.compile(rb'(?:[^"{}\[\]]*"[^"\\]*(?:\\.[^"\\]*)*")*[^"{}\[\]]*([{}\[\]])', re.DOTALL)
# files below this size are scanned each time
CACHED_BYTES = 100_000_000


def is_array(file: BinaryIO) -> bool:
    """Whether a file is a JSON array whose first value is an object."""
    file.seek(0)
    head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return head.startswith(b"[") and head[1:].lstrip()[:1] in (b"{", b"]")


def object_spans(path: Path, file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """The first byte of each object of an array and the byte behind its last, (n, 2); their numbers, from 1.

    path: for messages and the cache. file: the same, or what was unpacked from it. A large file is scanned
    with a progress bar, and the result is kept under path, size and time. Raises BadSource.
    """
    size = os.fstat(file.fileno()).st_size
    kept = _cache_file(path)
    spans = None
    with contextlib.suppress(OSError, ValueError):
        spans = np.load(kept, allow_pickle=False) if size >= CACHED_BYTES else None
    if spans is None:
        spans = _scan(path, file, size)
        # without a place to write, the next start scans again
        with contextlib.suppress(OSError):
            if size >= CACHED_BYTES:
                _keep(kept, spans)
    return spans, np.arange(1, len(spans) + 1)


def _keep(kept: Path, spans: np.ndarray) -> None:
    """Write an index into the cache, whole or not at all."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
        np.save(file, spans, allow_pickle=False)
    os.replace(file.name, kept)


def _cache_file(path: Path) -> Path:
    """Where the index of a file is kept."""
    state = path.stat()
    name = hashlib.sha256(f"{path.resolve()}\n{state.st_size}\n{state.st_mtime_ns}".encode()).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "glimpse" / f"{name}.npy"


def _scan(path: Path, file: BinaryIO, size: int) -> np.ndarray:
    """The spans, from the file's bytes."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        spans = np.array(list(_objects(path, text)), np.int64).reshape(-1, 2)
        # before the first object stands "[", between two one comma, behind the last "]"
        ends, starts = [0, *spans[:, 1].tolist()], [*spans[:, 0].tolist(), size]
        for number, (end, start) in enumerate(zip(ends, starts)):
            last = number == len(spans)
            expected = (b"[]" if last else b"[") if not number else (b"]" if last else b",")
            between = text[end:start].removeprefix(b"\xef\xbb\xbf")
            if b"".join(between.split()) != expected:
                line = 1 + text[:start].count(b"\n")
                held = short(b" ".join(between.split()).decode("utf-8", "replace"))
                said = f"line {line}: {held} stands behind item {number}"
                raise BadSource(f"{path}: begins as a JSON array, and is none: {said}; correct it")
    return spans


def _objects(path: Path, text: mmap.mmap) -> Iterator[tuple[int, int]]:
    """The spans of the values at depth 1 that are objects or arrays."""
    depth, start, shown = 0, 0, 0
    with tqdm(
        total=len(text),
        desc=f"{path.name}: index",
        unit="B",
        unit_scale=True,
        disable=len(text) < CACHED_BYTES,
    ) as bar:
        for bracket in BRACKET.finditer(text):
            if bracket[1] in b"{[":
                depth += 1
                start = bracket.start(1) if depth == 2 else start
            else:
                depth -= 1
                if depth == 1:
                    yield start, bracket.end(1)
                    bar.update(bracket.end(1) - shown)
                    shown = bracket.end(1)
    if depth:
        raise BadSource(f"{path}: begins as a JSON array, and ends within it; is the file complete?")
