"""The bridge of the built-in world, from the recipe to files that train; killed, it ends as an undisturbed
one."""

import json

import pytest

from data.answers import is_right
from data.sources.table import open_split
from grpo.bridge import __main__ as program
from grpo.bridge.store import FILES, Store

COMMAND = ["shapes", "limit=12", "vision.at_once=4", "vision.device=cpu"]


class Killed(Exception):
    pass


def told(out):
    """The stored lines without their times, and the results."""
    lines = [
        json.loads(line) for name in FILES.values() if (out / name).exists() for line in open(out / name)
    ]
    return [{**line, "seconds": 0} for line in lines], (out / "train.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    assert program.main([*COMMAND, f"out={out}"]) == 0
    return out


def test_it_keeps_what_is_right_and_says_what_it_dropped(whole, capsys):
    kept = open_split("jsonl", whole / "train.jsonl", "all", None, 0)
    examples = {example.uid: example for example in open_split("shapes", None, "train", 12, 0)}
    assert len(kept) >= 8
    for row in kept:
        (document,) = row.extra["documents"]
        assert is_right(document, examples[row.uid]) and "description" not in document
        assert row.extra["bridge"]["models"]["reason"] == "shapes"
    assert program.main([*COMMAND, f"out={whole}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["questions", "12"] and f"kept {len(kept)}" in " ".join(said[-3].split())
    assert said[-2:] == [str(whole / "train.jsonl"), str(whole / "report.html")]


def test_killed_while_it_describes_and_while_it_reasons(whole, tmp_path, monkeypatch):
    add = Store.add
    for count in (6, 10):
        left = [count]

        def killed(store, stored, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            add(store, stored)

        monkeypatch.setattr(Store, "add", killed)
        with pytest.raises(Killed):
            program.main([*COMMAND, f"out={tmp_path}"])
    monkeypatch.setattr(Store, "add", add)
    assert program.main([*COMMAND, f"out={tmp_path}"]) == 0
    assert told(tmp_path) == told(whole)
