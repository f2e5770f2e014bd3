"""Questions to train on, in their owners' layout: SAT, Geometry3K, GeoQA, CLEVR, Vision-R1, own JSON lines.

SAT is here twice. `sat` asks like the benchmarks, with lettered choices. `sat_paper` is the protocol of
VisualThinker-R1-Zero (arXiv 2503.05132, its SAT scripts): question and answer name the options in words.
Departures from its code: the order of the options depends on the seed, and the options are the file's list,
not cut at commas.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from data.answers import numbers
from data.sources.own import TAGGED
from data.sources.parquet import ParquetShard
from data.sources.rows import Row, layout
from data.types import Example, short

# the first rows of SAT_train.parquet; those with one picture are trained on
PAPER_ROWS = 15_000
# a mistake of SAT's generator, in options about a single picture; SAT's own loader removes it, too
SLIP = " in the first frame"


# ---- SAT


def sat_example(row: Row) -> Example:
    """Lettered choices, in an order drawn from the seed."""
    question, options, answer, task = _sat(row, clean=True)
    return Example(row.uid, question, options, answer, task, row.pictures)


def sat_paper_example(row: Row) -> Example:
    """A free answer. The space before the question is the paper's, which removed "<image>" before it."""
    question, options, answer, task = _sat(row, clean=False)
    last = f"{', '.join(options[:-1])} or {options[-1]}"
    asked = f" Answer in natural language. {question} Choose between the following options: {last}"
    return Example(row.uid, asked, (), answer, task, row.pictures, {"options": options, "kind": "text"})


def _sat(row: Row, clean: bool) -> tuple[str, tuple[str, ...], str, str]:
    """(question, shuffled options, answer, task). In the file the right option is often the first."""
    options, answer = row.texts("answers"), row.text("correct_answer")
    if clean:
        options, answer = tuple(option.replace(SLIP, "") for option in options), answer.replace(SLIP, "")
    if len(options) < 2 or len(set(options)) < len(options):
        raise row.bad("answers", f"{short(list(options))} are not two or more different options")
    if answer not in options:
        raise row.bad("correct_answer", f"{short(answer)} is not one of the answers {short(list(options))}")
    question = row.text("question")
    task = sat_task(question, row.text("question_type"))
    return question, shuffled(options, row.uid, row.seed), answer, task


def shuffled(options: tuple[str, ...], uid: str, seed: int) -> tuple[str, ...]:
    """The options in an order that depends on seed and uid, not on the order of the input."""
    return tuple(sorted(options, key=lambda each: hashlib.sha256(f"{seed}/{uid}/{each}".encode()).digest()))


def sat_task(question: str, kind: str) -> str:
    """CV-Bench's name for one of SAT's static templates, by its words; `kind` (question_type) for others."""
    words = {
        "Count": ("How many",),
        "Depth": ("closer to the camera", "further away or in front of", "behind"),
        "Distance": ("is closer to",),
        "Height": ("higher height",),
        "Relation": ("to the left", "with respect to", "above or below"),
    }
    if kind != "other":
        return kind
    return next((task for task, signs in words.items() if any(sign in question for sign in signs)), kind)


# ---- free answers


def open_question(row: Row, question: str, answer: str) -> Example:
    """A question with a free answer: a number if it can be read as one."""
    extra = {"kind": "number" if numbers.parse(answer) else "text"}
    return Example(row.uid, question.strip(), (), answer, pictures=row.pictures, extra=extra)


def problem_example(row: Row) -> Example:
    """Geometry3K and Vision-R1-rl, EasyR1's layout: `problem` and `answer`, which may be LaTeX."""
    return open_question(row, row.text("problem"), row.answer().strip())


def solution_example(row: Row) -> Example:
    """R1-V's layout: the answer is in `solution`, as <answer> … </answer>."""
    solution = row.text("solution")
    found = TAGGED.fullmatch(solution)
    if not found:
        raise row.bad("solution", f"{short(solution)} is not <answer> … </answer>")
    return open_question(row, row.text("problem"), found[1].strip())


SAT = layout("sat", ParquetShard, sat_example)
SAT_PAPER = replace(SAT, example=sat_paper_example, first=PAPER_ROWS)
GEOMETRY3K = layout("geometry3k", ParquetShard, problem_example)
VISION_R1 = layout("vision_r1", ParquetShard, problem_example)
GEOQA = CLEVR = layout("geoqa", ParquetShard, solution_example)
