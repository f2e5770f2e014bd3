"""A JSON array on demand: where its objects are, whatever they hold, and the cache of large ones."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sources import json_array
from data.sources.jsonl import JsonlShard

VALUES = st.recursive(
    st.none() | st.integers() | st.text() | st.sampled_from(['"', "\\", '\\"', "]}", "{[", "\\\\"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(), VALUES, max_size=3), min_size=1, max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    mark=st.booleans(),
    ascii_only=st.booleans(),
)
def test_objects_of_any_kind_are_found(tmp_path_factory, rows, indent, mark, ascii_only):
    path = tmp_path_factory.mktemp("array") / "x.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.encode("utf-8", "surrogatepass"))
    with open(path, "rb") as file:
        assert json_array.is_array(file)
        spans, numbers = json_array.object_spans(path, file)
        found = [
            json.loads(path.read_bytes()[start:end].decode("utf-8", "surrogatepass")) for start, end in spans
        ]
    assert found == rows and numbers.tolist() == list(range(1, len(rows) + 1))


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Every array counts as large, and the cache is here."""
    monkeypatch.setattr(json_array, "CACHED_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "glimpse"


def test_a_large_array_is_scanned_once_and_again_when_it_changes(tmp_path, cached, monkeypatch):
    path, scans, real = tmp_path / "x.json", [], json_array._scan
    monkeypatch.setattr(json_array, "_scan", lambda *args: scans.append(1) or real(*args))
    for number, text in enumerate(('[{"a": 1}, {"a": 2}]', '[{"a": 1}, {"a": 2}, {"a": 33}]'), 1):
        path.write_text(text)
        for _ in range(2):
            shard = JsonlShard(path, (), (), (), {})
            assert [shard.row(n) for n in range(len(shard))] == json.loads(text)
        assert len(scans) == number and len(list(cached.iterdir())) == number


def test_a_damaged_or_unwritable_cache_is_passed_over(tmp_path, cached):
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}]')
    JsonlShard(path, (), (), (), {})
    next(cached.iterdir()).write_bytes(b"torn")
    assert JsonlShard(path, (), (), (), {}).row(0) == {"a": 1}
    assert np.load(next(cached.iterdir())).tolist() == [[1, 9]]
    for file in cached.iterdir():
        file.unlink()
    cached.rmdir()
    cached.write_text("a file stands here")
    assert JsonlShard(path, (), (), (), {}).row(0) == {"a": 1}
