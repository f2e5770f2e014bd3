"""Sources that read the hub's parquet layouts, written here by pyarrow: columns, splits, what an example
asks and answers, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from data.sources import parquet, training
from data.sources import table as sources
from data.sources.table import SOURCES, BadSource, open_source
from data.types import BadRow

pyarrow = pytest.importorskip("pyarrow", reason="reading parquet is an optional extra")
from layouts import SCHEMAS, cvbench_row, mathvista_row, png, sat_row, shown, write


def read(name, path, split="all", limit=None, seed=0):
    return SOURCES[name](path, split, limit, seed)


# ---- SAT


def test_a_sat_row_is_asked_with_letters(tmp_path):
    question = (
        "Which object is closer to the camera taking this photo, the box (highlighted by a red box) or the "
        "desk?"
    )
    file = write(
        tmp_path / "SAT_train.parquet",
        "sat",
        [sat_row(3, question=question, answers=["the box", "the desk"], correct_answer="the box")],
    )
    (example,) = read("sat", file)
    assert example.pictures == (png(30),) and example.uid == "SAT_train/0" and example.task == "Depth"
    assert set(example.choices) == {"the box", "the desk"} and example.answer == "the box"
    assert example.asked.startswith(question + "\nSelect from the following choices.\n(A) the ")


def test_the_papers_sat_asks_and_answers_in_words(tmp_path):
    rows = [sat_row(answers=["2", "1", "5"], correct_answer="2"), sat_row(1)]
    three, two = read("sat_paper", write(tmp_path / "SAT_train.parquet", "sat", rows))
    a, b, c = three.extra["options"]
    assert sorted((a, b, c)) == ["1", "2", "5"] and three.choices == () and three.answer == "2"
    assert three.asked == (
        f" Answer in natural language. Where is the cup, 0? Choose between the following options: {a}, "
        f"{b} or {c}"
    )
    assert two.asked.endswith("following options: left or right") or two.asked.endswith(
        "following options: right or left"
    )


def test_an_option_with_a_comma_is_one_option(tmp_path):
    """The paper's script cut its options at ", "."""
    options = ["the red, round box", "the desk"]
    file = write(tmp_path / "SAT_train.parquet", "sat", [sat_row(answers=options, correct_answer=options[0])])
    assert sorted(read("sat", file)[0].choices) == sorted(options)
    assert sorted(read("sat_paper", file)[0].extra["options"]) == sorted(options)


@pytest.mark.parametrize("task", ["sat", "sat_paper"])
def test_the_order_of_the_options_is_the_seeds(tmp_path, task):
    """The right one stands first in the file. Its place is even over rows, the same at each reading, and
    no matter of the file's order."""

    def places(rows, seed):
        examples = read(task, write(tmp_path / "SAT_train.parquet", "sat", rows), seed=seed)
        return [(e.choices or e.extra["options"]).index("a") for e in examples]

    rows = [sat_row(i, answers=["a", "b", "c", "d"], correct_answer="a") for i in range(80)]
    found = places(rows, 0)
    assert found == places(rows, 0) == places([row | {"answers": row["answers"][::-1]} for row in rows], 0)
    assert all(10 <= found.count(place) <= 32 for place in range(4)) and found != places(rows, 1)


@pytest.mark.parametrize("column, layout", [("image_bytes", "sat"), ("images", "sat_v2")])
def test_only_rows_with_one_picture(tmp_path, column, layout):
    rows = [sat_row(i, pictures=i % 3, column=column) for i in range(12)]
    file = write(tmp_path / "train-00000-of-00001.parquet", layout, rows, row_group_size=5)
    assert [e.uid.rpartition("/")[2] for e in read("sat", file)] == ["1", "4", "7", "10"]
    assert [e.uid.rpartition("/")[2] for e in read("sat", file, limit=2)] == ["1", "4"]


def test_how_many_pictures_is_counted_without_reading_them(tmp_path, monkeypatch):
    scanned = []
    real = parquet.ParquetShard._scan
    monkeypatch.setattr(
        parquet.ParquetShard, "_scan", lambda self, columns: scanned.extend(columns) or real(self, columns)
    )
    assert len(read("sat", write(tmp_path / "SAT_train.parquet", "sat", [sat_row(i) for i in range(4)]))) == 4
    assert len(scanned) == 1 and scanned[0].startswith("image_bytes.") and scanned[0].endswith(".path")


def test_pictures_as_a_list_of_plain_bytes(tmp_path):
    schema = pyarrow.schema(list((SCHEMAS["sat"] | {"image_bytes": pyarrow.list_(pyarrow.binary())}).items()))
    rows = [sat_row(i, image_bytes=[png(i)] * (1 + i % 2)) for i in range(4)]
    assert [e.pictures for e in read("sat", write(tmp_path / "SAT_train.parquet", schema, rows))] == [
        (png(0),),
        (png(2),),
    ]


