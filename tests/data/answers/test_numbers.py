"""Numbers read by hand: closed forms, properties, and every row of the adversarial table, for our reader
and for math-verify where it is installed."""

import importlib.util
import math
import string
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.answers.numbers import LONGEST, Number, parse, same
from data.answers.parser import extract, is_right, is_right_paper, read
from data.answers.units import BASE, DEFINED, Unit, unit_named
from data.types import Example
from tests.data.answers.adversarial import CASES

ROWS = [
    pytest.param(
        case,
        id=f"{heading.partition(';')[0][:14]}-"
        f"{(case.shown or case.said or case.text or 'empty')[:24]}-{case.gold}",
    )
    for heading, cases in CASES.items()
    for case in cases
]
QUICK = settings(max_examples=200, deadline=None)
HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None


# ---- the table


@pytest.mark.parametrize("case", ROWS)
def test_every_row_of_the_adversarial_table(case):
    assert is_right(case.completion, case.example) == case.accuracy
    assert is_right_paper(case.completion, case.example) == case.paper


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="needs the extra math")
def test_every_row_of_the_adversarial_table_by_math_verify():
    """In one test: two processes serve all rows. A machine so slow that math-verify's five seconds pass
    fails it, which is what it would do to a run."""
    from grpo.rewards.rules import accuracy_math_verify, accuracy_paper_math_verify

    wrong = [
        (case.shown or case.said, case.gold, rule.__name__)
        for cases in CASES.values()
        for case in cases
        for rule, verdict in (
            (accuracy_math_verify, case.math),
            (accuracy_paper_math_verify, case.paper_math),
        )
        if verdict is not None and rule(case.completion, case.example, None) != verdict
    ]
    assert not wrong


# ---- values


@pytest.mark.parametrize(
    "text, value, unit",
    [
        ("3", 3, ""),
        ("-3.50", Fraction(-7, 2), ""),
        (".5", Fraction(1, 2), ""),
        ("5.", 5, ""),
        ("-2 1/2", Fraction(-5, 2), ""),
        ("6/4", Fraction(3, 2), ""),
        ("-\\frac{1}{2}", Fraction(-1, 2), ""),
        ("\\left(\\frac{3}{2}\\right)", Fraction(3, 2), ""),
        ("\\sqrt{16}", 4, ""),
        ("\\sqrt[3]{8}", 2, ""),
        ("12,345,678.9", Fraction(123456789, 10), ""),
        ("1\\,000", 1000, ""),
        ("2^{10}", 1024, ""),
        ("10⁻²", Fraction(1, 100), ""),
        ("-2^2", -4, ""),
        ("1.5E-3", Fraction(3, 2000), ""),
        ("5%", 5, "%"),
        ("12 cm²", 12, "cm^2"),
        ("12 \\text{cm}^2", 12, "cm^2"),
        ("5 m/s", 5, "m/s"),
        ("12 square units", 12, "units^2"),
        ("30 inches", 30, "in"),
        ("-$3", -3, "$"),
        ("$$3$$", 3, ""),
        ("\\angle ABC = 40^\\circ", 40, "°"),
        ("AB = 5 cm.", 5, "cm"),
        ("1e308", 10**308, ""),
        ("\\sqrt[4]{16}", 2, ""),
        ("\\sqrt[3]{-8}", -2, ""),
        ("4^{1/2}", 2, ""),
        ("4^0.5", 2, ""),
    ],
)
def test_exact_values(text, value, unit):
    assert parse(text) == Number(value, unit_named(unit)) and isinstance(parse(text).value, (Fraction, float))


@pytest.mark.parametrize(
    "text, value",
    [
        ("\\sqrt{2}", math.sqrt(2)),
        ("√2", math.sqrt(2)),
        ("2\\sqrt{2}/3", 2 * math.sqrt(2) / 3),
        ("\\pi", math.pi),
        ("2π/3", 2 * math.pi / 3),
        ("(1+√5)/2", (1 + math.sqrt(5)) / 2),
        ("2(\\sqrt{3}+1)", 2 * math.sqrt(3) + 2),
        ("\\frac{\\sqrt{3}}{2}", math.sqrt(3) / 2),
        ("-\\sqrt{\\frac{1}{2}}", -math.sqrt(0.5)),
        ("\\pi^2", math.pi**2),
        ("4 - 2\\sqrt{2}", 4 - 2 * math.sqrt(2)),
    ],
)
def test_roots_and_pi_are_floats(text, value):
    assert isinstance(parse(text).value, float) and parse(text).value == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "-",
        "+",
        "$",
        "$$",
        "\\",
        "{",
        "}",
        "(",
        ")",
        "()",
        "3)",
        "(3",
        "\\frac",
        "\\frac{}{}",
        "\\frac{1}",
        "\\frac{1}{0}",
        "\\frac123",
        "\\sqrt",
        "\\sqrt{}",
        "\\sqrt[4]{-16}",
        "10^",
        "10^{",
        "^2",
        "2^0.15",
        "9^{9^9}",
        "9^99999",
        "1e309",
        "-1e309",
        "1e-9999",
        "1e5.5",
        "1e",
        "e",
        "x",
        "x=",
        "=3",
        "x=3=4",
        "x=3 or x=4",
        "not = 3",
        "3x",
        "3 M",
        "1/2π",
        "1/-2",
        "1,00",
        "1,0000",
        "0,123",
        "1,234,56",
        "1.2.3",
        "1..2",
        "2 3/2",
        "1/2 1/2",
        "3 1/2 1/2",
        "3:2",
        "±3",
        "~3",
        "≈≈3",
        "3%%",
        "3% cm",
        "3 cm cm",
        "$3 cm",
        "$3$ or 4",
        "∞",
        "-inf",
        "1j",
        "3+4i",
        "True",
        "None",
        "\\boxed{3}\\boxed{4}",
        "3;4",
        "3\\\\4",
        "10**500",
        "1e308*10^5",
        "\x00",
        "3\x00",
        "\ud800",
    ],
)
def test_what_is_no_number(text):
    assert parse(text) is None


