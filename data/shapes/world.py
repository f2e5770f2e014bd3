"""The built-in world: small pictures of coloured shapes and questions about where, how many, how near.

The questions follow the four tasks of CV-Bench and SAT's static templates: *Relation* (left/right,
above/below), *Count*, *Depth* (which of two is nearer to the camera) and *Distance* (which of two is nearer
to a third). Nothing is read from disk: item `i` of a split is a pure function of (split, seed, i).

What a picture means. An object has a colour of its own, a shape, a place (x, y) on a 6 x 6 grid, a little off
the centre of its cell, and a size 1-3. All objects are "really" of one size, so a larger one is nearer and is
painted over those behind it. The background shades from left to right in red and from top to bottom in blue.
It is a frame, as a horizon is in a photograph: Qwen2-VL's vision tower knows only relative places. Every
answer follows from the geometry by a margin: two cells, one size, or two cells of distance.

Splits. `train`, `heldout` and `pairs` share no scene: a hash of the layout decides the split of a scene. The
colour-shape pairs of UNSEEN_PAIRS occur in no scene of `train` and `heldout`. Every question of `pairs` asks
for at least one of them. `caption` scenes have no question and may hold any pair.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import hypot
from typing import Any

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
# Pixels of a picture's side; pixels of a cell's side (a patch of Qwen2-VL); cells a side.
SIDE, CELL, GRID = 84, 14, 6
SIZES = 3
# Pixels.
RADII = {1: 3.2, 2: 5.4, 3: 8.4}
# An outline in one colour shows size and shape: without it neither was learned in the time.
OUTLINE = (0, 0, 0)


@dataclass(frozen=True)
class Thing:
    """One object. x, y: cells 0-5. size: 1-3, 3 is nearest. dx, dy: pixels off the centre of its cell."""

    color: str
    shape: str
    x: int
    y: int
    size: int
    dx: int = 0
    dy: int = 0

    @property
    def name(self) -> str:
        """Its name in questions, such as "red circle"."""
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
# Colour, shape.
Pair = tuple[str, str]
Pairs = Sequence[Pair]


@dataclass(frozen=True)
class World:
    """What can be varied. noise: standard deviation of Gaussian noise on every colour value (of 0 to 255).
    side: pixels to which the finished picture is scaled. crowd: six objects in every picture, which is more
    than most questions of the usual world have. kinds: the tasks, which take turns."""

    noise: float = 0.0
    side: int = SIDE
    crowd: bool = False
    kinds: tuple[str, ...] = TASKS

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(TASKS):
            raise ValueError(f"kinds: some of {', '.join(TASKS)}, not {'+'.join(self.kinds) or 'none'}")
        if self.noise < 0 or self.side < 28:
            raise ValueError(f"noise is at least 0 and side at least 28, not {self.noise:g} and {self.side}")

    def picture(self, scene: Scene, uid: str) -> Image.Image:
        """The picture of a scene. The noise is a function of the question's uid."""
        picture = draw(scene)
        if self.noise:
            drawn = int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "little")
            noise = np.random.default_rng(drawn).normal(0, self.noise, (SIDE, SIDE, 3))
            picture = Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))
        if self.side == SIDE:
            return picture
        return picture.resize((self.side, self.side), Image.Resampling.BICUBIC)


def gap(a: Thing, b: Thing) -> int:
    """Distance between two objects in whole cells, rounded."""
    return round(hypot(a.x - b.x, a.y - b.y))


_RED, _BLUE = np.meshgrid(np.linspace(50, 205, SIDE), np.linspace(50, 205, SIDE))
BACKGROUND = Image.fromarray(np.stack([_RED, np.full_like(_RED, 128), _BLUE], axis=-1).astype(np.uint8))


def draw(scene: Scene) -> Image.Image:
    """Paint a scene, far objects first, as an RGB picture of 84 x 84 pixels."""
    picture = BACKGROUND.copy()
    pen = ImageDraw.Draw(picture)
    for thing in sorted(scene, key=lambda t: t.size):
        (cx, cy), r, fill = thing.center, thing.radius, COLORS[thing.color]
        # a ring: the model took long to tell a disc from a square
        if thing.shape == "circle":
            pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill, outline=OUTLINE)
            pen.ellipse((cx - 0.6 * r, cy - 0.6 * r, cx + 0.6 * r, cy + 0.6 * r), fill=OUTLINE)
        elif thing.shape == "square":
            s = 0.88 * r
            pen.rectangle((cx - s, cy - s, cx + s, cy + s), fill=fill, outline=OUTLINE)
        elif thing.shape == "triangle":
            corners = [(cx, cy - r), (cx + r, cy + 0.9 * r), (cx - r, cy + 0.9 * r)]
            pen.polygon(corners, fill=fill, outline=OUTLINE)
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


