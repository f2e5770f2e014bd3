"""The built-in world: every answer is recomputed here from the geometry, and the picture is looked at, not
trusted."""

import itertools
import re
from collections import Counter
from math import hypot

import numpy as np
import pytest

from data.shapes.world import (
    CELL,
    CHANCE,
    COLORS,
    GRID,
    PAIRS,
    SHAPES,
    SIDE,
    SIZES,
    TASKS,
    UNSEEN_PAIRS,
    Shapes,
    Thing,
    World,
    draw,
    gap,
    in_order,
    item,
    split_of,
)
from data.types import LETTERS

# four rounds of 4 tasks x 16 turns, over which everything is balanced
COUNT = 4 * 16 * 4


@pytest.fixture(scope="module")
def world():
    """{split: [(scene, example), ...]}"""
    return {split: [item(split, 3, i) for i in range(COUNT)] for split in ("train", "heldout", "pairs")}


def everything(world):
    return [pair for items in world.values() for pair in items]


# ---- answers


def named(scene, name):
    """The one object that a question calls `name`."""
    found = [t for t in scene if f"{t.color} {t.shape}" == name]
    assert len(found) == 1, f"{name!r} is in the scene {len(found)} times"
    return found[0]


def answered(scene, question):
    """(answer, how clear it is) from the words of a question and the places and sizes of the objects
    alone."""
    if match := re.fullmatch(r"Is the (\w+ \w+) left or right of the (\w+ \w+)\?", question):
        a, b = (named(scene, name) for name in match.groups())
        return ("left" if a.x < b.x else "right"), abs(a.x - b.x)
    if match := re.fullmatch(r"Is the (\w+ \w+) above or below the (\w+ \w+)\?", question):
        a, b = (named(scene, name) for name in match.groups())
        return ("above" if a.y < b.y else "below"), abs(a.y - b.y)
    if match := re.fullmatch(r"Which is nearer to the camera, the (\w+ \w+) or the (\w+ \w+)\?", question):
        a, b = (named(scene, name) for name in match.groups())
        return match[1 if a.size > b.size else 2], abs(a.size - b.size)
    if match := re.fullmatch(r"Which is nearer to the (\w+ \w+), the (\w+ \w+) or the (\w+ \w+)\?", question):
        x, a, b = (named(scene, name) for name in match.groups())
        near, far = (hypot(x.x - t.x, x.y - t.y) for t in (a, b))
        return match[2 if near < far else 3], abs(near - far)
    match = re.fullmatch(r"How many (\w+)s are there\?", question)
    return str(sum(match[1] == t.shape for t in scene)), 2


def test_a_colour_occurs_once_in_a_scene(world):
    """Looks go by colours alone."""
    assert all(len({t.color for t in scene}) == len(scene) for scene, _ in everything(world))


def test_answers_follow_from_the_geometry_by_a_margin(world):
    for scene, example in everything(world):
        answer, margin = answered(scene, example.question)
        assert example.answer == answer, example.uid
        assert margin >= (1 if example.task == "Depth" else 2), example.uid


def test_two_named_objects_share_neither_colour_nor_shape(world):
    """Else half of a name would not tell which is meant, and a model that reads half of it would be right
    by luck."""
    for _, example in everything(world):
        if example.task != "Count":
            things = example.extra["named"]
            assert (
                len({t.color for t in things})
                == len({t.shape for t in things})
                == len(things)
                == 2 + (example.task == "Distance")
            )


def test_what_the_documents_read_is_what_is_asked(world):
    """`extra` is the documents' view of a question: its objects are the question's, in the question's
    order."""
    for scene, example in everything(world):
        things = example.extra["named"]
        assert set(things) <= set(scene)
        if example.task == "Count":
            assert set(things) == set(scene) and f"many {example.extra['shape']}s" in example.question
            assert [t.color for t in things] == [c for c in COLORS if c in {t.color for t in scene}]
        else:
            names = [
                f"{color} {shape}"
                for color, shape in re.findall(
                    rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", example.question
                )
            ]
            assert [t.name for t in things] == names


def test_gap_is_the_rounded_distance():
    a, b = Thing("red", "star", 1, 1, 3), Thing("blue", "star", 3, 4, 3)
    # 3.6 cells
    assert gap(a, b) == gap(b, a) == 4 and gap(a, a) == 0


# ---- balance


