"""A text-only reasoner of the built-in world: it gets a description and a question, and sees no picture.

It stands for the reasoner of Vision-R1's bridge (arXiv 2503.06749, section 3.3.1). It thinks long and doubts
itself: it looks again at the text, up to MOST times, and believes its last look. A look slips in SLIPS of all
cases. Where the text lacks what the question needs, it says so and must guess. Now and then it speaks of "the
description", which the bridge has to clean up.

It only uses words of the built-in tokenizer, so what it writes can train the built-in model.
"""

import random
import re
from dataclasses import replace

from data.shapes import world
from data.shapes.documents import concluded_from, letter_of, look
from data.shapes.looking import LOOK, LOOK_AGAIN
from data.shapes.world import COLORS, SHAPES, Thing
from data.types import Example

# the chance that it looks once more, and its most looks; the chance of a slip in a look; of naming the text
AGAIN, MOST, SLIPS, NAMES_TEXT = 0.6, 6, 0.05, 0.1
# what the text does not say
NOTHING = -1
_FACTS = re.compile(r"(?P<name>x|y|size|shape) (?P<value>\w+)")
_NAME = r"the (\w+) \w+"
_QUESTIONS = {
    "Relation": re.compile(rf"Is {_NAME} (left or right of|above or below) {_NAME}\?"),
    "Depth": re.compile(rf"Which is nearer to the camera, {_NAME} or {_NAME}\?"),
    "Distance": re.compile(rf"Which is nearer to {_NAME}, {_NAME} or {_NAME}\?"),
    "Count": re.compile(r"How many (\w+)s are there\?"),
}
_CHOICE = re.compile(r"^\(([A-H])\) (.+)$", re.MULTILINE)
# a question of a task needs these facts of its objects; Relation only the one of its axis
_NEEDS = {"Relation": "xy", "Count": ("shape",), "Depth": ("size",), "Distance": "xy"}


def reason(text: str, rng: random.Random) -> str:
    """A chain in <think> tags and an answer, from a text that holds a description and a question of this
    world with its choices. Raises ValueError without such a question."""
    example = _asked(text)
    lacks = _lacking(example)
    if lacks:
        chain, letter = _guess(example, lacks, rng)
    else:
        looks = [_look(example, rng)]
        while len(looks) < MOST and rng.random() < AGAIN:
            looks.append(_look(example, rng))
        chain, letter = f" {LOOK_AGAIN} ".join(looks), re.findall(r"\([A-H]\)", looks[-1])[-1]
    where = f"{LOOK} in the description" if rng.random() < NAMES_TEXT else LOOK
    return f"<think> {where} {chain} the answer is {letter} . </think> {letter}"


def _asked(text: str) -> Example:
    """The question as an example. `extra` holds the objects that the text tells of; its answer is not known,
    and the first choice stands for it."""
    choices = tuple(found[2] for found in _CHOICE.finditer(text))
    for task, form in _QUESTIONS.items():
        if (found := form.search(text)) and len(choices) > 1:
            things = described(text[: found.start()])
            question = Example("asked", found[0], choices, choices[0], task)
            return replace(question, extra=_facts(task, found.groups(), things))
    raise ValueError("the reasoner of the built-in world finds no question of this world with its choices")


def described(text: str) -> dict[str, Thing]:
    """The objects that a description tells of, by colour, as it first tells of each. What it does not say
    of them is NOTHING, or "" for a shape."""
    found: dict[str, Thing] = {}
    colors = list(re.finditer(rf"\b({'|'.join(COLORS)})\b", text))
    for color, following in zip(colors, [*colors[1:], None]):
        told = text[color.end() : following.start() if following else None]
        facts = {fact["name"]: fact["value"] for fact in _FACTS.finditer(told)}
        numbers = {
            name: int(facts[name]) if facts.get(name, "").isdigit() else NOTHING
            for name in ("x", "y", "size")
        }
        shape = facts["shape"] if facts.get("shape") in SHAPES else ""
        found.setdefault(color[1], Thing(color[1], shape, **numbers))
    return found


def _facts(task: str, words: tuple[str, ...], things: dict[str, Thing]) -> dict:
    """`Example.extra` of a question, as data/shapes/world.py makes it. words: what its form found."""
    if task == "Count":
        return {"named": world.in_order(tuple(things.values())), "shape": words[0]}
    axis = {"axis": "x" if "left" in words[1] else "y"} if task == "Relation" else {}
    colors = [word for word in words if word in COLORS]
    unknown = [Thing(color, "", NOTHING, NOTHING, NOTHING) for color in colors]
    return axis | {"named": tuple(things.get(thing.color, thing) for thing in unknown)}


def _lacking(example: Example) -> str:
    """What the text lacks: "x of red"; "" if it says all that the question needs."""
    needs = example.extra.get("axis") or _NEEDS[example.task]
    for thing in example.extra["named"]:
        for fact in needs:
            if getattr(thing, fact) in (NOTHING, ""):
                return f"{fact} of {thing.color}"
    # nothing can be concluded from equal values, or from no objects
    return "" if concluded_from(example, example.extra["named"]) else "answer"


def _look(example: Example, rng: random.Random) -> str:
    return look(example, rng, careless=rng.random() < SLIPS)


def _guess(example: Example, lacks: str, rng: random.Random) -> tuple[str, str]:
    """A chain that ends in a guess, and the letter of the guess."""
    seen = [f"{thing.color} shape {thing.shape}" for thing in example.extra["named"] if thing.shape]
    guess = rng.choice(example.choices).split()[0]
    letter = letter_of(example, guess)
    told = " , ".join([*seen, f"there is no {lacks} ."])
    return f"{told} {LOOK_AGAIN} there is no {lacks} , so it is {guess} {letter} .", letter
