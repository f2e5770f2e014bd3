"""Data in the forms that people have: other names of fields, numbers, letters, indices, arrays, gzip, base64,
git-lfs pointers, marks in the question, and files of one name in two folders."""

import base64
import gzip
import json
import sys
from pathlib import Path

import pytest

from data import check
from data.chat import Chat
from data.images import open_picture
from data.sources import SOURCES, open_source
from data.templates import IMAGE
from data.types import BadPicture, BadRow, BadSource, Example

sys.path.insert(0, str(Path(__file__).parent))
from layouts import png, shown, write_lines

TINY = Path(__file__).parents[3] / "models" / "tiny"
ROW = {"question": "Which?", "choices": ["the cup", "the jug"], "answer": "the jug"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def only(file, task="jsonl"):
    (example,) = SOURCES[task](file, "all", None, 0)
    return example


@pytest.mark.parametrize("answer", ["the jug", "The jug.", "B", "(B)", "b", "(B) the jug", 1])
def test_an_answer_as_text_letter_or_index(tmp_path, answer):
    example = only(write_lines(tmp_path / "x.jsonl", [ROW | {"answer": answer}]))
    assert (example.answer, example.letter) == ("the jug", "B")


def test_a_number_that_is_a_choice_is_no_index(tmp_path):
    row = {"question": "How many?", "choices": ["2", "1", "0"], "answer": 1}
    assert only(write_lines(tmp_path / "x.jsonl", [row])).answer == "1"


@pytest.mark.parametrize(
    "choices", [["A. the cup", "B. the jug"], ["(A) the cup", "(B) the jug"], ["A: the cup", "B: the jug"]]
)
def test_choices_that_carry_their_letters(tmp_path, choices):
    for answer in (choices[1], "B", "the jug"):
        example = only(write_lines(tmp_path / "x.jsonl", [ROW | {"choices": choices, "answer": answer}]))
        assert example.choices == ("the cup", "the jug") and example.answer == "the jug"


def test_other_names_of_fields(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    row = {
        "problem": "Which?",
        "options": ["a cup", "a jug"],
        "solution": "<answer> B </answer>",
        "image": "a.png",
    }
    example = only(write_lines(tmp_path / "x.jsonl", [row]))
    assert (example.question, example.answer) == ("Which?", "a jug") and example.pictures == (
        tmp_path / "a.png",
    )


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_a_json_array_and_gzip(tmp_path, indent, packed):
    text = json.dumps([ROW, ROW | {"answer": "C"}], indent=indent).encode()
    file = tmp_path / ("x.json.gz" if packed else "x.json")
    file.write_bytes(gzip.compress(text) if packed else text)
    for data in (file, tmp_path):
        examples = SOURCES["jsonl"](data, "all", None, 0)
        assert len(examples) == 2 and examples[0].answer == "the jug"
        with pytest.raises(BadRow, match="x.json(.gz)?, item 2: answer"):
            examples[1]


def test_packed_lines(tmp_path):
    lines = "\n".join(json.dumps(ROW | {"uid": str(i)}) for i in range(3)) + "\n"
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert [example.uid for example in SOURCES["jsonl"](tmp_path, "all", None, 0)] == ["0", "1", "2"]


def test_a_picture_as_base64_or_data_url(tmp_path):
    text = base64.b64encode(png()).decode()
    rows = [ROW | {"picture": text}, ROW | {"pictures": [f"data:image/png;base64,{text}"]}]
    for example in SOURCES["jsonl"](write_lines(tmp_path / "x.jsonl", rows), "all", None, 0):
        assert open_picture(example.pictures[0], name="x").size == open_picture(png(), name="x").size


@pytest.mark.parametrize("task, name", [("jsonl", "x.jsonl"), ("geoqa", "x.parquet")])
def test_a_git_lfs_pointer_is_named(tmp_path, task, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(BadSource, match="is a git-lfs pointer; fetch the file with `git lfs pull`"):
        SOURCES[task](tmp_path / name, "all", None, 0)
    (tmp_path / "a.png").write_bytes(POINTER)
    for picture in (POINTER, tmp_path / "a.png"):
        with pytest.raises(BadPicture, match="is a git-lfs pointer, no picture"):
            open_picture(picture, name="x")


@pytest.mark.parametrize(
    "answer, text, kind", [(3, "3", "number"), (2.5, "2.5", "number"), ("3/2", "3/2", "number")]
)
def test_numbers_in_a_parquet_column(tmp_path, answer, text, kind):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"images": [shown(1)], "problem": ["<image>How many?"], "answer": [answer]}
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    example = only(tmp_path / "train.parquet", "geometry3k")
    assert (example.answer, example.extra["kind"]) == (text, kind)


def test_an_answer_of_400_digits_is_one_bad_row(tmp_path, capsys):
    file = write_lines(
        tmp_path / "x.jsonl",
        [{"question": "q?", "answer": 10**399, "kind": "number"}, {"question": "q?", "answer": 3}],
    )
    assert check.main([str(file)]) == 1
    assert "line 1: kind: is 'number'" in capsys.readouterr().out


def test_a_folder_of_save_to_disk_says_how_to_convert_it(tmp_path):
    (tmp_path / "data-00000-of-00001.arrow").touch()
    with pytest.raises(BadSource, match="written by datasets.save_to_disk; .*load_from_disk"):
        SOURCES["geoqa"](tmp_path, "all", None, 0)


def test_files_of_one_name_in_two_folders_have_their_own_uids(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "test.jsonl", [ROW, ROW])
    uids = [example.uid for example in SOURCES["jsonl"](tmp_path, "all", None, 0)]
    assert uids == ["a/test.jsonl/0", "a/test.jsonl/1", "b/test.jsonl/0", "b/test.jsonl/1"]


def test_a_message_quotes_at_most_a_line(tmp_path):
    file = write_lines(
        tmp_path / "x.jsonl", [ROW | {"answer": "x" * 5000, "choices": ["y" * 900, "z" * 900]}]
    )
    with pytest.raises(BadRow) as error:
        SOURCES["jsonl"](file, "all", None, 0)[0]
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("gold", ["<answer>3</answer><answer>4</answer>", "x" * 2001, "a <answer> b"])
def test_a_right_answer_that_cannot_be_said_is_named(tmp_path, capsys, gold):
    file = write_lines(tmp_path / "x.jsonl", [{"question": "q?", "answer": gold}])
    assert check.main([str(file)]) == 1
    assert "written between the answer tags, is not right" in capsys.readouterr().out


def test_each_picture_goes_to_its_mark():
    """One mark for each picture: there; marks at the start only, or none: where the template puts them."""
    chat = Chat(TINY, template="shapes")
    pictures = (png(1, (56, 56)), png(2, (56, 56)))

    def text(question, pictures=pictures):
        return (
            chat.prompt(Example("u", question, (), "3", pictures=pictures))
            .text.replace("<|vision_start|>", "")
            .replace("<|vision_end|>", "")
        )

    assert text("Compare <image> with <image>.").startswith(f"User: Compare {IMAGE} with {IMAGE}.")
    assert text("Compare them.").startswith(f"{IMAGE}{IMAGE}User: Compare them.")
    assert text("What does <image> mean?", ()).startswith("User: What does <image> mean?")
    placed = chat.prompt(Example("u", "Compare <image> with <image>.", (), "3", pictures=pictures))
    ahead = chat.prompt(Example("u", "Compare  with .", (), "3", pictures=pictures))
    assert (placed.tokens == chat.image_token).sum() == (ahead.tokens == chat.image_token).sum() > 0
    assert (placed.patches == ahead.patches).all() and placed.tokens[0] != ahead.tokens[0]


def test_without_a_picture_the_papers_prompt_has_no_mark():
    chat = Chat(TINY, template="visualthinker")
    alone = chat.prompt(Example("u", "What is 1 + 2?", (), "3"))
    assert (
        alone.text.startswith("A conversation between User")
        and chat.encode(alone.text) == alone.tokens.tolist()
    )
    seen = chat.prompt(Example("u", "Which?", (), "3", pictures=(png(1, (56, 56)),)))
    assert seen.text.startswith(f"<|vision_start|>{IMAGE}<|vision_end|><image>A conversation")


def test_marks_in_files(tmp_path):
    (tmp_path / "a.png").write_bytes(png())

    def asked(question, names):
        return only(
            write_lines(tmp_path / "x.jsonl", [{"question": question, "answer": "3", "pictures": names}])
        ).question

    assert asked("<image>Which?", ["a.png"]) == asked("<image>\nWhich?", ["a.png"]) == "Which?"
    assert asked("Compare <image> and <image>", ["a.png", "a.png"]) == "Compare <image> and <image>"
    assert asked("Which?", ["a.png"]) == "Which?"
    with pytest.raises(BadRow, match="question: has 2 marks <image>, and there are 1 pictures"):
        asked("Compare <image> and <image>", ["a.png"])


def test_a_small_set_is_held_out_by_its_pictures(tmp_path, capsys):
    """At least 8 questions, or half of them; no picture on both sides; all on one picture: said."""
    for name in range(12):
        (tmp_path / f"{name}.png").write_bytes(png(name))

    def parts(rows):
        file = write_lines(tmp_path / "x.jsonl", rows)
        return [list(SOURCES["jsonl"](file, split, None, 0)) for split in ("train", "heldout")]

    def rows(count, pictures):
        return [{"question": f"q{i}?", "answer": "3", "picture": f"{i % pictures}.png"} for i in range(count)]

    for count, pictures, least in ((30, 10, 8), (10, 10, 5), (30, 12, 8), (20, 3, 6), (100, 12, 8)):
        train, heldout = parts(rows(count, pictures))
        assert len(train) + len(heldout) == count and least <= len(heldout) <= max(8, count // 2)
        assert not {e.pictures for e in train} & {e.pictures for e in heldout}
    train, heldout = parts(rows(30, 1))
    assert len(train) == 30 and not heldout
    open_source("jsonl", tmp_path / "x.jsonl", limit=None, seed=0, items=200)
    assert "held out: only 0 questions" in "".join(capsys.readouterr())
