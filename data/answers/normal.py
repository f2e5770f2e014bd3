"""One spelling for what can be written in several ways, ahead of all reading of answers.

`normal` removes what does not change an answer: look-alike signs, invisible characters, markup, delimiters of
mathematics, a label ("The answer is"), quotes and brackets around the whole, a final full stop. Of LaTeX it
leaves braces, powers, fractions and roots. It never joins two parts: a space remains between them, so that
two answers stay two.
"""

from __future__ import annotations

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
_STYLE = (
    r"\\(?:text|textbf|textit|texttt|textrm|textsf|textnormal|emph|underline|mathrm|mathbf|mathit|mathsf|"
    r"mathtt|num|bm|boldsymbol|operatorname|mbox|hbox|rm|bf|boxed|fbox|framebox|ensuremath)(?![A-Za-z])"
)
_TAGS = "[bipu]|s|em|strong|code|span|div|br|hr|mark|tt|center|font|h[1-6]|li|ul|ol"
# bold and italic; but ** between numbers is a power
_BOLD = (
    r"^\*{1,3}|\*{1,3}$|(?<![\w*)}\]])\*{1,3}(?=[^\s*])|"
    r"(?<=[^\s*])\*{1,3}(?=[\s.,:;!?)}\]\"'`_|$<]|\\[)\]])"
)
_in_braces = lambda found: "\\frac" + "".join(f"{{{part.strip('{}')}}}" for part in found.groups())
# a text without the first string is not searched for the pattern
_SPELLINGS = tuple(
    (sign, re.compile(pattern), plain)
    for sign, pattern, plain in (
        ("*", _BOLD, " "),
        # 1{,}000 and 1\,000 are 1,000
        ("", r"(?<=[0-9])(?:\\[,!]|\{,\})(?=[0-9]{3}(?![0-9]))", ","),
        ("<", rf"</?(?:{_TAGS})(?: [^<>]*)?/?>", " "),
        ("<", r"<su[bp]>([^<>]*)</su[bp]>", r"^{\1}"),
        ("\\", r"\\\$|\\text\{\$\}", "\x02"),
        ("\\", r"\\([%#&_{}])", r"\1"),
        ("\\", r"\\[()\[\],;:! ]", " "),
        ("~", r"~~|(?<=.)~(?=\S)", " "),
        ("\\", r"\\([A-Za-z]+)", lambda found: COMMANDS.get(found[1], found[0])),
        ("^", r"\^ ?(?:°|\{ ?° ?\})|(?<=[0-9}]) ?\^ ?(?:o(?![a-z])|\{ ?o ?\})", "°"),
        # a style's name goes, and its braces if they hold no others; twice, for a style within one
        ("\\", rf"{_STYLE} ?\{{([^{{}}]*)\}}", r" \1 "),
        ("\\", rf"{_STYLE} ?\{{([^{{}}]*)\}}", r" \1 "),
        ("\\", _STYLE, ""),
        ("_", r"(?<!\w)(_{1,2})([^_]+)\1(?!\w)", r" \2 "),
        ("`", r"(?<=\w)`(?=\w)", "'"),
        ("`", "`+", " "),
        # heading, quotation, list; - 3 is a number
        ("", r"^(?:#{1,6}|[>•]|-(?= \(?[A-Za-z])) ", ""),
        ("**", r"\*\*", "^"),
        ("=", "<=", "≤"),
        ("=", ">=", "≥"),
        ("=", "!=", "≠"),
        ("10", r"(?<=[0-9]) ?[xX] ?(?=10 ?\^)", "×"),
        # one form of powers, fractions and roots of single signs
        ("^{", r"\^\{ ?(\w) ?\}(?!\w)", r"^\1"),
        ("\\frac", r"\\frac ?(\w|\{[^{}]*\}) ?(\w|\{[^{}]*\})(?!\w)", _in_braces),
        ("\\sqrt", r"\\sqrt(?: ?\{ ?(\w+) ?\}(?! ?\w)|(?=[0-9]))", r"\\sqrt \1"),
    )
)
_PLAIN = re.compile(r"[A-Za-z0-9]*(?:[./][0-9]+)?")
_LABEL = re.compile(
    r"(?:(?:so|thus|hence|therefore|then),? )?(?:(?:the|my|our) )?(?:(?:final|correct|right|best) ){0,2}"
    r"(?:answer|ans|option|choice|result|solution)(?: (?:is|would be|should be)(?: option| choice)?)?"
    r"(?: ?[:=] ?|(?<=is) |(?<=be) |(?<=option) |(?<=choice) |(?<=answer) (?=\(?[A-Za-z0-9]\)?[.:)]?$))"
    r"|∴ ?|(?:因此|所以|故)?(?:正确|最终|最后)?的?(?:答案|选项|结果)应?[是为选]? ?:? ?|"
    r"[应故]?选 ?(?=\(?[A-Z]\)?[.]?$)",
    re.IGNORECASE,
)
# 3! is six, and what ends in dots goes on
_STOP = re.compile(r"(?<=[^.,;:!]) ?(?:[.,;:]|(?<![0-9])!)$")
_PAIRS = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'"}
# how often a label, a full stop and a wrapper are removed
_NESTED = 12


@lru_cache(maxsize=4096)
def normal(text: str) -> str:
    """The normal form of an answer. Linear in the text."""
    if _PLAIN.fullmatch(text):
        return text
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_SIGNS)
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda run: f"^{{{run[0].translate(_RAISED)}}}", text)
    for sign, pattern, plain in _SPELLINGS:
        if sign in text:
            text = pattern.sub(plain, text)
    # a single dollar is money, two delimit mathematics
    text = text.replace("$", " ") if text.count("$") % 2 == 0 else text
    return bare(text.replace("\x02", "$"))


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
    # 1,000 is one number
    if re.search(r"[,;](?![0-9]{3}(?![0-9]))", inside):
        return False
    depth = 0
    for sign in inside:
        depth += (sign == text[0]) - (sign == close)
        if depth < 0:
            return False
    return depth == 0
