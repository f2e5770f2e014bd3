"""Files in the layouts of the hub, written by pyarrow, with made-up rows. Not a test itself."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

# what `datasets` makes of an Image
PICTURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
TEXT, TEXTS = pyarrow.string(), pyarrow.list_(pyarrow.string())
SCHEMAS = {
    "sat": {
        "image_bytes": pyarrow.list_(PICTURE),
        "question": TEXT,
        "answers": TEXTS,
        "question_type": TEXT,
        "correct_answer": TEXT,
    },
    "sat_v2": {
        "images": pyarrow.list_(PICTURE),
        "question": TEXT,
        "answers": TEXTS,
        "question_type": TEXT,
        "correct_answer": TEXT,
    },
    "cvbench": {
        "idx": pyarrow.int64(),
        "type": TEXT,
        "task": TEXT,
        "image": PICTURE,
        "question": TEXT,
        "choices": TEXTS,
        "answer": TEXT,
        "prompt": TEXT,
        "filename": TEXT,
        "source": TEXT,
        "source_dataset": TEXT,
        "source_filename": TEXT,
        "target_class": TEXT,
        "target_size": pyarrow.int64(),
        "bbox": pyarrow.list_(pyarrow.list_(pyarrow.float64())),
    },
    "mathvista": {
        "pid": TEXT,
        "question": TEXT,
        "image": TEXT,
        "decoded_image": PICTURE,
        "choices": TEXTS,
        "unit": TEXT,
        "precision": pyarrow.float64(),
        "answer": TEXT,
        "question_type": TEXT,
        "answer_type": TEXT,
        "metadata": pyarrow.struct([("task", TEXT), ("source", TEXT), ("img_width", pyarrow.int64())]),
        "query": TEXT,
    },
    "problem": {"images": pyarrow.list_(PICTURE), "problem": TEXT, "answer": TEXT},
    "solution": {"image": PICTURE, "problem": TEXT, "solution": TEXT},
}


def png(seed=0, size=(40, 30)):
    """A picture of noise as the bytes of its file."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shown(*seeds):
    """The value of a column that holds a list of pictures."""
    return [{"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds]


def write(file, layout, rows, **options):
    """A parquet file of a layout; columns that a row does not have are empty. -> the file"""
    schema = pyarrow.schema(list(SCHEMAS[layout].items())) if isinstance(layout, str) else layout
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), file, **options)
    return file


def write_lines(file, rows):
    """A file of one JSON object a line; a text is written as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def sat_row(number=0, pictures=1, column="image_bytes", **changed):
    return {
        column: shown(*(10 * number + i for i in range(pictures))),
        "question": f"Where is the cup, {number}?",
        "answers": ["left", "right"],
        "question_type": "other",
        "correct_answer": "left",
    } | changed


def cvbench_row(number=0, kind="2D", **changed):
    return {
        "idx": number,
        "type": kind,
        "task": "Count" if kind == "2D" else "Depth",
        "image": shown(number)[0],
        "question": "How many organs are in the image?",
        "choices": ["3", "2", "1", "0"],
        "answer": "(C)",
        "prompt": (
            "How many organs are in the image? Select from the following choices.\n(A) 3\n(B) 2\n(C) 1\n(D) 0"
        ),
        "source": "ADE20K" if kind == "2D" else "Omni3D",
        "filename": "img/2D/count/ade20k_10.png",
    } | changed


def mathvista_row(number=1, **changed):
    return {
        "pid": str(number),
        "question": "What is the spring's extension?",
        "image": f"images/{number}.jpg",
        "decoded_image": shown(number)[0],
        "choices": None,
        "unit": None,
        "precision": 1.0,
        "answer": "1.2",
        "question_type": "free_form",
        "answer_type": "float",
        "metadata": {"task": "textbook question answering", "source": "SciBench", "img_width": 40},
        "query": "Hint: Please answer the question requiring a floating-point number with one "
        "decimal place …",
    } | changed


def vsr_row(number=0, **changed):
    return {
        "image": f"{number:012}.jpg",
        "image_link": f"http://images.cocodataset.org/train2017/{number:012}.jpg",
        "caption": "The person is inside the refrigerator.",
        "label": 1,
        "relation": "inside",
        "annotator_id": 29,
        "vote_true_validator_id": "[2, 9]",
        "vote_false_validator_id": "[3]",
        "reference_frame": None,
    } | changed
