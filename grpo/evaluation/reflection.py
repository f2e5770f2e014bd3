"""Signs of reflection in any policy's words, what they are worth, and repetition: pure functions over texts,
tokens and booleans.

The VisualThinker paper shows its "aha moment" in single completions and publishes no list; "visualthinker" is
the one that its author gave in issue 12 of the paper's repository. "vlaa" is VLAA-Thinking's (arXiv
2504.11468). Counting words says that a policy *writes* them. Whether they go with right answers is asked
within the question here: reflecting and other completions of one and the same prompt are compared, so that
hard questions, which may draw both more doubt and more mistakes, do not pass for an effect of doubt. (What
takes the words away from the policy, `evaluate.py --ban`, goes one step further.)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from grpo.evaluation.statistics import difference_interval

LISTS = {
    "visualthinker": ("aha", "check", "possibl*", "verify", "wait", "yet"),
    "vlaa": ("alternatively", "double-check", "i should check", "wait"),
}
"""Words and phrases; one with a * stands for every word that begins so."""

FORMS = {
    word: re.compile(
        r"(?<![a-z])" + re.escape(word.rstrip("*")) + ("" if word.endswith("*") else r"(?![a-z])")
    )
    for words in LISTS.values()
    for word in words
}
# tokens of an n-gram
GRAM = 4
# a loop is a block of tokens that stands at least so often, one after the other,
TIMES = 3
# over at least so many tokens,
LEAST = 16
# of the last so many: a block of up to 200 tokens is found
TAIL = 600


def said(text: str) -> frozenset[str]:
    """Which keywords of all lists a text holds, as whole words, in any case and with any white space
    between them. Linear in the text."""
    text = " ".join(text.lower().split())
    return frozenset(word for word, form in FORMS.items() if form.search(text))


def reflects(words: Collection[str], name: str) -> bool:
    """Is one of the found keywords on the list `name`?"""
    return any(word in words for word in LISTS[name])


def repetition(tokens: Sequence[int], n: int = GRAM) -> float:
    """The share of n-grams that stood before: 1 - distinct / all; 0 with none. seq-rep-n of Welleck et al.
    2020 (arXiv 1908.04319, §4)."""
    count = len(tokens) - n + 1
    return 1 - len(set(zip(*(tokens[i:] for i in range(n))))) / count if count > 0 else 0.0


def ends_in_loop(tokens: Sequence[int], times: int = TIMES, least: int = LEAST, tail: int = TAIL) -> bool:
    """Do the last tokens repeat one block at least `times` times, over at least `least` tokens? Looks at no
    more than the last `tail`.

    Read backwards, the end is a prefix, and a prefix of length m with a border of length k repeats with
    period m - k (Knuth, Morris & Pratt 1977): one pass.
    """
    backwards, border = list(tokens[-tail:])[::-1], [0]
    for i in range(1, len(backwards)):
        k = border[-1]
        while k and backwards[i] != backwards[k]:
            k = border[k - 1]
        border.append(k + (backwards[i] == backwards[k]))
        if i + 1 >= max(least, times * (i + 1 - border[-1])):
            return True
    return False


@dataclass(frozen=True)
class Gain:
    """Accuracy with reflection minus accuracy without, question by question: over `groups` questions that
    have both, their mean, spread and 95 % interval."""

    groups: int
    mean: float
    # of the questions' differences (divisor n)
    sd: float
    low: float
    high: float


def gain_of(groups: int, total: float, squares: float) -> Gain:
    """The gain from the number, the sum and the sum of squares of the questions' differences."""
    mean, (low, high) = total / groups, difference_interval(groups, total, squares)
    return Gain(groups, mean, max(0.0, squares / groups - mean**2) ** 0.5, low, high)


def gain_within(groups: Sequence[Sequence[tuple[bool, bool]]]) -> Gain | None:
    """(reflects, right) of every completion, grouped by question → what reflection goes with, inside
    questions. None if no question has both kinds."""
    differences = []
    for group in groups:
        split = (
            [right for reflected, right in group if reflected],
            [right for reflected, right in group if not reflected],
        )
        if all(split):
            differences.append(fmean(split[0]) - fmean(split[1]))
    return (
        gain_of(len(differences), sum(differences), sum(d * d for d in differences)) if differences else None
    )


def reflection_scores(groups: Sequence[Sequence[tuple[Collection[str], bool]]]) -> dict[str, float]:
    """(keywords said, right) of every completion, grouped by question → flat scores, per list and per word.
    What has no completions is left out.

    `<list>`: share that reflects.  `<list>/accuracy_with`, `<list>/accuracy_without`: over all questions.
    `<list>/gain`, `gain_sd`, `gain_low`, `gain_high`, `gain_groups`: `gain_within`.  `word/<word>`: share
    that holds a keyword.
    """
    rows = [row for group in groups for row in group]
    found: dict[str, float] = {}
    for name in LISTS:
        marked = [[(reflects(words, name), right) for words, right in group] for group in groups]
        found[name] = fmean(reflected for group in marked for reflected, _ in group)
        for label, wanted in (("with", True), ("without", False)):
            if these := [right for group in marked for reflected, right in group if reflected is wanted]:
                found[f"{name}/accuracy_{label}"] = fmean(these)
        if gain := gain_within(marked):
            found |= {
                f"{name}/gain": gain.mean,
                f"{name}/gain_sd": gain.sd,
                f"{name}/gain_low": gain.low,
                f"{name}/gain_high": gain.high,
                f"{name}/gain_groups": gain.groups,
            }
    return found | {
        f"word/{word.rstrip('*').replace(' ', '_')}": fmean(word in words for words, _ in rows)
        for word in FORMS
    }


def pooled(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """Lines of metrics.jsonl → the same of all their completions together: {share, with, without, gain}; a
    part without completions is None.

    Exact, from each step's counts: what a step's few questions leave open, hundreds of steps may settle.
    """
    rows = [
        row
        for row in rows
        if isinstance(row.get(f"aha/{name}"), (int, float)) and row.get("completions/count")
    ]
    if not rows:
        return None
    total = sum(row["completions/count"] for row in rows)
    reflecting = sum(row["completions/count"] * row[f"aha/{name}"] for row in rows)
    right = {
        label: sum(
            row["completions/count"]
            * share(row[f"aha/{name}"])
            * row.get(f"aha/{name}/accuracy_{label}", 0.0)
            for row in rows
        )
        for label, share in (("with", float), ("without", lambda share: 1 - share))
    }
    asked = [
        (row[f"aha/{name}/gain_groups"], row[f"aha/{name}/gain"], row[f"aha/{name}/gain_sd"])
        for row in rows
        if row.get(f"aha/{name}/gain_groups")
    ]
    gain = (
        gain_of(
            sum(n for n, _, _ in asked),
            sum(n * mean for n, mean, _ in asked),
            sum(n * (sd**2 + mean**2) for n, mean, sd in asked),
        )
        if asked
        else None
    )
    return {
        "share": reflecting / total,
        "with": right["with"] / reflecting if reflecting else None,
        "without": right["without"] / (total - reflecting) if reflecting < total else None,
        "gain": gain,
    }
