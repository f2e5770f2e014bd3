"""The units an answer may carry, as a grammar: prefix x symbol or word, powers, products and quotients.

Read are 3 cm, 12 sq. units, 9.8 m/s^2, 60 miles per hour, 25 cm2, 5 KG, 8平方厘米. The tables define units in
the grammar's own words. A word that is not in them is no unit, and the text then no number ("3 apples").
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from data.answers.normal import TABLES, table


class Unit(NamedTuple):
    """`size` in base units of what is measured, `of`: m^2 is (("m", 2),), per cent ()."""

    size: Fraction
    of: tuple[tuple[str, int], ...]


PREFIXES, PREFIX_WORDS = TABLES["prefixes"], TABLES["prefix_words"]
BASE, PREFIXABLE = TABLES["base"].split(), set(TABLES["prefixable"].split())
DEFINED, POWERS = TABLES["defined"], TABLES["powers"]
WORDS, CHINESE = table(TABLES["unit_words"]), table(TABLES["chinese"])
# characters of a unit
LONGEST = 60
_CHINESE = re.compile("|".join(sorted(CHINESE, key=len, reverse=True)))
_JOINED = re.compile(
    r"\b(per(?= ?cent)|nautical|n|us|degree|year)s?[ -]+"
    r"(cents?|miles?|dollars?|celsius|fahrenheit|centigrade|[cf]|old)\b",
    re.IGNORECASE,
)
_TERM = re.compile(
    r" ?(?P<sign>[/*]|(?i:per)\b)? ?(?:(?P<before>(?i:square|sq|cubic|cu)) ?(?=[^\W\d_]))?"
    r"(?P<word>° ?[CF](?![a-z])|[^\W\d_]+|[°$€£¥%¢])"
    r"(?: ?\^ ?(?P<power>-?[1-9])| ?(?P<digit>[23])(?![0-9])| (?P<after>(?i:squared|cubed|sq))\b)?"
)


@lru_cache(maxsize=4096)
def unit_named(text: str) -> Unit | None:
    """The unit that `text` names, in normal form (`data/answers/normal.py`); None if it names none.

    Terms stand side by side or with "*" between; all that follows "/" or "per" divides.
    """
    text = _CHINESE.sub(
        lambda found: f" {CHINESE[found[0]]} ", re.sub(r"[{}().]|(?<=[a-z])-(?=[a-z])", " ", text)
    )
    text = " ".join(_JOINED.sub(lambda found: (found[1] + found[2]).lower(), text).split())
    if not text or len(text) > LONGEST:
        return None
    terms: list[re.Match[str]] = []
    at = 0
    while at < len(text) and (term := _TERM.match(text, at)):
        terms.append(term)
        at = term.end()
    units = [unit for term in terms if (unit := named(term["word"]))]
    side_by_side = [term["word"] for term in terms if not term["sign"]]
    repeated = len(set(side_by_side)) < len(side_by_side)
    if at < len(text) or len(units) < len(terms) or terms[0]["sign"] or repeated:
        return None
    # per cent has no second unit beside it
    if len(units) > 1 and not all(unit.of for unit in units):
        return None
    size = Fraction(1)
    powers = Counter[str]()
    sign = 1
    for term, unit in zip(terms, units):
        sign = -1 if term["sign"] not in (None, "*") else sign
        power = POWERS.get((term["before"] or term["after"] or "").lower(), 1)
        power *= sign * int(term["power"] or term["digit"] or 1)
        size *= unit.size**power
        powers.update({name: times * power for name, times in unit.of})
    return Unit(size, tuple(sorted((name, times) for name, times in powers.items() if times)))


@lru_cache(maxsize=4096)
def named(word: str) -> Unit | None:
    """One word or symbol: as it is spelt, else in small letters, else without the ending of a plural."""
    word = word.replace(" ", "")
    small = word.lower()
    # one letter has a meaning in its own case only
    others = (small, small.removesuffix("s"), small.removesuffix("es")) if len(word) > 1 else ()
    for form in (word, *others):
        name = _SYMBOLS.get(form) or WORDS.get(form) or (len(word) > 1 and _FOLDED.get(form))
        if name:
            return _defined(name)
    return None


@lru_cache(maxsize=1024)
def _defined(name: str) -> Unit:
    """A name of the tables, after a power of ten: "-2 m"."""
    prefix, _, base = name.rpartition(" ")
    scale = Fraction(10) ** int(prefix or 0)
    if base in BASE:
        return Unit(scale, ((base, 1),)) if base != "%" else Unit(Fraction(1, 100), ())
    number, _, rest = DEFINED[base].rpartition(" ")
    unit = unit_named(rest)
    assert unit, name
    return Unit(scale * Fraction(number or 1) * unit.size, unit.of)


# every spelling of a symbol -> power of ten and name. Mm, ML and MG are mm, mL and mg; pm is afternoon
_UNUSED = {"M": "mgsLl", "p": "m"}
_SYMBOLS = {name: name for name in [*BASE, *DEFINED]}
for _mark, _tens in PREFIXES.items():
    for _name in sorted(PREFIXABLE.difference(_UNUSED.get(_mark, ""))):
        _SYMBOLS.setdefault(_mark + _name, f"{_tens} {_name}")
for _word, _name in list(WORDS.items()):
    if _name in PREFIXABLE:
        WORDS |= {mark + _word: f"{tens} {_name}" for mark, tens in PREFIX_WORDS.items()}
# in small letters; of two symbols the first above
_FOLDED: dict[str, str] = {}
for _symbol, _name in _SYMBOLS.items():
    _FOLDED.setdefault(_symbol.lower(), _name)
