"""The documents of the built-in base model: captions, lessons, and answers to questions in mixed behaviours.

They stand for the pre-training text of a base model, which no one has taught what a good answer is. They are
read in order, in six parts: colours, sizes, places, then all that can be seen, the letters of choices, and
last the answers. The first five parts are the trunk, which teaches to see. The last is the branch. Of its
answers

    65 %  are terse guesses, right by chance only;
    35 %  look first and then conclude. The first look is careless in 20 % of them, for every kind of question
          alike: it reads something false and concludes wrongly. Half of the looking ones, right or not at
          first, look again, in words such as "but wait, let me look again"; the second look is careful;
    30 %  of all of them are malformed: a tag is missing, or markup follows the answer.

So no behaviour is always right, and GRPO has to find out which one pays. `data/shapes/looking.py` reads the
behaviours back from a text, for the metrics.
"""

import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from data.shapes import world
from data.shapes.looking import LOOK, SECOND_LOOKS, conclusion
from data.shapes.world import COLORS, GRID, SHAPES, SIZES, TASKS, Scene, Thing, gap
from data.types import LETTERS, Example

TERSE, AGAIN, CARELESS, MALFORMED = 0.65, 1 / 2, 0.20, 0.30
# in long chains, of the looks after the first
CARELESS_LATER = 0.40
# the share of the terse answers that begin as an instruct model's do
POLITE = 0.04
# Items of the trunk: the recipe takes 32 a step.
TRUNK = 7500 * 32


# ---- captions, from which the base model learns to see: each function returns (question, caption)


