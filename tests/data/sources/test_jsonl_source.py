"""One's own questions as JSON lines with a folder of pictures, and VSR's captions: the schema, the places
of pictures, what is refused and how."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.sources.own import FIELDS
from data.sources.table import SOURCES, BadSource, open_source
from data.types import BadRow, Example

pytest.importorskip("pyarrow", reason="the helpers write parquet, too")
from layouts import png, vsr_row, write_lines

ROW = {
    "question": "Which is nearer?",
    "choices": ["the cup", "the jug"],
    "answer": "the cup",
    "pictures": ["a.png", "more/b.png"],
}


def read(path, split="all", limit=None, name="jsonl"):
    return SOURCES[name](path, split, limit, 0)


@pytest.fixture
def folder(tmp_path):
    """A folder with two pictures, for a file beside them."""
    (tmp_path / "more").mkdir()
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "more" / "b.png").write_bytes(png(2))
    return tmp_path


def test_a_line(folder):
    more = {
        "uid": "kitchen/1",
        "task": "Depth",
        "extra": {"room": "kitchen"},
        "wording": "Nearer: (A) the cup or (B) the jug?",
    }
    first, second = read(write_lines(folder / "mine.jsonl", [ROW, "", ROW | more]))
    assert (first.uid, first.question, first.choices, first.answer, first.task) == (
        "mine/0",
        "Which is nearer?",
        ("the cup", "the jug"),
        "the cup",
        "",
    )
    assert first.pictures == (folder / "a.png", folder / "more" / "b.png") and first.asked.endswith(
        "(A) the cup\n(B) the jug"
    )
    assert (second.uid, second.task, second.asked) == (
        "kitchen/1",
        "Depth",
        "Nearer: (A) the cup or (B) the jug?",
    )
    assert second.extra == {"kind": "text", "room": "kitchen"}


@pytest.mark.parametrize(
    "row, answer, kind",
    [
        ({"answer": "blue"}, "blue", "text"),
        ({"answer": 3, "kind": "number"}, "3", "number"),
        ({"answer": 0.5, "kind": "number"}, "0.5", "number"),
    ],
)
def test_free_answers_and_no_picture(folder, row, answer, kind):
    (example,) = read(write_lines(folder / "mine.jsonl", [{"question": "How?"} | row]))
    assert (example.answer, example.extra["kind"], example.choices, example.pictures) == (
        answer,
        kind,
        (),
        (),
    )


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"answer": "C"},
            (
                "answer: 'C' is not one of the 2 choices ['the cup', 'the jug']; write the choice's text, "
                "its letter, or its index from 0"
            ),
        ),
        ({"answer": "the cup or the jug"}, "is not one of the 2 choices"),
        ({"answer": 2}, "answer: '2' is not one of the 2 choices"),
        ({"answer": -1}, "answer: '-1' is not one of the 2 choices"),
        ({"answer": ["x"]}, "answer: holds list"),
        ({"answer": None}, "answer: holds NoneType"),
        ({"answer": True}, "answer: holds bool"),
        ({"question": 7}, "question: holds int, not text"),
        ({"question": ""}, "the question is empty"),
        ({"choices": "a, b"}, "choices: holds str, not a list of texts"),
        ({"choices": ["a", None]}, "choices: holds a list of NoneType, str"),
        ({"choices": ["the cup", "the cup"]}, "two choices are the same"),
        ({"choices": ["the cup"]}, "1 choices; give 2 to 26"),
        ({"kind": "number"}, "kind: is 'number'; write text or number, and nothing beside choices"),
        ({"kind": 1}, "kind: holds int"),
        (
            {"kind": "number", "choices": None, "answer": "a few"},
            "kind: is 'number', and the answer 'a few' is none; write it as one number",
        ),
        ({"extra": []}, "extra: holds list, not an object"),
        ({"image": "a.png"}, "picture: stands beside pictures"),
        ({"picture": "a.png", "image": "a.png"}, "image: and another field both say 'picture'"),
        ({"problem": "Which?"}, "problem: and another field both say 'question'"),
        ({"images": ["a.png"]}, "images: and another field both say 'pictures'"),
        ({"question": "<image>, <image>, <image>?"}, "question: has 3 marks <image>"),
        ({"choises": []}, "did you mean 'choices'?"),
        ({"picture": "a.png"}, "picture: stands beside pictures"),
        ({"pictures": 7}, "pictures: holds int, not a picture"),
        ({"pictures": ["c.png"]}, "pictures: no file c.png in"),
        ({"uid": 3.5}, "uid: holds float"),
        ({"uid": ""}, "has no uid"),
        ({"pictures": ["../a.png"]}, "pictures: '../a.png' leaves the folder"),
        ({"pictures": ["/etc/passwd"]}, "leaves the folder"),
        ({"pictures": ["..\\a.png"]}, "leaves the folder"),
        ({"pictures": ["more/../../a.png"]}, "leaves the folder"),
        ({"pictures": ["C:/a.png"]}, "leaves"),
        ({"pictures": [""]}, "leaves the folder"),
        ({"pictures": ["more"]}, "no file more in"),
        ({"pictures": ["."]}, "leaves the folder"),
        ({"pictures": ["x" * 5001]}, "is neither a file's name nor base64"),
        ({"pictures": ["data:image/png;base64,@@"]}, "is neither a file's name nor base64"),
        ({"pictures": ["a\0b"]}, "no file"),
        ({"question": "half \ud83d"}, "question: holds half a character, '\\ud83d'"),
        ({"choices": ["the cup", "\udc00"]}, "choices: holds half"),
        ({"answer": float("nan")}, "answer: holds nan"),
        ({"answer": float("inf")}, "answer: holds inf"),
    ],
)
def test_a_bad_line_is_named(folder, changed, message):
    examples = read(write_lines(folder / "mine.jsonl", [ROW, "", ROW | changed, ROW]))
    with pytest.raises(BadRow) as error:
        examples[1]
    assert message in str(error.value) and f"{folder / 'mine.jsonl'}, line 3: " in str(error.value)
    assert examples[0] != examples[2] and examples[2].answer == "the cup"


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list, not an object"),
        ("\udc80".encode("utf-8", "surrogateescape"), "is not JSON"),
        ('{"answer": "x"}', "question: is missing; add it"),
        ('{"question": "x", "anser": 1}', "answer: is missing; rename 'anser'"),
        ("[" * 100_000, "is not JSON"),
    ],
    ids=range(6),
)
def test_a_line_that_is_no_object(folder, line, message):
    (folder / "mine.jsonl").write_bytes(
        (line if isinstance(line, bytes) else line.encode()) + b"\n" + json.dumps(ROW).encode()
    )
    examples = read(folder / "mine.jsonl")
    with pytest.raises(BadRow, match="mine.jsonl, line 1: ") as error:
        examples[0]
    # the last line needs no end
    assert message in str(error.value) and examples[1].answer == "the cup"


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["the cup", "number", "a.png", "."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=4))
def test_any_line_is_an_example_or_a_bad_row(folder, values):
    examples = read(write_lines(folder / "mine.jsonl", [{"question": "Q?", "answer": "yes"} | values]))
    try:
        assert isinstance(examples[0], Example)
    except BadRow as error:
        assert str(error).startswith(f"{folder / 'mine.jsonl'}, line 1: ")


def test_the_parts_of_a_folder(folder):
    write_lines(folder / "train.jsonl", [ROW | {"uid": f"t{i}"} for i in range(3)])
    write_lines(folder / "heldout.jsonl", [ROW | {"uid": f"h{i}"} for i in range(2)])
    train, heldout = open_source("jsonl", folder, limit=None, seed=0, items=1)
    assert [e.uid for e in train] == ["t0", "t1", "t2"] and [e.uid for e in heldout["heldout"]] == ["h0"]
    assert len(read(folder)) == 5
    # the file held out is never trained on, whatever the other's name
    (folder / "train.jsonl").rename(folder / "questions.jsonl")
    assert [e.uid for e in read(folder, "train")] == ["t0", "t1", "t2"]
    (folder / "questions.jsonl").unlink()
    with pytest.raises(BadSource, match="there is heldout.jsonl, and no file to train on"):
        read(folder, "train")


def test_a_file_of_another_editor(folder):
    (folder / "mine.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n" + json.dumps(ROW).encode()
    )
    assert [e.answer for e in read(folder / "mine.jsonl")] == ["the cup", "the cup"]


def test_one_file_is_cut_by_the_names_of_its_pictures(folder):
    for i in range(100):
        (folder / f"{i}.png").write_bytes(b"never opened")
    file = write_lines(
        folder / "mine.jsonl", [ROW | {"pictures": [f"{i // 3}.png"], "uid": str(i)} for i in range(300)]
    )
    train, heldout = (read(file, part) for part in ("train", "heldout"))
    assert len(train) + len(heldout) == 300 and 3 <= len(heldout) <= 45
    assert not {e.pictures for e in train} & {e.pictures for e in heldout}
    assert len(read(file, "train", 7)) == 7


def test_a_parquet_file_is_no_jsonl(tmp_path):
    (tmp_path / "test.jsonl").write_bytes(b"PAR1 and so on")
    with pytest.raises(BadSource, match="is a parquet file, and this task reads JSON lines; name the task"):
        read(tmp_path / "test.jsonl", name="vsr")


def test_the_docs_name_every_field():
    page = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text("utf-8")
    assert all(f"| `{field}` |" in page for field in FIELDS)


# ---- VSR


def test_vsr_with_pictures_from_a_local_folder(tmp_path):
    file = write_lines(
        tmp_path / "vsr" / "test.jsonl",
        [vsr_row(1), vsr_row(2, label=0, image_link="http://images.cocodataset.org/val2017/2.jpg")],
    )
    coco = tmp_path / "coco"
    for part, number in (("train2017", 1), ("val2017", 2)):
        (coco / part).mkdir(parents=True)
        (coco / part / f"{number:012}.jpg").write_bytes(png(number))
    for data in (f"{file},{coco}", f"{file.parent},{coco}"):
        true, false = read(data, name="vsr")
        assert true.pictures == (coco / "train2017" / "000000000001.jpg",) and false.pictures == (
            coco / "val2017" / "000000000002.jpg",
        )
        assert true.asked == (
            'Please analyze the provided image. Does the statement "The person is inside the refrigerator." '
            "accurately describes what "
            "you see? Choose from (A) True or (B) False."
        )
        assert (true.letter, false.letter, true.choices, true.task) == ("A", "B", ("True", "False"), "inside")


def test_vsr_files_by_part(tmp_path):
    for name, count in (("train", 4), ("dev", 3), ("test", 2)):
        write_lines(tmp_path / f"{name}.jsonl", [vsr_row(i) for i in range(count)])
    assert [len(read(tmp_path, part, name="vsr")) for part in ("train", "heldout", "all")] == [4, 3, 2]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"label": 2}, "label: is 2, not 0 or 1"),
        ({"label": True}, "label: is True"),
        ({"caption": None}, "caption: holds"),
        ({"image": "../x.jpg"}, "leaves the folder"),
        ({}, "image: no file 000000000000.jpg in"),
    ],
)
def test_a_bad_row_of_vsr(tmp_path, changed, message):
    with pytest.raises(BadRow, match="line 1") as error:
        read(write_lines(tmp_path / "test.jsonl", [vsr_row(**changed)]), name="vsr")[0]
    assert message in str(error.value)


def test_a_folder_of_pictures_that_is_not_there(tmp_path):
    with pytest.raises(BadSource, match="nowhere: no such folder; it should hold the pictures"):
        read(f"{write_lines(tmp_path / 'test.jsonl', [vsr_row()])},{tmp_path / 'nowhere'}", name="vsr")
