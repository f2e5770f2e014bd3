"""Ids of the hub, without a hub: what is asked of huggingface_hub, a cache laid out as it does, and one
line for whatever goes wrong."""

import sys
from pathlib import Path

import pytest

from data.sources import hub
from data.sources.hub import HubError, NoMatch, matching, parts_of, resolve, snapshot
from data.sources.table import SOURCES

hf = pytest.importorskip("huggingface_hub", reason="comes with transformers")
constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache, repo, files, kind="datasets", revision="main"):
    """What a download leaves behind: snapshots/<commit>/<file> are links to blobs/<hash>, refs/<revision>
    names the commit."""
    home = cache / f"{kind}--{repo.replace('/', '--')}"
    for number, (name, content) in enumerate(files.items()):
        blob, link = home / "blobs" / f"{number:040}", home / "snapshots" / COMMIT / name
        for path in (blob, link, home / "refs" / revision):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
        (home / "refs" / revision).write_text(COMMIT)
    return home / "snapshots" / COMMIT


@pytest.mark.parametrize(
    "name, parts",
    [
        ("array/SAT", ("array/SAT", None, ())),
        ("array/SAT-v2:data/static-*.parquet", ("array/SAT-v2", None, ("data/static-*.parquet",))),
        ("a/b@v1.0:x,y", ("a/b", "v1.0", ("x", "y"))),
        ("Qwen/Qwen2-VL-2B", ("Qwen/Qwen2-VL-2B", None, ())),
        (Path("array/SAT"), ("array/SAT", None, ())),
        ("a/b.parquet", None),
        ("/a/b", None),
        ("./a/b", None),
        ("../b", None),
        ("a", None),
        ("a/b/c", None),
        ("a/b:../c", None),
        ("", None),
        ("a b/c", None),
    ],
)
def test_what_is_an_id(name, parts):
    assert parts_of(name) == parts


def test_from_the_cache_without_a_network(cache):
    folder = cached(
        cache, "me/mine", {"data/train-0.parquet": b"x", "README.md": b"y", "data/test-0.parquet": b"z"}
    )
    assert (
        snapshot("me/mine", ["*train-*"])
        == folder
        == snapshot("me/mine", ["*.md"], revision="main")
        == snapshot("me/mine", ["*.md"], revision=COMMIT)
    )
    assert resolve("me/mine", ["*val-*", "*train-* *test-*"]) == [
        folder / "data/test-0.parquet",
        folder / "data/train-0.parquet",
    ]
    assert resolve("me/mine:data/test-0.parquet", ["*train-*"]) == [folder / "data/test-0.parquet"]
    assert resolve("me/mine@main:*/test-*,*.md", []) == [folder / "README.md", folder / "data/test-0.parquet"]
    model = cached(cache, "me/mine", {"config.json": b"{}"}, kind="models")
    assert snapshot("me/mine", ["*.json"], kind="model") == model


def test_a_source_reads_by_id(cache):
    cached(
        cache,
        "me/mine",
        {
            "train.jsonl": b'{"question": "Q?", "answer": "yes"}\n',
            "heldout.jsonl": b'{"question": "R?", "answer": "no"}\n',
        },
    )
    assert [SOURCES["jsonl"]("me/mine", part, None, 0)[0].question for part in ("train", "heldout")] == [
        "Q?",
        "R?",
    ]
    assert len(SOURCES["jsonl"](Path("me/mine:heldout.jsonl"), "all", None, 0)) == 1


def test_what_the_cache_does_not_hold(cache):
    with pytest.raises(
        HubError,
        match="^dataset me/mine: the hub is out of reach and the cache does not hold it .*give a local path$",
    ):
        snapshot("me/mine", ["*"])
    cached(cache, "me/mine", {"README.md": b"y"})
    with pytest.raises(NoMatch, match=r"no file matches \*.parquet; in .* there are README.md$"):
        snapshot("me/mine", ["*.parquet"])
    with pytest.raises(HubError, match="me/mine at revision v2: the hub is out of reach"):
        snapshot("me/mine", ["*"], revision="v2")


def test_what_is_asked_of_the_hub(monkeypatch, tmp_path):
    asked = []
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(
        hf, "snapshot_download", lambda repo, **how: asked.append((repo, how)) or str(tmp_path)
    )
    assert snapshot("Qwen/Qwen2-VL-2B", ["*.json", "*.safetensors"], "model", COMMIT) == tmp_path
    assert asked == [
        (
            "Qwen/Qwen2-VL-2B",
            {"repo_type": "model", "revision": COMMIT, "allow_patterns": ["*.json", "*.safetensors"]},
        )
    ]


def test_pictures_come_with_the_lines_that_name_them(monkeypatch, tmp_path):
    asked = []
    (tmp_path / "mine.jsonl").write_text('{"question": "Q?", "answer": "yes", "picture": "images/1.png"}')
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").touch()
    monkeypatch.setattr(
        hf, "snapshot_download", lambda repo, **how: asked.append(how["allow_patterns"]) or str(tmp_path)
    )
    assert SOURCES["jsonl"]("me/mine", "all", None, 0)[0].pictures == (tmp_path / "images" / "1.png",)
    (patterns,) = asked
    assert {"*.jsonl", "*.parquet", "*"} <= set(patterns)


@pytest.mark.parametrize(
    "error, words",
    [
        ("GatedRepoError", "accept the terms"),
        ("RevisionNotFoundError", "the revision is not"),
        ("RepositoryNotFoundError", "the hub has none of that name"),
        (ConnectionError, "out of reach"),
        (TimeoutError, "TimeoutError"),
    ],
)
def test_errors_in_one_line(monkeypatch, error, words):
    def fails(*args, **how):
        kind = getattr(hf.errors, error) if isinstance(error, str) else error
        raise kind.__new__(kind)

    monkeypatch.setattr(hf, "snapshot_download", fails)
    with pytest.raises(HubError, match="^dataset me/mine: ") as raised:
        snapshot("me/mine", ["*"])
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match="pip install huggingface_hub, or give a local path"):
        snapshot("me/mine", ["*"])


def test_local_files_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot", lambda *args, **how: pytest.fail("asked the hub"))
    (tmp_path / "me" / "mine").mkdir(parents=True)
    (tmp_path / "me" / "mine" / "x.parquet").touch()
    (tmp_path / "me" / "mine" / ".hidden.parquet").touch()
    assert (
        resolve("me/mine", ["*.parquet"])
        == [Path("me/mine/x.parquet")]
        == resolve("me/mine/x.parquet", ["*.json"])
    )
    assert matching(tmp_path, ["*/x.*"]) == [tmp_path / "me/mine/x.parquet"]
    for missing in ("me/other.parquet", "nowhere", "/me/mine"):
        with pytest.raises(HubError, match=f"^{missing}: no such file or folder$"):
            resolve(missing, ["*"])
