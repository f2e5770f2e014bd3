"""Which chains are kept: a table of named pure functions over stored replies.

A reason is a function (example, replies, rules) -> whether the chain must go. `replies` are the last replies
to one question, by stage. The filters look at the chain after the clean-up (`cleanup.py`). Because they read
what is stored, a changed rule costs no request.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.answers import is_right
from data.answers.parser import ANSWER, END_ANSWER, TAGS
from data.images import open_picture
from data.sources.table import SPLITS, open_split, usable
from data.types import Example, Picture, short
from grpo.bridge.cleanup import REFUSAL, betrayals, clean
from grpo.evaluation.protocols import Reading, chat
from grpo.evaluation.reflection import ends_in_loop
from grpo.serving.messages import Reply

PSEUDO, DESCRIBE, REASON = STAGES = ("pseudo", "describe", "reason")
Replies = Mapping[str, Reply]

# a language's letters, by the first word of their names in Unicode
SCRIPTS = {
    "ar": "ARABIC",
    "el": "GREEK",
    "he": "HEBREW",
    "hi": "DEVANAGARI",
    "ja": "CJK HIRAGANA KATAKANA",
    "ko": "HANGUL",
    "ru": "CYRILLIC",
    "th": "THAI",
    "uk": "CYRILLIC",
    "zh": "CJK",
}
# of formulas, in every language
FORMULAS = frozenset("GREEK MATHEMATICAL DOUBLE-STRUCK SCRIPT BLACK-LETTER MODIFIER SUPERSCRIPT".split())
# where a chain states an answer, and characters from there on that say it
_STATED = re.compile(r"\banswer (?:is|must be|should be|would be)\b|\\boxed ?\{", re.IGNORECASE)
_LONG = 200
_WORDS = re.compile(r"\w+")
# words from which on two equal questions are no accident; "What is the value of x?" has fewer
TELLING = 10


@dataclass(frozen=True)
class Rules:
    """Settings of the filters. Raises ValueError for what cannot be right."""

    languages: list[str] = field(default_factory=lambda: ["en"])
    """languages of the chains; a script of another one is refused"""
    foreign: float = 0.02
    """share of a chain's letters that may be of another script"""
    least_words: int = 20
    """a chain of fewer words is too short"""
    most_words: int = 12000
    """a chain of more words is too long"""
    against: list[dict[str, str]] = field(default_factory=list)
    """benchmarks whose pictures and questions are refused: [{task: mathvista, data: FILE}]"""

    def __post_init__(self) -> None:
        if not 0 <= self.foreign <= 1:
            raise ValueError(f"filters.foreign: a share, from 0 to 1, got {self.foreign}")
        if not 0 <= self.least_words <= self.most_words:
            said = f"filters.least_words: {self.least_words} and most_words: {self.most_words}"
            raise ValueError(f"{said} leave no chain; the second must not be smaller")
        for entry in self.against:
            if not isinstance(entry, Mapping) or not {"task"} <= set(entry) <= {"task", "data"}:
                raise ValueError(f"filters.against: write {{task: NAME, data: FILE}}, not {short(entry)}")
            if entry["task"] not in SPLITS:
                raise ValueError(f"filters.against: no task {entry['task']!r}; there are {', '.join(SPLITS)}")

    def scripts(self) -> frozenset[str]:
        """The scripts that a chain may have. A language that SCRIPTS lacks has Latin letters."""
        own = {script for language in self.languages for script in SCRIPTS.get(language, "LATIN").split()}
        return FORMULAS | own | {"LATIN"}


def chain_of(replies: Replies) -> str:
    """The chain of thought after the clean-up; "" without one."""
    return clean(replies[REASON].thinking)[0] if REASON in replies else ""


def answer_of(example: Example, replies: Replies) -> Reading:
    """The answer that the reasoner gives behind its chain."""
    return chat(replies[REASON].text, example)


# ---- form: of one reply