def described(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """The place, size and shape of every object, in a random order."""
    things = rng.sample(scene, len(scene))
    readings = [f"{_place(t)} size {t.size} shape {t.shape}" for t in things]
    return "Describe the picture.", " , ".join(readings) + " ."


def coloured(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """The colours that are there, in their order."""
    return "Which colours are there?", " , ".join(t.color for t in world.in_order(scene)) + " ."


def sized(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """The size of every object, in the order of colours."""
    return "List the sizes.", " , ".join(f"{t.color} size {t.size}" for t in world.in_order(scene)) + " ."


def placed(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """The place and size of every object, in a random order."""
    readings = [f"{_place(t)} size {t.size}" for t in rng.sample(scene, len(scene))]
    return "Describe the picture.", " , ".join(readings) + " ."


def listed(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """The shape of every object, in the order of colours."""
    return "List the shapes.", " , ".join(f"{t.color} shape {t.shape}" for t in world.in_order(scene)) + " ."


def gaps(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """The distances of the others from the last object."""
    *others, start = scene
    caption = f"{_place(start)} , {_gaps(start, rng.sample(others, len(others)))} ."
    return f"How far is it from the {start.name}?", caption


def _place(thing: Thing) -> str:
    return f"{thing.color} x {thing.x} y {thing.y}"


def _gaps(start: Thing, others: Sequence[Thing]) -> str:
    return " , ".join(f"{_place(t)} gap {gap(start, t)}" for t in others)


# ---- a look: readings from the picture, and a conclusion


def look(example: Example, rng: random.Random, careless: bool) -> str:
    """One look at the picture, as text. A careless look reads something false, which misleads it.

    Objects are named by their unique colours. Relation reads the x or y of each object, Depth the size,
    Distance the places and the gaps between them; Count lists all objects with a running count.
    """
    things = example.extra["named"]
    concluded = true = concluded_from(example, things)
    # draw false readings until one of them misleads: all that do are equally likely
    while careless and concluded in (true, None):
        things = tuple(_misread(example, t, rng) for t in example.extra["named"])
        concluded = concluded_from(example, things)
    assert concluded is not None
    return f"{reading(example, things)} , so it is {concluded} {letter_of(example, concluded)} ."


def _misread(example: Example, thing: Thing, rng: random.Random) -> Thing:
    """The object with false values. A count is wrong by a few objects, so most stay the same."""
    if example.task == "Count":
        return replace(thing, shape=rng.choice(SHAPES)) if rng.random() < 0.3 else thing
    return replace(thing, x=rng.randrange(GRID), y=rng.randrange(GRID), size=rng.randint(1, SIZES))


def reading(example: Example, things: Sequence[Thing]) -> str:
    """What a look reads of the objects that a question asks for."""
    if example.task == "Count":
        counts = accumulate(int(t.shape == example.extra["shape"]) for t in things)
        return " , ".join(f"{t.color} shape {t.shape} {count}" for t, count in zip(things, counts))
    if example.task == "Distance":
        return f"{_place(things[0])} , {_gaps(things[0], things[1:])}"
    unit = example.extra["axis"] if example.task == "Relation" else "size"
    return " , ".join(f"{t.color} {unit} {getattr(t, unit)}" for t in things)


def concluded_from(example: Example, things: Sequence[Thing]) -> str | None:
    """The answer that the readings give: left, below, a colour or a number; None where they give none."""
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

POLITE_STARTS = ("Sure ! Here is the answer : ", "Certainly , I can see it . ")


def letter_of(example: Example, concluded: str) -> str:
    """ "(B)" for the choice that a conclusion names."""
    first_words = [choice.split()[0] for choice in example.choices]
    return f"({LETTERS[first_words.index(concluded)]})"


def _well_formed(letter: str) -> str:
    return f"</think> <answer> {letter} </answer>"


def _ending(letter: str, rng: random.Random) -> str:
    if rng.random() >= MALFORMED:
        return _well_formed(letter)
    # Thinking is not closed; no answer tags; the answer is not closed; markup follows it.
    unclosed = f"</think> <answer> {letter}"
    unopened = f"<answer> {letter} </answer>"
    return rng.choice((unopened, f"</think> {letter}", unclosed, f"{_well_formed(letter)} </div> </div>"))


def _second_look(rng: random.Random) -> str:
    """The words with which a second look begins."""
    return rng.choices([*SECOND_LOOKS], [*SECOND_LOOKS.values()])[0]


def answer_document(
    example: Example, rng: random.Random, looks: float = 1 - TERSE, again: float = AGAIN
) -> str:
    """One document that follows a question. looks: the share that looks first; again: of these, the share
    that looks a second time. No behaviour depends on the kind of question."""
    if rng.random() >= looks:
        letter = f"({rng.choice('ABCD'[: len(example.choices)])})"
        return (rng.choice(POLITE_STARTS) if rng.random() < POLITE else "") + _ending(letter, rng)
    text = look(example, rng, careless=rng.random() < CARELESS)
    chain = f"{LOOK} {text}"
    if rng.random() < again:
        text = look(example, rng, careless=False)
        chain += f" {_second_look(rng)} {text}"
    return f"{chain} {_ending(letter_of(example, conclusion(text)), rng)}"


def long_chain(example: Example, rng: random.Random) -> str:
    """A well-formed document of three to five looks; the last one counts. It is wrong more often than
    the first: thinking on does harm here, which is planted."""
    texts = [look(example, rng, careless=rng.random() < CARELESS)]
    chain = f"{LOOK} {texts[0]}"
    for _ in range(rng.randint(2, 4)):
        phrase = _second_look(rng)
        texts.append(look(example, rng, careless=rng.random() < CARELESS_LATER))
        chain += f" {phrase} {texts[-1]}"
    return f"{chain} {_well_formed(letter_of(example, conclusion(texts[-1])))}"


def short_answer(example: Example, _rng: random.Random) -> str:
    """A well-formed document that is only the letter of the right choice."""
    return _well_formed(f"({example.letter})")


# Documents of one kind, for imitation behind the base.
ONLY = {"long": long_chain, "short": short_answer}


def lesson(example: Example) -> Example:
    """The question without its choices, and the readings and the conclusion as its document."""
    things = example.extra["named"]
    text = f"{reading(example, things)} , so it is {concluded_from(example, things)} ."
    return replace(example, choices=(), task=f"Lesson {example.task}", extra={"documents": (text,)})


def lesson_with_letter(example: Example, rng: random.Random) -> Example:
    """The question with its choices; the document's conclusion names the letter, too."""
    text = look(example, rng, careless=False)
    return replace(example, task=f"Letter {example.task}", extra={"documents": (text,)})


def lettered(rng: random.Random, uid: str, each: int, pictures: tuple = ()) -> Example:
    """A lesson in letters: choices, and texts such as "right (B) , left (A) ."."""
    things = [f"{color} {rng.choice(SHAPES)}" for color in COLORS]
    pool = rng.choice((things, list("0123456789"), ["left", "right", "above", "below"]))
    choices = tuple(rng.sample(pool, rng.randint(2, min(len(pool), 8))))
    pairs = [f"{choice.split()[0]} ({letter})" for letter, choice in zip(LETTERS, choices)]
    texts = tuple(" , ".join(rng.sample(pairs, len(pairs))) + " ." for _ in range(each))
    extra = {"documents": texts}
    return Example(uid, "List the choices.", choices, choices[0], "Caption lettered", pictures, extra=extra)


def _any_scene(rng: random.Random) -> Scene:
    """One to five objects. Seeing is learned first where there are few."""
    return world.scatter(rng, world.free_pairs(rng, rng.choice((1, 2, 2, 3, 4, 5))))


class Part(NamedTuple):
    """A part of the reading list. until: the first item behind it. captions, letters: shares of the items;
    the others are lessons, or documents that answer. kinds: of captions. tasks: of the questions, in the
    shares in which they stand here. choices: lessons keep their choices, and name the letter of what they
    conclude; lessons in letters have a picture.
    """

    until: int
    captions: float
    letters: float
    kinds: tuple[Callable, ...]
    tasks: tuple[str, ...] = TASKS
    choices: bool = False


# What is learned first hides what could be learned instead, so the order matters (docs/results/base.md).
PARTS = (
    # colours: an object can be found by its colour only if that is seen
    Part(300 * 32, 1.0, 0.0, (coloured,)),
    # sizes: after places, they are read off any object
    Part(1000 * 32, 0.6, 0.0, (sized,), ("Depth",)),
    # whose place it is: by the colour alone in a lesson
    Part(2600 * 32, 0.6, 0.0, (placed, placed, gaps), ("Relation", "Depth", "Distance")),
    Part(
        6800 * 32,
        0.5,
        0.1,
        (described, listed, listed, gaps),
        ("Relation", "Count", "Count", "Depth", "Distance", "Distance"),
    ),
    # letters beside a picture: those that are learned without one do not always serve there
    Part(
        TRUNK,
        0.1,
        0.1,
        (described, listed, gaps),
        ("Relation", *TASKS, "Depth", "Distance", "Distance"),
        choices=True,
    ),
    # the branch
    Part(sys.maxsize, 0.1, 0.1, (described, described, listed, gaps), choices=True),
)


class Documents(Sequence[Example]):
    """What the built-in base model reads: `extra["documents"]` holds `each` texts that may follow the prompt.

    Item i is a function of (seed, i) and of the part in which it lies. Questions are of the training split,
    with other scenes than GRPO's (another seed). branch: begin with the last part, behind the trunk. looks,
    again: see `answer_document`; counts: the same as looks, for Count alone (None: looks). only: nothing but
    questions, with documents of this kind of ONLY.
    """

    # a run takes the items one after the other, because the order is what the trunk learns by
    in_order = True

    def __init__(
        self,
        count: int = 2_000_000,
        seed: int = 0,
        each: int = 2,
        branch: bool = False,
        looks: float = 1 - TERSE,
        again: float = AGAIN,
        counts: float | None = None,
        only: str | None = None,
    ):
        self.size, self.seed, self.each = count, seed, each
        self.start = TRUNK if branch or only else 0
        self.looks, self.again, self.only = looks, again, only
        self.counts = looks if counts is None else counts

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:  # pyrefly: ignore[bad-override]
        if not 0 <= index < self.size:
            raise IndexError(index)
        index += self.start
        rng = random.Random(f"documents/{self.seed}/{index}")
        part = next(part for part in PARTS if index < part.until)
        kind = 1.0 if self.only else rng.random()
        if kind < part.captions:
            return self._caption(rng, index, part.kinds)
        if kind < part.captions + part.letters:
            pictures = (partial(world.draw, _any_scene(rng)),) if part.choices else ()
            return lettered(rng, f"letters/{self.seed}/{index}", self.each, pictures)
        task = TASKS.index(rng.choice(part.tasks))
        _, example = world.item("train", self.seed + 1_000_003, len(TASKS) * index + task)
        if index < TRUNK:
            return lesson_with_letter(example, rng) if part.choices else lesson(example)
        texts = tuple(self._answer(example, rng) for _ in range(self.each))
        return replace(example, extra={**example.extra, "documents": texts})

    def _answer(self, example: Example, rng: random.Random) -> str:
        if self.only:
            return ONLY[self.only](example, rng)
        looks = self.counts if example.task == "Count" else self.looks
        return answer_document(example, rng, looks, self.again)

    def _caption(self, rng: random.Random, index: int, kinds: Sequence) -> Example:
        scene = _any_scene(rng)
        kind = rng.choice(kinds) if len(scene) > 1 else kinds[0]
        asked, texts = zip(*(kind(scene, rng) for _ in range(self.each)))
        uid, task = f"caption/{self.seed}/{index}", f"Caption {kind.__name__}"
        pictures = (partial(world.draw, scene),)
        return Example(uid, asked[0], (), texts[0], task, pictures, extra={"documents": texts})


# Words of the prompt templates.
PROMPTS = (
    "Select from the following choices. Describe the picture. User: Assistant: Let me solve this step by "
    "step. A conversation between User and Assistant. The user asks a question about the image, and the "
    "Assistant solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. Answer in natural language. Choose between options"
)


def words() -> list[str]:
    """Every word of the built-in tokenizer but its special tokens. Their order decides the token ids."""
    plurals, letters = [f"{shape}s" for shape in SHAPES], [f"({letter})" for letter in "ABCDEFGH"]
    found = [*COLORS, *SHAPES, *plurals, *"0123456789", *letters]
    found += "left right above below x y size gap look but wait let me again so it is , . : ? </div>".split()
    found += "Is or of the How many are there far it from List shape shapes Which nearer to camera".split()
    found += "yes no true false".split()
    texts = " ".join((PROMPTS, "colours sizes", *SECOND_LOOKS, *POLITE_STARTS))
    return list(dict.fromkeys(found + re.findall(r"\w+|[^\w\s]", texts)))