def scatter(rng: random.Random, pairs: Pairs) -> Scene:
    """Place one object for each (colour, shape), so that none hides another, in the order of `pairs`."""
    while True:
        if len(scene := _placed(rng, (), pairs)) == len(pairs):
            return scene


def _placed(rng: random.Random, scene: Scene, pairs: Pairs) -> Scene:
    """The scene, and an object for each (colour, shape) for which a free place was found."""
    for color, shape in pairs:
        for _ in range(30):
            x, y = rng.randrange(GRID), rng.randrange(GRID)
            size = rng.randint(1, SIZES)
            thing = Thing(color, shape, x, y, size, rng.randint(-1, 1), rng.randint(-1, 1))
            if all(_apart(thing, other) for other in scene):
                scene = (*scene, thing)
                break
    return scene


def free_pairs(rng: random.Random, count: int) -> list[Pair]:
    """`count` different colours, each with any shape: the objects of a scene without a question."""
    return [(color, rng.choice(SHAPES)) for color in rng.sample(list(COLORS), count)]


def in_order(scene: Scene) -> Scene:
    """The objects in the order of COLORS, in which they are listed and counted."""
    return tuple(sorted(scene, key=lambda t: list(COLORS).index(t.color)))


def split_of(scene: Scene) -> str:
    """The split whose questions may use this scene, from a hash of its layout: three in four are "train"."""
    layout = sorted((t.color, t.shape, t.x, t.y, t.size) for t in scene)
    return "train" if hashlib.blake2b(repr(layout).encode(), digest_size=2).digest()[0] % 4 else "heldout"


def _others(rng: random.Random, named: Pairs, pairs: Pairs, count: int) -> list[Pair]:
    """`count` more pairs, in other colours than those of `named`."""
    colors = rng.sample([c for c in COLORS if c not in {color for color, _ in named}], count)
    return [rng.choice([p for p in pairs if p[0] == color]) for color in colors]


def _compared(rng: random.Random, pairs: Pairs, first: Pair | None, count: int, most: int) -> Scene:
    """`count` objects that differ in colour and in shape, so that either word of a name tells them apart, and
    up to `most` others."""
    while True:
        named = ([first] if first else []) + rng.sample(pairs, count - (first is not None))
        if len({c for c, _ in named}) == len({s for _, s in named}) == count:
            return scatter(rng, named + _others(rng, named, pairs, rng.randint(0, most)))


def _touching(scene: Scene) -> Scene:
    """Move the second object beside the first, so that the nearer one hides a part of the other, if there is
    room."""
    a, b, *others = scene
    side = 1 if a.x < GRID - 1 else -1
    a, b = replace(a, dx=2 * side), replace(b, x=a.x + side, y=a.y, dx=-2 * side, dy=a.dy)
    free = _apart(a, b) and all(_apart(t, other) for t in (a, b) for other in others)
    return (a, b, *others) if free else scene


# ---- questions. first: a pair that the question must ask for. turn: decides the right answer

# scene, question, choices in their natural order, index of the right one, facts for `Example.extra`
Question = tuple[Scene, str, tuple[str, ...], int, dict[str, Any]]


