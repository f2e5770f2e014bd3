"""How fast answers are checked, on one core:  python tests/bench/answers.py [--seconds 1.0]

Counts checks per second for letters, texts and numbers in completions of 100 words. Measures the seconds for
10 MB of text of each hard kind. Uses processor time, which other jobs on the machine change little. Prints a
table; the last line is one JSON object.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.answers.parser import is_right, is_right_paper, well_formed, well_formed_paper
from data.types import Example

THOUGHT = "<think> " + "look at the picture and compare the two " * 13 + "</think> "
LETTERED = [
    Example(
        f"bench/{i}", "Which is nearer?", ("the red cube", "the blue ball", "left", str(i)), "the blue ball"
    )
    for i in range(64)
]
# of answers that repeat, as in a run, most are remembered; "#" stands for a number, another in each answer
NUMERIC = [Example("bench/number", "How long?", (), "1.5", extra={"kind": "number"})]
SHORT = {
    "a letter, (B)": ("(B)", LETTERED),
    "a choice's text": ("the blue ball", LETTERED),
    "a number, 1.5": ("1.5", NUMERIC),
    "a fraction, 3/2": ("3/2", NUMERIC),
    "LaTeX, \\frac{3}{2}": ("\\frac{3}{2}", NUMERIC),
    "LaTeX, 2\\sqrt{2}": ("2\\sqrt{2}", NUMERIC),
    "different numbers": ("#.5 cm", NUMERIC),
    "different fractions": ("\\frac{#}{2}", NUMERIC),
    "different texts": ("the # balls", LETTERED),
}
LONG = {
    "thought": ("<think>", "look ", "</think><answer>B</answer>"),
    "spaces": ("<think></think>", " ", "<answer>B</answer>"),
    "opened tags": ("", "<answer>", ""),
    "closed thoughts": ("<think>", "</think> ", ""),
    "hedges": ("<answer>A", " or B", "</answer>"),
    "brackets": ("<answer>", "(", "</answer>"),
    "digits": ("<answer>", "3", "</answer>"),
}
TEN_MB = 10_000_000


def checks_per_second(said: str, examples: list[Example], seconds: float) -> float:
    """Answers checked in a second of processor time, measured over `seconds`."""
    done, spent = 0, 0.0
    while spent < seconds:
        texts = [f"{THOUGHT}<answer>{said.replace('#', str(done + i))}</answer>" for i in range(1000)]
        start = time.process_time()
        for i, text in enumerate(texts):
            is_right(text, examples[i % len(examples)])
        spent += time.process_time() - start
        done += 1000
    return done / spent


def seconds_for(text: str) -> float:
    """Of processor time, for the slowest of the four rules, on one text."""
    slowest = 0.0
    for rule in (
        lambda: is_right(text, LETTERED[0]),
        lambda: is_right(text, NUMERIC[0]),
        lambda: is_right_paper(text, NUMERIC[0]),
        lambda: (well_formed(text), well_formed_paper(text)),
    ):
        start = time.process_time()
        rule()
        slowest = max(slowest, time.process_time() - start)
    return slowest


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    speed = {
        name: round(checks_per_second(said, examples, args.seconds))
        for name, (said, examples) in SHORT.items()
    }
    slow = {
        name: round(seconds_for(start + piece * (TEN_MB // len(piece)) + end), 3)
        for name, (start, piece, end) in LONG.items()
    }
    for name, value in speed.items():
        print(f"{name:<24}{value:>10,} checks a second")
    for name, value in slow.items():
        print(f"10 MB of {name:<15}{value:>10.3f} seconds")
    print(
        json.dumps(
            {
                "checks_per_second": speed,
                "seconds_for_10_MB": slow,
                "letters_per_second": min(speed["a letter, (B)"], speed["a choice's text"]),
                "worst_10_MB": max(slow.values()),
            }
        )
    )


if __name__ == "__main__":
    main()
