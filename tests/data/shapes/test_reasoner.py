"""The text-only reasoner: it concludes from what the text says, whatever the picture shows, and guesses where
the text lacks what the question needs."""

import random
import re

import pytest

from data.shapes import reasoner, tokenizer, world
from data.shapes.documents import described, listed
from data.shapes.looking import read_looks
from data.shapes.reasoner import AGAIN, MOST, reason
from data.shapes.world import CHANCE, TASKS

SEED = 5


def written(caption, number, task=None, seed=0):
    """(example, what the reasoner writes) for item `number` of the training split."""
    scene, example = world.item("train", SEED, number)
    text, _ = caption(scene, random.Random(number))[1], None
    return example, reason(f"{text}\n{example.asked}", random.Random(f"{seed}/{number}"))


def is_right(example, text):
    thinking, _, answer = text.partition("</think>")
    assert thinking.startswith("<think> look :") and re.fullmatch(r" \([A-H]\)", answer)
    assert thinking.endswith(f"the answer is{answer} . ")
    return answer.strip() == f"({example.letter})"


def shares(caption, count=800):
    found = {task: [] for task in TASKS}
    for number in range(count):
        example, text = written(caption, number)
        found[example.task].append(is_right(example, text))
    return {task: sum(right) / len(right) for task, right in found.items()}


def test_a_full_description_is_enough_but_for_slips():
    for task, share in shares(described).items():
        assert share == pytest.approx(1 - reasoner.SLIPS, abs=0.04), task


def test_without_places_and_sizes_it_guesses():
    """The shapes alone are enough to count; everything else is chance. 200 questions a task: five standard
    deviations are 0.18."""
    found = shares(listed)
    assert found.pop("Count") > 0.9
    for task, share in found.items():
        assert share == pytest.approx(CHANCE[task], abs=0.18), task


def test_it_believes_the_text_and_not_the_picture():
    _, example = world.item("train", SEED, 0)
    a, b = example.extra["named"]
    axis = example.extra["axis"]
    there = {a: 0, b: 5}
    for swap in (False, True):
        text = " , ".join(f"{t.color} {axis} {5 - x if swap else x}" for t, x in there.items())
        answers = [read_looks(reason(f"{text}\n{example.asked}", random.Random(s))).last for s in range(60)]
        first = {"x": ("left", "right"), "y": ("above", "below")}[axis][swap]
        assert answers.count(first) >= 50


def test_the_chain_is_a_function_of_text_and_seed():
    assert written(described, 3)[1] == written(described, 3)[1]
    assert len({written(described, 3, seed=seed)[1] for seed in range(20)}) > 5


def test_its_doubts_are_as_stated():
    looks = [written(described, number)[1].count("let me look again") + 1 for number in range(400)]
    assert max(looks) == MOST
    assert sum(count > 1 for count in looks) / 400 == pytest.approx(AGAIN, abs=0.12)


@pytest.mark.parametrize("caption", [described, listed])
def test_the_built_in_tokenizer_knows_every_word_but_description(caption):
    known = tokenizer.build()
    unknown = known.token_to_id("<unk>")
    for number in range(80):
        text = written(caption, number)[1].replace("description", "image")
        assert unknown not in known.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize(
    "description", ["", "red", "red x size y shape", "purple shape purple x 9 y", "x 1 y 2 , shape star ."]
)
def test_a_broken_description_leads_to_a_guess(description):
    for number in range(8):
        _, example = world.item("train", SEED, number)
        text = reason(f"{description}\n{example.asked}", random.Random(number))
        assert "there is no" in text
        is_right(example, text)


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match="finds no question of this world"):
        reason("red x 1 y 2\nWhat is the value of x?", random.Random(0))
