"""VLMEvalKit's tables and their owners' own files: made by hand in their layouts, and real rows."""

import base64
import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.images import open_picture
from data.sources import tsv
from data.sources.table import SOURCES, BadSource
from data.sources.tsv import TsvShard
from data.sources.vlmeval import boxed, mathvista_query
from data.types import BadRow

SHARED = Path(__file__).resolve().parents[4] / "shared/data"


def picture(shade):
    """A picture in base64, longer than an index may be."""
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), (shade, 0, 0)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def table(path, rows, header=None):
    """A table as pandas writes it: tabs, quotes only where needed, doubled within cells."""
    header = header or list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows([[row.get(name, "") for name in header] for row in rows])
    return path


def read(task, path, **row):
    return SOURCES[task](path, "all", None, 0)


# ---- the reader


def test_cells_with_quotes_tabs_and_line_breaks(tmp_path):
    rows = [
        {"index": "1", "image": picture(1), "question": 'one "two"\nthree\tfour', "answer": "a"},
        {"index": "2", "image": "1", "question": "plain", "answer": ""},
        {
            "index": "3",
            "image": f"['{picture(3)}', '{picture(4)}']",
            "question": "two pictures",
            "answer": "c",
        },
    ]
    file = table(tmp_path / "x.tsv", rows)
    shard = TsvShard(file, ("index", "question", "answer"), ("A",), (("image",), ("image_path",)), {})
    assert len(shard) == 3 and list(shard.uids(["index"])) == ["1", "2", "3"]
    found = [shard.row(number) for number in range(3)]
    assert [row["question"] for row in found] == [row["question"] for row in rows]
    assert found[1]["answer"] is None and "A" not in found[0]
    # the second row's picture is the first's
    pictures = [shard.shown(row, shard.where(number)) for number, row in enumerate(found)]
    assert [len(each) for each in pictures] == [1, 1, 2] and pictures[0] == pictures[1]
    assert open_picture(pictures[2][1], name="x").getpixel((0, 0)) == (4, 0, 0)
    keys = list(shard.keys())
    assert keys[0] == keys[1] != keys[2]
    # line 1 is the header, and the first row has two lines
    assert [shard.where(number) for number in range(3)] == [f"{file}, line {n}" for n in (2, 4, 5)]


def test_a_cell_of_megabytes(tmp_path):
    """Longer than the csv module's own limit of 131,072 characters."""
    long = base64.b64encode(bytes(3_000_000)).decode()
    shard = TsvShard(
        table(tmp_path / "x.tsv", [{"index": "1", "image": long}]), ("index",), (), (("image",),), {}
    )
    assert shard.shown(shard.row(0), "x") == (bytes(3_000_000),)


def test_memory_holds_places_not_rows(tmp_path):
    rows = [{"index": str(n), "image": picture(n % 250)} for n in range(300)]
    shard = TsvShard(table(tmp_path / "x.tsv", rows), ("index",), (), (("image",),), {})
    held = [value for value in vars(shard).values() if isinstance(value, (list, dict))]
    assert len(shard) == 300 and sum(map(len, held)) < 10


@pytest.mark.parametrize("chunk", ["\ufeff", ""])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_other_ways_to_write_a_table(tmp_path, chunk, ending):
    text = chunk + ending.join(["index\timage\tquestion", f"1\t{picture(1)}\tWhat?", "", ""])
    (tmp_path / "x.tsv").write_bytes(text.encode())
    shard = TsvShard(tmp_path / "x.tsv", ("index", "question"), (), (("image",),), {})
    assert len(shard) == 1 and shard.row(0)["question"] == "What?"


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\U0010ffff"), max_size=12)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_table_holds_is_read(tmp_path, cells):
    """Quotes, tabs and line breaks of every kind: each cell is read as it was written."""
    rows = [{"index": str(n), "question": a, "answer": b} for n, (a, b) in enumerate(cells)]
    shard = TsvShard(table(tmp_path / "x.tsv", rows), ("index", "question", "answer"), (), (), {})
    found = [shard.row(number) for number in range(len(shard))]
    assert [(row["question"] or "", row["answer"] or "") for row in found] == cells
    assert list(shard.uids(["index"])) == [str(n) for n in range(len(cells))]


