"""What the built-in base model has read: captions, and question-answer documents in mixed behaviours.

It stands for the pre-training text of a base model: nobody has taught it what a good answer is. Of the documents that follow a question

    55 %  are terse guesses, right by chance only;
    45 %  look first and then conclude. The first look is careless in 20 % of them (what is read is wrong, and so is the conclusion), whatever the question.
          A third of the looking ones, whether or not their first look was right, go on with "but wait, let me look again"; the second look is careful;
    30 %  of all of them are malformed: a tag is missing, or markup trails behind.

So no behaviour is always right, and which one pays is for GRPO to find out. `read_looks` reads the behaviours back from a text, for the metrics.
"""
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from data.shapes import COLORS, GRID, PAIRS, SHAPES, SIZES, Scene, draw, free_pairs, gap, item, scatter
from data.types import Example

TERSE, AGAIN, CARELESS, MALFORMED = 0.55, 1 / 3, 0.20, 0.30
LOOK, LOOK_AGAIN = "look :", "but wait , let me look again :"
FIRST_WORD_OF_SECOND_LOOK = "but"


# ---- captions: what teaches the base model to see

def described(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """(What is asked, a caption): every object with its place and size, in a random order."""
    return "Describe the picture.", " , ".join(f"{t.name} x {t.x} y {t.y} size {t.size}" for t in rng.sample(scene, len(scene))) + " ."


def gaps(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """(What is asked, a caption): how far the others are from the last object."""
    *others, start = scene
    return f"How far is it from the {start.name}?", " , ".join(f"{t.name} gap {gap(start, t)}" for t in rng.sample(others, len(others))) + " ."


def listed(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """(What is asked, a caption): the objects of the last one's shape, in the fixed order of PAIRS."""
    found = sorted((t for t in scene if t.shape == scene[-1].shape), key=lambda t: PAIRS.index(t.pair))
    return f"List the {scene[-1].shape}s.", " , ".join(t.name for t in found) + " ."


CAPTIONS = (described, described, described, gaps, listed)


# ---- a look: what is read from the picture, and the conclusion drawn from it

def look(example: Example, rng: random.Random, careless: bool) -> str:
    """One look at the picture of a question, as text; a careless one reads something false that leads to a wrong conclusion.

    The readings are x or y for Relation, sizes for Depth, gaps for Distance, and the matching objects, in a fixed order, for Count.
    """
    named, task = example.extra["named"], example.task
    if task == "Count":
        return _count_look(example, rng, careless)
    if task == "Relation":
        axis = example.extra["axis"]
        words = ("left", "right") if axis == "x" else ("above", "below")
        readings, unit, top = [getattr(t, axis) for t in named], axis, GRID - 1
    else:
        words = tuple(t.name for t in named[-2:])
        readings = [t.size for t in named] if task == "Depth" else [gap(named[0], t) for t in named[1:]]
        unit, top = ("size", SIZES) if task == "Depth" else ("gap", 7)
    low = 0 if task == "Relation" else 1
    first_wins = _first_wins(task, readings)
    if careless:                                                       # false readings, evenly over all those that lead astray
        while True:
            readings = [rng.randint(low, top), rng.randint(low, top)]
            if readings[0] != readings[1] and _first_wins(task, readings) != first_wins:
                break
        first_wins = not first_wins
    seen = " , ".join(f"{t.name} {unit} {r}" for t, r in zip(named[-2:], readings))
    return f"{seen} , so it is {words[0] if first_wins else words[1]} ."


def _first_wins(task: str, readings: Sequence[int]) -> bool:
    """Does the first reading settle the question: the smaller x, y or gap, or the larger size?"""
    return readings[0] > readings[1] if task == "Depth" else readings[0] < readings[1]


def _count_look(example: Example, rng: random.Random, careless: bool) -> str:
    pairs = [t.pair for t in example.extra["named"]]
    if careless:                                                       # one that is not there, or one missed
        absent = [p for p in PAIRS if p[1] == example.extra["shape"] and p not in pairs]
        if len(pairs) == 1 or (len(pairs) < 4 and rng.random() < 0.5):
            pairs = sorted(pairs + [rng.choice(absent)], key=PAIRS.index)
        else:
            pairs.pop(rng.randrange(len(pairs)))
    seen = " , ".join(f"{color} {shape}" for color, shape in pairs)
    return f"{seen} , so it is {len(pairs)} ."


def conclusion(look_text: str) -> str:
    """What a look concludes: the words between "so it is" and the full stop; empty where it concludes nothing."""
    found = re.findall(r"so it is ([a-z0-9]+(?: [a-z0-9]+)?) ?\.", look_text)   # two words at most: linear time whatever a policy writes
    return found[-1] if found else ""


# ---- whole documents

def letter_of(example: Example, answer: str) -> str:
    """The letter, such as "(B)", of the choice that reads `answer`. Raises ValueError where none does."""
    return f"({'ABCDEFGH'[example.choices.index(answer)]})"


def _ending(letter: str, rng: random.Random) -> str:
    if rng.random() >= MALFORMED:
        return f"</think> <answer> {letter} </answer>"
    return rng.choice((f"<answer> {letter} </answer>",                  # thinking is never closed
                       f"</think> {letter}",                            # no answer tags
                       f"</think> <answer> {letter}",                   # never closed
                       f"</think> <answer> {letter} </answer> </div> </div>"))


def answer_document(example: Example, rng: random.Random) -> str:
    """One document that follows a question: terse or looking, perhaps with a second look, perhaps malformed. No behaviour depends on the question's kind."""
    if rng.random() < TERSE:
        return _ending(f"({rng.choice('ABCDEFGH'[:len(example.choices)])})", rng)
    text = look(example, rng, careless=rng.random() < CARELESS)
    chain = f"{LOOK} {text}"
    if rng.random() < AGAIN:
        text = look(example, rng, careless=False)
        chain += f" {LOOK_AGAIN} {text}"
    return f"{chain} {_ending(letter_of(example, conclusion(text)), rng)}"


class Documents(Sequence):
    """The reading list of the built-in base model: examples whose `extra["documents"]` hold `each` texts that may follow the prompt.

    A share `captions` of the items are captions of free scenes, the others are questions of the training split, with other scenes than GRPO's (another seed).
    Item i is a pure function of (seed, i).
    """

    def __init__(self, count: int = 2_000_000, seed: int = 0, each: int = 2, captions: float = 0.6):
        self.count, self.seed, self.each, self.captions = count, seed, each, captions

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        rng = random.Random(f"documents/{self.seed}/{index}")
        if rng.random() < self.captions:
            scene = scatter(rng, free_pairs(rng, rng.choice((1, 1, 2, 3, 4, 5))))         # single objects are where localising starts
            kind = rng.choice(CAPTIONS) if len(scene) > 1 else described
            asked, texts = zip(*(kind(scene, rng) for _ in range(self.each)))
            return Example(uid=f"caption/{self.seed}/{index}", question=asked[0], choices=(), answer=texts[0], task=f"Caption {kind.__name__}",
                           pictures=(partial(draw, scene),), extra={"documents": texts})
        _, example = item("train", self.seed + 1_000_003, index)
        return replace(example, extra={**example.extra, "documents": tuple(answer_document(example, rng) for _ in range(self.each))})


# ---- reading behaviours back

@dataclass(frozen=True)
class Looks:
    """Which behaviour a text shows: did it look, did it look again, and what each look concluded ("" where it did not)."""
    looked: bool
    again: bool
    first: str
    last: str


def read_looks(text: str) -> Looks:
    """Read the behaviour of a completion of the built-in world."""
    first, _, second = text.partition(f"{FIRST_WORD_OF_SECOND_LOOK} wait")
    return Looks(looked=LOOK in first, again=bool(second), first=conclusion(first), last=conclusion(second) or conclusion(first))


# ---- vocabulary

def words() -> list[str]:
    """Every word the built-in tokenizer knows besides its special tokens: the world's, and those of the prompt templates."""
    world = [*COLORS, *SHAPES, *(s + "s" for s in SHAPES), *"0123456789", *(f"({c})" for c in "ABCDEFGH"), "left", "right", "above", "below",
             "x", "y", "size", "gap", "look", "but", "wait", "let", "me", "again", "so", "it", "is", ",", ".", ":", "?", "</div>", "Is", "or", "of",
             "the", "How", "many", "are", "there", "far", "it", "from", "List", "shape", "shapes", "Which", "nearer", "to", "camera", "yes", "no", "true", "false"]
    prompts = ("Select from the following choices. Describe the picture. User: Assistant: Let me solve this step by step. A conversation between User and "
               "Assistant. The user asks a question about the image, and the Assistant solves it. The assistant first thinks about the reasoning process in "
               "the mind and then provides the user with the answer. Answer in natural language. Choose between options")
    return list(dict.fromkeys(world + re.findall(r"\w+|[^\w\s]", prompts)))
