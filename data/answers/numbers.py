"""Numbers in answers, read by hand: 3/2, 50 %, 1,000, 2 1/2, 2\\sqrt{2}, x = 3 × 10^5 m/s -> value and unit.

A small grammar reads one number in closed form, in linear time and at most DEPTH brackets deep. It does not
add or multiply exact numbers: "3-4" may be a range, "12*7" is work still to be done. 1+\\sqrt{2} and 3 × 10^5
have no other spelling. Values are fractions wherever the text is exact; roots and π are floats.
"""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from data.answers.normal import TABLES, normal
from data.answers.units import Unit, unit_named

# characters of a number (the largest float has 309 digits); brackets within brackets; bits of a power
LONGEST = 320
DEPTH = 16
_BITS = 4096
# relative: six significant digits, where no finite decimal is exact
TOLERANCE = 5e-6
# a decimal with this many digits was a float: 0.30000000000000004 is 0.3, 2.8284271247461903 a root
_FLOAT_DIGITS = 15

_WORDS = set(TABLES["words"].split())
_NAME = re.compile(TABLES["name"], re.VERBOSE)
_EQUALS = re.compile(r" ?([=≈]) ?| (?:is|equals) |等于|[为是]")
# read without the grammar, because it is frequent
_FRACTION = re.compile(r"([+-]?)(?:\\frac\{([0-9]{1,15})\}\{([0-9]{1,15})\}|([0-9]{1,15})/([0-9]{1,15}))")
# [1,000], and 5 (cm)
_GROUPS = re.compile(r"^[\[({]([0-9]{1,3}(?:,[0-9]{3})+)[)\]}]$")
_IN_BRACKETS = re.compile(r"(?<=[0-9}]) ?[(\[]([^()\[\]0-9+*-]+(?:\^-?[0-9]|[23])?)[)\]]$")
# "3" cm, [3] cm
_PART = re.compile(r'"([^"]+)"|(?<!sqrt)(?<!sqrt )\[([^\[\],]+)\]')
_MONEY = re.compile(r"([+-]?) ?(?:US)?([$€£¥]) ?(?=[0-9.])")
_PLAIN = re.compile(r"[+-]?[0-9]{1,300}(?:\.[0-9]{1,11})?")
_TOKEN = re.compile(
    r"""[ ]?(?:
    (?P<number>(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)
    (?:[eE](?P<power>[+-]?[0-9]+)(?![0-9.]))?
  | (?P<frac>\\frac(?![A-Za-z])) | (?P<over>\\over(?![A-Za-z]))
  | (?P<sqrt>(?:\\|(?<![A-Za-z]))sqrt(?![A-Za-z])) | (?P<pi>π|(?<![A-Za-z])pi(?![A-Za-z]))
  | (?P<vulgar>[¼-¾⅐-⅞]) | (?P<mark>[-+*/^()}\[\]]|\{(?![ ]?(?!pi|sqrt)[A-Za-z°])))""",
    re.VERBOSE,
)
# what multiplies a number: letters right behind it (5 K is five kelvin), or words
_FACTORS = TABLES["factors"]
_LONG = "|".join(name for name in _FACTORS if len(name) > 2)
_FACTOR = re.compile(rf"(?:[kKMB]|[bm]n)(?![^\W_]|[/^])| ?[百千万亿](?![米克瓦])| ?(?:{_LONG})\b")
# capital letters right behind a number that are as likely part of a name: seat 5A, floor 3F, 2D
_NAMES = set("ABCDEFGHKMT")


class Number(NamedTuple):
    """A value (exact if the text is) and its unit. named: the unit may be part of a name instead (5A)."""

    value: Fraction | float
    unit: Unit | None = None
    named: bool = False


class Token(NamedTuple):
    """kind: number, frac, sqrt, pi, over, vulgar, end, or the mark itself. exact: a number's value."""

    kind: str
    text: str
    exact: Fraction | float = 0


class _Unreadable(Exception):
    """The text is not one number."""


def parse(text: str) -> Number | None:
    """The one number that `text` says, or None. NaN, 1/0 and what is beyond the floats are no numbers."""
    if _PLAIN.fullmatch(text):
        return Number(Fraction(text))
    return parse_normal(normal(text)) if len(text) <= LONGEST else None


@lru_cache(maxsize=4096)
def parse_normal(text: str) -> Number | None:
    """The number in a text in normal form: 3 cm, x = 3 cm, and 3/2 = 1.5, whose sides are equal."""
    if len(text) > LONGEST:
        return None
    pieces = _EQUALS.split(text.replace("×", "*"), maxsplit=4)
    if len(pieces) == 1:
        return _number(pieces[0], working=False)
    # "is" has its name before it: 3 is bad
    sides = list(zip(["=", *pieces[1::2]], pieces[::2]))
    sides = [(sign, side) for sign, side in sides if not (sign and _is_name(side))]
    # ≈ 3
    sides = sides[1:] if len(sides) == 2 and sides[0][1] == "" and sides[1][0] == "≈" else sides
    found = [_number(side, working=len(sides) > 1) for _, side in sides]
    numbers = [number for number in found if number]
    if not numbers or len(numbers) < len(found):
        return None
    for (sign, side), other in zip(sides, numbers):
        rounded = sign == "≈" and _is_rounded(numbers[0].value, other.value, side)
        if not (rounded or same(numbers[0], other)):
            return None
    return next((number for number in numbers if number.unit), numbers[0])


