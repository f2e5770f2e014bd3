"""Words of reflection in any policy's completions, what they are worth, and repetition: pure functions.

The VisualThinker paper shows its "aha moment" in single completions and publishes no list; "visualthinker"
is the list that its author gave in issue 12 of the paper's repository. "vlaa" is VLAA-Thinking's (arXiv
2504.11468). A count of words shows that a policy writes them. Whether they go with right answers is measured
inside each question: its reflecting completions against its other completions. Hard questions may draw both
more doubt and more mistakes, and that would look like an effect of doubt. (`evaluate.py --ban` goes further:
it forbids the words.)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from grpo.evaluation.statistics import difference_interval

# words and phrases; one with a * stands for every word with this beginning
LISTS = {
    "visualthinker": ("aha", "check", "possibl*", "verify", "wait", "yet"),
    "vlaa": ("alternatively", "double-check", "i should check", "wait"),
}

FORMS = {
    word: re.compile(rf"(?<![a-z]){re.escape(word.rstrip('*'))}" + ("" if word[-1] == "*" else r"(?![a-z])"))
    for words in LISTS.values()
    for word in words
}
# tokens of an n-gram
GRAM = 4
# a loop: one block of tokens at least TIMES times in a row, over at least LEAST tokens, among a completion's
# last TAIL tokens (so a block of up to 200 tokens is found)
TIMES = 3
LEAST = 16
TAIL = 600


def said(text: str) -> frozenset[str]:
    """The keywords of all lists in a text: whole words, any case and white space. Takes linear time."""
    text = " ".join(text.lower().split())
    return frozenset(word for word, form in FORMS.items() if form.search(text))


def reflects(words: Collection[str], name: str) -> bool:
    """Whether one of the keywords is on the list `name`."""
    return any(word in words for word in LISTS[name])


def repetition(tokens: Sequence[int], n: int = GRAM) -> float:
    """seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319, §4): 1 - distinct / all n-grams; 0 without any."""
    count = len(tokens) - n + 1
    return 1 - len(set(zip(*(tokens[i:] for i in range(n))))) / count if count > 0 else 0.0


def ends_in_loop(tokens: Sequence[int], times: int = TIMES, least: int = LEAST, tail: int = TAIL) -> bool:
    """Whether the last tokens are one block, at least `times` times in a row, over at least `least` tokens,
    among the last `tail` tokens.

    Read backwards, the end is a prefix. A prefix of length m with a border of length k repeats with period m
    - k (Knuth, Morris & Pratt 1977), so one pass is enough.
    """
    backwards = list(tokens[-tail:])[::-1]
    border = [0]
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
    """Accuracy with reflection minus accuracy without, over the `groups` questions that have both: mean,
    standard deviation (divisor n) and 95 % interval of the questions' differences."""

    groups: int
    mean: float
    sd: float
    low: float
    high: float


def gain_of(groups: int, total: float, squares: float) -> Gain:
    """The gain from the number, the sum and the sum of squares of the questions' differences."""
    mean, (low, high) = total / groups, difference_interval(groups, total, squares)
    return Gain(groups, mean, max(0.0, squares / groups - mean**2) ** 0.5, low, high)


def gain_within(groups: Sequence[Sequence[tuple[bool, bool]]]) -> Gain | None:
    """The gain from each question's (reflects, right) of completions. None if no question has both kinds."""
    found = []
    for group in groups:
        reflecting = [right for reflected, right in group if reflected]
        others = [right for reflected, right in group if not reflected]
        if reflecting and others:
            found.append(fmean(reflecting) - fmean(others))
    return gain_of(len(found), sum(found), sum(d * d for d in found)) if found else None


def reflection_scores(groups: Sequence[Sequence[tuple[Collection[str], bool]]]) -> dict[str, float]:
    """Flat scores of each list and each word, from (keywords, right) of every completion, grouped by
    question. A score without completions is left out.

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
            found[f"{name}/gain"] = gain.mean
            found |= {f"{name}/gain_{part}": getattr(gain, part) for part in ("sd", "low", "high", "groups")}
    return found | {
        f"word/{word.rstrip('*').replace(' ', '_')}": fmean(word in words for words, _ in rows)
        for word in FORMS
    }


def pooled(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """A list's exact scores over many rows of metrics.jsonl: {share, with, without, gain}, each None without
    completions. None without rows. A step has few questions; hundreds of steps have enough."""
    key = f"aha/{name}"
    rows = [row for row in rows if isinstance(row.get(key), (int, float)) and row.get("completions/count")]
    if not rows:
        return None
    total = sum(row["completions/count"] for row in rows)
    reflecting = sum(row["completions/count"] * row[key] for row in rows)
    right = {"with": 0.0, "without": 0.0}
    for row in rows:
        for label, share in (("with", row[key]), ("without", 1 - row[key])):
            right[label] += row["completions/count"] * share * row.get(f"{key}/accuracy_{label}", 0.0)
    names = [f"{key}/gain_groups", f"{key}/gain", f"{key}/gain_sd"]
    asked = [[row[each] for each in names] for row in rows if row.get(names[0])]
    gain = None
    if asked:
        squares = sum(n * (sd**2 + mean**2) for n, mean, sd in asked)
        gain = gain_of(sum(n for n, _, _ in asked), sum(n * mean for n, mean, _ in asked), squares)
    return {
        "share": reflecting / total,
        "with": right["with"] / reflecting if reflecting else None,
        "without": right["without"] / (total - reflecting) if reflecting < total else None,
        "gain": gain,
    }
