"""What the built-in base model has read: captions, and question-answer documents in mixed behaviours.

It stands for the pre-training text of a base model: nobody has taught it what a good answer is. Of the
documents that follow a question

    55 %  are terse guesses, right by chance only;
    45 %  look first and then conclude. The first look is careless in 20 % of them (what is read is wrong, and
    so is the conclusion), whatever the question.
          A third of the looking ones, whether or not their first look was right, go on with "but wait, let me
          look again"; the second look is careful;
    30 %  of all of them are malformed: a tag is missing, or markup trails behind.

So no behaviour is always right, and which one pays is for GRPO to find out. `read_looks` reads the behaviours
back from a text, for the metrics.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

from data.shapes.looking import LOOK, LOOK_AGAIN, conclusion
from data.shapes.world import (
    COLORS,
    GRID,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw,
    free_pairs,
    gap,
    in_order,
    item,
    scatter,
)
from data.types import LETTERS, Example

TERSE, AGAIN, CARELESS, MALFORMED = 0.55, 1 / 3, 0.20, 0.30


# ---- captions: what teaches the base model to see


def described(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """(What is asked, a caption): where every object is, how large, and what, in a random order."""
    return "Describe the picture.", " , ".join(
        f"{t.color} x {t.x} y {t.y} size {t.size} shape {t.shape}" for t in rng.sample(scene, len(scene))
    ) + " ."


def listed(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """(What is asked, a caption): what every object is, in the order of colours."""
    return "List the shapes.", " , ".join(f"{t.color} shape {t.shape}" for t in in_order(scene)) + " ."


def gaps(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """(What is asked, a caption): how far the others are from the last object."""
    *others, start = scene
    return (
        f"How far is it from the {start.name}?",
        f"{_place(start)} , {_gaps(start, rng.sample(others, len(others)))} .",
    )


CAPTIONS = (described, described, listed, gaps)


def _place(thing: Thing) -> str:
    return f"{thing.color} x {thing.x} y {thing.y}"


def _gaps(start: Thing, others: Sequence[Thing]) -> str:
    return " , ".join(f"{_place(t)} gap {gap(start, t)}" for t in others)


# ---- a look: what is read from the picture, and the conclusion drawn from it


def look(example: Example, rng: random.Random, careless: bool) -> str:
    """One look at the picture of a question, as text; a careless one reads something false that leads to a
    wrong conclusion.

    Objects go by their colours, which are unique in a scene. Relation reads an x or y of each, Depth a size,
    Distance the places and the gaps between them; Count lists all objects with a running count.
    """
    things = example.extra["named"]
    true = _conclude(example, things)
    # false readings, evenly over those that lead astray
    while careless:
        things = tuple(_misread(example, t, rng) for t in example.extra["named"])
        if _conclude(example, things) not in (true, None):
            break
    concluded = _conclude(example, things)
    return f"{_read(example, things)} , so it is {concluded} {_letter(example, concluded)} ."


def _misread(example: Example, thing: Thing, rng: random.Random) -> Thing:
    """The same object with anything else in place of what matters. A count goes wrong by single objects,
    so most of them stay as they are."""
    if example.task == "Count":
        return replace(thing, shape=rng.choice(SHAPES)) if rng.random() < 0.3 else thing
    return replace(thing, x=rng.randrange(GRID), y=rng.randrange(GRID), size=rng.randint(1, SIZES))


def _read(example: Example, things: Sequence[Thing]) -> str:
    if example.task == "Count":
        counts = accumulate(int(t.shape == example.extra["shape"]) for t in things)
        return " , ".join(f"{t.color} shape {t.shape} {count}" for t, count in zip(things, counts))
    if example.task == "Distance":
        return f"{_place(things[0])} , {_gaps(things[0], things[1:])}"
    unit = example.extra["axis"] if example.task == "Relation" else "size"
    return " , ".join(f"{t.color} {unit} {getattr(t, unit)}" for t in things)


def _conclude(example: Example, things: Sequence[Thing]) -> str | None:
    """What the readings say: left, below, a colour or a number; None where they settle nothing."""
    if example.task == "Count":
        count = sum(t.shape == example.extra["shape"] for t in things)
        return str(count) if 1 <= count <= 4 else None
    if example.task == "Relation":
        axis = example.extra["axis"]
        a, b = (getattr(t, axis) for t in things)
        return None if a == b else {"x": ("left", "right"), "y": ("above", "below")}[axis][a > b]
    a, b = (-t.size for t in things) if example.task == "Depth" else (gap(things[0], t) for t in things[1:])
    return None if a == b else things[-2 + (b < a)].color


# ---- whole documents


def _letter(example: Example, concluded: str) -> str:
    """ "(B)" for the choice that a conclusion names."""
    return next(
        f"({letter})" for letter, choice in zip(LETTERS, example.choices) if choice.split()[0] == concluded
    )


def _ending(letter: str, rng: random.Random) -> str:
    if rng.random() >= MALFORMED:
        return f"</think> <answer> {letter} </answer>"
    return rng.choice(
        (
            # thinking is never closed
            f"<answer> {letter} </answer>",
            # no answer tags
            f"</think> {letter}",
            # never closed
            f"</think> <answer> {letter}",
            f"</think> <answer> {letter} </answer> </div> </div>",
        )
    )


def answer_document(example: Example, rng: random.Random) -> str:
    """One document that follows a question: terse or looking, perhaps with a second look, perhaps
    malformed. No behaviour depends on the question's kind."""
    if rng.random() < TERSE:
        return _ending(f"({rng.choice('ABCD'[: len(example.choices)])})", rng)
    text = look(example, rng, careless=rng.random() < CARELESS)
    chain = f"{LOOK} {text}"
    if rng.random() < AGAIN:
        text = look(example, rng, careless=False)
        chain += f" {LOOK_AGAIN} {text}"
    return f"{chain} {_ending(_letter(example, conclusion(text)), rng)}"