def _is_name(side: str) -> bool:
    name = _NAME.fullmatch(side)
    return bool(name and (name["sign"] or (name["name"] or "").replace(" ", "").lower() not in _WORDS))


def _is_rounded(value: Fraction | float, shown: Fraction | float, text: str) -> bool:
    """Whether a number was rounded to the decimals that are shown: √8 ≈ 2.83."""
    places = len(text.partition(".")[2]) if re.fullmatch(r"-?[0-9]+\.?[0-9]*", text) else LONGEST
    return abs(value - shown) <= Fraction(1, 2 * 10**places)


def _number(text: str, working: bool) -> Number | None:
    if found := _FRACTION.fullmatch(text):
        below = int(found[3] or found[5])
        return Number(Fraction(int(found[1] + (found[2] or found[4])), below)) if below else None
    money = _MONEY.match(text)
    text = money[1] + text[money.end() :] if money else text
    try:
        text = _IN_BRACKETS.sub(r" \1", _GROUPS.sub(r"\1", text)) if text[-1:] in ")]}" else text
        text = _PART.sub(r" \1\2 ", text).strip() if '"' in text or "[" in text else text
        tokens, rest = _tokens(text)
        alone = len(tokens) == 1 and tokens[0].kind == "number"
        value = tokens[0].exact if alone else _Reader(tokens, working).value()
        factor = _FACTOR.match(rest)
        letter = bool(factor and factor[0][0] in "kKMB") and not money
        named = letter or rest in _NAMES
        if factor:
            value *= 10 ** _FACTORS[factor[0].strip()]
            rest = rest[factor.end() :]
        unit = unit_named(rest.strip()) if rest.strip() else None
        # so written, the last test is true of NaN, too
        if (rest.strip() and (unit is None or money)) or not abs(value) <= sys.float_info.max:
            return None
        return Number(value, unit_named(money[2]) if money else unit, named)
    except (_Unreadable, ZeroDivisionError, OverflowError):
        return None


def same(a: Number, b: Number) -> bool:
    """Whether two numbers are equal. Symmetric.

    Exactly, as fractions; within TOLERANCE, relative, only where one of them has no finite decimal (1/3, √2,
    π). A unit may be left out on one side, if it is no name (5A). Where both give one, 300 cm is 3 m, and
    3 cm is neither 3 m nor 3 kg. 50% is 50 with its unit left out, and it is 1/2.
    """
    if a.unit and b.unit:
        return a.unit.of == b.unit.of and _equal(_in_base_units(a), _in_base_units(b))
    if (a.unit and a.named) or (b.unit and b.named):
        return False
    unit = a.unit or b.unit
    if unit and not unit.of and _equal(_in_base_units(a), _in_base_units(b)):
        return True
    return _equal(a.value, b.value)


def _in_base_units(number: Number) -> Fraction | float:
    return number.value * (number.unit.size if number.unit else 1)


def _equal(a: Fraction | float, b: Fraction | float) -> bool:
    if a == b or (_finite_decimal(a) and _finite_decimal(b)):
        return a == b
    x, y = Fraction(a), Fraction(b)
    return abs(x - y) <= Fraction(TOLERANCE) * max(abs(x), abs(y))


def _finite_decimal(value: Fraction | float) -> bool:
    """Whether it is a fraction (no root, no π) whose denominator divides a power of ten."""
    if not isinstance(value, Fraction):
        return False
    below = value.denominator
    return below == 1 or 10 ** below.bit_length() % below == 0


def _tokens(text: str) -> tuple[list[Token], str]:
    """The tokens of a number from the start of `text`, and the text behind them."""
    tokens: list[Token] = []
    at = 0
    while match := _TOKEN.match(text, at):
        kind, said = match.lastgroup or "", match[0].strip()
        if match["number"]:
            tokens.append(Token("number", said, _decimal(match["number"], match["power"] or "0")))
        elif kind == "vulgar":
            above, _, below = unicodedata.normalize("NFKC", said).partition("⁄")
            tokens.append(Token("vulgar", said, Fraction(int(above), int(below))))
        else:
            tokens.append(Token(said if kind == "mark" else kind, said))
        at = match.end()
    return tokens, text[at:]


def _decimal(digits: str, power: str) -> Fraction | float:
    # Fraction("1e999999999") would build it
    if len(power) > 5 or abs(int(power)) > 400:
        raise _Unreadable
    whole, _, part = digits.replace(",", "").partition(".")
    value = Fraction(int(whole + part or "0"), 10 ** len(part))
    value = value * Fraction(10) ** int(power) if power != "0" else value
    if not part or len((whole + part).strip("0")) < _FLOAT_DIGITS:
        return value
    rounded = f"{float(value):.12g}"
    return Fraction(rounded) if len(rounded.partition("e")[0].strip("-0.")) <= 10 else float(value)


