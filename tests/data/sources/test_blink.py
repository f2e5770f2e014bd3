"""BLINK's parquet layout, with made-up rows, and with the real photographs where they are."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_chat import processor, qwen, verbatim  # noqa: F401

from data.chat import Chat
from data.sources.table import SOURCES, BadSource
from data.types import BadExample, BadRow

pyarrow = pytest.importorskip("pyarrow", reason="reading parquet is an optional extra")
REAL = Path(__file__).resolve().parents[4] / "shared/data/blink/Spatial_Relation/val-00000-of-00001.parquet"
blink = SOURCES["blink"]
PICTURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
SCHEMA = pyarrow.schema(
    [(name, pyarrow.string()) for name in ("idx", "question", "sub_task")]
    + [(f"image_{i}", PICTURE) for i in (1, 2, 3, 4)]
    + [("choices", pyarrow.list_(pyarrow.string()))]
    + [(name, pyarrow.string()) for name in ("answer", "prompt", "explanation")]
)


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def row(number, pictures=1, **changed):
    found = {
        "idx": f"val_{number}",
        "question": f"Question {number}?",
        "sub_task": "Counting",
        "choices": ["one", "two", "three"],
        "answer": "(C)",
        "prompt": f"A longer question {number}? \nSelect from the following choices.\n"
        "(A) one\n(B) two\n(C) three",
        "explanation": None,
    }
    found |= {
        f"image_{i}": {"bytes": png(10 * number + i), "path": "image.jpg"} if i <= pictures else None
        for i in (1, 2, 3, 4)
    }
    return found | changed


def parquet(folder, rows, schema=SCHEMA, **options):
    import pyarrow.parquet

    file = folder / "val.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), file, **options)
    return file


def test_a_blink_row(tmp_path):
    (example,) = blink(parquet(tmp_path, [row(7, pictures=3)]), "all", None, 0)
    assert (example.uid, example.task, example.answer, example.letter) == ("val_7", "Counting", "three", "C")
    assert example.pictures == (png(71), png(72), png(73))
    # to the letter, the space before the line's end too
    assert example.asked == row(7)["prompt"]
    (short,) = blink(parquet(tmp_path, [row(7, prompt="in another form")]), "all", None, 0)
    assert short.question == "Question 7?"


def test_limit_and_order(tmp_path):
    file = parquet(tmp_path, [row(i) for i in range(40)], row_group_size=7)
    assert [e.uid for e in blink(file, "all", None, 0)] == [f"val_{i}" for i in range(40)]
    assert [e.uid for e in blink(file, "all", 5, 0)] == [f"val_{i}" for i in range(5)]
    assert len(blink(file, "all", 0, 0)) == 0
    assert [e.uid for e in blink(file, "train", 3, 0)] == [e.uid for e in blink(file, "train", None, 0)[:3]]
    assert list(blink(file, "all", None, 1)) == list(blink(file, "all", None, 2))


def test_the_halves_share_no_photograph(tmp_path):
    # three questions a photograph
    rows = [row(i, image_1={"bytes": png(i // 3), "path": None}) for i in range(60)]
    file = parquet(tmp_path, rows)
    train, heldout = blink(file, "train", None, 0), blink(file, "heldout", None, 0)
    assert len(train) + len(heldout) == 60 and min(len(train), len(heldout)) >= 15
    assert not {e.pictures for e in train} & {e.pictures for e in heldout}
    # whatever the order
    assert {e.uid for e in train} == {e.uid for e in blink(parquet(tmp_path, rows[::-1]), "train", None, 0)}


def test_rows_after_the_limit_are_not_read(tmp_path):
    """The last row is broken and never seen; nor do the other rows suffer from it."""
    file = parquet(tmp_path, [*(row(i) for i in range(64)), row(64, answer="(Z)")])
    assert len(list(blink(file, "all", 10, 0))) == 10
    examples = blink(file, "all", None, 0)
    assert len(examples) == 65 and examples[63].uid == "val_63"
    with pytest.raises(BadRow, match="row 64"):
        examples[64]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"answer": "(D)"}, "row 1: answer: '(D)' is not the letter of one of 3"),
        ({"answer": "hidden"}, "row 1: answer: the answer is hidden; BLINK's test split"),
        ({"answer": "(A)(B)"}, "is not the letter"),
        ({"answer": ""}, "is not the letter"),
        ({"answer": None}, "row 1: answer: holds NoneType"),
        ({"choices": []}, "is not the letter of one of 0 choices"),
        ({"choices": None}, "choices: holds NoneType"),
        ({"idx": None}, "idx: holds"),
        ({"choices": ["one", None]}, "choices: holds a list of NoneType, str"),
        ({"image_1": None}, "row 1: image_1, image_2, image_3, image_4: no picture"),
        ({"image_1": {"bytes": None, "path": "x.jpg"}}, "row 1: image_1: holds no picture bytes"),
        ({"question": None, "prompt": "in another form"}, "question: holds NoneType"),
        ({"prompt": None}, "prompt: holds NoneType"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changed, message):
    examples = blink(parquet(tmp_path, [row(0), row(1, **changed), row(2)]), "all", None, 0)
    with pytest.raises(BadRow) as error:
        examples[1]
    assert message in str(error.value) and "val.parquet" in str(error.value)
    assert (examples[0].uid, examples[2].uid) == ("val_0", "val_2")


def test_a_bad_example_is_named(tmp_path):
    with pytest.raises(BadExample, match="val.parquet, row 0: example 'val_0': two choices are the same"):
        blink(parquet(tmp_path, [row(0, choices=["one", "one", "three"])]), "all", None, 0)[0]


def test_a_file_that_is_not_right(tmp_path):
    with pytest.raises(BadSource, match="gone.parquet: no such file"):
        blink(tmp_path / "gone.parquet", "all", None, 0)
    (tmp_path / "text.parquet").write_text("hello, this is no parquet file")
    with pytest.raises(BadSource, match="text.parquet: cannot be read as parquet"):
        blink(tmp_path / "text.parquet", "all", None, 0)
    file = parquet(tmp_path, [row(i) for i in range(9)])
    (tmp_path / "half.parquet").write_bytes(file.read_bytes()[:3000])
    with pytest.raises(BadSource, match="half.parquet: cannot be read"):
        blink(tmp_path / "half.parquet", "all", None, 0)
    names = [name for name in SCHEMA.names if name not in ("choices", "image_3")]
    without = parquet(tmp_path, [row(0)], schema=pyarrow.schema([SCHEMA.field(name) for name in names]))
    with pytest.raises(BadSource, match="val.parquet: no column choices, image_3; it has idx, question"):
        blink(without, "all", None, 0)


def test_pictures_as_plain_bytes(tmp_path):
    schema = SCHEMA
    for name in ("image_1", "image_2", "image_3", "image_4"):
        schema = schema.set(schema.get_field_index(name), pyarrow.field(name, pyarrow.binary()))
    plain = {f"image_{i}": png(i) if i < 3 else None for i in (1, 2, 3, 4)}
    (example,) = blink(parquet(tmp_path, [row(0, **plain)], schema=schema), "all", None, 0)
    assert example.pictures == (png(1), png(2))


# ---- the real photographs


@pytest.fixture(scope="module")
def photographs():
    if not REAL.is_file():
        pytest.skip(
            "the 143 photographs of BLINK's Spatial_Relation are not beside the repository (../shared/data)"
        )
    return blink(REAL, "all", None, 0)


def test_the_real_rows(photographs):
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(REAL, columns=["prompt", "answer", "idx"]).to_pylist()
    assert len(photographs) == len({e.uid for e in photographs}) == 143
    # as BLINK's own val_answers.json
    assert [e.letter for e in photographs].count("A") == 77
    assert all(
        e.asked == r["prompt"] and f"({e.letter})" == r["answer"] and e.uid == r["idx"]
        for e, r in zip(photographs, rows)
    )
    train, heldout = blink(REAL, "train", None, 0), blink(REAL, "heldout", None, 0)
    assert len(train) + len(heldout) == 143 and min(len(train), len(heldout)) > 50
    assert not {e.pictures for e in train} & {e.pictures for e in heldout}


def test_the_real_photographs_become_prompts(photographs):
    """Every one of them, at the built-in model's pixel limit."""
    folder = Path(__file__).resolve().parents[3] / "models" / "tiny"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("no built-in model")
    chat = Chat(folder, template="shapes", max_prompt=256)
    for example in photographs:
        prompt = chat.prompt(example)
        assert 3136 <= prompt.grid.prod() * 196 <= 84 * 84
        assert (
            (prompt.tokens == chat.image_token).sum() == prompt.grid.prod() // 4 == len(prompt.patches) // 4
        )
        assert np.isfinite(prompt.patches).all() and prompt.patches.std() > 0.05


def test_the_real_photographs_as_transformers(photographs, processor, qwen):
    """All 143, at the paper's pixel limit: the prompt's ids are the same, pixels differ by a rounding at
    most."""
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 401408}
    chat = Chat(qwen, template="visualthinker", min_pixels=3136, max_pixels=401408)
    for example in photographs:
        ours = chat.prompt(example)
        theirs = processor(
            text=[verbatim("visualthinker", example)],
            images=[Image.open(io.BytesIO(p)) for p in example.pictures],
            return_tensors="np",
        )
        assert (
            ours.tokens.tolist() == theirs["input_ids"][0].tolist()
            and ours.grid.tolist() == theirs["image_grid_thw"].tolist()
        )
        assert np.abs(ours.patches - theirs["pixel_values"]).max() <= 1e-6