def failed(reply: Reply) -> bool:
    """No reply, or an empty one."""
    return bool(reply.error) or not (reply.text.strip() or reply.thinking.strip())


def refused(reply: Reply) -> bool:
    """The model says that it cannot or will not."""
    return bool(REFUSAL.match(reply.text))


def cut(reply: Reply) -> bool:
    """It ended at the longest number of tokens."""
    return reply.finish == "length"


def loops(reply: Reply) -> bool:
    """It ends in a block of words that comes again and again."""
    return any(ends_in_loop(_numbered(text)) for text in (reply.thinking, reply.text))


def unclosed(reply: Reply) -> bool:
    """A reasoner's chain and answer cannot be told apart: one of them is missing, or a tag is inside."""
    said = reply.thinking + reply.text.partition(ANSWER)[0]
    return not (reply.thinking.strip() and reply.text.strip()) or any(tag in said for tag in TAGS)


FORM: dict[str, Callable[[Reply], bool]] = {
    "failed": failed,
    "refused": refused,
    "cut": cut,
    "unclosed": unclosed,
    "loops": loops,
}
"""What is wrong with the form of one reply. Another attempt, with a new seed, may go better."""


def form_reasons(stage: str, reply: Reply, example: Example | None = None) -> list[str]:
    """Why a reply is worth another attempt, in the table's order; [] if it is not. A failed one is nothing
    else. example: a reasoner's answer to it must be readable, too."""
    if failed(reply):
        return ["failed"]
    known = (name for name in FORM if name != "unclosed" or stage == REASON)
    found = [name for name in known if FORM[name](reply)]
    if not found and stage == REASON and example is not None and unread(example, {REASON: reply}, Rules()):
        return ["unread"]
    return found


# ---- content: of all replies to a question


def unread(example: Example, replies: Replies, rules: Rules) -> bool:
    """No answer can be read."""
    return answer_of(example, replies).answer is None


def wrong(example: Example, replies: Replies, rules: Rules) -> bool:
    """An answer is read, and it is not the right one."""
    found = answer_of(example, replies)
    return found.answer is not None and not found.correct


def speaks_of_text(example: Example, replies: Replies, rules: Rules) -> bool:
    """The chain betrays that a text was read, or that the answer was given."""
    return bool(betrayals(chain_of(replies), example.asked))


def inconsistent(example: Example, replies: Replies, rules: Rules) -> bool:
    """The last "the answer is X" of the chain is another answer than the one behind the chain."""
    thinking = replies[REASON].thinking
    stated = [found.start() for found in _STATED.finditer(thinking)]
    final = answer_of(example, replies).answer
    if not stated or final is None:
        return False
    last = chat(thinking[stated[-1] :][:_LONG].partition("\n")[0], example).answer
    if last is None or example.choices:
        return last not in (None, final)
    # "the answer is the sum of both sides" states nothing yet
    says_more = example.extra.get("kind") != "number" and len(last.split()) > len(final.split()) + 2
    return not says_more and not is_right(f"{ANSWER}{last}{END_ANSWER}", replace(example, answer=final))


def foreign(example: Example, replies: Replies, rules: Rules) -> bool:
    """Too many letters of a script that no allowed language has."""
    letters = Counter(replies[REASON].thinking + replies[REASON].text)
    known = {letter: count for letter, count in letters.items() if letter.isalpha()}
    allowed = rules.scripts()
    strange = sum(count for letter, count in known.items() if _script(letter) not in allowed)
    return strange > rules.foreign * sum(known.values())


def too_long(example: Example, replies: Replies, rules: Rules) -> bool:
    """More words than `rules.most_words`."""
    return len(chain_of(replies).split()) > rules.most_words


def too_short(example: Example, replies: Replies, rules: Rules) -> bool:
    """Fewer words than `rules.least_words`."""
    return len(chain_of(replies).split()) < rules.least_words


