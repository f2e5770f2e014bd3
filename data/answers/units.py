"""The units an answer may carry: `3 cm`, `140°`, `5 m/s`, `$4`, `12 square units`. A table, so that what
is not in it is no unit ("3 or 4", "3x")."""

from __future__ import annotations

import re
from fractions import Fraction

_LENGTHS = {
    "m": Fraction(1),
    "mm": Fraction(1, 1000),
    "cm": Fraction(1, 100),
    "dm": Fraction(1, 10),
    "km": Fraction(1000),
    "in": Fraction(254, 10000),
    "ft": Fraction(3048, 10000),
    "yd": Fraction(9144, 10000),
    "mi": Fraction(1609344, 1000),
}
_KINDS = {
    "length": _LENGTHS,
    "area": {f"{name}^2": size**2 for name, size in _LENGTHS.items()},
    "volume": {f"{name}^3": size**3 for name, size in _LENGTHS.items()}
    | {"L": Fraction(1, 1000), "mL": Fraction(1, 10**6)},
    "mass": {"g": Fraction(1), "mg": Fraction(1, 1000), "kg": Fraction(1000), "t": Fraction(10**6)},
    "time": {
        "s": Fraction(1),
        "ms": Fraction(1, 1000),
        "min": Fraction(60),
        "h": Fraction(3600),
        "days": Fraction(86400),
    },
    "speed": {"m/s": Fraction(1), "km/h": Fraction(5, 18)},
    "dollars": {"$": Fraction(1), "cents": Fraction(1, 100)},
    **{
        name: {name: Fraction(1)}
        for name in (
            "°",
            "rad",
            "°C",
            "°F",
            "K",
            "€",
            "£",
            "N",
            "J",
            "W",
            "V",
            "A",
            "Ω",
            "Hz",
            "Pa",
            "units",
            "units^2",
            "units^3",
        )
    },
}

UNITS = {name: (kind, size) for kind, names in _KINDS.items() for name, size in names.items()}
"""{unit: (what it measures, its size in the first unit of that)}"""

_WORDS = {
    "meter": "m",
    "metre": "m",
    "millimeter": "mm",
    "millimetre": "mm",
    "centimeter": "cm",
    "centimetre": "cm",
    "kilometer": "km",
    "kilometre": "km",
    "inch": "in",
    "foot": "ft",
    "feet": "ft",
    "yard": "yd",
    "mile": "mi",
    "unit": "units",
}
_WORDS |= {
    f"{power} {word}": f"{name}^{n}"
    for power, n in (("square", 2), ("sq", 2), ("cubic", 3))
    for word, name in _WORDS.items()
}
_WORDS |= {
    "degree": "°",
    "deg": "°",
    "radian": "rad",
    "dollar": "$",
    "euro": "€",
    "cent": "cents",
    "gram": "g",
    "kilogram": "kg",
    "second": "s",
    "sec": "s",
    "minute": "min",
    "hour": "h",
    "day": "days",
    "liter": "L",
    "litre": "L",
    "newton": "N",
    "joule": "J",
    "watt": "W",
    "volt": "V",
    "ohm": "Ω",
    "percent": "%",
}
_TEXT = re.compile(r"\\(?:text|mathrm|rm) ?\{([^{}]*)\}")


def unit_named(text: str) -> str | None:
    """The unit that `text` names, in this table's spelling; "" for no text, "%" for per cent, None for
    anything else."""
    text = _TEXT.sub(r"\1", text).replace("\\", "").replace("{", "").replace("}", "").strip()
    if text in UNITS or text in ("", "%"):
        return text
    word = text.lower()
    return next(
        (_WORDS[form] for form in (word, word.removesuffix("s"), word.removesuffix("es")) if form in _WORDS),
        None,
    )