def test_a_number_is_short_and_shallow():
    # beyond the floats, and within
    assert parse("3" * 310) is None and parse("1" * 308) == Number(int("1" * 308))
    assert (
        parse(" " * (LONGEST - 3) + "1/2") == Number(Fraction(1, 2))
        and parse(" " * (LONGEST - 2) + "1/2") is None
    )
    assert parse("(" * 15 + "3" + ")" * 15).value == 3 and parse("(" * 60 + "3" + ")" * 60) is None


# ---- comparing


@pytest.mark.parametrize(
    "a, b, equal",
    [
        ("10000001", "10000000", False),
        ("0.1", "0.10000001", False),
        ("1/3", "2/6", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.33333", False),
        ("1.414214", "\\sqrt{2}", True),
        ("1.4142", "\\sqrt{2}", False),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("0", "1e-300", False),
        ("-\\pi", "\\pi", False),
        ("60 s", "1 min", True),
        ("1 h", "3600 s", True),
        ("100 cm²", "0.01 m²", True),
        ("36 km/h", "10 m/s", True),
        ("3 kg", "3 m", False),
        ("3 cm", "3", True),
        ("3 cm", "0.03", False),
        ("50 cents", "$0.50", True),
        ("180°", "\\pi rad", False),
        ("50%", "1/2", True),
        ("25.4 mm", "1 inch", True),
    ],
)
def test_equality(a, b, equal):
    assert same(parse(a), parse(b)) is equal is same(parse(b), parse(a))


def test_units_are_spelt_as_they_are_read():
    """Each unit of the tables is read behind a number, and its definition is of the same size."""
    for unit in [*BASE, *DEFINED]:
        assert parse(f"3 {unit}")[:2] == (3, unit_named(unit))
    for unit, definition in DEFINED.items():
        number, _, rest = definition.rpartition(" ")
        assert same(parse(f"1 {unit}"), Number(Fraction(number or 1), unit_named(rest)))


# ---- properties


@given(st.text() | st.text("0123456789.,-+*/^(){}[]\\frac sqrtpi$%°√π½eE=x ", max_size=60))
@QUICK
def test_any_text_is_a_finite_number_or_none(text):
    found = parse(text)
    assert found is None or (
        abs(found.value) <= sys.float_info.max and (found.unit is None or isinstance(found.unit, Unit))
    )


@given(st.integers(-(10**300), 10**300))
@QUICK
def test_whole_numbers_read_as_themselves(n):
    assert parse(str(n)) == Number(n)


@given(st.integers(-(10**120), 10**120))
@QUICK
def test_thousands_separators_change_nothing(n):
    assert parse(f"{n:,}") == parse(f"{n:,}".replace(",", "{,}")) == Number(n)


@given(st.floats(allow_nan=False, allow_infinity=False))
@QUICK
def test_floats_read_as_their_own_decimals(x):
    found = parse(repr(x)).value
    # a decimal of 15 digits or more was a float itself
    digits = repr(abs(x)).partition("e")[0].replace(".", "").strip("0")
    assert found == Fraction(repr(x)) if len(digits) < 15 else found == pytest.approx(x, rel=1e-11)


@given(st.integers(-999, 999), st.integers(1, 999))
@QUICK
def test_fractions_in_every_spelling(above, below):
    value, sign = Fraction(above, below), "-" if above < 0 else ""
    for text in (
        f"{above}/{below}",
        f"{sign}\\frac{{{abs(above)}}}{{{below}}}",
        f"\\frac{{{above}}}{{{below}}}",
        f"$ {above} / {below} $",
    ):
        assert parse(text) == Number(value)


@st.composite
def formulas(draw, depth=0):
    """A formula as we read it, and as Python evaluates it."""
    kind = draw(st.sampled_from("12π√f(+-*/" if depth < 3 else "12π"))
    if kind in "12":
        return (str(draw(st.integers(1, 12))),) * 2
    if kind == "π":
        return "π", "math.pi"
    (a, x), (b, y) = draw(formulas(depth + 1)), draw(formulas(depth + 1))
    space = draw(st.sampled_from(["", " "]))
    return {
        "√": (f"√({a})", f"math.sqrt({x})"),
        "f": (f"\\frac{{{a}}}{{{b}}}", f"(({x})/({y}))"),
        "(": (f"({a})", f"({x})"),
    }.get(kind, (f"{a}{space}{kind}{space}{b}", f"{x}{kind}{y}"))


@given(formulas())
@QUICK
def test_a_formula_has_the_value_that_python_gives_it(pair):
    text, python = pair
    found = parse(text)
    assume(found)
    assert found.unit is None and float(found.value) == pytest.approx(eval(python, {"math": math}), rel=1e-9)


NUMBERS = st.one_of(
    st.integers(-99, 99).map(str),
    st.floats(-9, 9).map(lambda x: f"{x:.6g}"),
    st.sampled_from(["1/3", "0.333333", "\\pi", "3.14159", "\\sqrt{2}"]),
)
ANY = (
    st.builds(
        lambda number, unit: f"{number} {unit}",
        NUMBERS,
        st.sampled_from(["", "cm", "m", "°", "%", "kg", "$"]),
    )
    .map(parse)
    .filter(bool)
)


@given(ANY, ANY)
@QUICK
def test_equality_is_symmetric_and_reflexive(a, b):
    assert same(a, b) == same(b, a) and same(a, a) and same(b, b)


NUMERIC = Example("u", "How many?", (), "3", extra={"kind": "number"})
LETTERED = Example("u", "Which?", ("yes", "no", "3"), "3")
PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "3", "(C)", "no", " ", "\n", "or", "4"])
    | st.text(string.printable, max_size=3),
    max_size=12,
).map("".join)


