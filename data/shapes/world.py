"""The built-in world: small pictures of coloured shapes and questions about where, how many, how near.

The questions follow the four tasks of CV-Bench and SAT's static templates: *Relation* (left/right,
above/below), *Count*, *Depth* (which of two is nearer to the camera) and *Distance* (which of two is nearer
to a third). Nothing is read from disk: item `i` of a split is a pure function of (split, seed, i).

What a picture means. An object has a colour that no other has, a shape, a place (x, y) on a 6 x 6 grid, a
little off the centre of its cell, and a size 1-3. All objects are "really" of one size, so a larger one is
nearer and is painted over those behind it. The background shades from left to right in red and from top to
bottom in blue; it is the frame that a horizon or a floor gives in a photograph. (The vision tower of Qwen2-VL
knows relative places only.) Every answer follows from
the geometry by a margin: two cells, one size, or two cells of distance, so no question is a matter of taste.

Splits. `train`, `heldout` and `pairs` share no scene: a scene belongs to a split by a hash of its layout. The
colour-shape pairs of UNSEEN_PAIRS occur in no scene of `train` and `heldout`, and every question of `pairs`
asks for at least one of them. `caption` scenes, which carry no question, may hold any pair.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import hypot

import numpy as np
from PIL import Image, ImageDraw

from data.types import Example

TASKS = ("Relation", "Count", "Depth", "Distance")
CHANCE = {"Relation": 1 / 2, "Count": 1 / 4, "Depth": 1 / 2, "Distance": 1 / 2}
SPLITS = ("train", "heldout", "pairs", "caption")
COLORS = {
    "red": (240, 20, 20),
    "green": (20, 200, 40),
    "blue": (20, 40, 240),
    "yellow": (250, 230, 20),
    "purple": (200, 20, 220),
    "white": (255, 255, 255),
}
SHAPES = ("circle", "square", "triangle", "star")
UNSEEN_PAIRS = frozenset({("red", "star"), ("green", "triangle"), ("blue", "circle"), ("yellow", "square")})
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
# pixels, pixels a cell (the patch of Qwen2-VL: what a vision tower of 1 M parameters resolves soon), cells a
# side
SIDE, CELL, GRID = (84, 14, 6)
SIZES = 3
# pixels
RADII = {1: 3.2, 2: 5.4, 3: 8.4}
# whatever the colour, the outline shows size and shape: without it neither was learned in the time
OUTLINE = (0, 0, 0)


@dataclass(frozen=True)
class Thing:
    """One object: `x`, `y` in cells 0-5, `size` 1-3 (3 is nearest), `dx`, `dy` pixels off the centre of
    its cell."""

    color: str
    shape: str
    x: int
    y: int
    size: int
    dx: int = 0
    dy: int = 0

    @property
    def name(self) -> str:
        """What a question calls it, such as "red circle"."""
        return f"{self.color} {self.shape}"

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.color, self.shape

    @property
    def radius(self) -> float:
        """Half its extent, in pixels."""
        return RADII[self.size]

    @property
    def center(self) -> tuple[int, int]:
        """Pixel (column, row) of its centre."""
        return self.x * CELL + CELL // 2 + self.dx, self.y * CELL + CELL // 2 + self.dy


Scene = tuple[Thing, ...]


def gap(a: Thing, b: Thing) -> int:
    """Distance between two objects in whole cells, rounded."""
    return round(hypot(a.x - b.x, a.y - b.y))


# ---- drawing


def _background() -> np.ndarray:
    ramp = np.linspace(50, 205, SIDE)
    red, blue = np.meshgrid(ramp, ramp)
    return np.stack([red, np.full_like(red, 128), blue], axis=-1).astype(np.uint8)


BACKGROUND = Image.fromarray(_background())


def draw(scene: Scene) -> Image.Image:
    """Paint a scene, far objects first. → RGB picture, 84 x 84."""
    picture = BACKGROUND.copy()
    pen = ImageDraw.Draw(picture)
    for thing in sorted(scene, key=lambda t: t.size):
        (cx, cy), r, fill = thing.center, thing.radius, COLORS[thing.color]
        # a ring: a disc looked like a square for too long
        if thing.shape == "circle":
            pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill, outline=OUTLINE)
            pen.ellipse((cx - 0.6 * r, cy - 0.6 * r, cx + 0.6 * r, cy + 0.6 * r), fill=OUTLINE)
        elif thing.shape == "square":
            s = 0.88 * r
            pen.rectangle((cx - s, cy - s, cx + s, cy + s), fill=fill, outline=OUTLINE)
        elif thing.shape == "triangle":
            pen.polygon(
                [(cx, cy - r), (cx + r, cy + 0.9 * r), (cx - r, cy + 0.9 * r)], fill=fill, outline=OUTLINE
            )
        else:
            # a star of four straight rays, too slim for an outline
            w = 0.3 * r
            pen.rectangle((cx - r, cy - w, cx + r, cy + w), fill=fill)
            pen.rectangle((cx - w, cy - r, cx + w, cy + r), fill=fill)
    return picture


# ---- scenes


def _apart(a: Thing, b: Thing) -> bool:
    """Neither hides more than about a third of the other, so both can be named from the picture."""
    big, small = max(a.radius, b.radius), min(a.radius, b.radius)
    return hypot(a.center[0] - b.center[0], a.center[1] - b.center[1]) >= big + 0.3 * small


def scatter(rng: random.Random, pairs: Sequence[tuple[str, str]]) -> Scene:
    """Place one object for each (colour, shape) where none hides another. → the scene, in the order of
    `pairs`."""
    while True:
        scene: list[Thing] = []
        for color, shape in pairs:
            for _ in range(30):
                thing = Thing(
                    color,
                    shape,
                    rng.randrange(GRID),
                    rng.randrange(GRID),
                    rng.randint(1, SIZES),
                    rng.randint(-1, 1),
                    rng.randint(-1, 1),
                )
                if all(_apart(thing, other) for other in scene):
                    scene.append(thing)
                    break
        if len(scene) == len(pairs):
            return tuple(scene)


def free_pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Colours and shapes of a scene without a question: `count` colours, each with any shape."""
    return [(color, rng.choice(SHAPES)) for color in rng.sample(list(COLORS), count)]


