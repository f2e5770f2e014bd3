"""From stored replies to files that train: `train.jsonl` in this project's schema, its pictures beside it,
and, if asked for, the array that LLaMA-Factory reads.

Everything is made anew from what is stored, so a changed rule or layout needs no request.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.images import open_picture
from data.types import MARK, BadExample, Example, Picture, short
from grpo.bridge.filters import DESCRIBE, Known, Rules, chain_of, reasons
from grpo.bridge.funnel import Funnel, kind_of
from grpo.bridge.store import Stored
from grpo.serving.messages import MEDIA, png
from grpo.storage.atomic import replacing, write_whole

TRAIN, LLAMA, INFO, PICTURES = "train.jsonl", "llama_factory.json", "dataset_info.json", "pictures"
_PLACES = re.compile(r"\{(thinking|answer)\}")


@dataclass(frozen=True)
class Output:
    """How results are written. Raises ValueError for a layout without its places."""

    layout: str = "<think> {thinking} </think><answer> Final Answer:{answer} </answer>"
    """of a document: {thinking} is the chain, {answer} the right letter or text; default: as published"""
    llama_factory: bool = False
    """also write llama_factory.json and dataset_info.json, which LLaMA-Factory reads"""

    def __post_init__(self) -> None:
        if sorted(_PLACES.findall(self.layout)) != ["answer", "thinking"]:
            raise ValueError(
                f"output.layout: {short(self.layout)} must hold {{thinking}} and {{answer}} once"
            )


def write_results(
    folder: Path,
    examples: Sequence[Example],
    stored_of: Callable[[str], Mapping[str, Stored]],
    rules: Rules,
    output: Output,
    known: Known,
) -> Funnel:
    """Filter all stored replies and write what is kept. stored_of: uid -> {stage: its last reply}. Examples
    that cannot be used are left out. If this is interrupted, the files are as before. Raises OSError."""
    funnel = Funnel()
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        train = files.enter_context(replacing(folder / TRAIN))
        array = files.enter_context(_array(folder / LLAMA)) if output.llama_factory else None
        for index in tqdm(range(len(examples)), "filter", unit="question", leave=False, disable=None):
            try:
                example = examples[index]
                stored = stored_of(example.uid)
                replies = {stage: each.reply for stage, each in stored.items()}
                why = reasons(example, replies, rules, known)
                funnel.add(example, replies, why)
                if why:
                    continue
                pictures = [save_picture(each, folder, example.uid) for each in example.pictures]
            except BadExample:
                continue
            document = document_of(example, chain_of(replies), output.layout)
            row = row_of(example, document, pictures, bridge_of(stored))
            train.write(encoded(row) + b"\n")
            if array:
                array(llama_row(example, document, pictures))
    if output.llama_factory:
        columns = {"messages": "conversations", "images": "images"}
        info = {"bridge": {"file_name": LLAMA, "formatting": "sharegpt", "columns": columns}}
        write_whole(folder / INFO, json.dumps(info, indent=2) + "\n")
    return funnel


def document_of(example: Example, chain: str, layout: str) -> str:
    """What imitation learns. The answer is the letter if there are choices. What is filled in is never
    searched for places."""
    words = {"thinking": chain, "answer": example.letter or example.answer}
    return _PLACES.sub(lambda match: words[match[1]], layout)


def row_of(
    example: Example, document: str, pictures: Sequence[str], bridge: Mapping[str, Any]
) -> dict[str, Any]:
    """A line of train.jsonl, as the task `jsonl` reads it (docs/data.md)."""
    row: dict[str, Any] = {"uid": example.uid, "question": example.question}
    if example.choices:
        row["choices"] = example.choices
    elif (kind := kind_of(example)) in ("number", "text"):
        row["kind"] = kind
    row |= {"answer": example.answer, "pictures": pictures}
    row |= {name: value for name in ("task", "wording") if (value := getattr(example, name))}
    return row | {"extra": {"documents": [document], "bridge": bridge}}


def bridge_of(stored: Mapping[str, Stored]) -> dict[str, Any]:
    """Where a document comes from: the description, and by stage the model and the number of attempts."""
    return {
        "description": stored[DESCRIBE].reply.text if DESCRIBE in stored else "",
        "models": {stage: each.model for stage, each in stored.items()},
        "attempts": {stage: each.attempt + 1 for stage, each in stored.items()},
    }


def llama_row(example: Example, document: str, pictures: Sequence[str]) -> dict[str, Any]:
    """A row of LLaMA-Factory's sharegpt form. Pictures without marks in the question stand before it."""
    asked = example.asked if MARK in example.asked else MARK * len(pictures) + example.asked
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": document}]
    return {"conversations": turns, "images": pictures}


def save_picture(picture: Picture, folder: Path, uid: str) -> str:
    """Put a picture into `folder`, named by its content, and return its name from there. A file becomes a
    hard link where that is possible, which takes no space. Raises BadPicture, OSError."""
    file = picture if isinstance(picture, Path) else None
    if file is not None:
        content = file.read_bytes()
    else:
        content = picture if isinstance(picture, bytes) else png(open_picture(picture, name=uid))
    media = next((media for first, media in MEDIA.items() if content.startswith(first)), "")
    ending = file.suffix.lower() if file else f".{media.partition('/')[2] or 'img'}"
    name = f"{PICTURES}/{sha256(content).hexdigest()[:32]}{ending}"
    if not (folder / name).exists():
        aside = folder / f"{name}.tmp"
        aside.unlink(missing_ok=True)
        _link_or_write(file, content, aside)
        os.replace(aside, folder / name)
    return name


def _link_or_write(file: Path | None, content: bytes, target: Path) -> None:
    if file is not None:
        with contextlib.suppress(OSError):
            # the file itself, not a link that leads to it
            os.link(file.resolve(), target)
            return
        shutil.copyfile(file, target)
        return
    target.write_bytes(content)


@contextlib.contextmanager
def _array(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A JSON array, written row by row."""
    with replacing(path) as file:
        before = b"[\n"

        def write(row: Mapping[str, Any]) -> None:
            nonlocal before
            file.write(before + encoded(row))
            before = b",\n"

        yield write
        file.write(b"\n]\n" if before == b",\n" else b"[]\n")


def encoded(row: Mapping[str, Any]) -> bytes:
    """A row as JSON on one line. Half a character, which a server may send, becomes a question mark."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
