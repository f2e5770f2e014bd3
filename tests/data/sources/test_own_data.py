"""One's own questions in every form: files, answers, choices, messages, columns, marks, shares, uids.

Each table holds the members of one kind; a law holds for all of them.
"""

import base64
import bz2
import datetime
import gzip
import itertools
import json
import lzma
import sys
import zipfile
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
from data import check
from data.chat import Chat
from data.sources import SOURCES, open_source
from data.sources.own import FIELDS
from data.sources.table import columns_of, open_split
from data.templates import TEMPLATES
from data.types import BadExample, BadRow, BadSource, Example
from grpo.config import ConfigError, parse
from grpo.evaluation.scores import differences, read_completion
from grpo.monitor import report

pyarrow = pytest.importorskip("pyarrow", reason="reading parquet is an optional extra")
import pyarrow.parquet

sys.path.insert(0, str(Path(__file__).parent))
from layouts import cvbench_row, mathvista_row, png, sat_row, shown, vsr_row, write, write_lines

ROOT = Path(__file__).parents[3]
ROW = {"question": "Which?", "choices": ["the cup", "the jug"], "answer": "the jug"}
LAW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path, split="all", task="jsonl", **options):
    return open_split(task, path, split, None, 0, **options)


def as_parquet(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def only(tmp_path, row, **options):
    (example,) = read(write_lines(tmp_path / "x.jsonl", [row]), **options)
    return example


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(ord(name)))
    return tmp_path


# ---- files

