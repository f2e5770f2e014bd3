"""grpo/evaluation/totals.py: totals against closed forms, a paper's printed table, and their definitions."""

import random
from math import sqrt

import pytest

from grpo.evaluation.protocols import PROTOCOLS, rounded, truncated
from grpo.evaluation.statistics import wilson
from grpo.evaluation.tables import notes
from grpo.evaluation.totals import PERCEPTION, Mark, micro, shares_by, source_averaged, task_averaged, totals


def test_the_paper_s_row_of_table_3():
    """470/788, 434/650, 325/600 and 340/600 right are printed as 59.64, 66.76, 54.16, 56.66 and 59.47 in
    all: micro, and truncated (rounded it is 59.48)."""
    counts = {
        "Count": (470, 788, "59.64"),
        "Relation": (434, 650, "66.76"),
        "Depth": (325, 600, "54.16"),
        "Distance": (340, 600, "56.66"),
    }
    for right, n, printed in counts.values():
        assert truncated(right / n) == printed
    marks = [
        Mark(task, "somewhere", float(i < right)) for task, (right, n, _) in counts.items() for i in range(n)
    ]
    found = micro(marks)
    assert (
        len(marks) == 2638
        and found["value"] == pytest.approx(1569 / 2638)
        and truncated(found["value"]) == "59.47"
    )
    assert found["interval"] == pytest.approx(wilson(1569, 2638))
    assert f"{100 * found['value']:.2f}" == "59.48" and rounded(found["value"]) == "59.5"
    assert PROTOCOLS["paper"].shown is truncated and [
        name for name, each in PROTOCOLS.items() if each.shown is truncated
    ] == ["paper"]


@pytest.mark.parametrize("n", [1, 3, 7, 100, 267, 600, 650, 788, 2638])
def test_truncation_is_that_of_the_fraction(n):
    """Floats come out a hair low (0.29 is 28.999… %): every count of every size is cut as whole-number
    arithmetic cuts it."""
    for right in range(n + 1):
        assert truncated(right / n) == f"{right * 10_000 // n // 100}.{right * 10_000 // n % 100:02}"


def marks_of(**counts):
    return [Mark("a", source, float(i < right)) for source, (right, n) in counts.items() for i in range(n)]


def test_cambrian_s_total():
    marks = marks_of(ADE20K=(3, 4), COCO=(1, 2), Omni3D=(2, 8))
    found = source_averaged(marks)
    assert found["value"] == pytest.approx(((3 / 4 + 1 / 2) / 2 + 1 / 4) / 2)
    assert found["parts"] == {"ADE20K": 0.75, "COCO": 0.5, "Omni3D": 0.25}
    # and the two are not the same
    assert micro(marks)["value"] == pytest.approx(6 / 14)
    assert source_averaged(marks[::-1])["value"] == found["value"]


def test_blink_s_total_is_the_mean_of_its_subtasks():
    marks = [
        Mark(task, None, float(i < right))
        for task, right, n in (("a", 1, 4), ("b", 6, 6), ("c", 0, 2))
        for i in range(n)
    ]
    found = task_averaged(marks)
    assert (
        found["value"] == pytest.approx((1 / 4 + 1 + 0) / 3)
        and found["parts"] == {"a": 0.25, "b": 1.0, "c": 0.0}
        and micro(marks)["value"] == 7 / 12
    )
    alone = task_averaged(marks[:4])
    assert (alone["value"], alone["interval"]) == (
        micro(marks[:4])["value"],
        pytest.approx(micro(marks[:4])["interval"]),
    )


def test_its_interval_is_put_together_from_each_source_s():
    marks = marks_of(ADE20K=(300, 400), COCO=(200, 400), Omni3D=(300, 1200))
    found, (low, high) = source_averaged(marks), source_averaged(marks)["interval"]
    parts = [(1 / 4, 300, 400), (1 / 4, 200, 400), (1 / 2, 300, 1200)]
    below = sum((w * (right / n - wilson(right, n)[0])) ** 2 for w, right, n in parts)
    assert found["value"] - low == pytest.approx(sqrt(below))
    # with many questions: the normal interval
    variance = sum(w**2 * right / n * (1 - right / n) / n for w, right, n in parts)
    assert high - low == pytest.approx(2 * 1.959964 * sqrt(variance), rel=0.01)
    low, high = source_averaged(marks_of(ADE20K=(4, 4), COCO=(4, 4), Omni3D=(4, 4)))["interval"]
    assert 0 < low < 1 and high == 1.0