@given(st.integers(0, 10**6), st.binary(max_size=4), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_table_raises_only_errors_with_its_name(tmp_path, place, piece, cut):
    """Bytes replaced or cut away anywhere: rows are read, or an error names file and line."""
    row = {"question": 'Is "it"\tred?', "answer": "Yes", "category": "OCR", "image_path": "a"}
    rows = [row | {"index": "1", "image": picture(1)}, row | {"index": "2", "image": "1"}]
    file = table(tmp_path / "MME.tsv", rows)
    data = file.read_bytes()
    place %= len(data)
    file.write_bytes(data[:place] + piece + (b"" if cut else data[place + len(piece) :]))
    try:
        examples = read("mme", file)
        for number in range(len(examples)):
            try:
                examples[number]
            except BadRow as error:
                assert str(error).startswith(f"{file}, line ") and "\n" not in str(error)
    except BadSource as error:
        assert str(file) in str(error) and "\n" not in str(error)


HEADER = "index\timage\tquestion\tanswer\tcategory\timage_path\n"
BAD = {
    "a cell is missing": (
        "1\t{p}\tIs it?\tYes\n",
        "line 2: category: the row has 4 cells, and the header has 6",
    ),
    "no such row": (
        "1\t7\tIs it?\tYes\tOCR\ta\n",
        "line 2: image: '7' is neither a picture in base64 nor the index",
    ),
    "names a name": (
        "1\t2\tIs it?\tYes\tOCR\ta\n2\t1\tIs it?\tNo\tOCR\ta\n",
        "which has no picture of its own",
    ),
    "no base64": ("1\t" + "%" * 99 + "\tIs it?\tYes\tOCR\ta\n", "line 2: image: is not base64"),
    "no picture": ("1\t\tIs it?\tYes\tOCR\ta\n", "line 2: image: no picture"),
    "another answer": ("1\t{p}\tIs it?\tMaybe\tOCR\ta\n", "line 2: answer: is 'Maybe', not Yes or No"),
    "no answer": ("1\t{p}\tIs it?\t\tOCR\ta\n", "line 2: answer: holds NoneType, not text"),
    "not UTF-8": ("1\t{p}\tIs \xff?\tYes\tOCR\ta\n", "line 2: cannot be read: 'utf-8'"),
    "a picture that is none": (f"1\t{'QUJD' * 30}\tIs it?\tYes\tOCR\ta\n", "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_one_sentence_with_file_line_and_column(tmp_path, case):
    row, message = BAD[case]
    file = tmp_path / "MME.tsv"
    file.write_bytes((HEADER + row.format(p=picture(1))).encode("latin-1"))
    with pytest.raises(ValueError) as error:
        example = read("mme", file)[0]
        open_picture(example.pictures[0], name=f"{file}, line 2")
    said = str(error.value)
    assert message in said and str(file) in said and "\n" not in said


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no column index, question, answer, category, image_path, image; it has nothing"),
        ("index\tanswer\n", "no column question, category, image_path, image; it has 'index', 'answer'"),
        (HEADER + '1\t"open\n', "line 2: text in quotes does not end"),
        ("index\tindex\n", "two columns are called 'index'"),
        (HEADER + "1\tx\tq\tYes\tOCR\ta\n1\tx\tq\tNo\tOCR\ta\n", "uid: '1' is also that of"),
        ("version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_a_bad_file(tmp_path, text, message):
    (tmp_path / "MME.tsv").write_text(text)
    with pytest.raises(BadSource) as error:
        read("mme", tmp_path)
    assert message in str(error.value) and "MME.tsv" in str(error.value)


def test_pictures_beside_the_table(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "images" / "1.png")
    rows = [{"index": "1", "question": "What?", "answer": "A", "A": "x", "B": "y", "category": "c"}]
    rows[0]["image_path"] = "1.png"
    (example,) = read("mmstar", table(tmp_path / "MMStar.tsv", rows))
    assert example.pictures == (tmp_path / "images" / "1.png",)
    rows[0]["image_path"] = "../1.png"
    with pytest.raises(BadRow, match="image_path: '../1.png' leaves the folder"):
        read("mmstar", table(tmp_path / "MMStar.tsv", rows))[0]


def test_halves_by_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(tsv, "LARGE", 0)
    rows = [
        {"index": f"{n}", "image": picture(n // 2) if n % 2 == 0 else str(n - 1), "category": "OCR"}
        | {"question": "Is it?", "answer": "Yes" if n % 2 else "No", "image_path": f"{n // 2}.png"}
        for n in range(80)
    ]
    file = table(tmp_path / "MME.tsv", rows)
    parts = [SOURCES["mme"](file, split, None, 0) for split in ("train", "heldout")]
    assert sum(map(len, parts)) == 80 and all(len(part) >= 20 for part in parts)
    groups = [{example.extra["groups"]["picture"] for example in part} for part in parts]
    assert not groups[0] & groups[1]


# ---- the benchmarks


def test_mmstar(tmp_path):
    row = {"index": "7", "image": picture(1), "question": "Which?", "answer": "B", "category": "math"}
    row |= {"A": "one", "B": "None", "C": "three", "l2_category": "counting"}
    (example,) = read("mmstar", table(tmp_path / "MMStar.tsv", [row]))
    assert (example.uid, example.choices, example.letter, example.task) == (
        "7",
        ("one", "None", "three"),
        "B",
        "math",
    )
    assert example.extra["groups"] == {"skill": "counting"}
    assert example.extra["query"] == (
        "Question: Which?\nOptions:\nA. one\nB. None\nC. three\n"
        "Please select the correct answer from the options above. \n"
    )
    with pytest.raises(BadRow, match="answer: 'D' is not the letter of one of 3 choices"):
        read("mmstar", table(tmp_path / "MMStar.tsv", [row | {"answer": "D"}]))[0]


def test_chartqa(tmp_path):
    rows = [
        {"index": "1", "image": picture(1), "question": "How many?", "answer": "12.5", "split": "human"},
        {
            "index": "2",
            "image": picture(1),
            "question": "Which?",
            "answer": "['red', 'crimson']",
            "split": "augmented",
        },
    ]
    one, two = read("chartqa", table(tmp_path / "ChartQA_TEST.tsv", rows))
    assert (one.answer, one.task, one.extra["kind"], one.extra["golds"]) == (
        "12.5",
        "human",
        "number",
        ("12.5",),
    )
    assert (two.answer, two.extra["golds"], two.extra["kind"]) == ("red", ("red", "crimson"), "text")


def test_hallusionbench(tmp_path):
    row = {"index": "x_VD_figure_3_1_0", "image": picture(1), "question": "Is it larger?", "answer": "No"}
    row |= {"category": "VD", "l2-category": "figure"}
    (example,) = read("hallusion", table(tmp_path / "HallusionBench.tsv", [row]))
    assert example.extra["groups"] == {"figure": "VD/figure/3/1", "question": "VD/figure/3/0"}
    assert (example.choices, example.answer, example.asked) == (("Yes", "No"), "No", "Is it larger?")
    with pytest.raises(BadRow, match="index: 'VD_1' does not end in _SET_FIGURE_QUESTION"):
        read("hallusion", table(tmp_path / "HallusionBench.tsv", [row | {"index": "VD_1"}]))[0]


VERSE = {
    "question": "Then the angle is ()\nChoices:\nA:40°\nB:60°\nC:120°",
    "answer": "C",
    "question_type": "multi-choice",
    "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"},
    "query_cot": "Please first conduct reasoning, and then answer.\nQuestion: Then the angle is ()",
}
VISION = "Please first conduct reasoning, and then answer the question.\nQuestion: "


def test_mathverse_as_a_table(tmp_path):
    rows = [
        VERSE
        | {
            "index": "0",
            "image": picture(1),
            "problem_version": "Text Lite",
            "metadata": str(VERSE["metadata"]),
        },
        VERSE
        | {"index": "1", "image": "0", "problem_version": "Vision Only", "question": "", "query_cot": VISION}
        | {"metadata": str(VERSE["metadata"]), "question_for_eval": VERSE["question"]},
        VERSE
        | {
            "index": "2",
            "image": "0",
            "problem_version": "Text Lite",
            "question": "How long?",
            "answer": "4.4 m",
        }
        | {"metadata": str(VERSE["metadata"])},
    ]
    lite, vision, free = read("mathverse", table(tmp_path / "MathVerse_MINI.tsv", rows))
    assert (lite.choices, lite.answer, lite.asked) == (("40°", "60°", "120°"), "120°", VERSE["question"])
    assert (lite.task, lite.extra["groups"]) == (
        "Text Lite",
        {"subject": "Plane Geometry", "subfield": "Angle"},
    )
    # the question is in the picture; its choices are known from the other version
    assert (
        vision.asked == "Please first conduct reasoning, and then answer the question."
        and vision.letter == "C"
    )
    assert lite.extra["query"] == VERSE["question"] and vision.extra["query"] == VISION
    assert (free.choices, free.answer, free.extra["kind"]) == ((), "4.4 m", "number")


def test_mathverse_as_its_owners_publish_it(tmp_path):
    """The parquet file, and the JSON array beside its pictures, give the same questions."""
    pyarrow = pytest.importorskip("pyarrow", reason="reading parquet is an optional extra")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = VERSE | {"sample_index": "5", "problem_index": "1", "problem_version": "Text Lite"}
    raw = base64.b64decode(picture(1))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "5.png").write_bytes(raw)
    (tmp_path / "testmini.json").write_text(json.dumps([row | {"image": "5.png"}]))
    parquet.write_table(
        pyarrow.Table.from_pylist([row | {"image": {"bytes": raw, "path": "5.png"}}]),
        tmp_path / "testmini.parquet",
    )
    (a,), (b,) = (read("mathverse", tmp_path / name) for name in ("testmini.json", "testmini.parquet"))
    assert (a.uid, a.asked, a.choices, a.extra) == (b.uid, b.asked, b.choices, b.extra)
    assert a.uid == "5" and a.pictures == (tmp_path / "images" / "5.png",) and b.pictures == (raw,)
    assert a.extra["query"] == VERSE["query_cot"]


def test_mm_math(tmp_path):
    (tmp_path / "MM_Math").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "MM_Math" / "9.png")
    row = {
        "question": "Find x.",
        "file_name": "9.png",
        "solution": r"So $x=\boxed{\frac{1}{2}}$, $y=\boxed{3}$.",
    }
    row |= {"year": "eight", "difficult": "hard", "knowledge": {"level_1": "Functions", "level_2": "Linear"}}
    (tmp_path / "MM_Math.jsonl").write_text(json.dumps(row) + "\n")
    (example,) = read("mm_math", tmp_path)
    assert (example.answer, example.task) == (r"\frac{1}{2}, 3", "hard")
    assert example.extra["groups"] == {"grade": "eight", "knowledge": "Functions"}
    assert example.pictures == (tmp_path / "MM_Math" / "9.png",)
    tsv_row = {"index": "1", "image": picture(1), "question": "Find x.", "answer": "60", "difficulty": "easy"}
    tsv_row |= {"year": "seven", "knowledge_l1": "Shapes"}
    (example,) = read("mm_math", table(tmp_path / "MM-Math.tsv", [tsv_row]))
    assert (example.answer, example.task, example.extra["kind"]) == ("60", "easy", "number")
    (tmp_path / "x.jsonl").write_text(json.dumps(row | {"solution": "none"}))
    with pytest.raises(BadRow, match=r"x.jsonl, line 1: solution: has no \\boxed"):
        read("mm_math", tmp_path / "x.jsonl")[0]


def test_what_is_boxed():
    assert boxed(r"\boxed{\frac{a}{b}} and \boxed {2}") == [r"\frac{a}{b}", "2"]
    assert boxed(r"\boxed{open") == [] and boxed("") == []


def test_variants_of_dynamath(tmp_path):
    """As a table, and as one parquet file for each variant: a question's variants share a group."""
    rows = [
        {
            "index": str(n),
            "image": picture(n),
            "question": "How long?",
            "answer": f"{n}.5",
            "answer_type": "float",
        }
        | {
            "subject": "algebra",
            "knowledge_level": "high school",
            "varid": str(n % 3 + 1),
            "qid": str(n // 3),
        }
        for n in range(6)
    ]
    found = read("dynamath", table(tmp_path / "DynaMath.tsv", rows))
    assert [example.extra["groups"]["question"] for example in found] == ["0", "0", "0", "1", "1", "1"]
    pyarrow = pytest.importorskip("pyarrow", reason="reading parquet is an optional extra")
    parquet = pytest.importorskip("pyarrow.parquet")
    for variant in (1, 2):
        row = {
            "id": "4",
            "question": f"Is {variant} a prime? Choices: (A) yes (B) no",
            "ground_truth": "AB"[variant - 1],
        }
        row |= {
            "answer_type": "multiple choice",
            "subject": "arithmetic",
            "knowledge_level": "elementary school",
        }
        row["decoded_image"] = {"bytes": base64.b64decode(picture(variant)), "path": "4.png"}
        file = tmp_path / f"sample{variant}-00000-of-00001.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    (tmp_path / "DynaMath.tsv").unlink()
    one, two = read("dynamath", tmp_path)
    assert one.uid != two.uid and one.extra["groups"] == two.extra["groups"]
    assert (one.choices, one.answer, two.answer) == (("yes", "no"), "yes", "no")


# ---- real rows

MATHVISTA = SHARED / "mathvista"


@pytest.mark.skipif(not MATHVISTA.is_dir(), reason="MathVista is not beside the repository (../shared/data)")
def test_mathvista_s_own_words():
    """Its 1,000 questions are asked with the hint, the unit and the choices that its owners wrote down."""
    rows = json.loads((MATHVISTA / "testmini.json").read_text("utf-8"))
    queries = json.loads((MATHVISTA / "query.json").read_text("utf-8"))
    for pid, row in rows.items():
        words = row["question"], row["choices"] or (), row["answer_type"], row["precision"], row["unit"]
        assert mathvista_query(*words) == queries[pid], pid


@pytest.mark.skipif(not MATHVISTA.is_dir(), reason="MathVista is not beside the repository (../shared/data)")
def test_mathvista_as_a_table(tmp_path):
    """The real questions in VLMEvalKit's layout are those of the owners' JSON file."""
    owners = json.loads((MATHVISTA / "testmini.json").read_text("utf-8"))
    queries = json.loads((MATHVISTA / "query.json").read_text("utf-8"))
    (tmp_path / "images").mkdir()
    rows = []
    for number, (pid, row) in enumerate(owners.items()):
        choices = row["choices"] or []
        option = "ABCDEFGH"[choices.index(row["answer"])] if choices else ""
        told = {name: row[name] for name in ("answer", "question_type", "answer_type")}
        told |= {
            "task": row["metadata"]["task"],
            "skills": str(row["metadata"]["skills"]),
            "choices": str(choices),
        }
        told |= {"index": pid, "image": "1" if number else picture(1), "question": queries[pid]}
        rows.append(told | {"answer_option": option})
        (tmp_path / row["image"]).write_bytes(b"")
    found = read("mathvista", table(tmp_path / "MathVista_MINI.tsv", rows))
    # the owners' rows, with files of the right names
    (tmp_path / "testmini.json").write_text((MATHVISTA / "testmini.json").read_text("utf-8"))
    theirs = read("mathvista", tmp_path / "testmini.json")
    assert len(found) == len(theirs) == 1000
    for ours, other in zip(found, theirs):
        assert (ours.uid, ours.choices, ours.answer, ours.task) == (
            other.uid,
            other.choices,
            other.answer,
            other.task,
        )
        assert "".join(ours.asked.split()) == "".join(other.asked.split())
        for name in ("kind", "answer_type", "groups", "query"):
            assert ours.extra[name] == other.extra[name], (ours.uid, name)
        if other.extra["answer_type"] == "float":
            assert int(ours.extra["precision"]) == int(other.extra["precision"])


DYNAMATH = SHARED / "dynamath"


@pytest.mark.skipif(not DYNAMATH.is_dir(), reason="DynaMath is not beside the repository (../shared/data)")
def test_dynamath_s_501_questions():
    """One object with all rows by their ids; the pictures are in the folder `image`."""
    found = list(read("dynamath", DYNAMATH))
    rows = json.loads((DYNAMATH / "dataset.json").read_text("utf-8"))
    assert len(found) == len(rows) == 501 and [e.extra["groups"]["question"] for e in found] == list(rows)
    for example, row in zip(found, rows.values()):
        assert example.asked == row["question"] and example.pictures[0] == DYNAMATH / row["image"]
        assert row["answer"].strip() in (example.answer, example.letter)
    assert sum(bool(example.choices) for example in found) >= 165
    assert open_picture(found[0].pictures[0], name="1").size[0] > 100


VERSE_FILE = SHARED / "mathverse/testmini_text_only.json"


@pytest.mark.skipif(
    not VERSE_FILE.is_file(), reason="MathVerse is not beside the repository (../shared/data)"
)
def test_mathverse_s_788_questions(tmp_path):
    """The owners' rows of the version without pictures, with one picture put in."""
    rows = json.loads(VERSE_FILE.read_text("utf-8"))
    Image.new("RGB", (30, 30)).save(tmp_path / "1.png")
    (tmp_path / "testmini.json").write_text(json.dumps([row | {"image": "1.png"} for row in rows]))
    found = list(read("mathverse", tmp_path))
    assert len(found) == 788 and {example.task for example in found} == {"Text Only"}
    multi = [row["question_type"] == "multi-choice" for row in rows]
    # a few have their choices in the picture only
    assert sum(bool(example.choices) == each for example, each in zip(found, multi)) >= 775
    assert all(example.extra["query"] == row["query_cot"] for example, row in zip(found, rows))
