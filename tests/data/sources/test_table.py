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
        ("shapes", "x.parquet", "reads no file; data may hold options: noise, side, crowd, kinds."),
        ("shapes", "noise", "It has no 'noise'"),
        ("shapes", "noise=much", "data=noise=much: noise: could not convert"),
        ("shapes", "kinds=Sum", "data=kinds=Sum: kinds: some of Relation, Count, Depth, Distance, not Sum"),
        ("shapes", "crowd=yes", "crowd: write 0 or 1"),
        ("documents", "looks=2", "looks: a share, from 0 to 1"),
        ("documents", "only=some", "only: write long or short, not"),
        ("documents", "noise=2", "options: branch, looks, again, counts, only. It has no 'noise=2'"),
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


def test_options_of_the_built_in_world():
    examples, heldout = open_source("shapes", "kinds=Count,crowd=1", limit=8, seed=0, items=8)
    assert {e.task for e in (*examples, *heldout["heldout"], *heldout["pairs"])} == {"Count"}
    assert all(len(e.extra["named"]) == 6 for e in examples)
    documents, heldout = open_source("documents", "branch=1,looks=1", limit=40, seed=0, items=8)
    asked = [e for e in documents if e.task in ("Relation", "Count", "Depth", "Distance")]
    assert asked and all(t.startswith("look :") for e in asked for t in e.extra["documents"])
    assert len(heldout["heldout"]) == 8


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(BadSource, match="needs pyarrow, an optional extra"):
        SOURCES["blink"](tmp_path / "x.parquet", "all", None, 0)
