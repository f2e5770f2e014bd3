"""Benchmarks of mathematics, charts and perception: VLMEvalKit's tables, and their owners' own files.

`extra["benchmark"]` names the comparison of answers (`grpo/evaluation/comparisons.py`), `extra["groups"]` the
parts of totals (`grpo/evaluation/totals.py`), `extra["query"]` the question as VLMEvalKit words it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.answers import numbers
from data.answers.parser import listed_choices
from data.sources.jsonl import JsonlShard
from data.sources.own import inside
from data.sources.parquet import ParquetShard
from data.sources.rows import Layout, Row, layout
from data.sources.tsv import TsvShard, items
from data.types import LETTERS, BadRow, Example, Picture, short

# MathVista's own hints, by what is asked (its create_query.py)
HINTS = {
    "choice": "the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, "
    "at the end.",
    "float 1": "the question requiring a floating-point number with one decimal place and provide the final "
    "value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float 2": "the question requiring a floating-point number with two decimal places and provide the final "
    "value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "the question requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
    "[1.2, 1.3, 1.4], at the end.",
}
# a row of MathVerse's version "Vision Only" has no question: it is in the picture
IN_PICTURE = "Answer the question in the picture."
# the columns of VLMEvalKit's tables, needed and known
TABLES = {
    "mathvista": (
        "index question answer question_type answer_type task",
        "choices answer_option precision skills",
    ),
    "mathverse": ("index question answer problem_version", "metadata question_for_eval query_cot"),
    "mm_math": ("index question answer difficulty", "year knowledge_l1"),
    "dynamath": ("index question answer answer_type qid subject", "knowledge_level"),
    "mmstar": ("index question answer A B category", "l2_category hint"),
    "chartqa": ("index question answer", "split"),
    "mme": ("index question answer category image_path", ""),
    "hallusion": ("index question answer", "category l2-category set_id figure_id question_id"),
}


class JsonShard(JsonlShard):
    """JSON lines, one array, or one object with all rows by their ids; the adapter finds the pictures."""

    def uids(self, columns: Sequence[str]):
        """For each row the name that it has in these fields; None without one."""
        for number in range(len(self)):
            try:
                values = self.row(number)
            except BadRow:
                values = {}
            named = [str(values[name]) for name in columns if values.get(name) is not None]
            yield "/".join(named) if len(named) == len(columns) else None


def shard_of(name: str) -> Callable[..., Any]:
    """The reader of one file of a benchmark, by its ending: VLMEvalKit's table, or its owners' file."""

    def opened(path: Path, columns: Any, optional: Any, pictures: Any, names: Any) -> Any:
        if path.suffix.lower() == ".tsv":
            needed, known = (text.split() for text in TABLES[name])
            known += [*LETTERS] if "A" in needed else ["image_path"]
            known = [each for each in known if each not in needed]
            return TsvShard(path, needed, known, (("image",), ("image_path",)), names)
        if path.suffix.lower() == ".parquet":
            return ParquetShard(path, columns, optional, pictures, names)
        return JsonShard(path, columns, optional, [*pictures, ("image",)], names)

    return opened


def known_layout(name: str, example: Callable[[Row], Example]) -> Layout:
    """The layout of that name, for files of each kind."""
    return layout(name, shard_of(name), example)


# ---- parts of rows


def pictures_of(row: Row, field: str) -> tuple[Picture, ...]:
    """The row's pictures: those that the file holds, else the files that a field names. Raises BadRow."""
    if row.pictures:
        return row.pictures
    named = row.values.get(field)
    roots = [row.beside or row.folder]
    roots += [roots[0] / name for name in ("images", "image", "Image", "MM_Math")]
    if not isinstance(named, str) or not named:
        raise row.bad(field, "no picture", "leave the row out")
    return tuple(inside(row, field, name, roots) for name in items(named))


def plain_list(row: Row, field: str) -> list[str]:
    """A list of texts: as it is, or as Python writes it. [] if there is none. Raises BadRow."""
    value = row.values.get(field)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.startswith("[") else [value]
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = [value]
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(item, (str, int, float)) for item in value):
        raise row.bad(field, f"{short(row.values[field])} is not a list of texts", 'write ["…", "…"]')
    return [str(item) for item in value]


def about_of(row: Row, field: str) -> Mapping[str, Any]:
    """An object: as it is, or as Python writes it. {} if there is none. Raises BadRow."""
    value = row.values.get(field)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise row.bad(field, f"{short(value)} is no object", "download the file again") from None
    if value is not None and not isinstance(value, dict):
        raise row.bad(field, f"holds {type(value).__name__}, not an object", "download the file again")
    return value or {}


def kind_of(answer: str) -> str:
    """How a free answer compares: "number" if it is one."""
    return "number" if numbers.parse(answer) else "text"


def lettered(row: Row, answer: str, choices: Sequence[str]) -> str:
    """The choice whose letter is the answer. Raises BadRow."""
    letter = answer.strip().strip("().").upper()
    if len(letter) != 1 or letter not in LETTERS[: len(choices)]:
        raise row.bad("answer", f"{short(answer)} is not the letter of one of {len(choices)} choices")
    return choices[LETTERS.index(letter)]


