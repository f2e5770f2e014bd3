"""Numbers in answers, read by hand: 3/2, 50 %, 1,000, 2 1/2, 2\\sqrt{2}, 140^\\circ, 3 × 10^5 → a value and a
unit.

The paper hands the model's text to a computer-algebra system. Here nothing is evaluated: a small grammar
reads one number in closed form, in time linear in the text and at most DEPTH brackets deep, and whatever it
cannot read is no number. It is strict where a policy could hide: exact numbers are not added or multiplied,
because "3-4" may be a range and "12*7" is work still to be done; 1+\\sqrt{2} and 3 × 10^5 can't be written
otherwise and may stand. Values are exact fractions wherever the text is exact; roots and π are floats.
"""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from data.answers.units import UNITS, unit_named

# characters of a number: the largest float has 309 digits
LONGEST = 320
# of brackets
DEPTH = 16
# relative: six significant digits, where no finite decimal is exact
TOLERANCE = 5e-6
# of a power; the floats end at 1,024
_BITS = 4096

_SIGNS = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},
    **str.maketrans("−–﹣∕⁄÷×·⋅∗º。", "---///****°."),
    ord("√"): "\\sqrt ",
    ord("π"): "\\pi ",
    0x2009: "\\,",
    0x202F: "\\,",
}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SPELLINGS = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        # 1{,}000 and 1\,000 are 1,000
        (r"(?<=[0-9])(?:\\[,!]|\{,\})(?=[0-9]{3}(?![0-9]))", ","),
        (r"\\[,;:! ]|(?<=.)~|\\(?:left|right|displaystyle)(?![A-Za-z])", " "),
        (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\*\*", "^"),
        (r"\^ ?\\circ(?![A-Za-z])|\^ ?\{ ?\\circ ?\}|\\degree(?![A-Za-z])", "°"),
        (r"\\([%$])", r"\1"),
    )
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
# the "x =" of x = 3
_NAME = re.compile(
    r"(?:m? ?\\angle ?)?(?:[A-Za-z]|[A-Z]{2,3}|\\(?:theta|alpha|beta|gamma|phi))(?:_\{?[A-Za-z0-9]\}?)? ?= ?"
)
_MONEY = re.compile(r"([+-]?) ?([$€£]) ?(?=[0-9.])")
_PLAIN = re.compile(r"[+-]?[0-9]{1,300}(?:\.[0-9]{1,15})?")
_TOKEN = re.compile(
    r"""[ ]?(?:
    (?P<number>(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)
    (?:[eE](?P<power>[+-]?[0-9]+)(?![0-9.]))?
  | (?P<frac>\\[dtc]?frac(?![A-Za-z])) | (?P<sqrt>(?:\\|(?<![A-Za-z]))sqrt(?![A-Za-z]))
  | (?P<pi>(?:\\|(?<![A-Za-z]))pi(?![A-Za-z]))
  | (?P<boxed>\\boxed(?![A-Za-z])) | (?P<vulgar>[¼-¾⅐-⅞]) | (?P<mark>[-+*/^(){}\[\]]))""",
    re.VERBOSE,
)


class Number(NamedTuple):
    """What an answer says: its value (exact if the text is) and its unit in the spelling of
    `data/answers/units.py`, "" for none."""

    value: Fraction | float
    unit: str


class Token(NamedTuple):
    """`kind` is number, frac, sqrt, pi, boxed, vulgar, end, or the mark itself; `exact` the value of a
    number or vulgar fraction."""

    kind: str
    text: str
    exact: Fraction | None = None


class _Unreadable(Exception):
    """The text is not one number."""


def parse(text: str) -> Number | None:
    """The one number that `text` says, or None. Never raises; NaN, 1/0 and what is beyond the floats
    (1e999) are no numbers."""
    if _PLAIN.fullmatch(text):
        return Number(Fraction(text), "")
    if len(text) > LONGEST:
        return None
    text = _normal(text)
    text = text[name.end() :] if (name := _NAME.match(text)) else text
    money = _MONEY.match(text)
    try:
        tokens, rest = _tokens(money[1] + text[money.end() :] if money else text)
        value, unit = _Reader(tokens).read(), unit_named(rest)
        if money:
            unit = money[2] if unit == "" else None
        # so written, it catches NaN too (infinity - infinity on the way)
        if unit is None or not abs(value) <= sys.float_info.max:
            return None
        return Number(value / 100, "") if unit == "%" else Number(value, unit)
    except (_Unreadable, ZeroDivisionError, OverflowError):
        return None


