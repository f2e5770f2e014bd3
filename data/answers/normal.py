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
_STYLE = (
    r"\\(?:(?:text|math)(?:bf|it|tt|rm|sf|normal|cal|bb|frak)?|emph|underline|num|bm|boldsymbol|operatorname|"
    r"[mhf]box|rm|bf|boxed|framebox|ensuremath|tiny|small|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])"
)
_TAGS = "[bipu]|s|em|strong|code|span|div|br|hr|mark|tt|center|font|h[1-6]|li|ul|ol|pre|big|small|final"
# bold and italic; but ** between numbers is a power
_BOLD = (
    r"^\*{1,3}|\*{1,3}$|(?<![^\W_])(?<![*)}\]])\*{1,3}(?=[^\s*])|"
    r"(?<=[^\s*])\*{1,3}(?=[\s.,:;!?)}\]\"'`_|$<]|\\[)\]])"
)
_in_braces = lambda found: "\\frac" + "".join(f"{{{part.strip('{} ')}}}" for part in found.groups())
# a text without the first string is not searched for the pattern
_SPELLINGS = tuple(
    (sign, re.compile(pattern), plain)
    for sign, pattern, plain in (
        ("*", _BOLD, " "),
        # 1{,}000, 1,\!000 and 1\,000 are 1,000
        (",", r"(?<=[0-9])(?:\\,|,\\!|\{,\})(?=[0-9]{3}(?![0-9]))", ","),
        # with the name of a language
        ("```", r"```[a-z]*\n", " "),
        ("<", rf"</?(?:{_TAGS})(?: [^<>]*)?/?>", " "),
        ("<", r"<su[bp]>([^<>]*)</su[bp]>", r"^{\1}"),
        ("\\", r"\\\$|\\text\{\$\}", "\x02"),
        ("\\", r"\\([%#&_{}])", r"\1"),
        ("\\", r"\\[()\[\],;:! ]", " "),
        ("~", r"~{2,}|(?<=.)~(?=\S)", " "),
        ("\\", r"\\([A-Za-z]+)", lambda found: COMMANDS.get(found[1], found[0])),
        ("^", r"\^ ?(?:°|\{ ?° ?\})|(?<=[0-9}]) ?\^ ?(?:o(?![a-z])|\{ ?o ?\})", "°"),
        # one form of powers of single signs
        ("^{", r"\^\{ ?([-+]?[0-9]+|\w) ?\}(?!\w)", r"^\1"),
        ("color", r"\\(?:text)?color(?:box)? ?\{[^{}]*\}", ""),
        # a style's name goes, and its braces if they hold no others; twice, for a style within one
        ("\\", rf"{_STYLE} ?\{{([^{{}}]*)\}}", r" \1 "),
        ("\\", rf"{_STYLE} ?\{{([^{{}}]*)\}}", r" \1 "),
        ("\\", _STYLE, ""),
        ("_", r"(?<!\w)(_{1,2})([^_]+)\1(?!\w)", r" \2 "),
        ("`", r"(?<=\w)`(?=\w)", "'"),
        ("`", "`+", " "),
        # heading, quotation, list; - 3 and 1. 3 may be numbers
        (" ", r"^\s*(?:#{1,6}|[>•]|-(?= +\(?[A-Za-z])|[0-9]{1,2}[.)](?= +\(?[A-Za-z]\)?[.:)]?$)) ", ""),
        ("**", r"\*\*", "^"),
        ("=", "<=", "≤"),
        ("=", ">=", "≥"),
        ("=", "!=", "≠"),
        ("=", "[:=]=", "="),
        ("inf", r"\binf(?:ty|inity)?\b", "∞"),
        ("U", r"(?<=[)\]]) ?U ?(?=[(\[])", "∪"),
        ("}", r"(?<![A-Za-z}\]^_])\{(\w+)\}(?= ?\^)", r"\1"),
        ("10", r"(?<=[0-9]) ?[xX] ?(?=10 ?\^)", "×"),
        # one form of fractions and roots of single signs
        ("\\over", r"\{ ?([^{}\\]+?) ?\\over(?![a-z]) ?([^{}\\]+?) ?\}", r"\\frac{\1}{\2}"),
        ("\\root", r"\\root ?\{?(\w)\}? ?\\of ?", r"\\sqrt[\1]"),
        ("\\frac", r"\\frac ?(\w|\{[^{}]*\}) ?(\w|\{[^{}]*\})(?!\w)", _in_braces),
        ("sqrt", r"(?:\\|(?<![A-Za-z\\]))sqrt(?: ?[({] ?(\w+) ?[)}](?! ?\w)|(?=[0-9]))", r"\\sqrt \1"),
    )
)
_PLAIN = re.compile(r"[A-Za-z0-9]*(?:[./][0-9]+)?")
_IS = r"(?:is|would be|should be|must be)"
_LABEL = re.compile(
    # so, B; so 3
    r"(?:so|thus|hence|therefore|then)(?:[,:] ?| (?=\(?[A-Z]\)?[.]?$|[a-z]{0,3} ?=|[-(\\0-9]|the |my ))"
    r"|(\")?(?:(?:the|my|our) )?(?:(?:final|correct|right|best) ){0,2}"
    r"(?:answer|ans|option|choice|letter|result|solution)\b(?(1)\")[.]?"
    rf"(?: {_IS}(?: (?:option|choice|letter))?(?: ?[:=])? ?| ?[:=] ?| - (?=\(?[A-Z])|"
    # "Solution A" may be the name of something
    r"(?<!solution)(?<!result) (?=\(?[A-Z0-9]\)?[.:)]?(?:$| )))"
    r"|(?:[∴→⇒➜:]|[-=]>) ?"
    r"|(?:因此|所以|故)?(?:本题)?(?:正确|最终|最后)?的?(?:答案?|选项|结果)应?[是为选]? ?:? ?"
    r"|(?:所以|因此|本题)?[应故我]?选择? ?(?=\(?[A-Z]\)?[.]?$)",
    re.IGNORECASE,
)
# 3! is six, and what ends in dots goes on; "B is the answer"
_STOP = re.compile(
    r"(?<=[^.,;:!]) ?(?:[.,;:]|(?<![0-9])!{1,3})$|(?<=\b[A-Z])(?P<close>\)?)(?: ?选?项|"
    r" is (?:the )?(?:(?:correct|right|best)(?: (?:answer|option|choice|one))?|answer))$"
)
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
        text = unicodedata.normalize("NFC", text).translate(_SIGNS)
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
        text = _STOP.sub(r"\g<close>", before)
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
    return depth == 0 and len(split_list(inside, brackets=True)) == 1


def split_list(text: str, brackets: bool) -> list[str]:
    """The parts between commas and semicolons outside of brackets.

    1,000 is one number where the other separators have a space behind them: (1,000, 2). brackets: around the
    text; then alone it is two parts, as in (100,200).
    """
    depth = 0
    cuts = []
    for at, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign in ",;" and depth == 0:
            cuts.append(at)
    others = [at for at in cuts if not _THOUSANDS.match(text, at)]
    if (others or not brackets) and all(text[at] == ";" or text[at + 1 : at + 2] == " " for at in others):
        cuts = others
    return [text[start + 1 : end] for start, end in zip([-1, *cuts], [*cuts, len(text)])]