def worded(
    row: Row, uid: str, text: str, answer: str, listing: str, extra: dict[str, Any], task: str
) -> Example:
    """A question that has its choices in its own text, or none. listing: the text that lists them."""
    pictures = pictures_of(row, "image")
    choices = listed_choices(listing)
    if choices and len(answer.strip()) == 1 and answer.strip() in LETTERS[: len(choices)]:
        right = choices[LETTERS.index(answer.strip())]
        return Example(uid, text, choices, right, task, pictures, extra, wording=text, may_repeat=True)
    extra["kind"] = kind_of(answer)
    return Example(uid, text, (), answer, task, pictures, extra)


def boxed(text: str) -> list[str]:
    r"""What stands in each \boxed{…} of a text, braces matched."""
    found = []
    for start in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for end in range(start.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                found.append(text[start.end() : end].strip())
                break
    return found


# ---- the benchmarks


def mathvista_query(
    question: str, choices: Sequence[str], answer_type: str, precision: Any, unit: str
) -> str:
    """The question as MathVista words it (its create_query.py, without captions and OCR)."""
    places = int(precision) if answer_type == "float" and precision == precision and precision else 1
    asks = "choice" if choices else f"float {places}" if answer_type == "float" else answer_type
    hint = HINTS.get(asks, "the question and provide the final answer at the end.")
    listing = "\nChoices:" + "".join(map("\n({}) {}".format, LETTERS, choices)) if choices else ""
    unit = f" (Unit: {unit})" if unit else ""
    return f"Hint: Please answer {hint}\nQuestion: {question}{unit}{listing}".strip()


def mathvista_example(row: Row) -> Example:
    """`extra` has what its scoring needs: question_type, answer_type, precision, unit. In VLMEvalKit's table
    the question is the query, with its hint and its choices."""
    answer = row.answer()
    if not answer.strip():
        raise row.bad("answer", "is empty", "MathVista's test split has no answers, use testmini")
    question, unit, kind = row.text("question"), row.text("unit", missing=""), row.text("answer_type")
    choices = tuple(plain_list(row, "choices"))
    precision, about = row.values.get("precision"), about_of(row, "metadata")
    if question.startswith("Hint:"):
        query = question
        unit = ""
        question = question.partition("\nQuestion: ")[2].partition("\nChoices:")[0]
        precision = precision or (2 if "two decimal places" in query else 1 if "one decimal" in query else 0)
        option = row.text("answer_option", missing="").strip()
        answer = lettered(row, option, choices) if option and choices else answer
    else:
        query = mathvista_query(question, choices, kind, precision, unit)
    if choices and answer not in choices:
        raise row.bad("answer", f"{short(answer)} is not one of the choices {short(list(choices))}")
    extra: dict[str, Any] = dict(question_type=row.text("question_type"), answer_type=kind, unit=unit)
    extra |= {"precision": precision, "benchmark": "mathvista", "query": query}
    extra["kind"] = "number" if kind in ("integer", "float") and not choices else "text"
    skills = plain_list(row, "skills") or list(about.get("skills") or [])
    extra["groups"] = {"skill": tuple(map(str, skills))}
    task = row.text("task", missing="") or str(about.get("task") or "")
    asked = f"{question} (Unit: {unit})" if unit else question
    uid = row.text("pid" if "pid" in row.values else "index")
    # three rows of testmini have equal choices; either letter is right
    pictures = pictures_of(row, "image")
    return Example(uid, asked, choices, answer, task, pictures, extra, may_repeat=True)


def mathverse_example(row: Row) -> Example:
    """The task is the version of the problem, which says how much stands in the picture alone."""
    question, query = row.text("question", missing=""), row.text("query_cot", missing="")
    about = about_of(row, "metadata")
    names = {"subject": about.get("subject"), "subfield": about.get("subfield")}
    groups = {name: str(value) for name, value in names.items() if value}
    text = question.strip() or query.partition("\nQuestion:")[0].strip() or IN_PICTURE
    extra: dict[str, Any] = {"benchmark": "mathverse", "groups": groups}
    extra["query"] = question if "index" in row.values and question.strip() else query or text
    extra["question_for_eval"] = row.text("question_for_eval", missing="") or question
    uid = row.text("index" if "index" in row.values else "sample_index")
    listing = question if listed_choices(question) else extra["question_for_eval"]
    return worded(row, uid, text, row.answer().strip(), listing, extra, row.text("problem_version"))


def mm_math_example(row: Row) -> Example:
    r"""The answer is what the solution (in VLMEvalKit's table, the answer) has in \boxed{…}."""
    table = "index" in row.values
    solution = row.answer() if table else row.text("solution")
    answer = ", ".join(boxed(solution)) or (solution.strip() if table else "")
    if not answer:
        raise row.bad("solution", r"has no \boxed{…}", "leave the row out")
    knowledge = row.values.get("knowledge_l1") or about_of(row, "knowledge").get("level_1")
    names = {"grade": row.values.get("year"), "knowledge": knowledge}
    groups = {name: str(value) for name, value in names.items() if value}
    question, task = (
        row.text("question"),
        str(row.values.get("difficulty") or row.values.get("difficult") or ""),
    )
    extra = {"benchmark": "mm_math", "groups": groups, "kind": kind_of(answer)}
    uid = row.text("index") if table else row.uid
    return Example(
        uid, question, (), answer, task, pictures_of(row, "image" if table else "file_name"), extra
    )


def dynamath_example(row: Row) -> Example:
    """The task is the subject. Variants of one question have the same group `question`."""
    values = row.values
    answer = row.answer("answer" if values.get("answer") is not None else "ground_truth").strip()
    number = str(values.get("qid") or values.get("id") or "")
    if not number:
        raise row.bad("id", "is missing", "add the question's number, which its variants share")
    uid = row.text("index") if "index" in values else f"{row.uid.rpartition('/')[0]}/{number}"
    level = str(values.get("knowledge_level") or values.get("level") or "")
    extra: dict[str, Any] = {"benchmark": "dynamath", "answer_type": row.text("answer_type")}
    extra["groups"] = {"question": number} | ({"level": level} if level else {})
    question = row.text("question")
    return worded(row, uid, question, answer, question, extra, row.text("subject"))


def mmstar_example(row: Row) -> Example:
    """Lettered choices, in the columns A, B, C and so on."""
    choices = [str(row.values[letter]) for letter in LETTERS if row.values.get(letter) is not None]
    answer = lettered(row, row.text("answer"), choices)
    question, hint = row.text("question"), row.text("hint", missing="")
    listing = "".join(map("{}. {}\n".format, LETTERS, choices))
    query = f"Hint: {hint}\n" if hint else ""
    query += f"Question: {question}\nOptions:\n{listing}"
    query += "Please select the correct answer from the options above. \n"
    groups = {"skill": row.text("l2_category")} if row.values.get("l2_category") else {}
    extra = {"benchmark": "mmstar", "groups": groups, "query": query}
    asked = f"{hint}\n{question}" if hint else question
    uid, task, pictures = row.text("index"), row.text("category"), pictures_of(row, "image_path")
    return Example(uid, asked, tuple(choices), answer, task, pictures, extra, may_repeat=True)


def chartqa_example(row: Row) -> Example:
    """The task is the file's part: questions by people, or by a model."""
    golds = plain_list(row, "answer") or [row.answer()]
    question = row.text("question")
    query = f"{question}\nAnswer the question using a single word or phrase."
    extra = {"benchmark": "chartqa", "golds": tuple(golds), "query": query, "kind": kind_of(golds[0])}
    uid, task = row.text("index"), row.text("split", missing="")
    return Example(uid, question, (), golds[0], task, pictures_of(row, "image_path"), extra)


def yes_or_no(row: Row, benchmark: str, task: str, groups: Mapping[str, str]) -> Example:
    """A question to be answered by yes or no, which the text asks for itself."""
    answer, question = row.text("answer").strip().capitalize(), row.text("question")
    if answer not in ("Yes", "No"):
        raise row.bad("answer", f"is {short(row.values['answer'])}, not Yes or No")
    extra = {"benchmark": benchmark, "groups": groups, "query": question}
    uid, pictures = row.text("index"), pictures_of(row, "image_path")
    return Example(uid, question, ("Yes", "No"), answer, task, pictures, extra, wording=question)


def mme_example(row: Row) -> Example:
    """Two questions a picture; `image_path` says which belong together."""
    category = row.text("category")
    return yes_or_no(row, "mme", category, {"picture": f"{category}/{row.text('image_path')}"})


def hallusion_example(row: Row) -> Example:
    """The index ends in _SET_FIGURE_QUESTION; rows with the same figure, or the same question about other
    figures, belong together."""
    category, part = row.text("category", missing=""), row.text("l2-category", missing="")
    numbered = [row.values.get(name) for name in ("set_id", "figure_id", "question_id")]
    if not all(numbered):
        numbered = row.text("index").split("_")[-3:]
        if len(numbered) < 3 or not all(text.isdigit() for text in numbered):
            raise row.bad("index", f"{short(row.values['index'])} does not end in _SET_FIGURE_QUESTION")
    place = f"{category}/{part}/{numbered[0]}"
    groups = {"figure": f"{place}/{numbered[1]}", "question": f"{place}/{numbered[2]}"}
    return yes_or_no(row, "hallusion", part or category, groups)


LAYOUTS = {
    "mathvista": known_layout("mathvista", mathvista_example),
    "mathverse": known_layout("mathverse", mathverse_example),
    "mm_math": known_layout("mm_math", mm_math_example),
    "dynamath": known_layout("dynamath", dynamath_example),
    "mmstar": known_layout("mmstar", mmstar_example),
    "chartqa": known_layout("chartqa", chartqa_example),
    "mme": known_layout("mme", mme_example),
    "hallusion": known_layout("hallusion", hallusion_example),
}