def in_order(scene: Scene) -> Scene:
    """The objects in the order of COLORS, in which they are listed and counted."""
    return tuple(sorted(scene, key=lambda t: list(COLORS).index(t.color)))


def split_of(scene: Scene) -> str:
    """The one split whose questions may use this scene: a hash of the layout decides, so that splits
    cannot share one."""
    layout = sorted((t.color, t.shape, t.x, t.y, t.size) for t in scene)
    return "train" if hashlib.blake2b(repr(layout).encode(), digest_size=2).digest()[0] % 4 else "heldout"


def _distinct(
    rng: random.Random, pairs: Sequence[tuple[str, str]], count: int, first: tuple[str, str] | None
) -> list[tuple[str, str]]:
    """`count` pairs that differ in colour and in shape, so that either word of a name tells them apart."""
    while True:
        chosen = ([first] if first else []) + rng.sample(pairs, count - (first is not None))
        if len({c for c, _ in chosen}) == len({s for _, s in chosen}) == count:
            return chosen


def _others(
    rng: random.Random, named: Sequence[tuple[str, str]], pairs: Sequence[tuple[str, str]], count: int
) -> list[tuple[str, str]]:
    """`count` further pairs, of colours that are not taken."""
    colors = rng.sample([c for c in COLORS if c not in {color for color, _ in named}], count)
    return [rng.choice([p for p in pairs if p[0] == color]) for color in colors]


def _touching(scene: Scene) -> Scene:
    """The same with the second object beside the first, so that the nearer one hides a part of the other;
    unchanged where there is no room."""
    a, b, *others = scene
    side = 1 if a.x < GRID - 1 else -1
    a, b = replace(a, dx=2 * side), replace(b, x=a.x + side, y=a.y, dx=-2 * side, dy=a.dy)
    free = _apart(a, b) and all(_apart(t, other) for t in (a, b) for other in others)
    return (a, b, *others) if free else scene


# ---- questions: each returns (scene, question, choices in their natural order, index of the right one, what
# the question is about)


