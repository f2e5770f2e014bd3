"""The stored replies: for each stage a file of JSON lines, to which lines are only added.

A line is {uid, stage, attempt, request, model, text, thinking, finish, tokens_in, tokens_out, seconds,
error}; `request` is a hash of what was asked. It is on the disk before the next reply is taken, so a kill
loses what was in flight and nothing else. The last line of a question and stage counts. Where each last line
stands is kept in a temporary database on disk, so memory does not grow with the number of questions.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from grpo.bridge.stages import STAGES
from grpo.serving.messages import Reply
from grpo.storage.atomic import append_line

FILES = {stage: f"{number}-{stage}.jsonl" for number, stage in enumerate(STAGES, 1)}
_REPLY = tuple(each.name for each in fields(Reply))


@dataclass(frozen=True)
class Stored:
    """A reply of a stage about the question `uid`. attempt: 0 for the first. model: what wrote it."""

    uid: str
    stage: str
    attempt: int
    model: str
    reply: Reply

    def line(self) -> bytes:
        """Its line in the file."""
        told = {"uid": self.uid, "stage": self.stage, "attempt": self.attempt}
        reply = asdict(self.reply)
        told |= {"request": reply.pop("request"), "model": self.model}
        text = json.dumps(told | reply, ensure_ascii=False) + "\n"
        # a server may send half a surrogate pair, which UTF-8 cannot hold
        return text.encode("utf-8", "backslashreplace")

    @classmethod
    def read(cls, line: bytes) -> Stored:
        """Raises ValueError, TypeError or KeyError for what is no line of ours."""
        told = json.loads(line)
        reply = Reply(**{name: told[name] for name in _REPLY})
        return cls(told["uid"], told["stage"], told["attempt"], told["model"], reply)


@dataclass
class Spent:
    """What stored replies have cost. seconds: of all of them, one after the other."""

    replies: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def add(self, reply: Reply) -> None:
        """Count a reply."""
        self.replies += 1
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        self.seconds += reply.seconds

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.tokens_in + self.tokens_out


@dataclass
class Store:
    """The replies in a folder. `spent` is by stage. Opening cuts a torn last line off. Raises ValueError
    that names a broken line, and OSError."""

    folder: Path
    spent: dict[str, Spent] = field(default_factory=lambda: {stage: Spent() for stage in STAGES})

    def __post_init__(self) -> None:
        # "": a database in a temporary file, removed when it is closed
        self._places = sqlite3.connect("", isolation_level=None)
        self._places.execute("PRAGMA journal_mode=OFF")
        self._places.execute(
            "CREATE TABLE last (stage TEXT, uid TEXT, place INT, PRIMARY KEY (stage, uid)) WITHOUT ROWID"
        )
        for stage, name in FILES.items():
            if (self.folder / name).exists():
                self._read(stage, self.folder / name)

    def close(self) -> None:
        """Remove the temporary database."""
        self._places.close()

    def _read(self, stage: str, path: Path) -> None:
        place = 0
        self._places.execute("BEGIN")
        with open(path, "r+b") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    file.truncate(place)
                    break
                try:
                    found = Stored.read(line)
                except (ValueError, TypeError, KeyError):
                    why = "this file was edited; correct the line, or remove it"
                    raise ValueError(f"{path}, line {number}: not a stored reply: {why}") from None
                self._note(found, stage, place)
                place += len(line)
        self._places.execute("COMMIT")

    def _note(self, stored: Stored, stage: str, place: int) -> None:
        self._places.execute("INSERT OR REPLACE INTO last VALUES (?, ?, ?)", (stage, stored.uid, place))
        self.spent[stage].add(stored.reply)

    def add(self, stored: Stored) -> None:
        """Append a reply; it is on the disk when this returns. Raises OSError, the file as before."""
        path = self.folder / FILES[stored.stage]
        self._note(stored, stored.stage, append_line(path, stored.line(), sync=True))

    def last(self, stage: str, uid: str) -> Stored | None:
        """The last reply of a stage about a question."""
        row = self._places.execute("SELECT place FROM last WHERE stage = ? AND uid = ?", (stage, uid))
        if (found := row.fetchone()) is None:
            return None
        with open(self.folder / FILES[stage], "rb") as file:
            file.seek(found[0])
            return Stored.read(file.readline())

    def questions(self, stage: str) -> int:
        """How many questions a stage has replies to."""
        row = self._places.execute("SELECT COUNT(*) FROM last WHERE stage = ?", (stage,))
        return row.fetchone()[0]

    def of(self, uid: str) -> dict[str, Stored]:
        """{stage: the last reply} about a question."""
        found = {stage: self.last(stage, uid) for stage in STAGES}
        return {stage: stored for stage, stored in found.items() if stored is not None}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()