@pytest.mark.parametrize("split", ["train", "heldout", "pairs"])
def test_tasks_answers_and_letters_are_balanced(world, split):
    examples = [example for _, example in world[split]]
    assert Counter(e.task for e in examples) == dict.fromkeys(TASKS, COUNT // 4)
    for task in TASKS:
        mine = [e for e in examples if e.task == task]
        choices = len(mine[0].choices)
        assert {len(e.choices) for e in mine} == {choices} and CHANCE[task] == 1 / choices
        assert Counter(e.letter for e in mine) == dict.fromkeys(LETTERS[:choices], len(mine) // choices)
        if task in ("Relation", "Count"):
            words = {"Relation": ("left", "right", "above", "below"), "Count": ("1", "2", "3", "4")}[task]
            assert Counter(e.answer for e in mine) == dict.fromkeys(words, len(mine) // 4)
            # no answer has a letter of its own
            assert len(Counter((e.answer, e.letter) for e in mine)) == 4 * choices
        else:
            # the first or the second that is named
            first = [e.answer == e.extra["named"][-2].name for e in mine]
            assert sum(first) == len(mine) // 2
            assert Counter(zip(first, (e.letter for e in mine))) == {
                (f, x): len(mine) // 4 for f in (True, False) for x in "AB"
            }


def test_what_is_asked_about_varies(world):
    """No colour or shape is the right one more often than it should be: with 64 answers over six colours,
    30 of one is nine deviations."""
    for task in ("Depth", "Distance"):
        answers = [e.answer.split() for _, e in world["train"] if e.task == task]
        assert {c for c, _ in answers} == set(COLORS) and {s for _, s in answers} == set(SHAPES)
        assert max(Counter(c for c, _ in answers).values()) < 30


# ---- splits


def layout(scene):
    return frozenset((t.color, t.shape, t.x, t.y, t.size) for t in scene)


def test_a_scene_has_one_split(world):
    scenes = {split: {layout(scene) for scene, _ in items} for split, items in world.items()}
    assert (
        not scenes["train"] & (scenes["heldout"] | scenes["pairs"])
        and not scenes["heldout"] & scenes["pairs"]
    )
    for split, items in world.items():
        assert {split_of(scene) for scene, _ in items} == {"train" if split == "train" else "heldout"}
    # By construction, not by chance: what is painted first, or a pixel off its place, is the same scene.
    for scene, _ in everything(world)[:100]:
        assert (
            split_of(scene[::-1])
            == split_of(scene)
            == split_of(tuple(Thing(t.color, t.shape, t.x, t.y, t.size) for t in scene))
        )


def test_unseen_pairs(world):
    for split in ("train", "heldout"):
        assert not any(t.pair in UNSEEN_PAIRS for scene, _ in world[split] for t in scene)
    asked = {t.pair for _, e in world["pairs"] for t in e.extra["named"]}
    assert all(
        any(
            t.pair in UNSEEN_PAIRS
            for t in e.extra["named"]
            if e.task != "Count" or t.shape == e.extra["shape"]
        )
        for _, e in world["pairs"]
    )
    assert asked >= UNSEEN_PAIRS
    # each colour and each shape was seen with others
    seen = {t.pair for scene, _ in world["train"] for t in scene}
    assert (
        {c for c, _ in seen} == set(COLORS)
        and {s for _, s in seen} == set(SHAPES)
        and seen == set(PAIRS) - UNSEEN_PAIRS
    )


def test_only_three_splits_ask():
    with pytest.raises(ValueError, match="caption"):
        Shapes("caption")
    with pytest.raises(KeyError):
        item("trian", 0, 0)


# ---- determinism


def same(a, b):
    return (a.uid, a.question, a.choices, a.answer, a.task, a.extra) == (
        b.uid,
        b.question,
        b.choices,
        b.answer,
        b.task,
        b.extra,
    )


def test_a_function_of_split_seed_and_index():
    backwards = [item("train", 7, i) for i in reversed(range(24))][::-1]
    for i, (scene, example) in enumerate(backwards):
        again_scene, again = item("train", 7, i)
        assert scene == again_scene and same(example, again)
        assert example.pictures[0]().tobytes() == again.pictures[0]().tobytes()
    assert len({e.uid for _, e in backwards}) == 24
    for other in (("train", 8), ("heldout", 7)):
        scenes = [item(*other, i)[0] for i in range(24)]
        assert not {layout(s) for s in scenes} & {layout(s) for s, _ in backwards}


def test_pinned():
    """Results in the docs are about these very scenes: this may never change, with any version of
    anything."""
    scene, example = item("heldout", 0, 5)
    assert (example.uid, example.question, example.choices, example.answer) == PINNED
    assert [(t.name, t.x, t.y, t.size, t.dx, t.dy) for t in scene] == PINNED_SCENE


PINNED = ("shapes/heldout/0/5", "How many squares are there?", ("2", "4", "3", "1"), "2")
PINNED_SCENE = [
    ("purple square", 3, 3, 2, -1, -1),
    ("blue square", 1, 0, 1, 0, 1),
    ("yellow circle", 2, 0, 1, -1, 0),
]


def test_a_sequence_that_is_made_when_asked():
    shapes = Shapes("heldout", 10, seed=2)
    assert len(shapes) == 10 and len(list(shapes)) == 10 and shapes[3] is shapes[3]
    assert same(shapes[3], item("heldout", 2, 3)[1])
    for index in (10, -1):
        with pytest.raises(IndexError):
            shapes[index]


# ---- pictures


def test_every_object_can_be_seen(world):
    """Around the centre of each object there are pixels of its colour, as many as a body of its size must
    show where nothing nearer hides it."""
    for scene, _ in everything(world)[::3]:
        pixels = np.asarray(draw(scene)).astype(int)
        assert pixels.shape == (SIDE, SIDE, 3)
        for thing in scene:
            (column, row), reach = thing.center, round(thing.radius)
            assert 0 <= column < SIDE and 0 <= row < SIDE
            mine = (pixels == COLORS[thing.color]).all(-1)
            near = mine[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1]
            rows, columns = (min(place + reach, SIDE) - max(place - reach, 0) for place in (row, column))
            # the share that is not beyond the picture's edge
            inside = rows * columns / (2 * reach) ** 2
            assert near.sum() >= max(2, 0.12 * inside * (2 * reach) ** 2), (thing, near.sum())
            # and nowhere else; a star's points reach further
            assert mine.sum() == near.sum() or thing.shape == "star", thing


def test_nearer_is_larger_and_in_front():
    areas = [
        int((np.asarray(draw((Thing("red", "square", 3, 3, size),))) == COLORS["red"]).all(-1).sum())
        for size in range(1, SIZES + 1)
    ]
    assert all(b > 2 * a for a, b in itertools.pairwise(areas))
    behind, before = Thing("red", "square", 3, 3, 3), Thing("blue", "square", 3, 3, 2)
    # whatever the order, the larger one hides the smaller
    for scene in ((behind, before), (before, behind)):
        assert tuple(np.asarray(draw(scene))[3 * CELL + 6, 3 * CELL + 6]) == COLORS["red"]


def test_some_nearer_objects_hide_a_part_of_the_other(world):
    """Depth has two cues: size, and in about a quarter of its questions occlusion."""
    depth = [e.extra["named"] for _, e in everything(world) if e.task == "Depth"]
    overlap = [
        hypot(a.center[0] - b.center[0], a.center[1] - b.center[1]) < a.radius + b.radius for a, b in depth
    ]
    assert 0.1 < sum(overlap) / len(overlap) < 0.5


def test_shapes_differ_in_outline():
    masks = [
        (np.asarray(draw((Thing("white", shape, 3, 3, 3),))) == COLORS["white"]).all(-1) for shape in SHAPES
    ]
    for a in range(len(masks)):
        for b in range(a):
            # of about 150 pixels
            assert (masks[a] ^ masks[b]).sum() >= 30


def test_places_and_sizes_use_the_whole_range(world):
    things = [t for scene, _ in everything(world) for t in scene]
    assert {t.x for t in things} == {t.y for t in things} == set(range(GRID)) and {
        t.size for t in things
    } == set(range(1, SIZES + 1))


# ---- what can be varied


def test_kinds_take_turns_and_the_rest_is_as_usual():
    only = Shapes("heldout", 8, world=World(kinds=("Count", "Depth")))
    assert [e.task for e in only] == ["Count", "Depth"] * 4
    assert Shapes("heldout", 8)[3].question == item("heldout", 0, 3, World())[1].question


@pytest.mark.parametrize("task", TASKS)
def test_a_crowd_has_all_colours_and_the_same_right_answers(task):
    for index in range(24):
        scene, example = item("heldout", 0, index, World(crowd=True, kinds=(task,)))
        assert {t.color for t in scene} == set(COLORS) and split_of(scene) == "heldout"
        if task == "Count":
            count = sum(t.shape == example.extra["shape"] for t in scene)
            assert example.answer == str(count) and example.extra["named"] == in_order(scene)
        else:
            assert set(example.extra["named"]) <= set(scene)
        assert not any(t.pair in UNSEEN_PAIRS for t in scene)


def test_noise_is_a_function_of_the_question_and_has_its_size():
    noisy, plain = Shapes("heldout", 4, world=World(noise=20)), Shapes("heldout", 4)
    again = Shapes("heldout", 4, world=World(noise=20))
    # where no value is cut off at 0 or 255
    inside = [np.asarray(e.pictures[0]()).astype(float) for e in plain]
    seen = [np.asarray(e.pictures[0]()).astype(float) for e in noisy]
    for a, b, e in zip(seen, inside, again):
        assert (a == np.asarray(e.pictures[0]())).all()
        middle = (b > 80) & (b < 175)
        assert abs((a - b)[middle].std() - 20) < 1
    assert (seen[0] != seen[1]).any()


def test_a_larger_picture_shows_the_same_scene():
    large, plain = Shapes("heldout", 2, world=World(side=168))[1], Shapes("heldout", 2)[1]
    picture = large.pictures[0]()
    assert picture.size == (168, 168) and large.question == plain.question
    small = np.asarray(picture.resize((84, 84))).astype(int)
    assert abs(small - np.asarray(plain.pictures[0]()).astype(int)).mean() < 6


@pytest.mark.parametrize("wrong", [{"kinds": ("Sum",)}, {"kinds": ()}, {"noise": -1.0}, {"side": 8}])
def test_a_world_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        World(**wrong)
