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

from data.answers.normal import table


class Unit(NamedTuple):
    """`size` in base units of what is measured, `of`: m^2 is (("m", 2),), per cent ()."""

    size: Fraction
    of: tuple[tuple[str, int], ...]


PREFIXES = {"k": 3, "c": -2, "m": -3, "d": -1, "μ": -6, "u": -6, "n": -9, "M": 6, "G": 9, "h": 2, "T": 12}
PREFIX_WORDS = dict(
    kilo=3, centi=-2, milli=-3, deci=-1, micro=-6, nano=-9, mega=6, giga=9, hecto=2, tera=12, pico=-12, deca=1
)
# pm and am are times of the day, so the prefixes pico and atto have no symbol
BASE = "m g s A K mol cd ° rad °C °F $ € £ ¥ unit month byte pixel %".split()
PREFIXABLE = set("m g s A K mol cd N J W V C F Ω T H L l Hz Pa Wb eV cal bar Wh Nm byte B t".split())
DEFINED = {
    "N": "kg*m/s^2", "J": "N*m", "W": "J/s", "Pa": "N/m^2", "C": "A*s", "V": "W/A", "Ω": "V/A", "F": "C/V",
    "Wb": "V*s", "T": "Wb/m^2", "H": "Wb/A", "Hz": "s^-1", "L": "dm^3", "l": "L", "Nm": "N*m", "Wh": "W*h",
    "t": "1000 kg", "lb": "453.59237 g", "oz": "28.349523125 g", "eV": "1.602176634e-19 J", "cal": "4.184 J",
    "bar": "100000 Pa", "atm": "101325 Pa", "in": "0.0254 m", "ft": "12 in", "yd": "3 ft", "mi": "1760 yd",
    "nmi": "1852 m", "cc": "cm^3", "ha": "10000 m^2", "acre": "43560 ft^2", "min": "60 s", "h": "60 min",
    "day": "24 h", "week": "7 day", "year": "12 month", "mph": "mi/h", "kph": "km/h", "mps": "m/s",
    "fps": "ft/s", "knot": "nmi/h", "cent": "0.01 $", "B": "byte", "gal": "231 in^3",
    "pint": "0.125 gal", "quart": "0.25 gal", "rpm": "min^-1",
}  # fmt: skip
WORDS = table("""
    metre=m meter=m gram=g gramme=g second=s sec=s minute=min hour=h hr=h d=day wk=week yr=year ampere=A
    amp=A kelvin=K mole=mol litre=L liter=L newton=N joule=J watt=W volt=V ohm=Ω hertz=Hz pascal=Pa
    coulomb=C farad=F tesla=T henry=H calorie=cal gallon=gal byte=byte inch=in foot=ft feet=ft yard=yd
    mile=mi nauticalmile=nmi pound=lb ounce=oz tonne=t ton=t hectare=ha degree=° deg=° degs=° radian=rad
    celsius=°C degreecelsius=°C degreec=°C centigrade=°C fahrenheit=°F degreefahrenheit=°F degreef=°F
    dollar=$ usd=$ usdollar=$ euro=€ eur=€ gbp=£ yuan=¥ rmb=¥ cny=¥ yen=¥ jpy=¥ ¢=cent penny=cent
    pennies=cent percent=% pct=% kmh=kph kmph=kph kn=knot kt=knot px=pixel watthour=Wh newtonmetre=Nm
    newtonmeter=Nm
""")
CHINESE = table("""
    摄氏度=°C 平方=sq 立方=cubic 每=/ 海里=nmi 公里=km 千米=km 厘米=cm 毫米=mm 分米=dm 微米=μm 纳米=nm
    公斤=kg 千克=kg 毫克=mg 毫升=mL 小时=h 分钟=min 毫秒=ms 英里=mi 英尺=ft 英寸=in 公顷=ha 米=m 克=g 吨=t
    升=L 秒=s 时=h 分=min 天=day 日=day 周=week 月=month 年=year 度=° 元=¥ 个=unit 瓦=W 伏=V 安=A
    牛=N 焦=J 欧=Ω
""")
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
# characters of a unit
LONGEST = 60
_CHINESE = re.compile("|".join(sorted(CHINESE, key=len, reverse=True)))
_JOINED = re.compile(
    r"\b(per(?= ?cent)|nautical|us|newton|watt|degree)s?[ -]+"
    r"(cents?|miles?|dollars?|met(?:er|re)s?|hours?|celsius|fahrenheit|centigrade|[cf])\b",
    re.IGNORECASE,
)
_TERM = re.compile(
    r" ?(?P<sign>[/*]|(?i:per)\b)? ?(?:(?P<before>(?i:square|sq|cubic|cu)) ?(?=[^\W\d_]))?"
    r"(?P<word>° ?[CF](?![a-z])|[^\W\d_]+|[°$€£¥%¢])"
    r"(?: ?\^ ?(?P<power>-?[1-9])| ?(?P<digit>[23])(?![0-9])| (?P<after>(?i:squared|cubed))\b)?"
)


@lru_cache(maxsize=4096)
def unit_named(text: str) -> Unit | None:
    """The unit that `text` names, in normal form (`data/answers/normal.py`); None if it names none.

    Terms stand side by side or with "*" between; all that follows "/" or "per" divides.
    """
    text = _CHINESE.sub(lambda found: f" {CHINESE[found[0]]} ", re.sub(r"[{}().]", " ", text))
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
    if (
        at < len(text)
        or len(units) < len(terms)
        or terms[0]["sign"]
        or len(set(side_by_side)) < len(side_by_side)
    ):
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
    for form in (
        (word, small, small.removesuffix("s"), small.removesuffix("es")) if len(word) > 1 else (word,)
    ):
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


# every spelling of a symbol -> power of ten and name. Megametres do not occur: Mm, ML, MG are mm, mL and mg.
_SYMBOLS = {name: name for name in [*BASE, *DEFINED]}
for _mark, _tens in PREFIXES.items():
    for _name in sorted(PREFIXABLE.difference("mgsLl" if _mark == "M" else "")):
        _SYMBOLS.setdefault(_mark + _name, f"{_tens} {_name}")
for _word, _name in list(WORDS.items()):
    if _name in PREFIXABLE:
        WORDS |= {mark + _word: f"{tens} {_name}" for mark, tens in PREFIX_WORDS.items()}
# in small letters; of two symbols the first above
_FOLDED: dict[str, str] = {}
for _symbol, _name in _SYMBOLS.items():
    _FOLDED.setdefault(_symbol.lower(), _name)