def test_the_papers_rows_are_the_first_ones(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.LAYOUTS, "sat_paper", replace(training.SAT_PAPER, first=6))
    file = write(
        tmp_path / "SAT_train.parquet", "sat", [sat_row(i, pictures=1 + (i == 2)) for i in range(10)]
    )
    train, heldout = open_source("sat_paper", file, limit=None, seed=3, items=8)
    assert [e.uid for e in train] == [f"SAT_train/{i}" for i in (0, 1, 3, 4, 5)]
    assert [e.uid for e in heldout["heldout"]] == [f"SAT_train/{i}" for i in (6, 7, 8, 9)]
    assert training.SAT_PAPER.first == 15_000


def test_a_slip_of_the_generator_is_taken_out(tmp_path):
    rows = [
        sat_row(
            answers=["the cup in the first frame", "the jug"], correct_answer="the cup in the first frame"
        )
    ]
    file = write(tmp_path / "SAT_train.parquet", "sat", rows)
    assert (
        read("sat", file)[0].answer == "the cup"
        and read("sat_paper", file)[0].answer == "the cup in the first frame"
    )


@pytest.mark.parametrize(
    "question, task",
    [
        ("How many boxes are visible in the scene?", "Count"),
        ("Is the box behind the desk?", "Depth"),
        ("Which point is closer to the camera taking this photo, point A  or point B?", "Depth"),
        ("Which object is closer to the box, the desk or the bin?", "Distance"),
        ("Considering the relative positions, is the box above or below the desk?", "Relation"),
        ("Is the box to the left of the desk?", "Relation"),
        ("Is the centerpoint of  the box at a higher height than the desk?", "Height"),
        ("Something new?", "other"),
    ],
)
def test_sats_questions_by_kind(question, task):
    assert (
        training.sat_task(question, "other") == task and training.sat_task(question, "goal_aim") == "goal_aim"
    )


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"correct_answer": "up"}, "row 1: correct_answer: 'up' is not one of the answers ['left', 'right']"),
        ({"correct_answer": None}, "correct_answer: holds NoneType"),
        ({"answers": ["left"]}, "answers: ['left'] are not two"),
        ({"answers": ["left", "left"]}, "answers: "),
        ({"answers": None}, "answers: holds NoneType"),
        ({"question": None}, "question: holds NoneType"),
        ({"question": " "}, "the question is empty"),
        ({"image_bytes": [{"bytes": None, "path": "x.png"}]}, "row 1: image_bytes: holds no picture bytes"),
    ],
)
def test_a_bad_row_of_sat(tmp_path, changed, message):
    examples = read(
        "sat", write(tmp_path / "SAT_train.parquet", "sat", [sat_row(), sat_row(1, **changed), sat_row(2)])
    )
    with pytest.raises(BadRow) as error:
        examples[1]
    assert message in str(error.value) and "SAT_train.parquet" in str(error.value)
    assert examples[0].answer == examples[2].answer == "left"


# ---- CV-Bench


def test_a_cvbench_row(tmp_path):
    (example,) = read("cvbench", write(tmp_path / "test.parquet", "cvbench", [cvbench_row(7)]))
    # in one line, unlike BLINK's
    assert example.asked == cvbench_row()["prompt"]
    assert (example.uid, example.task, example.answer, example.letter, example.pictures) == (
        "2D/7",
        "Count",
        "1",
        "C",
        (png(7),),
    )
    assert example.extra == {"source": "ADE20K", "type": "2D"}


def test_cvbench_old_and_new(tmp_path):
    """One file; or one file a configuration, as since April 2025."""
    flat, deep = [cvbench_row(i) for i in range(3)], [cvbench_row(i, "3D") for i in range(3, 5)]
    write(tmp_path / "old" / "test.parquet", "cvbench", flat + deep)
    write(tmp_path / "new" / "test_2d.parquet", "cvbench", flat)
    write(tmp_path / "new" / "test_3d.parquet", "cvbench", deep)
    old, new = (list(read("cvbench", tmp_path / name)) for name in ("old", "new"))
    assert old == new and [e.extra["type"] for e in new] == ["2D"] * 3 + ["3D"] * 2
    assert [e.extra["source"] for e in read("cvbench", tmp_path / "new" / "test_3d.parquet")] == [
        "Omni3D"
    ] * 2


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"type": "4D"}, "type: is '4D'"),
        ({"idx": None}, "idx: holds NoneType"),
        ({"source": None}, "source: holds"),
        ({"answer": "(E)"}, "answer: '(E)' is not the letter of one of 4 choices"),
        ({"image": None}, "image: no picture"),
    ],
)
def test_a_bad_row_of_cvbench(tmp_path, changed, message):
    with pytest.raises(BadRow, match="row 0") as error:
        read("cvbench", write(tmp_path / "test.parquet", "cvbench", [cvbench_row(**changed)]))[0]
    assert message in str(error.value)