def _relation(rng, pairs, first, turn):
    axis = turn % 2
    while True:
        named = _distinct(rng, pairs, 2, first)
        scene = scatter(rng, named + _others(rng, named, pairs, rng.randint(0, 2)))
        a, b = scene[:2]
        step = (b.x - a.x, b.y - a.y)[axis]
        if abs(step) >= 2 and (step < 0) == bool(turn // 2 % 2):
            break
    words = (("left", "right"), ("above", "below"))[axis]
    where = ("left or right of", "above or below")[axis]
    return (
        scene,
        f"Is the {a.name} {where} the {b.name}?",
        words,
        int(step < 0),
        {"axis": "xy"[axis], "named": (a, b)},
    )


def _depth(rng, pairs, first, turn):
    while True:
        named = _distinct(rng, pairs, 2, first)
        scene = scatter(rng, named + _others(rng, named, pairs, rng.randint(0, 2)))
        if rng.random() < 0.25:
            scene = _touching(scene)
        a, b = scene[:2]
        if a.size != b.size and (b.size > a.size) == bool(turn % 2):
            break
    return (
        scene,
        f"Which is nearer to the camera, the {a.name} or the {b.name}?",
        (a.name, b.name),
        turn % 2,
        {"named": (a, b)},
    )


def _distance(rng, pairs, first, turn):
    while True:
        named = _distinct(rng, pairs, 3, first)
        scene = scatter(rng, named + _others(rng, named, pairs, rng.randint(0, 1)))
        x, a, b = scene[:3]
        exact = hypot(x.x - a.x, x.y - a.y) - hypot(x.x - b.x, x.y - b.y)
        if abs(exact) >= 2 and (exact > 0) == bool(turn % 2):
            break
    return (
        scene,
        f"Which is nearer to the {x.name}, the {a.name} or the {b.name}?",
        (a.name, b.name),
        turn % 2,
        {"named": (x, a, b)},
    )


def _count(rng, pairs, first, turn):
    count = turn % 4 + 1
    shape = first[1] if first else rng.choice(SHAPES)
    alike = [p for p in pairs if p[1] == shape and p != first]
    named = ([first] if first else []) + rng.sample(alike, count - (first is not None))
    scene = scatter(rng, named + _others(rng, named, [p for p in pairs if p[1] != shape], rng.randint(1, 2)))
    return (
        scene,
        f"How many {shape}s are there?",
        ("1", "2", "3", "4"),
        count - 1,
        {"named": in_order(scene), "shape": shape},
    )


QUESTIONS = {"Relation": _relation, "Count": _count, "Depth": _depth, "Distance": _distance}


def item(split: str, seed: int, index: int) -> tuple[Scene, Example]:
    """Item `index` of a split, with its scene.

    The task turns with the index, and so do the right answer and the letter it stands behind: within any 4 x
    16 consecutive items both are balanced, so "always (A)" earns chance. Raises KeyError for an unknown
    split.
    """
    home = {"train": "train", "heldout": "heldout", "pairs": "heldout"}[split]
    rng = random.Random(f"{split}/{seed}/{index}")
    task, turn = TASKS[index % len(TASKS)], index // len(TASKS)
    seen = [p for p in PAIRS if p not in UNSEEN_PAIRS]
    while True:
        first = rng.choice(sorted(UNSEEN_PAIRS)) if split == "pairs" else None
        scene, question, choices, right, about = QUESTIONS[task](
            rng, PAIRS if split == "pairs" else seen, first, turn
        )
        if split_of(scene) == home:
            break
    answer, slot = choices[right], turn // 4 % len(choices)
    shuffled = [c for c in choices if c != answer]
    rng.shuffle(shuffled)
    shuffled.insert(slot, answer)
    return scene, Example(
        uid=f"shapes/{split}/{seed}/{index}",
        question=question,
        choices=tuple(shuffled),
        answer=answer,
        task=task,
        pictures=(partial(draw, scene),),
        extra=about,
    )


class Shapes(Sequence):
    """`count` examples of a split ("train", "heldout" or "pairs"), made when they are asked for and kept."""

    def __init__(self, split: str = "train", count: int = 20_000, seed: int = 0):
        if split not in SPLITS[:3]:
            raise ValueError(f"shapes: unknown split {split!r}; one of {', '.join(SPLITS[:3])}")
        self.split, self.count, self.seed, self._kept = split, count, seed, {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(index)
        if index not in self._kept:
            self._kept[index] = item(self.split, self.seed, index)[1]
        return self._kept[index]