class _Reader:
    """Recursive descent over the tokens. working: exact numbers may be added and multiplied.

    all      mixed | sum [over sum]
    mixed    number (frac | ½ | number / number)         2 1/2, 2½: the parts are added
    sum      [+-] ratio ([+-] ratio)*                    one of the two not exact: 1+√2
    ratio    product [/ power]                           3/2, 3π/4; 1/2/3 and 1/2π are ambiguous
    product  power ([*] power)*                          one of the two not exact, or times a power of ten
    power    atom [^ atom]
    atom     number | ½ | π | √ [[n]] atom | frac argument argument | (sum) | {all}
    """

    def __init__(self, tokens: list[Token], working: bool):
        self.tokens = [*tokens, Token("end", "")]
        self.working = working
        self.at = self.depth = 0

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

    def value(self) -> Fraction | float:
        value = self.all()
        self.need("end")
        return value

    def all(self) -> Fraction | float:
        start = self.at
        value = self.mixed()
        if value is None:
            self.at = start
            value = self.sum()
        return value / self.sum() if self.take("over") else value

    def mixed(self) -> Fraction | None:
        """None where the tokens are nothing of the kind."""
        sign = self.take("+", "-")
        whole = self.take("number")
        kinds = [token.kind for token in self.tokens[self.at : self.at + 3]]
        fraction = (
            kinds[0] in ("vulgar", "frac") or kinds[:2] == ["{", "frac"] or kinds == ["number", "/", "number"]
        )
        if not whole or not whole.text.isdigit() or not fraction:
            return None
        part = self.ratio()
        if not (isinstance(part, Fraction) and isinstance(whole.exact, Fraction) and 0 < part < 1):
            raise _Unreadable
        return (whole.exact + part) * (-1 if sign and sign.kind == "-" else 1)

    def sum(self) -> Fraction | float:
        self.depth += 1
        if self.depth > DEPTH:
            raise _Unreadable
        sign = self.take("+", "-")
        value = self.ratio()
        value = -value if sign and sign.kind == "-" else value
        while sign := self.take("+", "-"):
            other = self.ratio()
            self.may_join(value, other)
            value = value + other if sign.kind == "+" else value - other
        self.depth -= 1
        return value

    def may_join(self, a: Fraction | float, b: Fraction | float) -> None:
        if isinstance(a, Fraction) and isinstance(b, Fraction) and not self.working:
            raise _Unreadable

    def ratio(self) -> Fraction | float:
        value = self.product()
        return value / self.power() if self.take("/") else value

    def product(self) -> Fraction | float:
        value = self.power()
        while self.take("*") or self.tokens[self.at].kind in ("sqrt", "pi", "(", "{"):
            scientific = self.tokens[self.at].text == "10" and self.tokens[self.at + 1].kind == "^"
            other = self.power()
            if not scientific:
                self.may_join(value, other)
            value = value * other
        return value

    def power(self) -> Fraction | float:
        value = self.atom()
        if not self.take("^"):
            return value
        sign = self.take("-")
        exponent = self.atom() * (-1 if sign else 1)
        if not isinstance(exponent, Fraction) or exponent.denominator > 9:
            raise _Unreadable
        if isinstance(value, Fraction):
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
            if abs(exponent.numerator) * bits > _BITS:
                raise _Unreadable
        return _root(value**exponent.numerator, exponent.denominator)

    def atom(self) -> Fraction | float:
        token = self.need("number", "vulgar", "pi", "sqrt", "frac", "(", "{")
        if token.kind in ("(", "{"):
            value = self.sum() if token.kind == "(" else self.all()
            self.need(")" if token.kind == "(" else "}")
            return value
        if token.kind == "pi":
            return math.pi
        if token.kind == "frac":
            above = self.argument()
            return above / self.argument()
        if token.kind == "sqrt":
            index = self.need("number").text if self.take("[") else ""
            if index:
                self.need("]")
            if index not in ("", *"23456789"):
                raise _Unreadable
            return _root(self.atom(), int(index or 2))
        return token.exact

    def argument(self) -> Fraction | float:
        """Of \\frac: in braces, or the next digit, as in \\frac12."""
        token = self.tokens[self.at]
        if token.kind == "number" and token.text.isdigit() and len(token.text) > 1:
            self.tokens[self.at] = Token("number", token.text[1:], Fraction(token.text[1:]))
            return Fraction(token.text[0])
        return self.atom()


def _root(value: Fraction | float, index: int) -> Fraction | float:
    """The root, exact where it is a fraction; odd ones of negative numbers, too."""
    if index == 1:
        return value
    if value < 0 and index % 2 == 0:
        raise _Unreadable
    if value < 0:
        return -_root(-value, index)
    if isinstance(value, Fraction):
        parts = (value.numerator, value.denominator)
        above, below = (math.isqrt(part) if index == 2 else round(part ** (1 / index)) for part in parts)
        if (above**index, below**index) == parts:
            return Fraction(above, below)
    return float(value) ** (1 / index)