# ---- MathVista


def test_mathvista(tmp_path):
    rows = [
        mathvista_row(),
        mathvista_row(
            2,
            choices=["3", "4"],
            answer="4",
            question_type="multi_choice",
            answer_type="text",
            precision=None,
        ),
        mathvista_row(3, unit="$", answer="7", answer_type="integer", precision=None),
        mathvista_row(4, answer="[1, 2]", answer_type="list"),
    ]
    write(tmp_path / "data" / "test-00000-of-00002.parquet", "mathvista", [mathvista_row(9, answer="")])
    write(tmp_path / "data" / "testmini-00000-of-00001-725687bf7a18d64b.parquet", "mathvista", rows)
    free, choice, unit, several = read("mathvista", tmp_path)
    assert (free.uid, free.choices, free.answer, free.task) == ("1", (), "1.2", "textbook question answering")
    assert free.extra == {
        "question_type": "free_form",
        "answer_type": "float",
        "precision": 1.0,
        "unit": "",
        "kind": "number",
        "benchmark": "mathvista",
        "groups": {"skill": ()},
        "query": "Hint: Please answer the question requiring a floating-point number with one decimal place "
        "and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.\n"
        "Question: What is the spring's extension?",
    }
    assert choice.letter == "B" and choice.extra["kind"] == "text" and choice.asked.endswith("(A) 3\n(B) 4")
    assert (
        unit.asked == "What is the spring's extension? (Unit: $)"
        and unit.extra["unit"] == "$"
        and several.extra["kind"] == "text"
    )
    with pytest.raises(BadRow, match="row 0: answer: is empty; MathVista's test split has no answers"):
        read("mathvista", tmp_path / "data" / "test-00000-of-00002.parquet")[0]


# ---- free answers


@pytest.mark.parametrize("task", ["geometry3k", "vision_r1"])
@pytest.mark.parametrize(
    "answer, kind",
    [
        ("\\frac{3}{2}", "number"),
        ("140^\\circ", "number"),
        ("2 \\sqrt { 221 }", "number"),
        ("C", "text"),
        ("\\pi", "number"),
    ],
)
def test_problem_and_answer(tmp_path, task, answer, kind):
    (example,) = read(
        task,
        write(
            tmp_path / "train.parquet",
            "problem",
            [{"images": shown(1, 2), "problem": "<image> <image>Find x.", "answer": answer}],
        ),
    )
    assert (example.asked, example.choices, example.answer, example.extra) == (
        "Find x.",
        (),
        answer,
        {"kind": kind},
    )
    assert example.pictures == (png(1), png(2))


@pytest.mark.parametrize("task", ["clevr", "geoqa"])
def test_problem_and_solution(tmp_path, task):
    rows = [
        {"image": shown(1)[0], "problem": "How many items are there?", "solution": "<answer> 3 </answer>"},
        {"image": shown(2)[0], "problem": "How many?", "solution": "3"},
    ]
    examples = read(task, write(tmp_path / "train-00000-of-00001.parquet", "solution", rows))
    assert (examples[0].answer, examples[0].extra, examples[0].pictures) == (
        "3",
        {"kind": "number"},
        (png(1),),
    )
    with pytest.raises(BadRow, match="row 1: solution: '3' is not <answer>"):
        examples[1]


# ---- files and parts


def problems(first, count):
    return [
        {"images": shown(i), "problem": f"Problem {i}", "answer": str(i)} for i in range(first, first + count)
    ]


def test_a_folder_with_a_file_for_each_part(tmp_path):
    for name, first, count in (
        ("train-00000-of-00002", 0, 3),
        ("train-00001-of-00002", 3, 3),
        ("validation-00000-of-00001", 10, 2),
        ("test-00000-of-00001", 20, 2),
    ):
        write(tmp_path / "data" / f"{name}.parquet", "problem", problems(first, count))
    train, heldout = open_source("geometry3k", tmp_path, limit=None, seed=0, items=9)
    assert [e.answer for e in train] == ["0", "1", "2", "3", "4", "5"] and [
        e.answer for e in heldout["heldout"]
    ] == ["10", "11"]
    assert [e.answer for e in read("geometry3k", tmp_path, limit=4)] == ["0", "1", "2", "3"]
    assert [e.answer for e in train[4:]] == ["4", "5"] and train[-1].answer == "5" and len(train[1:3]) == 2