def test_a_source_that_is_missing_is_named():
    with pytest.raises(ValueError, match="none of COCO, Omni3D"):
        source_averaged(marks_of(ADE20K=(1, 2)))
    with pytest.raises(ValueError, match="cvbench"):
        source_averaged([Mark("a", None, 1.0)])


# ---- totals of groups


def yes_no_marks(seed, tasks=("OCR", "color", "code_reasoning"), pictures=9):
    draw = random.Random(seed)
    return [
        Mark(task, None, float(draw.random() < 0.7), {"picture": f"{task}/{n}"})
        for task in tasks
        for n in range(pictures)
        for _ in range(2)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_mme_counts_questions_and_pictures(seed):
    """By its definition: of each task the percentage of right questions plus that of pictures with both."""
    marks = yes_no_marks(seed)
    found = totals(marks, "micro")["mme"]
    points = {}
    for task in dict.fromkeys(mark.task for mark in marks):
        rights = [mark.right for mark in marks if mark.task == task]
        both = [a * b for a, b in zip(rights[::2], rights[1::2])]
        points[task] = 100 * sum(rights) / len(rights) + 100 * sum(both) / len(both)
    assert {name: found["points"][name] for name in points} == pytest.approx(points)
    assert found["points"]["perception"] == pytest.approx(points["OCR"] + points["color"])
    assert found["points"]["cognition"] == pytest.approx(points["code_reasoning"])
    assert found["of"] == 600 and found["value"] == pytest.approx(sum(points.values()) / 600)
    assert found["interval"][0] < found["value"] < found["interval"][1]
    assert len(PERCEPTION) == 10
    (line,) = notes({"totals": {"micro": micro(marks), "mme": found}, "measured": {}, "failures": {}})
    assert line.startswith(f"mme total: {sum(points.values()):.1f} of 600 points (perception")


def test_a_question_is_right_only_if_all_its_variants_are():
    marks = [
        Mark("algebra", None, right, {"question": question, "level": "school"})
        for question, right in [("1", 1.0), ("1", 1.0), ("2", 1.0), ("2", 0.0), ("3", 0.0)]
    ]
    found = totals(marks, "micro")
    assert found["micro"]["value"] == 3 / 5 and found["worst_case"]["value"] == 1 / 3
    assert found["worst_case"]["interval"] == list(wilson(1, 3))
    assert shares_by(marks) == {"level": {"school": {"questions": 5} | micro(marks)}}


def test_hallusionbench_counts_answers_figures_and_questions():
    """Two questions about two figures; one answer is wrong: one figure and one question are."""
    marks = [
        Mark("figure", None, right, {"figure": f"VD/0/{figure}", "question": f"VD/0/{question}"})
        for figure, question, right in [(0, 0, 1.0), (0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.0), (2, 0, 1.0)]
    ]
    found = totals(marks, "micro")["hallusion"]
    assert found["parts"] == {"aAcc": 4 / 5, "fAcc": 2 / 3, "qAcc": 1 / 2}
    assert found["value"] == pytest.approx((4 / 5 + 2 / 3 + 1 / 2) / 3)
    assert found["interval"][0] < found["value"] < found["interval"][1]


def test_a_question_counts_in_each_of_its_skills():
    marks = [
        Mark("t", None, 1.0, {"skill": ("algebra", "geometry")}),
        Mark("t", None, 0.0, {"skill": ("algebra",)}),
        Mark("t", None, 0.0, {"skill": ()}),
    ]
    found = shares_by(marks)["skill"]
    assert {name: (part["questions"], part["value"]) for name, part in found.items()} == {
        "algebra": (2, 0.5),
        "geometry": (1, 1.0),
    }
    assert set(totals(marks, "micro")) == {"micro"}