def lettered(rng: random.Random, uid: str, each: int) -> Example:
    """A lesson in letters, which needs no picture: lists of choices, and texts such as "right (B) , left
    (A) ."."""
    pool = rng.choice(
        (
            [f"{color} {rng.choice(SHAPES)}" for color in COLORS],
            list("0123456789"),
            ["left", "right", "above", "below"],
        )
    )
    choices = tuple(rng.sample(pool, rng.randint(2, min(len(pool), 8))))
    pairs = [f"{choice.split()[0]} ({letter})" for letter, choice in zip(LETTERS, choices)]
    texts = tuple(" , ".join(rng.sample(pairs, len(pairs))) + " ." for _ in range(each))
    return Example(
        uid=uid,
        question="List the choices.",
        choices=choices,
        answer=choices[0],
        task="Caption lettered",
        extra={"documents": texts},
    )


class Documents(Sequence):
    """The reading list of the built-in base model: examples whose `extra["documents"]` hold `each` texts that
    may follow the prompt.

    A share `captions` of the items are captions of free scenes, the others are questions of the training
    split, with other scenes than GRPO's (another seed). Item i is a pure function of (seed, i).
    """

    def __init__(
        self,
        count: int = 2_000_000,
        seed: int = 0,
        each: int = 2,
        captions: float = 0.5,
        letters: float = 0.2,
    ):
        self.count, self.seed, self.each, self.captions, self.letters = count, seed, each, captions, letters

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        rng = random.Random(f"documents/{self.seed}/{index}")
        kind = rng.random()
        if kind < self.captions:
            # few objects are where seeing starts
            scene = scatter(rng, free_pairs(rng, rng.choice((1, 2, 2, 3, 4, 5))))
            kind = rng.choice(CAPTIONS) if len(scene) > 1 else described
            asked, texts = zip(*(kind(scene, rng) for _ in range(self.each)))
            return Example(
                uid=f"caption/{self.seed}/{index}",
                question=asked[0],
                choices=(),
                answer=texts[0],
                task=f"Caption {kind.__name__}",
                pictures=(partial(draw, scene),),
                extra={"documents": texts},
            )
        if kind < self.captions + self.letters:
            return lettered(rng, f"letters/{self.seed}/{index}", self.each)
        _, example = item("train", self.seed + 1_000_003, index)
        return replace(
            example,
            extra={
                **example.extra,
                "documents": tuple(answer_document(example, rng) for _ in range(self.each)),
            },
        )


# ---- vocabulary


def words() -> list[str]:
    """Every word the built-in tokenizer knows besides its special tokens: the world's, and those of the
    prompt templates."""
    world = [
        *COLORS,
        *SHAPES,
        *(s + "s" for s in SHAPES),
        *"0123456789",
        *(f"({c})" for c in "ABCDEFGH"),
        "left",
        "right",
        "above",
        "below",
        "x",
        "y",
        "size",
        "gap",
        "look",
        "but",
        "wait",
        "let",
        "me",
        "again",
        "so",
        "it",
        "is",
        ",",
        ".",
        ":",
        "?",
        "</div>",
        "Is",
        "or",
        "of",
        "the",
        "How",
        "many",
        "are",
        "there",
        "far",
        "it",
        "from",
        "List",
        "shape",
        "shapes",
        "Which",
        "nearer",
        "to",
        "camera",
        "yes",
        "no",
        "true",
        "false",
    ]
    prompts = (
        "Select from the following choices. Describe the picture. User: Assistant: Let me solve this step by "
        "step. A conversation between User and "
        "Assistant. The user asks a question about the image, and the Assistant solves it. The assistant "
        "first thinks about the reasoning process in "
        "the mind and then provides the user with the answer. Answer in natural language. Choose between "
        "options"
    )
    return list(dict.fromkeys(world + re.findall(r"\w+|[^\w\s]", prompts)))
