"""A chain about a text becomes a chain about a picture: pure functions on texts.

The published data was made by replacing single words. That doubled verbs ("the image displays displays") and
ate spaces. Here whole phrases are replaced (`phrases.yaml`), and a phrase stays where its replacement would
stand beside a like word. What still betrays the text is found by `betrayals`, and the filters refuse it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import yaml

_PHRASES = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text("utf-8"))
VERBS = frozenset(_PHRASES["verbs"].split())
_NEXT = re.compile(r"\s+([^\W\d_]+)")
_LAST = re.compile(r"([^\W\d_]+)\s+\Z")
# characters before a phrase in which its neighbour is looked for
_NEAR = 60


def _pattern(phrase: str) -> re.Pattern[str]:
    for name, part in _PHRASES["parts"].items():
        phrase = phrase.replace("{" + name + "}", part)
    # one white space: a phrase may go over the end of a line, and not over a blank line
    spaced = phrase.replace(" ", r"[ \t]*(?:[ \t]|\n)[ \t]*")
    return re.compile(rf"(?<![\w'’-]){spaced}(?![\w'’-])", re.IGNORECASE)


REPLACED = {name: (_pattern(find), put) for name, (find, put) in _PHRASES["replaced"].items()}
BETRAYS = tuple(map(_pattern, _PHRASES["betrays"]))
REFUSAL = re.compile(rf"\W*(?:{'|'.join(_PHRASES['refusals'])})", re.IGNORECASE)
"""Matches the beginning of a reply that refuses."""


@lru_cache(maxsize=64)
def clean(text: str) -> tuple[str, Mapping[str, int]]:
    """A text with its phrases replaced, and how often each was. It is idempotent; a text without a phrase
    comes back unchanged."""
    counts: Counter[str] = Counter()
    for name, (pattern, put) in REPLACED.items():
        pieces: list[str] = []
        at = 0
        for found in pattern.finditer(text):
            new = " ".join(found.expand(put).split())
            if _meets_its_like(new, found):
                continue
            pieces += [text[at : found.start()], new[0].upper() + new[1:] if found[0][0].isupper() else new]
            at = found.end()
            counts[name] += 1
        text = "".join([*pieces, text[at:]])
    return text, counts


def _meets_its_like(new: str, found: re.Match[str]) -> bool:
    """Whether a word would be doubled, or two verbs would meet, at either end of a replacement."""
    text = found.string
    before = _LAST.search(text, max(0, found.start() - _NEAR), found.start())
    behind = _NEXT.match(text, found.end())
    words = new.casefold().split()
    pairs = [(before[1].casefold(), words[0])] if before else []
    pairs += [(words[-1], behind[1].casefold())] if behind else []
    return any(a == b or (a in VERBS and b in VERBS) for a, b in pairs)


def betrayals(text: str, allowed: str = "") -> list[str]:
    """What in a text betrays that a text was read instead of a picture. allowed: the question; what it says
    itself is no betrayal."""
    allowed = allowed.casefold()
    found = (match[0] for pattern in BETRAYS for match in pattern.finditer(text))
    return [said for said in dict.fromkeys(found) if said.casefold() not in allowed]