def same(a: Number, b: Number) -> bool:
    """Whether two numbers are equal. Symmetric.

    Exactly, as fractions; within TOLERANCE, relative, only where one of them has no finite decimal (1/3, √2,
    π). A unit may be left out on one side. Where both give one, 300 cm is 3 m, and 3 cm is neither 3 m nor 3
    kg.
    """
    x, y = Fraction(a.value), Fraction(b.value)
    if a.unit and b.unit:
        (kind, size), (other_kind, other_size) = UNITS[a.unit], UNITS[b.unit]
        if kind != other_kind:
            return False
        x, y = x * size, y * other_size
    if x == y or (_finite_decimal(a.value) and _finite_decimal(b.value)):
        return x == y
    return abs(x - y) <= Fraction(TOLERANCE) * max(abs(x), abs(y))


def _finite_decimal(value: Fraction | float) -> bool:
    """A float stands for a root or π; a fraction has finitely many decimals if its denominator divides a
    power of ten."""
    return isinstance(value, Fraction) and 10 ** value.denominator.bit_length() % value.denominator == 0


def _normal(text: str) -> str:
    """One spelling for each sign, single spaces, no delimiters of mathematics around, no full stop behind."""
    if not text.isascii():
        text = re.sub(
            "[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda run: f"^{{{run[0].translate(_RAISED)}}}", text.translate(_SIGNS)
        )
    text = " ".join(text.split()).removesuffix(".").strip()
    for start, end in _DELIMITERS:
        if text.startswith(start) and text.endswith(end) and len(text) > len(start + end):
            text = text[len(start) : -len(end)]
            break
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text)
    return " ".join(text.split()).removesuffix(".").strip()


def _tokens(text: str) -> tuple[list[Token], str]:
    """The tokens of a number from the start of `text`, and what stands behind them (a unit, or what makes
    it no number)."""
    tokens, at = [], 0
    while match := _TOKEN.match(text, at):
        kind, said = match.lastgroup, match[0].strip()
        if match["number"]:
            power = match["power"] or "0"
            # Fraction("1e999999999") would build it
            if len(power) > 5 or abs(int(power)) > 400:
                raise _Unreadable
            tokens.append(
                Token("number", said, Fraction(match["number"].replace(",", "")) * Fraction(10) ** int(power))
            )
        elif kind == "vulgar":
            above, _, below = unicodedata.normalize("NFKC", said).partition("⁄")
            tokens.append(Token("vulgar", said, Fraction(int(above), int(below))))
        else:
            tokens.append(Token(said if kind == "mark" else kind, said))
        at = match.end()
    return tokens, text[at:].strip()