TWO = [ROW, ROW | {"answer": 0}]
LINES = "".join(json.dumps(row) + "\n" for row in TWO)
FILES = {
    "x.jsonl": LINES.encode(),
    "no_end.jsonl": LINES.strip().encode(),
    "gaps.jsonl": LINES.replace("\n", "\n\n \n").encode(),
    "mark.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "windows.jsonl": LINES.replace("\n", "\r\n").encode(),
    "old_mac.jsonl": LINES.replace("\n", "\r").encode(),
    "utf16le.jsonl": LINES.encode("utf-16"),
    "utf16_no_mark.jsonl": LINES.encode("utf-16-le"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "utf16be.jsonl": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "array.json": json.dumps(TWO).encode(),
    "indented.json": json.dumps(TWO, indent=2).encode(),
    "array_mark.json": b"\xef\xbb\xbf \n" + json.dumps(TWO, indent=1).encode(),
    "array_utf16.json": json.dumps(TWO, indent=2).encode("utf-16"),
    "called_lines.jsonl": json.dumps(TWO, indent=2).encode(),
    "objects.json": "\n".join(json.dumps(row, indent=2) for row in TWO).encode(),
    "CAPITALS.JSONL": LINES.encode(),
}
FILES |= {f"{name}.gz": gzip.compress(data) for name, data in FILES.items()}


@pytest.mark.parametrize("name", FILES)
def test_every_form_of_a_file_reads_alike(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    for path in (tmp_path / name, tmp_path):
        found = read(path)
        assert [(e.question, e.choices, e.answer) for e in found] == [
            ("Which?", ("the cup", "the jug"), answer) for answer in ("the jug", "the cup")
        ]


def test_every_file_of_a_folder_is_read_whatever_its_form(tmp_path):
    for number, name in enumerate(("a.jsonl", "b.jsonl.gz", "c.json", "d.json.gz", "more/E.JSONL")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = json.dumps(ROW | {"question": str(number)}).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    as_parquet(tmp_path / "a.parquet", [ROW | {"question": "5"}])
    found = read(tmp_path)
    assert sorted(e.question for e in found) == list("012345") and len({e.uid for e in found}) == 6


def zipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as file:
        file.writestr("x.jsonl", LINES)
    return (tmp_path / "packed.zip").read_bytes()


BROKEN = {
    "array without its end": (
        b'[\n{"question": "Q?", "answer": 1},\n{"question": "Q?", "answer": 1}\n',
        "array",
    ),
    "a comma too many": (b'[{"question": "Q?", "answer": 1},\n{"question": "Q?", "answer": 1},\n]', "line 3"),
    "something between the items": (b'[{"question": "Q?"},\n"R?", {"question": "Q?"}]', "line 2"),
    "half a gzip file": (gzip.compress(LINES.encode() * 99)[:60], "cannot be read"),
    "half a UTF-16 file": (LINES.encode("utf-16")[:-1], "cannot be read"),
    "zip": (zipped, r"compressed \(zip\); unpack it"),
    "bzip2": (bz2.compress(LINES.encode()), "compressed"),
    "xz": (lzma.compress(LINES.encode()), "compressed"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
    "half a parquet file": (b"PAR1 and so on", "cannot be read as parquet"),
    "a list of texts": (b'[\n"Q?",\n"R?"\n', "array"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_with_a_mistake_is_one_message(tmp_path, kind):
    data, words = BROKEN[kind]
    data = data(tmp_path) if callable(data) else data
    (tmp_path / "x.jsonl").write_bytes(data)
    with pytest.raises(BadSource, match=words) as error:
        read(tmp_path / "x.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'x.jsonl'}: ") and len(str(error.value)) < 400


def bad(examples, number):
    with pytest.raises(BadRow) as error:
        examples[number]
    return error.value


def test_rows_inside_another_object_and_tables_are_named(tmp_path):
    for indent in (None, 1):
        (tmp_path / "x.json").write_text(json.dumps({"data": [ROW, ROW]}, indent=indent))
        said = str(bad(read(tmp_path / "x.json"), 0))
        assert "this object holds others" in said and "write the rows alone, as one array" in said
        # rows by their ids are read, as MathVista and DynaMath have them
        (tmp_path / "x.json").write_text(json.dumps({"1": ROW, "2": ROW}, indent=indent))
        assert [example.question for example in read(tmp_path / "x.json")] == [ROW["question"]] * 2
    (tmp_path / "x.csv").write_text("question,answer\nQ?,1\n")
    with pytest.raises(BadSource, match=r'is a table; .*pandas.read_csv\("x.csv"\).to_json\("x.jsonl"'):
        read(tmp_path / "x.csv")


def test_a_mistake_within_an_item_of_an_array_is_a_bad_row(tmp_path):
    text = json.dumps([*TWO, *TWO], indent=2)
    (tmp_path / "x.json").write_text(text.replace('",', '"', 1))
    found = read(tmp_path / "x.json")
    assert len(found) == 4 and "item 1: is not JSON" in str(bad(found, 0)) and found[3].question


@pytest.mark.parametrize("text", ["", "\n\n", "[]", "[\n]"])
def test_a_file_without_rows(tmp_path, text, capsys):
    (tmp_path / "x.json").write_text(text)
    assert len(read(tmp_path / "x.json")) == 0
    assert evaluate.main(["--task", "jsonl", "--data", str(tmp_path / "x.json")]) == 2
    assert "has no questions" in capsys.readouterr().err
    with pytest.raises(BadSource, match="no training example"):
        open_source("jsonl", tmp_path / "x.json", limit=None, seed=0, items=4)


@pytest.mark.parametrize("task", ["jsonl", "geoqa"])
def test_a_folder_of_save_to_disk_is_named(tmp_path, task):
    disk = tmp_path / "disk"
    disk.mkdir()
    for name in ("data-00000-of-00001.arrow", "state.json", "dataset_info.json"):
        (disk / name).write_text("{}")
    for path in (disk, disk / "data-00000-of-00001.arrow"):
        with pytest.raises(BadSource, match=r"load_from_disk\(\"\S*disk\"\).to_parquet\(\"disk.parquet\"\)"):
            read(path, task=task)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(BadSource, match=r'load_from_disk\("\S*"\)\["train"\].to_parquet'):
        read(tmp_path, task=task)


def test_a_key_given_twice_is_not_the_last_one(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "Q?", "answer": "yes", "answer": "no"}\n' + LINES)
    found = read(tmp_path / "x.jsonl")
    assert "the key 'answer' is given twice" in str(bad(found, 0)) and found[1].answer == "the jug"


# ---- answers and choices

PAIR = ["a cat", "a dog"]
ANSWERS = [
    (PAIR, "a dog", 1), (PAIR, "A dog", 1), (PAIR, "B", 1), (PAIR, "b", 1), (PAIR, "B.", 1), (PAIR, "(B)", 1),
    (PAIR, "(B) a dog", 1), (PAIR, "B. a dog", 1), (PAIR, 1, 1), (PAIR, "1", 1), (PAIR, 0, 0), (PAIR, "0", 0),
    (PAIR, 1.0, 1), (PAIR, "<answer> B </answer>", 1), (["2", "1", "0"], 1, 1), ([2, 1, 0], "2", 0),
    ([0.5, 1], 0.5, 0), ([10, 20, 30], 2, 2), (["A. a cat", "B. a dog"], "B. a dog", 1),
    (["A. <image>", "B. <image>"], "B", 1), ({"A": "a cat", "B": "a dog"}, "B", 1),
    ({"B": "a dog", "A": "a cat", "C": None}, "a dog", 1), ({"(a)": "a cat", "(b)": "a dog"}, 1, 1),
    (["a) a cat", "b) a dog"], "B", 1), (["1. a cat", "2. a dog"], 1, 0), (["1. a cat", "2. a dog"], "2.", 1),
    (["1. a cat", "2. a dog"], 0, "is not one of"), (["1.5", "2.7"], "2.7", 1),
    (["B. A.", "G. B."], 0, 0), (["1. 5 cm", "2. 1 cm"], "1", "is not one of"), (["1. 5", "2. 6"], "6", 1),
    ({"1": "a cat", "2": "a dog"}, "2", 1), ({"A": 5, "B": 6}, "5", 0),
    ({"A": "x", "B": "x"}, "A", "the same"), (list("zyxwvutsrqponmlkjihgfedcba"), "z", 0),
    ({"A": ["x"], "B": "y"}, "A", "a list of list, str"), ({}, "x", ""),
    ({"A": "", "B": "y"}, "B", "is empty"), ({str(i): f"c{i}" for i in range(1, 13)}, "11", 10),
    (["U. S.", "U. K."], "U. K.", 1), (["a cat", "a dog"], "The answer is B.", 1), ([1.5, 2], 2.0, 1),
    (PAIR, 2, "is not one of the 2 choices"), (PAIR, -1, "is not one of"), (PAIR, "2", "is not one of"),
    (PAIR, 0.5, "is not one of"), (PAIR, "A or B", "is not one of"), (PAIR, "", "is not one of"),
    (["12 cm", "5 cm"], "1", "is not one of"), (PAIR, True, "holds bool"), (PAIR, None, "holds NoneType"),
    (PAIR, ["a cat"], "holds list"), (PAIR, {"A": 1}, "holds dict"), (PAIR, 10**400, "is not one of"),
    ([["a cat"], ["a dog"]], "a cat", "holds a list of list"), ([True, False], "A", "holds a list of bool"),
    ([float("nan"), "x"], "x", "holds a list of float, str"), (["a", None], "a", "holds a list of NoneType"),
    ({"A": "a cat", "C": "a dog"}, "A", "not the letters"), ({"cat": "a", "dog": "b"}, "cat", "not the"),
    ("a cat, a dog", "a cat", "holds str"), (["x", "x"], "x", "two choices are the same"),
    (["x"], "x", "1 choices"), (["x", ""], "x", "a choice is empty"),
]  # fmt: skip


@pytest.mark.parametrize("choices, answer, wanted", ANSWERS)
def test_a_right_choice_in_every_form(folder, choices, answer, wanted):
    pictures = {"pictures": ["a.png", "b.png"]} if "<image>" in str(choices) else {}
    row = {"question": "Which?", "choices": choices, "answer": answer} | pictures
    (folder / "x.jsonl").write_text(json.dumps(row))
    if wanted == "":
        assert read(folder / "x.jsonl")[0].choices == ()
    elif isinstance(wanted, int):
        assert read(folder / "x.jsonl")[0].choices.index(read(folder / "x.jsonl")[0].answer) == wanted
    else:
        assert wanted in str(bad(read(folder / "x.jsonl"), 0))


@pytest.mark.parametrize(
    "value, kind, answer, as_kind",
    [
        (3, pyarrow.int64(), "3", "number"),
        (3, pyarrow.uint8(), "3", "number"),
        (3.0, pyarrow.float64(), "3", "number"),
        (0.1, pyarrow.float32(), "0.1", "number"),
        (2.5, pyarrow.float16(), "2.5", "number"),
        (1e-7, pyarrow.float64(), "1e-07", "number"),
        (Decimal("1.50"), pyarrow.decimal128(9, 2), "1.50", "number"),
        ("3", pyarrow.string(), "3", "text"),
        ("three", pyarrow.large_string(), "three", "text"),
        ("three", pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), "three", "text"),
        (True, pyarrow.bool_(), "holds bool", None),
        (None, pyarrow.int64(), "holds NoneType", None),
        (float("nan"), pyarrow.float64(), "holds nan", None),
        (float("inf"), pyarrow.float32(), "holds inf", None),
        (datetime.date(2024, 1, 2), pyarrow.date32(), "holds date", None),
        (datetime.datetime(2024, 1, 2), pyarrow.timestamp("us"), "holds datetime", None),
        (b"3", pyarrow.binary(), "holds bytes", None),
        (["3"], pyarrow.list_(pyarrow.string()), "holds list", None),
    ],
)
@pytest.mark.parametrize("task", ["jsonl", "geometry3k"])
def test_a_column_of_answers_of_every_type(tmp_path, value, kind, answer, as_kind, task):
    columns = {"problem": ["How many?"], "answer": pyarrow.array([value], kind), "images": [shown(1)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    found = read(tmp_path / "x.parquet", task=task)
    if as_kind is None:
        assert answer in str(bad(found, 0))
        return
    assert found[0].answer == answer and found[0].pictures == (png(1),)
    if task == "jsonl":
        assert found[0].extra == {"kind": as_kind}


@pytest.mark.parametrize("digits", [20, 399, 5000])
@pytest.mark.parametrize("array", [False, True])
def test_an_integer_of_many_digits_is_text(tmp_path, digits, array):
    text = f'{{"question": "Q?", "answer": {"1" * digits}}}'
    (tmp_path / "x.json").write_text(f"[{text},\n{text}]" if array else text)
    assert read(tmp_path / "x.json")[0].answer == "1" * digits


@pytest.mark.parametrize(
    "name, words",
    [
        ("A.PNG", "there is a.png; correct the name"),
        ("sub", "it is a folder; name one picture in it"),
        ("c.png", "put it there, or correct the name"),
        ("https://a.b/c.png", "download it, and name pictures from there"),
        ("file:///a.png", "leaves the folder"),
        ("iVBORw0KGgo!", "is neither a file's name nor base64"),
        ("data:image/svg+xml,<svg/>", "is neither a file's name nor base64"),
        ("", "leaves the folder"),
    ],
)
def test_a_picture_that_cannot_be_opened_says_what_to_do(folder, name, words):
    (folder / "sub").mkdir()
    assert words in str(bad(read(write_lines(folder / "x.jsonl", [ROW | {"picture": name}])), 0))


def test_base64_of_a_small_picture_and_in_lines(folder):
    small = base64.b64encode(png(size=(1, 1))).decode()
    lines = "\n".join(small[at : at + 20] for at in range(0, len(small), 20))
    assert len(small) < 255
    for text in (small, lines, f"data:image/png;base64,{small}"):
        assert only(folder, ROW | {"picture": text}).pictures == (png(size=(1, 1)),)


# ---- JSON and parquet follow one schema

ALIKE = [
    {"question": "Q?", "answer": "yes"},
    {"problem": "Q?", "options": ["x", "y"], "solution": "<answer>B</answer>", "image": "a.png"},
    {"prompt": "Q?", "answer": 4, "kind": None, "images": ["a.png", "b.png"], "task": "Count", "uid": "u1"},
    {"question": "Compare <image> and <image>.", "answer": 0.25, "pictures": ["a.png", "b.png"], "uid": 7},
    {
        "question": "Q?",
        "choices": {"A": "x", "B": "y", "C": "z"},
        "answer": "C",
        "extra": {"room": "kitchen"},
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Q?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "<answer>7</answer>"}]},
        ],
        "images": ["a.png"],
        "answer": None,
    },
    {"prompt": [{"role": "user", "content": "<image>Q?"}], "solution": "3", "images": ["b.png"]},
]


@pytest.mark.parametrize("row", ALIKE, ids=range(len(ALIKE)))
def test_a_row_is_the_same_in_json_and_parquet(folder, row):
    (table,) = read(as_parquet(folder / "x.parquet", [row]))
    (lines,) = read(write_lines(folder / "x.jsonl", [row]))
    assert table == lines and lines.pictures == tuple(
        folder / f"{name}.png" for name in "ab" if f"{name}.png" in json.dumps(row)
    )


def test_pictures_of_a_table_as_bytes_struct_path_or_list(folder):
    data = png(9)
    for value, wanted in (
        (data, (data,)),
        ({"bytes": data, "path": "gone.png"}, (data,)),
        ({"bytes": None, "path": "a.png"}, (folder / "a.png",)),
        ([{"bytes": data, "path": None}] * 2, (data, data)),
        ([data], (data,)),
        ("a.png", (folder / "a.png",)),
        (["a.png", "b.png"], (folder / "a.png", folder / "b.png")),
        (base64.b64encode(data).decode(), (data,)),
        ([], ()),
    ):
        for column in ("picture", "pictures", "image", "images"):
            (found,) = read(
                as_parquet(folder / "x.parquet", [{"question": "Q?", "answer": "1", column: value}])
            )
            assert found.pictures == wanted
    for value, words in ((b"", "no bytes"), ({"bytes": None, "path": None}, "no bytes"), (7, "holds int")):
        file = as_parquet(folder / "x.parquet", [{"question": "Q?", "answer": "1", "image": value}])
        assert f"row 0: picture: holds {words}".replace("holds holds", "holds") in str(bad(read(file), 0))


def test_columns_of_a_table_that_are_no_fields_are_named_before_a_row_is_read(tmp_path):
    for row, words in (
        ({"question": "Q?", "answr": "1"}, "no column answer; it has question, answr; name it with"),
        ({"question": "Q?", "answer": "1", "choises": ["x"]}, "choises: is no field; did you mean 'choices'"),
        ({"question": "Q?", "answer": "1", "source": "here"}, "source: is no field"),
    ):
        with pytest.raises(BadSource, match=words):
            read(as_parquet(tmp_path / "x.parquet", [row]))


# ---- the setting columns

MAPPED = [
    ({"q": "Q?", "a": "1"}, {"question": "q", "answer": "a"}),
    ({"q": "Q?", "a": "1", "id": 3, "source": "web"}, {"question": "q", "answer": "a"}),
    ({"q": "Q?", "a": "1", "id": 3}, {"question": "q", "answer": "a", "uid": "id"}),
    ({"question": "other", "q": "Q?", "answer": "1"}, {"question": "q"}),
    ({"problem": "other", "q": "Q?", "answer": "1"}, {"question": "q"}),
    ({"problem": "Q?", "solution": "x", "label": 1}, {"answer": "label"}),
    (
        {"q": "Q?", "reward_model": {"style": "rule", "ground_truth": "1"}},
        {"question": "q", "answer": "reward_model.ground_truth"},
    ),
    ({"q": [{"role": "user", "content": "Q?"}], "answer": "1"}, {"question": "q"}),
    ({"q": "Q?", "answer": "1", "solution": "so it is one"}, {"question": "q", "answer": "answer"}),
    ({"q": "Q?", "answer": "1", "image": None, "images": [], "choices": []}, {"question": "q"}),
    ({"q": "Q?", "a.b": "1"}, {"question": "q", "answer": "a.b"}),
    ({"chat": [{"role": "user", "content": "Q?"}], "answer": "1"}, {"messages": "chat"}),
    ({"chat": [{"role": "user", "content": "Q?"}], "question": "x", "answer": "1"}, {"messages": "chat"}),
]


@pytest.mark.parametrize("row, columns", MAPPED, ids=range(len(MAPPED)))
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_columns_name_the_fields(tmp_path, row, columns, form):
    file = tmp_path / f"x.{form}"
    as_parquet(file, [row]) if form == "parquet" else write_lines(file, [row])
    (example,) = read(file, columns=columns)
    assert (example.question, example.answer) == ("Q?", "1")
    assert example.uid == ("3" if "uid" in columns else "x/0")


@pytest.mark.parametrize(
    "row, columns, words",
    [
        (ROW, {"qestion": "x"}, "columns: no field 'qestion'; there are question, answer"),
        ({"q": "Q?", "answer": "1"}, {"q": "question"}, "write {question: q}, our name first"),
        (ROW, {"question": "x", "wording": "x"}, "columns: 'x' is named for question and wording"),
        (ROW, {"question": "x"}, "no column 'x'|x: is missing, and columns names it for question"),
        ({"q": "Q?", "answr": "1"}, {"question": "q"}, "answer|rename 'answr'"),
        ({"q": "Q?", "answer": "x", "choises": ["x", "y"]}, {"question": "q"}, "did you mean 'choices'"),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_wrong_columns_are_named(tmp_path, row, columns, words, form):
    file = tmp_path / f"x.{form}"
    as_parquet(file, [row]) if form == "parquet" else write_lines(file, [row])
    with pytest.raises((BadRow, BadSource), match=words):
        read(file, columns=columns)[0]


def test_columns_of_the_other_sources(tmp_path):
    row = {"picture": shown(1)[0], "text": "How many?", "solution": "<answer>3</answer>"}
    file = as_parquet(tmp_path / "x.parquet", [row] * 40)
    columns = {"image": "picture", "problem": "text"}
    found = read(file, task="geoqa", columns=columns)
    assert (found[0].question, found[0].answer, found[0].pictures) == ("How many?", "3", (png(1),))
    with pytest.raises(BadSource, match="no column txt"):
        read(file, task="geoqa", columns=columns | {"problem": "txt"})
    with pytest.raises(BadSource, match="columns: for tasks that read files, and 'shapes' reads none"):
        read(None, task="shapes", split="train", columns=columns)
    row = {"caption" if name == "text" else name: value for name, value in vsr_row(1).items()}
    (tmp_path / "000000000001.jpg").write_bytes(png(1))
    row["claim"] = row.pop("caption")
    file = write_lines(tmp_path / "test.jsonl", [row])
    assert read(file, task="vsr", columns={"caption": "claim"})[0].question.startswith("The person")


def test_the_settings_columns_and_heldout():
    cfg = parse.load("shapes", ["columns={question: problem}", "columns.answer=label", "heldout=0.1"])
    assert cfg.columns == {"question": "problem", "answer": "label"} and cfg.heldout == 0.1
    assert columns_of("{question: problem}") == {"question": "problem"} and columns_of("{}") == {}
    for wrong in (
        "columns=problem",
        "columns={question: 3}",
        "columns={question: [a]}",
        "heldout=1",
        "heldout=-0.1",
        "heldout=x",
    ):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            parse.load("shapes", [wrong])
    for wrong in ("question", "{question: 3}", "{", "[a]"):
        with pytest.raises(ValueError, match="columns: write {our name: the file's}"):
            columns_of(wrong)


# ---- messages


def turns(*contents, roles=("user", "assistant")):
    return [{"role": role, "content": content} for role, content in zip(itertools.cycle(roles), contents)]


TEXT = {"type": "text", "text": "Q?"}
MESSAGES = [
    ({"messages": turns("Q?", "1")}, "Q?", ""),
    ({"messages": turns("Q?", "<think>x</think> <answer> 1 </answer>")}, "Q?", ""),
    ({"prompt": turns("Q?"), "answer": "1"}, "Q?", ""),
    ({"messages": turns("Q?", "so it is one"), "solution": "<answer>1</answer>"}, "Q?", ""),
    ({"messages": {"role": "user", "content": "Q?"}, "answer": "1"}, "Q?", ""),
    (
        {"messages": turns("Be brief.", "Q?", "1", roles=("system", "user", "assistant"))},
        "Be brief.\n\nQ?",
        "",
    ),
    (
        {
            "conversations": [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "1"}],
            "image": "a.png",
        },
        "Q?",
        "a",
    ),
    ({"messages": turns("<image>Q?", "1"), "images": ["a.png"]}, "Q?", "a"),
    (
        {"messages": turns("Is <image> like <image>?", "1"), "images": ["a.png", "b.png"]},
        "Is <image> like <image>?",
        "ab",
    ),
    ({"messages": turns("Q?", "1"), "images": ["a.png", "b.png"]}, "Q?", "ab"),
    ({"messages": turns([{"type": "image"}, TEXT], "1"), "images": ["a.png"]}, "Q?", "a"),
    ({"messages": turns([{"type": "image", "image": "a.png"}, TEXT], "1")}, "Q?", "a"),
    ({"messages": turns([{"image": "a.png"}, {"text": "Q?"}], "1")}, "Q?", "a"),
    ({"messages": turns([{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT], "1")}, "Q?", "a"),
    ({"messages": turns([{"type": "input_text", "text": "Q?"}], [{"type": "text", "text": "1"}])}, "Q?", ""),
    (
        {
            "messages": turns([TEXT, {"type": "image", "image": "a.png"}, TEXT, {"type": "image"}], "1"),
            "images": ["b.png"],
        },
        "Q?<image>Q?<image>",
        "ab",
    ),
    ({"messages": turns(["Q?"], "1")}, "Q?", ""),
]


@pytest.mark.parametrize("row, question, pictures", MESSAGES, ids=range(len(MESSAGES)))
def test_messages_are_a_question(folder, row, question, pictures):
    example = only(folder, row)
    assert (example.question, example.answer) == (question, "1")
    assert example.pictures == tuple(folder / f"{name}.png" for name in pictures)
    last = row.get("messages", [{}])
    last = last[-1] if isinstance(last, list) else {}
    if last.get("role") == "assistant" and isinstance(last["content"], str):
        assert example.extra["documents"] == (last["content"],)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": turns("Q?")}, "answer: is missing; add it, or end the messages"),
        ({"messages": turns("Q?", "1", "R?", "2")}, "have turns of user, assistant, user; one row asks one"),
        ({"messages": []}, "no turn of the user"),
        ({"messages": turns("1", roles=("assistant",))}, "no turn of the user"),
        ({"messages": "Q?"}, "hold 'Q\\?', not a turn"),
        ({"messages": ["Q?"]}, "hold 'Q\\?', not a turn"),
        ({"messages": [{"content": "Q?"}]}, "have a turn with the keys \\['content'\\]"),
        ({"messages": [{"role": "user", "content": None}]}, "have a turn with the keys"),
        ({"messages": [{"role": "tool", "content": "x"}, *turns("Q?", "1")]}, "have turns of tool, user"),
        ({"messages": turns([{"type": "video", "video": "x"}], "1")}, "a part of type 'video'"),
        (
            {"messages": turns([{"type": "text", "text": 3}], "1")},
            "a part of type 'text' that cannot be read",
        ),
        ({"messages": turns([{"type": "text", "text": "Q?", "image": "a.png"}], "1")}, "cannot be read"),
        ({"messages": turns([7], "1")}, "cannot be read"),
        ({"messages": turns("<image>Q?", "1")}, "1 places for pictures, and the row has 0"),
        ({"messages": turns("<image>Q?", "1"), "images": ["a.png", "b.png"]}, "1 places .* has 2"),
        (
            {"messages": turns([{"type": "image", "image": "a.png"}, TEXT], "1"), "images": ["a.png"]},
            "0 places",
        ),
        (
            {"messages": turns("Q?", [{"type": "image", "image": "a.png"}])},
            "a picture in the assistant's turn",
        ),
        ({"messages": turns("Q?", "1"), "question": "Q?"}, "stand beside question"),
        ({"messages": turns("Q?", "1"), "conversations": turns("Q?")}, "both say 'messages'"),
        ({"messages": turns([{"type": "image", "image": "../a.png"}, TEXT], "1")}, "leaves the folder"),
        ({"messages": turns([{"type": "image", "image": "c.png"}, TEXT], "1")}, "no file c.png"),
    ],
)
def test_bad_messages_are_named(folder, row, words):
    with pytest.raises(BadRow, match=words):
        only(folder, row)


def test_imitation_learns_the_assistants_turn(folder):
    """Without the opening that the prompt already holds; else the answer in the template's form."""
    spoken = only(folder, {"messages": turns("Q?", "<think>x</think> <answer>1</answer>")})
    for name, template in TEMPLATES.items():
        chat = Chat(ROOT / "models" / "tiny", template=name)
        (text,) = chat.documents(spoken)
        assert text == f"{'' if template.opening else '<think>'}x</think> <answer>1</answer>"
        assert chat.documents(Example("u", "Q?", (), "1")) == (chat.bare("1"),)
    assert "not a list of texts" in str(
        bad(read(write_lines(folder / "x.jsonl", [ROW | {"extra": {"documents": "x"}}])), 0)
    )


# ---- marks


def with_marks(task, folder, question, pictures):
    """A file of a task with one question about that number of pictures."""
    if task == "jsonl":
        row = {"question": question, "answer": "3", "pictures": ["a.png", "b.png"][:pictures]}
        return write_lines(folder / "x.jsonl", [row])
    if task == "parquet":
        return as_parquet(
            folder / "x.parquet", [{"question": question, "answer": "3", "images": shown(*range(pictures))}]
        )
    if task == "messages":
        row = {"messages": turns(question, "3"), "images": ["a.png", "b.png"][:pictures]}
        return write_lines(folder / "x.jsonl", [row])
    if task in ("geometry3k", "vision_r1"):
        row = {"images": shown(*range(pictures)), "problem": question, "answer": "3"}
        return write(folder / "x.parquet", "problem", [row])
    if task == "geoqa":
        row = {"image": shown(1)[0], "problem": question, "solution": "<answer>3</answer>"}
        return write(folder / "x.parquet", "solution", [row])
    if task == "sat":
        return write(folder / "x.parquet", "sat", [sat_row(question=question)])
    if task == "cvbench":
        prompt = f"{question} Select from the following choices.\n(A) 3\n(B) 2\n(C) 1\n(D) 0"
        return write(folder / "x.parquet", "cvbench", [cvbench_row(question=question, prompt=prompt)])
    return write(folder / "x.parquet", "mathvista", [mathvista_row(question=question)])


ONE = ("sat", "cvbench", "mathvista", "geoqa")


@pytest.mark.parametrize("task", ["jsonl", "parquet", "messages", "geometry3k", "vision_r1", *ONE])
@pytest.mark.parametrize(
    "question",
    ["Q?", "<image>Q?", "<image>\n<image> Q?", "Is <image> Q?", "Is <image> or <image>?", "Q? <image>"],
)
@pytest.mark.parametrize("pictures", [1, 2])
def test_each_picture_has_its_mark_or_none_has_one(folder, task, question, pictures):
    """In every source: the marks stay where they say something, and a wrong number of them is named."""
    if pictures == 2 and task in ONE:
        return
    task_of = {"parquet": "jsonl", "messages": "jsonl"}.get(task, task)
    found = read(with_marks(task, folder, question, pictures), task=task_of)
    marks = question.count("<image>")
    if marks not in (0, pictures):
        assert f"{marks} " in str(bad(found, 0)) and f"{pictures} pictures" in str(bad(found, 0))
        return
    asked = found[0].asked
    ahead = question.replace("<image>", "").strip() == question.rpartition("<image>")[2].strip()
    assert asked.count("<image>") == (0 if ahead else marks) and ("Q?" in asked or "or" in asked)
    chat = Chat(ROOT / "models" / "tiny", template="visualthinker")
    prompt = chat.prompt(found[0])
    assert prompt.text.count("<|image_pad|>") == pictures
    # the template's own literal mark goes with the pictures that stand ahead
    assert prompt.text.count("<image>") == ahead


@pytest.mark.parametrize(
    "row, fine",
    [
        ({"choices": ["first <image>", "second <image>"]}, True),
        ({"choices": ["A. <image>", "B. <image>"]}, True),
        ({"question": "<image> Which?", "choices": ["<image>", "another"]}, True),
        ({"choices": ["<image>", "none"]}, False),
        ({"question": "<image><image> Which?", "choices": ["<image>", "none"]}, False),
        ({"wording": "<image> or <image>?", "question": "<image>"}, True),
        ({"wording": "Which?", "question": "<image>"}, True),
        ({"wording": "Is it <image>?"}, False),
    ],
)
def test_marks_in_choices_and_wording_count(folder, row, fine):
    row = {"question": "Which?", "answer": "A", "pictures": ["a.png", "b.png"]} | row
    row["answer"] = "A" if "choices" in row else "yes"
    found = read(write_lines(folder / "x.jsonl", [row]))
    if not fine:
        assert "marks <image>, and there are 2 pictures" in str(bad(found, 0))
        return
    prompt = Chat(ROOT / "models" / "tiny", template="shapes").prompt(found[0])
    assert prompt.text.count("<|image_pad|>") == 2 and "<image>" not in prompt.text


def test_an_example_of_ones_own_source_has_its_marks_counted():
    chat = Chat(ROOT / "models" / "tiny", template="shapes")
    for marks in range(4):
        example = Example("u", "Q? " + "<image>" * marks, (), "3", pictures=(png(1), png(2)))
        if marks in (0, 2):
            assert chat.prompt(example).text.count("<|image_pad|>") == 2
            continue
        with pytest.raises(BadExample, match=f"has {marks} marks <image>, and there are 2 pictures"):
            chat.prompt(example)


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_a_picture_no_prompt_has_a_mark(template):
    prompt = Chat(ROOT / "models" / "tiny", template=template).prompt(Example("u", "Q?", (), "3"))
    assert "<image>" not in prompt.text and "Q?" in prompt.text


# ---- what is held out


@LAW
@given(
    owners=st.lists(st.integers(0, 40), min_size=1, max_size=120),
    share=st.none() | st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 0.8]),
    salt=st.integers(0, 10**6),
)
def test_a_small_set_is_held_out_sensibly(tmp_path, owners, share, salt):
    """Any rows on any pictures: no picture on both sides, something to train on, at least 8 rows or the share
    where the pictures allow it."""
    rows = [{"question": f"{i}?", "answer": "3", "picture": f"{salt}/{p}.png"} for i, p in enumerate(owners)]
    file = write_lines(tmp_path / "x.jsonl", rows)
    train, heldout = (read(file, part, heldout=share) for part in ("train", "heldout"))
    place = lambda part: {owners[int(row)] for _, row in part.places}
    assert len(train) + len(heldout) == len(rows) and not place(train) & place(heldout)
    wanted = round((1 / 16 if share is None else share) * len(rows))
    least, most = max(8, wanted), min(max(len(rows) // 2, wanted), len(rows) - 1)
    assert len(train) > 0 and len(heldout) <= (0 if share == 0 else most)
    largest = max(map(owners.count, owners))
    if share != 0 and largest == 1:
        assert len(heldout) == min(least, most)
    elif share != 0:
        assert len(heldout) >= min(least, most - largest + 1)


def test_a_large_set_and_a_larger_share(tmp_path):
    rows = [{"question": f"{i}?", "answer": "3"} for i in range(2000)]
    file = write_lines(tmp_path / "x.jsonl", rows)
    held = {
        share: {int(row) for _, row in read(file, "heldout", heldout=share).places}
        for share in (None, 0.1, 0.3)
    }
    assert held[None] < held[0.1] < held[0.3]
    assert [round(len(held[share]) / 2000, 1) for share in (0.1, 0.3)] == [0.1, 0.3]
    # the same for few pictures with many questions
    rows = [row | {"picture": f"{i % 3}.png"} for i, row in enumerate(rows)]
    file = write_lines(tmp_path / "x.jsonl", rows)
    assert 600 < len(read(file, "heldout")) < 700


@pytest.mark.parametrize("column", ["picture", "pictures", "image", "images"])
def test_a_picture_under_two_spellings_is_one(tmp_path, column):
    rows = []
    for i in range(40):
        spellings = (f"{i}.png", f"./{i}.png", [f"{i}.png"], f"x/../{i}.png")
        rows += [{"question": f"{i}?", "answer": "3", "picture": each} for each in spellings[:2]]
        rows.append({"question": f"{i}?", "answer": "3", column: spellings[2]})
    file = write_lines(tmp_path / "x.jsonl", rows)
    train, heldout = (read(file, part) for part in ("train", "heldout"))
    assert not {int(row) // 3 for _, row in train.places} & {int(row) // 3 for _, row in heldout.places}


@pytest.mark.parametrize("pictures, said", [(1, "only 0 questions"), (30, "")])
def test_few_held_out_questions_are_said(tmp_path, capsys, pictures, said):
    for salt in range(20):
        rows = [
            {"question": f"{i}?", "answer": "3", "picture": f"{salt}-{i % pictures}.png"} for i in range(30)
        ]
        for i in range(pictures):
            (tmp_path / f"{salt}-{i}.png").touch()
        open_source("jsonl", write_lines(tmp_path / "x.jsonl", rows), limit=None, seed=0, items=200)
        out = "".join(capsys.readouterr())
        assert (said in out) if said else not out


def test_a_share_where_it_has_no_effect_is_refused(tmp_path):
    write_lines(tmp_path / "train.jsonl", [ROW])
    write_lines(tmp_path / "heldout.jsonl", [ROW])
    with pytest.raises(BadSource, match="heldout: .* has its own files for that"):
        read(tmp_path, "train", heldout=0.1)
    with pytest.raises(BadSource, match="heldout: the split all holds nothing out"):
        read(tmp_path / "train.jsonl", heldout=0.5)
    with pytest.raises(BadSource, match="heldout: must be a share"):
        read(tmp_path / "train.jsonl", "train", heldout=1.5)
    with pytest.raises(BadSource, match="heldout: this source has its own rows"):
        read(write(tmp_path / "SAT_train.parquet", "sat", [sat_row()]), "train", "sat_paper", heldout=0.1)
    with pytest.raises(BadSource, match="heldout: for tasks that read files"):
        read(None, "train", "shapes", heldout=0.1)


def test_a_runs_share_is_that_of_its_evaluation(tmp_path, monkeypatch):
    file = str(write_lines(tmp_path / "x.jsonl", [{"question": f"{i}?", "answer": "1"} for i in range(100)]))
    how = {"template": "shapes", "cap": 8, "max_prompt": 99, "min_pixels": None, "max_pixels": None}
    model = lambda **run: evaluate.EvaluatedModel("m", tmp_path, dtype="float32", **how, **run)
    for run, argv, wanted in (
        ({"trained_on": "jsonl", "data": file, "heldout": 0.25}, [], 25),
        ({"trained_on": "jsonl", "data": file, "heldout": 0.25}, ["--heldout", "0.5"], 50),
        ({"trained_on": "jsonl", "data": "other.jsonl", "heldout": 0.25}, [], 8),
        ({"trained_on": "jsonl", "data": file, "heldout": 0.25}, ["--split", "all"], 100),
        ({}, [], 8),
    ):
        args = evaluate.arguments(["--task", "jsonl", "--data", file, *argv])
        assert len(evaluate.questions(args, [model(**run)])) == wanted


def test_the_parts_of_a_folder_of_tables(tmp_path):
    for name in ("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"):
        as_parquet(tmp_path / "data" / f"{name}.parquet", [ROW | {"question": name.partition("-")[0]}])
    questions = lambda split: [e.question for e in read(tmp_path, split)]
    assert questions("train") == ["train"] and questions("heldout") == ["validation"]
    (tmp_path / "data" / "validation-00000-of-00001.parquet").unlink()
    assert questions("heldout") == ["test"] and sorted(questions("all")) == ["test", "train"]


# ---- uids


def repeated(task, folder):
    if task == "jsonl":
        return write_lines(folder / "x.jsonl", [ROW | {"uid": "u"}, ROW, ROW | {"uid": "u"}])
    if task == "a default name":
        return write_lines(folder / "x.jsonl", [ROW, ROW | {"uid": "v"}, ROW | {"uid": "x/0"}])
    if task == "a number":
        return write_lines(folder / "x.jsonl", [ROW | {"uid": 1}, ROW, ROW | {"uid": "1"}])
    if task == "columns":
        return write_lines(folder / "x.jsonl", [ROW | {"key": "u"}, ROW | {"key": "v"}, ROW | {"key": "u"}])
    if task == "parquet":
        return as_parquet(folder / "x.parquet", [ROW | {"uid": "u"}, ROW | {"uid": None}, ROW | {"uid": "u"}])
    if task == "cvbench":
        return write(folder / "x.parquet", "cvbench", [cvbench_row(i) for i in (1, 2, 1)])
    if task == "mathvista":
        return write(folder / "x.parquet", "mathvista", [mathvista_row(i) for i in (1, 2, 1)])
    for name in "ab":
        write_lines(folder / name / "x.jsonl", [ROW | {"uid": "u"}])
    return folder


CASES = ["jsonl", "a default name", "a number", "columns", "parquet", "cvbench", "mathvista", "two files"]


@pytest.mark.parametrize("case", CASES)
def test_a_repeated_uid_is_refused_before_anything_is_asked(tmp_path, case, capsys, monkeypatch):
    data = repeated(case, tmp_path)
    task = case if case in SOURCES else "jsonl"
    columns = {"uid": "key"} if case == "columns" else {}
    where = "b/x.jsonl, line 1" if case == "two files" else r"x\.\w+, (line 3|row 2)"
    with pytest.raises(BadSource, match=rf"{where}: uid: .* is also that of .*(line 1|row 0); give each row"):
        read(data, task=task, columns=columns)
    monkeypatch.setattr(evaluate.EvaluatedModel, "open", lambda *args: pytest.fail("a model was opened"))
    argv = ["--task", task, "--data", str(data), "--split", "all", "--columns", json.dumps(columns)]
    assert evaluate.main([*argv, "--compare", "tiny"]) == 2
    assert "is also that of" in capsys.readouterr().err
    if case != "columns":
        # every row is listed
        assert check.main([str(data), "--task", task]) == 1
        assert "give each row its own" in capsys.readouterr().out


def test_what_pairs_by_uid_refuses_a_repeated_one():
    said = lambda uid: [
        read_completion(Example(uid, "?", ("yes", "no"), "yes"), "<answer>A</answer>", [1], True)
    ]
    once, twice = [said("a"), said("b")], [said("a"), said("b"), said("a")]
    assert differences(once, once)["all"]["difference"] == 0
    for first, second in ((once, twice), (twice, once), (twice, twice)):
        with pytest.raises(ValueError, match="the uid 'a' is that of 2 questions"):
            differences(first, second)
    line = {"kind": "heldout", "step": 0, "uid": "a", "completions": [{"text": "x"}]}
    shown_twice = [
        line | {"question": "one?"},
        line | {"question": "two?"},
        line | {"question": "one?", "step": 1},
    ]
    assert [len(each["answers"]) for each in report._questions(shown_twice)] == [2, 1]


# ---- messages to people

LONG = st.sampled_from(["x" * 5000, "x y" * 2000, "\n" * 3000, "<image>" * 700, "é" * 4000, "1" * 3000])
VALUE = st.recursive(
    LONG | st.integers() | st.floats() | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LONG, inner, max_size=2),
    max_leaves=4,
)


@LAW
@given(st.dictionaries(st.sampled_from(FIELDS) | LONG, VALUE, max_size=4))
def test_a_message_quotes_at_most_a_line(folder, values):
    (folder / "x.jsonl").write_text(json.dumps({"question": "Q?", "answer": "yes"} | values))
    try:
        read(folder / "x.jsonl")[0]
    except (BadRow, BadSource) as error:
        assert len(str(error)) < len(str(folder)) * 2 + 420 and "\n" not in str(error)


def test_bad_held_out_rows_are_said_by_kind(tmp_path, capsys):
    write_lines(tmp_path / "train.jsonl", [ROW])
    write_lines(tmp_path / "heldout.jsonl", [ROW | {"answer": f"{i}?"} for i in range(40)])
    open_source("jsonl", tmp_path, limit=None, seed=0, items=200)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and "and 35 more rows like the 5 above" in lines[-1]


# ---- lengths


def test_lengths_say_what_the_limits_drop(tmp_path, capsys):
    rows = [{"question": "red " * (i + 1), "answer": "1", "picture": "a.png"} for i in range(40)]
    rows += [{"messages": turns("red", "blue " * 30)}]
    (tmp_path / "a.png").write_bytes(png())
    file = write_lines(tmp_path / "x.jsonl", rows)
    chat = Chat(ROOT / "models" / "tiny", template="visualthinker", max_prompt=1 << 30)
    prompts = sorted(len(chat.prompt(example).tokens) for example in read(file))
    argv = ["--lengths", "--template", "visualthinker", "--max-prompt", str(prompts[-3]), "--cap", "20"]
    assert check.main([str(file), *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"41 prompts, in tokens: 50 % have at most {prompts[20]:,}, 90 %")
    assert lines[0].endswith(f"the longest has {prompts[-1]:,}")
    assert f"max_prompt={prompts[-3]} drops 2 (4.9%): {file}, line 40 ({prompts[-1]:,}); " in lines[1]
    assert lines[2].startswith("41 documents, in tokens: 50 % have at most")
    assert lines[2].endswith("the longest has 31") and "cap=20 drops 1 (2.4%)" in lines[3]
    assert check.main([str(file), "--lengths", "--model", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err


def test_check_with_columns_and_a_share(tmp_path, capsys):
    file = write_lines(tmp_path / "x.jsonl", [{"q": f"{i}?", "answer": "1"} for i in range(100)])
    assert check.main([str(file), "--columns", "{question: q}", "--heldout", "0.1"]) == 0
    assert "heldout=0.1 holds out 10 of 100 rows" in capsys.readouterr().out
    assert check.main([str(file), "--columns", "question"]) == 2