CONTENT: dict[str, Callable[[Example, Replies, Rules], bool]] = {
    "unread": unread,
    "wrong": wrong,
    "speaks of the description": speaks_of_text,
    "inconsistent": inconsistent,
    "language": foreign,
    "too long": too_long,
    "too short": too_short,
}
"""What is wrong with a chain whose form is right."""

KNOWN = ("duplicate", "in a benchmark")
"""What is wrong with a question, whatever is replied to it."""

TABLE = (*FORM, *CONTENT, *KNOWN)


def reasons(example: Example, replies: Replies, rules: Rules, known: Known | None = None) -> list[str]:
    """Why a chain is not kept, in the order of TABLE; [] if it is kept. What stages lack in form hides what
    else is wrong with them. known: the questions before this one."""
    seen = known.reasons(example) if known else []
    if seen and REASON not in replies:
        # such a question is not asked
        return seen
    formed = {REASON: Reply("", error="not asked"), **replies}
    found = {name for stage, reply in formed.items() for name in form_reasons(stage, reply)}
    if not found:
        found = {name for name, wrongs in CONTENT.items() if wrongs(example, replies, rules)}
    found.update(seen)
    return [name for name in TABLE if name in found]


class Known:
    """The questions of benchmarks (`rules.against`), and the questions that were seen so far: a digest of
    each. Raises BadSource, HubError."""

    def __init__(self, rules: Rules) -> None:
        self._pixels: set[bytes] = set()
        words: Counter[str] = Counter()
        self._seen: dict[bytes, str] = {}
        for entry in rules.against:
            # a task that draws its pictures has no split of everything
            split = "all" if "all" in SPLITS[entry["task"]] else "heldout"
            examples = open_split(entry["task"], entry.get("data"), split, None, 0)
            for example in tqdm(usable(examples), f"against {entry['task']}", unit="question", leave=False):
                self._pixels.update(_pixels(example))
                words.update(_telling(example))
        # a question that a benchmark asks about several pictures is made from a template, and tells nothing
        self._words = {question for question, count in words.items() if count == 1}

    def reasons(self, example: Example) -> list[str]:
        """ "duplicate": an earlier question has the same pictures and words. "in a benchmark": a picture, or
        a question of TELLING words that is asked there once, is one of a benchmark's. Raises BadPicture."""
        content = [_content(picture, example.uid) for picture in example.pictures]
        name = sha256(repr((content, _plain(example.asked))).encode()).digest()
        repeated = self._seen.setdefault(name, example.uid) != example.uid
        held = not self._words.isdisjoint(_telling(example))
        held = held or (bool(self._pixels) and not self._pixels.isdisjoint(_pixels(example)))
        return [reason for reason, holds in zip(KNOWN, (repeated, held)) if holds]


def _content(picture: Picture, uid: str) -> bytes:
    """A digest of a picture's file; of its pixels if it is drawn."""
    if isinstance(picture, Path) and picture.is_file():
        picture = picture.read_bytes()
    if isinstance(picture, bytes):
        return sha256(picture).digest()
    return _digest(picture, uid)


def _pixels(example: Example) -> set[bytes]:
    """A digest of each picture's pixels, whatever its file's format."""
    return {_digest(picture, example.uid) for picture in example.pictures}


def _digest(picture: Any, uid: str) -> bytes:
    image = open_picture(picture, name=f"example {short(uid)}")
    return sha256(repr(image.size).encode() + image.tobytes()).digest()


def _plain(text: str) -> str:
    """A text's words alone."""
    return " ".join(_WORDS.findall(text.casefold()))


def _telling(example: Example) -> set[str]:
    """The words of a question without its choices, if it has many."""
    words = _plain(example.wording or example.question)
    return {words} if len(words.split()) >= TELLING else set()


def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


def _numbered(text: str) -> Sequence[int]:
    """A number for each word of a text, the same for equal words."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(word, len(numbers)) for word in text.split()]