class _Reader:
    """Recursive descent over the tokens:

    sum      [+-] ratio ([+-] ratio)*                    one of the two not exact: 1+√2
    ratio    product [/ power]                           3/2, 3π/4; 1/2/3 and 1/2π are ambiguous
    product  power ([*] power)*                          one of the two not exact, or the second a power of
    ten: 2√2, 3 × 10^5 power    atom [^ integer] atom     number | ½ | π | √ atom | \\frac{sum}{sum} | (sum) |
    \\boxed{sum}
    """

    def __init__(self, tokens: list[Token]):
        self.tokens, self.at, self.depth = [*tokens, Token("end", "")], 0, 0

    def read(self) -> Fraction | float:
        """The value of all tokens together."""
        value = self.mixed()
        if value is None:
            value = self.sum()
        self.need("end")
        return value

    def take(self, *kinds: str) -> Token | None:
        token = self.tokens[self.at]
        if token.kind not in kinds:
            return None
        self.at += 1
        return token

    def need(self, *kinds: str) -> Token:
        if token := self.take(*kinds):
            return token
        raise _Unreadable

    def mixed(self) -> Fraction | None:
        """2 1/2, 2½, 2\\frac{1}{2}: the only places where two numbers side by side are added. None where
        the tokens are nothing of the kind."""
        sign = -1 if self.tokens[0].kind == "-" else 1
        whole, *part = self.tokens[self.tokens[0].kind in ("+", "-") : -1] or self.tokens
        if not whole.text.isdigit():
            return None
        spelling = [token.kind for token in part]
        if spelling == ["vulgar"]:
            fraction = part[0].exact
        elif spelling in (["number", "/", "number"], ["frac", "{", "number", "}", "{", "number", "}"]):
            above, below = (token.text for token in part if token.kind == "number")
            if not (above.isdigit() and below.isdigit() and int(above) < int(below)):
                raise _Unreadable
            fraction = Fraction(int(above), int(below))
        else:
            return None
        self.at = len(self.tokens) - 1
        return sign * (whole.exact + fraction)

    def sum(self) -> Fraction | float:
        self.depth += 1
        if self.depth > DEPTH:
            raise _Unreadable
        sign = self.take("+", "-")
        value = self.ratio()
        value = -value if sign and sign.kind == "-" else value
        while sign := self.take("+", "-"):
            other = self.ratio()
            if isinstance(value, Fraction) and isinstance(other, Fraction):
                raise _Unreadable
            value = value + other if sign.kind == "+" else value - other
        self.depth -= 1
        return value

    def ratio(self) -> Fraction | float:
        value = self.product()
        return value / self.power() if self.take("/") else value

    def product(self) -> Fraction | float:
        value = self.power()
        while self.take("*") or self.tokens[self.at].kind in ("sqrt", "pi", "("):
            scientific = self.tokens[self.at].text == "10" and self.tokens[self.at + 1].kind == "^"
            other = self.power()
            if isinstance(value, Fraction) and isinstance(other, Fraction) and not scientific:
                raise _Unreadable
            value = value * other
        return value

    def power(self) -> Fraction | float:
        value = self.atom()
        if not self.take("^"):
            return value
        close = {"{": "}", "(": ")"}.get(opened.kind) if (opened := self.take("{", "(")) else None
        minus, digits = self.take("-"), self.need("number").text
        if close:
            self.need(close)
        if not digits.isdigit() or len(digits) > 4:
            raise _Unreadable
        exponent = -int(digits) if minus else int(digits)
        if (
            isinstance(value, Fraction)
            and abs(exponent) * max(value.numerator.bit_length(), value.denominator.bit_length()) > _BITS
        ):
            raise _Unreadable
        return value**exponent

    def atom(self) -> Fraction | float:
        token = self.need("number", "vulgar", "pi", "sqrt", "frac", "(", "boxed")
        if token.exact is not None:
            return token.exact
        if token.kind == "pi":
            return math.pi
        if token.kind == "(":
            return self.bracket(")")
        if token.kind == "sqrt":
            return self.root()
        if token.kind == "boxed":
            return self.group()
        # \frac32 is 3/2
        if short := self.take("number"):
            if len(short.text) != 2 or not short.text.isdigit():
                raise _Unreadable
            return Fraction(int(short.text[0]), int(short.text[1]))
        return self.group() / self.group()

    def group(self) -> Fraction | float:
        self.need("{")
        return self.bracket("}")

    def bracket(self, close: str) -> Fraction | float:
        value = self.sum()
        self.need(close)
        return value

    def root(self) -> Fraction | float:
        """√x or the cube root of x, exact where it is a fraction."""
        cubic = False
        if self.take("["):
            cubic = self.need("number").text == "3"
            self.need("]")
            if not cubic:
                raise _Unreadable
        if number := self.take("number"):
            value = number.exact
        else:
            value = self.bracket({"{": "}", "(": ")"}[self.need("{", "(").kind])
        if value < 0:
            raise _Unreadable
        if cubic or isinstance(value, float):
            return float(value) ** (1 / 3 if cubic else 1 / 2)
        above, below = math.isqrt(value.numerator), math.isqrt(value.denominator)
        return Fraction(above, below) if Fraction(above**2, below**2) == value else math.sqrt(value)