@given(PARTS, st.sampled_from([NUMERIC, LETTERED]))
@QUICK
def test_without_exactly_one_readable_answer_nothing_is_earned(text, example):
    if not is_right(text, example):
        return
    assert read(text, example).why == "" and text.count("<answer>") == text.count("</answer>") == 1
    before, _, rest = text.partition("<answer>")
    content, _, after = rest.partition("</answer>")
    assert content.strip() and not any(word in content for word in ("or", "4", "no", "think"))
    for spoilt in (
        text + "<answer>3</answer>",
        text + "<answer>",
        before + "<think>" + rest,
        f"<think>{text}",
        f"{before}<answer>{content} or 4</answer>{after}",
        f"{before}<answer></answer>{after}",
        f"{before}{content}{after}",
    ):
        assert ("<think>" in spoilt and after.count("</think>")) or not is_right(spoilt, example)


def test_numbers_are_for_questions_that_ask_for_one():
    """`kind` decides; a right answer that is no number itself is compared as text, so that nothing is paid
    for an unreadable gold."""
    text = Example("u", "What is written there?", (), "3.0")
    assert (
        not is_right("<answer>3</answer>", text)
        and is_right("<answer>3.0.</answer>", text)
        and read("<answer>three</answer>", text).why == ""
    )
    assert (
        is_right("<answer>3</answer>", NUMERIC)
        and read("<answer>three</answer>", NUMERIC).why == "not a number"
    )
    unreadable = Example("u", "How many?", (), "\\frac{x}{2}", extra={"kind": "number"})
    assert is_right("<answer> \\frac{X}{2} </answer>", unreadable) and not is_right(
        "<answer>3</answer>", unreadable
    )
    assert extract("<answer>three</answer>", ()).answer == "three"


# ---- time


@pytest.mark.parametrize(
    "piece", ["(", "3 ", "3+", "\\frac{", "\\sqrt", "1,000", "-", " ", "√", "x = ", "9^", "²"], ids=repr
)
def test_a_long_number_costs_its_length(piece):
    """Ten times the text at most twenty times ten times the seconds, which leaves room for a busy machine;
    a backtracking expression would take a hundred times."""
    short, full, endless = (cost((piece * size)[:size]) for size in (LONGEST // 10, LONGEST, 1000 * LONGEST))
    # what is longer than LONGEST is not looked at
    assert full < 200 * short and endless < 200 * short


def cost(text: str) -> float:
    """Seconds of processor time for twenty calls, the best of five."""

    def once() -> float:
        start = time.process_time()
        for _ in range(20):
            parse(text)
        return time.process_time() - start

    return max(min(once() for _ in range(5)), 1e-5)