def test_one_file_is_cut_by_its_pictures(tmp_path):
    """A sixteenth is held out; no picture is on both sides; neither order nor seed matters."""
    rows = [row | {"images": shown(i // 4)} for i, row in enumerate(problems(0, 400))]
    file = write(tmp_path / "train.parquet", "problem", rows, row_group_size=64)
    train, heldout = (read("geometry3k", file, part) for part in ("train", "heldout"))
    assert len(train) + len(heldout) == 400 and 4 <= len(heldout) <= 60
    assert not {e.pictures for e in train} & {e.pictures for e in heldout}
    mixed = write(tmp_path / "mixed.parquet", "problem", rows[::-1])
    assert {e.answer for e in read("geometry3k", mixed, "heldout", seed=9)} == {e.answer for e in heldout}


def test_what_is_no_file(tmp_path):
    with pytest.raises(BadSource, match="nowhere: no such file or folder"):
        read("sat", tmp_path / "nowhere")
    (tmp_path / "a.txt").touch()
    with pytest.raises(BadSource, match=r"no file matches \*.parquet; in .* there are a.txt"):
        read("sat", tmp_path)
    file = write(tmp_path / "x.parquet", "problem", problems(0, 1))
    with pytest.raises(BadSource, match="no column pid, .*, decoded_image; it has"):
        read("mathvista", file)
    with pytest.raises(BadSource, match="x.parquet: no column solution; it has images, problem, answer"):
        read("clevr", file)


def test_unusable_heldout_rows_are_named_and_left_out(tmp_path, capsys):
    for name, first in (("train", 0), ("validation", 10)):
        write(
            tmp_path / f"{name}-0.parquet",
            "problem",
            [*problems(first, 2), {"images": None, "problem": "x", "answer": "1"}],
        )
    train, heldout = open_source("geometry3k", tmp_path, limit=None, seed=0, items=9)
    assert len(train) == 3 and [e.answer for e in heldout["heldout"]] == ["10", "11"]
    assert (
        "left out of the held-out questions" in (err := capsys.readouterr().err)
        and "validation-0.parquet, row 2: images: no picture" in err
    )


# ---- reading


@pytest.mark.parametrize("large", [parquet.LARGE, 0], ids=["held", "unpacked"])
def test_any_row_in_any_order(tmp_path, monkeypatch, large):
    """From row groups held in memory, and from a group too large for that, which goes through a temporary
    file."""
    monkeypatch.setattr(parquet, "LARGE", large)
    monkeypatch.setattr(parquet, "HELD", 20_000)
    monkeypatch.setattr(parquet, "ROWS", 4)
    file = write(tmp_path / "train.parquet", "problem", problems(0, 50), row_group_size=17)
    examples = read("geometry3k", file)
    for index in (49, 0, 16, 17, 33, 34, 5, 48, 0, -1):
        assert examples[index].answer == str(index % 50) and examples[index].pictures == (png(index % 50),)
    assert len(examples.shards[0]._unpacked) == (3 if large == 0 else 0)
    with pytest.raises(IndexError):
        examples[50]


def test_many_files_share_one_memory(tmp_path, monkeypatch):
    """Sixteen files and two row groups of each: what is held is bounded by bytes, not by files."""
    held = parquet._Held()
    monkeypatch.setattr(parquet, "_held", held)
    monkeypatch.setattr(parquet, "HELD", 100_000)
    for number in range(16):
        write(tmp_path / f"train-{number:02}.parquet", "problem", problems(10 * number, 10), row_group_size=5)
    examples = read("geometry3k", tmp_path)
    order = np.random.default_rng(0).permutation(160)
    for index in order.tolist():
        assert examples[index].answer == str(index)
        assert held.bytes == sum(table.nbytes for table in held.tables.values()) <= 100_000
    group = next(iter(held.tables.values())).nbytes
    assert 10_000 < group < 40_000 and 2 <= len(held.tables) < 10


def test_a_file_damaged_in_the_middle(tmp_path):
    file = write(tmp_path / "train.parquet", "problem", problems(0, 40), row_group_size=10)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) * 3 // 4] = bytes(len(data) * 3 // 4 - len(data) // 2)
    file.write_bytes(data)
    examples = read("geometry3k", file)
    assert examples[0].answer == "0" and examples[19].pictures == (png(19),)
    with pytest.raises(BadSource, match="train.parquet, row 2[0-9]: cannot be read as parquet"):
        [examples[i] for i in range(20, 40)]


def test_large_row_groups_of_structs(tmp_path, monkeypatch):
    """The temporary file keeps nested columns: lists, structs, nothing."""
    monkeypatch.setattr(parquet, "LARGE", 0)
    rows = [mathvista_row(i, choices=["3", "4"] if i % 2 else None, answer="4") for i in range(5)]
    examples = read("mathvista", write(tmp_path / "testmini-0.parquet", "mathvista", rows))
    assert [e.choices for e in examples] == [(), ("3", "4"), (), ("3", "4"), ()] and examples[
        3
    ].task == "textbook question answering"
