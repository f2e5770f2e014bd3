"""The table of sources, and the built-in world behind it. (BLINK's file is test_blink's.)"""

import sys

import pytest

from data.sources.table import HOOKS, SOURCES, SPLITS, BadSource, hook_of, open_source


def test_every_source_has_its_splits():
    assert set(SOURCES) == set(SPLITS) and set(HOOKS) < set(SOURCES)
    assert all({"train", "heldout", *hook_of(name).sets} <= set(SPLITS[name]) for name in SOURCES)


@pytest.mark.parametrize(
    "name, path, message",
    [
        ("shape", None, "no task 'shape'; did you mean 'shapes'?"),
        ("xyz", None, "no task 'xyz'; there are shapes"),
        ("blink", None, "give data=FILE"),
        ("shapes", "x.parquet", "reads no file, but data is x.parquet"),
    ],
)
def test_what_cannot_be_opened(name, path, message):
    with pytest.raises(BadSource) as error:
        open_source(name, path, limit=None, seed=0, items=4)
    assert message in str(error.value)


@pytest.mark.parametrize("name", SOURCES)
def test_an_unknown_split(name, tmp_path):
    with pytest.raises(BadSource, match=f"'{name}' has no split 'test'; it has train, heldout"):
        SOURCES[name](None, "test", 1, 0)


def test_nothing_to_train_on():
    with pytest.raises(BadSource, match="no training example"):
        open_source("shapes", None, limit=0, seed=0, items=4)


@pytest.mark.parametrize("name", ["shapes", "documents"])
def test_the_built_in_world(name):
    examples, heldout = open_source(name, None, limit=30, seed=5, items=8)
    _, same = open_source(name, None, limit=30, seed=6, items=8)
    assert len(examples) == 30 and {k: len(v) for k, v in heldout.items()} == {"heldout": 8, "pairs": 8}
    # held out alike, whatever the seed
    assert [e.uid for e in heldout["heldout"]] == [e.uid for e in same["heldout"]]
    assert examples[0].uid != open_source(name, None, limit=30, seed=6, items=8)[0][0].uid
    assert bool(examples[0].extra.get("documents")) == (name == "documents")


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(BadSource, match="needs pyarrow, an optional extra"):
        SOURCES["blink"](tmp_path / "x.parquet", "all", None, 0)
