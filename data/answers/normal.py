"""One spelling for what can be written in several ways, ahead of all reading of answers.

`normal` removes what does not change an answer: look-alike signs, invisible characters, markup, delimiters of
mathematics, a label ("The answer is"), quotes and brackets around the whole, a final full stop. Of LaTeX it
leaves braces, powers, fractions and roots. It never joins two parts: a space remains between them, so that
two answers stay two.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

import yaml

TABLES = yaml.safe_load(Path(__file__).with_name("spellings.yaml").read_text("utf-8"))
_SIGNS: dict[int, str | int | None] = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_SIGNS |= {ord(sign): plain for plain, signs in TABLES["signs"].items() for sign in signs}
for _codes in TABLES["invisible"]:
    _first, _last = (int(code, 16) for code in _codes.split())
    _SIGNS |= dict.fromkeys(range(_first, _last + 1))
_SIGNS |= str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")


def table(pairs: str) -> dict[str, str]:
    """`name=value name=value` as a dict."""
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs.split())}


COMMANDS = table(TABLES["commands"])
_FUNCTIONS = {
    "COMMAND": lambda found: COMMANDS.get(found[1], found[0]),
    "FRACTION": lambda found: "\\frac" + "".join(f"{{{part.strip('{} ')}}}" for part in found.groups()),
}
_SPELLINGS = tuple(
    (
        sign,
        re.compile(pattern.replace("STYLE", TABLES["style"]).replace("TAGS", TABLES["tags"])),
        _FUNCTIONS.get(plain, plain),
    )
    for sign, pattern, plain in TABLES["spellings"]
)
_PLAIN = re.compile(r"[A-Za-z0-9]*(?:[./][0-9]+)?")
_LABEL = re.compile("|".join(TABLES["labels"]), re.IGNORECASE | re.VERBOSE)
_STOP = re.compile("|".join(TABLES["ends"]), re.VERBOSE)
_PAIRS = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'", "<": ">"}
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
# how often a label, a full stop and a wrapper are removed
_NESTED = 12


@lru_cache(maxsize=4096)
def normal(text: str) -> str:
    """The normal form of an answer. Linear in the text."""
    return text if _PLAIN.fullmatch(text) else bare(spelled(text))


def spelled(text: str) -> str:
    """The text in one spelling of signs, markup and LaTeX; its lines, labels, quotes and brackets stay."""
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():
        # an answer that is an emoji stays one
        text = unicodedata.normalize("NFC", text)
        text = text.translate(_SIGNS).strip() or text
        # 45⁰ is meant as degrees
        text = re.sub("(?<=[0-9])⁰(?![⁰¹²³⁴⁵⁶⁷⁸⁹])", "°", text)
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda run: f"^{{{run[0].translate(_RAISED)}}}", text)
    for sign, pattern, plain in _SPELLINGS:
        if sign in text:
            text = pattern.sub(plain, text)
    # a single dollar is money, two delimit mathematics
    text = text.replace("$", " ") if text.count("$") % 2 == 0 else text
    return text.replace("\x02", "$")


def bare(text: str) -> str:
    """Without label, final full stop, and quotes or brackets around the whole."""
    for _ in range(_NESTED):
        before = " ".join(text.split())
        text = _STOP.sub("", before)
        label = _LABEL.match(text)
        if label and label.end() < len(text):
            text = text[label.end() :]
        elif _wrapped(text):
            text = text[1:-1]
        if text == before:
            break
    return text


def _wrapped(text: str) -> bool:
    """Whether one pair of quotes or brackets is around all of it. (3, 4), [3, 4] and {3, 4} keep theirs."""
    close = _PAIRS.get(text[:1])
    inside = text[1:-1]
    if not close or not inside.strip() or text[-1] != close:
        return False
    if close in "\"'":
        return close not in re.sub(r"\b'\b", "", inside).strip(close)
    depth = 0
    for sign in inside:
        depth += (sign == text[0]) - (sign == close)
        if depth < 0:
            return False
    # (100,200) may be two numbers, (1,000 m) is one; the comma of (So, B) separates nothing
    inside = inside[label.end() :] if (label := _LABEL.match(inside)) else inside
    return depth == 0 and len(split_list(inside, brackets=inside.replace(",", "").isdigit())) == 1


def split_list(text: str, brackets: bool) -> list[str]:
    """The parts between commas and semicolons outside of brackets.

    1,000 is one number where the other separators have a space behind them: (1,000, 2). brackets: around the
    text; then alone it is two parts, as in (100,200), unless the second is no number of its own: (1,000).
    """
    depth = 0
    cuts = []
    for at, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign in ",;" and depth == 0:
            cuts.append(at)
    others = [at for at in cuts if not _THOUSANDS.match(text, at)]
    alone = brackets and any(text[at + 1] != "0" for at in cuts if at not in others)
    if (others or not alone) and all(text[at] == ";" or text[at + 1 : at + 2] == " " for at in others):
        cuts = others
    return [text[start + 1 : end] for start, end in zip([-1, *cuts], [*cuts, len(text)])]
