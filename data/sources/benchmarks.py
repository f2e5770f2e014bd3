"""Benchmarks in their owners' layout: BLINK, CV-Bench, VSR. Each is a `Layout` of
layouts.yaml and an adapter from a row to an `Example`.

They are for evaluation, split "all". Training on half of one ("train", "heldout": halves by picture) shows
that a model learns; it is no result. A benchmark's own prompt is kept where question and choices differ.
"""

from __future__ import annotations

from data.sources.jsonl import JsonlShard
from data.sources.own import inside
from data.sources.parquet import ParquetShard
from data.sources.rows import Row, layout
from data.types import LETTERS, Example, MissingPicture, listed, short

# VisualThinker-R1-Zero's exact wording of a caption (arXiv 2503.05132, its evaluation on VSR)
VSR_WORDING = (
    'Please analyze the provided image. Does the statement "{caption}" accurately describes what you see? '
    "Choose from (A) True or (B) False."
)


def right_choice(row: Row, choices: tuple[str, ...]) -> str:
    """The choice whose letter is in the field `answer`, as "(A)" or "A". Raises BadRow."""
    answer = row.text("answer")
    letter = answer.strip("() ")
    if answer.strip() == "hidden":
        raise row.bad("answer", "the answer is hidden", "BLINK's test split has none, use its val split")
    if len(letter) != 1 or letter not in LETTERS[: len(choices)]:
        raise row.bad("answer", f"{short(answer)} is not the letter of one of {len(choices)} choices")
    return choices[LETTERS.index(letter)]


def as_prompted(row: Row, choices: tuple[str, ...]) -> tuple[str, str]:
    """`Example`'s question and wording, so that the model reads exactly the field `prompt`.

    BLINK's list of choices starts on a new line, as in `Example.asked`; CV-Bench's on the same line. A prompt
    that does not end in this list has another form: `question` is used.
    """
    prompt, listing = row.text("prompt"), listed(choices)
    if prompt.endswith("\n" + listing):
        return prompt.removesuffix("\n" + listing), ""
    return row.text("question"), prompt if prompt.endswith(listing) else ""


def blink_example(row: Row) -> Example:
    """`prompt` is what BLINK asks; `question` is shorter in some subtasks."""
    choices = row.texts("choices")
    question, wording = as_prompted(row, choices)
    uid, answer, task = row.text("idx"), right_choice(row, choices), row.text("sub_task")
    return Example(uid, question, choices, answer, task, row.pictures, wording=wording)


def cvbench_example(row: Row) -> Example:
    """`extra` has source (ADE20K, COCO, Omni3D) and type (2D, 3D): Cambrian's score needs them."""
    choices, kind, number = row.texts("choices"), row.text("type"), row.values["idx"]
    if kind not in ("2D", "3D"):
        raise row.bad("type", f"is {short(kind)}, not 2D or 3D")
    if type(number) is not int:
        raise row.bad("idx", f"holds {type(number).__name__}, not int")
    question, wording = as_prompted(row, choices)
    answer, task = right_choice(row, choices), row.text("task")
    extra = {"source": row.text("source"), "type": kind}
    return Example(f"{kind}/{number}", question, choices, answer, task, row.pictures, extra, wording)


def vsr_example(row: Row) -> Example:
    """A caption that is true or false of its picture, a file of COCO in a local folder."""
    name, label = row.text("image"), row.values["label"]
    if type(label) is not int or label not in (0, 1):
        raise row.bad("label", f"is {short(label)}, not 0 or 1")
    caption = row.text("caption")
    root = row.beside or row.folder
    part = "val2017" if "/val2017/" in row.text("image_link") else "train2017"
    try:
        picture = inside(row, "image", name, [root, root / part, root / "images", root / "images" / part])
    except MissingPicture as error:
        error.link = row.text("image_link")
        raise
    choices, task = ("True", "False"), row.text("relation", missing="")
    wording = VSR_WORDING.format(caption=caption)
    return Example(row.uid, caption, choices, choices[1 - label], task, (picture,), wording=wording)


BLINK = layout("blink", ParquetShard, blink_example)
CVBENCH = layout("cvbench", ParquetShard, cvbench_example)
VSR = layout("vsr", JsonlShard, vsr_example)
