"""What the built-in world measures in a completion: does it look, does it look again, and did that help?

A completion looks if it has `look :` before any second look; it looks again if it has the first words of a
second look, such as `but wait`. The conclusion of a look stands behind `so it is`. All of this is read from
the text: it says what the policy writes, not yet what that is worth (`evaluate.py --ban` tests that).
"""

import re
from dataclasses import dataclass

from data.types import Example, TaskHook

LOOK = "look :"
LOOK_AGAIN = "but wait , let me look again :"
# How a second look begins in the base's documents -> its share of them. The words are those that the papers
# count as reflection.
SECOND_LOOKS = {
    LOOK_AGAIN: 0.85,
    "hmm , let me check :": 0.05,
    "alternatively , look again :": 0.05,
    "is this a mistake ? look again :": 0.05,
}
SECOND_LOOK = re.compile("but wait|hmm|alternatively|is this a mistake")


@dataclass(frozen=True)
class Looks:
    """The behaviour of a text. first, last: conclusions of the first and the last look, "" without one."""

    looked: bool
    again: bool
    first: str
    last: str


def read_looks(text: str) -> Looks:
    """Read the behaviour of a completion."""
    before, *after = SECOND_LOOK.split(text, maxsplit=1)
    first = conclusion(before)
    return Looks(LOOK in before, bool(after), first, conclusion("".join(after)) or first)


def conclusion(look: str) -> str:
    """The word behind the last "so it is"; "" without one."""
    found = re.findall(r"so it is (\w+)", look)
    return found[-1] if found else ""


def agrees(concluded: str, example: Example) -> bool:
    """Whether a conclusion names the right choice. Objects go by colour: "red" for "red circle"."""
    return concluded == example.answer.split()[0]


def measure(text: str, example: Example) -> dict[str, bool | None]:
    """The measurements of one completion; `first_look_right` does not apply (None) where it never looked."""
    looks = read_looks(text)
    first_right, last_right = agrees(looks.first, example), agrees(looks.last, example)
    return {
        "looking": looks.looked,
        "self_correction": looks.again,
        "first_look_right": first_right if looks.looked else None,
        "wrong_to_right": looks.again and last_right and not first_right,
        "right_to_wrong": looks.again and first_right and not last_right,
    }


COLUMNS = {"looking": "looks", "self_correction": "looks again"}
CHANGES = {"wrong_to_right": "wrong -> right", "right_to_wrong": "right -> wrong"}
DESCRIBED = "Share of completions that describe what they see, and that correct themselves."
CHANGED = "Share of all completions in which looking again made a wrong answer right, or the reverse."
CHARTS = (("Looking, and looking again", DESCRIBED, COLUMNS), ("What the second look did", CHANGED, CHANGES))
HOOK = TaskHook(measure=measure, columns=COLUMNS, charts=CHARTS, sets={"pairs": "unseen pairs"})