def _relation(rng: random.Random, pairs: Pairs, first: Pair | None, turn: int) -> Question:
    axis = turn % 2
    while True:
        scene = _compared(rng, pairs, first, 2, 2)
        a, b = scene[:2]
        step = (b.x - a.x, b.y - a.y)[axis]
        if abs(step) >= 2 and (step < 0) == bool(turn // 2 % 2):
            break
    words = (("left", "right"), ("above", "below"))[axis]
    where = ("left or right of", "above or below")[axis]
    question = f"Is the {a.name} {where} the {b.name}?"
    return scene, question, words, int(step < 0), {"axis": "xy"[axis], "named": (a, b)}


def _depth(rng: random.Random, pairs: Pairs, first: Pair | None, turn: int) -> Question:
    while True:
        scene = _compared(rng, pairs, first, 2, 2)
        if rng.random() < 0.25:
            scene = _touching(scene)
        a, b = scene[:2]
        if a.size != b.size and (b.size > a.size) == bool(turn % 2):
            break
    question = f"Which is nearer to the camera, the {a.name} or the {b.name}?"
    return scene, question, (a.name, b.name), turn % 2, {"named": (a, b)}


def _distance(rng: random.Random, pairs: Pairs, first: Pair | None, turn: int) -> Question:
    while True:
        scene = _compared(rng, pairs, first, 3, 1)
        x, a, b = scene[:3]
        exact = hypot(x.x - a.x, x.y - a.y) - hypot(x.x - b.x, x.y - b.y)
        if abs(exact) >= 2 and (exact > 0) == bool(turn % 2):
            break
    question = f"Which is nearer to the {x.name}, the {a.name} or the {b.name}?"
    return scene, question, (a.name, b.name), turn % 2, {"named": (x, a, b)}


def _count(rng: random.Random, pairs: Pairs, first: Pair | None, turn: int) -> Question:
    count = turn % 4 + 1
    shape = first[1] if first else rng.choice(SHAPES)
    alike = [p for p in pairs if p[1] == shape and p != first]
    named = ([first] if first else []) + rng.sample(alike, count - (first is not None))
    scene = scatter(rng, named + _others(rng, named, [p for p in pairs if p[1] != shape], rng.randint(1, 2)))
    facts = {"named": in_order(scene), "shape": shape}
    return scene, f"How many {shape}s are there?", ("1", "2", "3", "4"), count - 1, facts


QUESTIONS = {"Relation": _relation, "Count": _count, "Depth": _depth, "Distance": _distance}


USUAL = World()


def item(split: str, seed: int, index: int, world: World = USUAL) -> tuple[Scene, Example]:
    """Item `index` of a split, with its scene.

    The task, the right answer and its letter take turns with the index. Within any 4 x 16 consecutive items
    they are balanced, so "always (A)" earns chance. Raises KeyError for an unknown split.
    """
    home = {"train": "train", "heldout": "heldout", "pairs": "heldout"}[split]
    rng = random.Random(f"{split}/{seed}/{index}")
    task = world.kinds[index % len(world.kinds)]
    turn = index // len(world.kinds)
    pairs = PAIRS if split == "pairs" else [p for p in PAIRS if p not in UNSEEN_PAIRS]
    while True:
        first = rng.choice(sorted(UNSEEN_PAIRS)) if split == "pairs" else None
        scene, question, choices, right, facts = QUESTIONS[task](rng, pairs, first, turn)
        if world.crowd:
            # of other shapes than the one that is counted
            free = [p for p in pairs if p[1] != facts.get("shape")]
            named = [t.pair for t in scene]
            scene = _placed(rng, scene, _others(rng, named, free, len(COLORS) - len(scene)))
            facts |= {"named": in_order(scene)} if task == "Count" else {}
        if split_of(scene) == home and (len(scene) == len(COLORS) or not world.crowd):
            break
    answer = choices[right]
    shuffled = [c for c in choices if c != answer]
    rng.shuffle(shuffled)
    shuffled.insert(turn // 4 % len(choices), answer)
    uid = f"shapes/{split}/{seed}/{index}"
    pictures = (partial(draw, scene) if world == USUAL else partial(world.picture, scene, uid),)
    return scene, Example(uid, question, tuple(shuffled), answer, task, pictures, facts)


class Shapes(Sequence[Example]):
    """`count` examples of a split ("train", "heldout" or "pairs"), each made at its first use, then kept.
    Raises ValueError for another split."""

    def __init__(self, split: str = "train", count: int = 20_000, seed: int = 0, world: World = USUAL):
        if split not in SPLITS[:3]:
            raise ValueError(f"shapes: unknown split {split!r}; one of {', '.join(SPLITS[:3])}")
        self.split, self.size, self.seed, self.world = split, count, seed, world
        self._kept: dict[int, Example] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:  # pyrefly: ignore[bad-override]
        if not 0 <= index < self.size:
            raise IndexError(index)
        if index not in self._kept:
            self._kept[index] = item(self.split, self.seed, index, self.world)[1]
        return self._kept[index]
