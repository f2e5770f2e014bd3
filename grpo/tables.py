"""Scores as tables for people: shares in percent, differences in points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def score_table(found: Mapping[str, Any]) -> str:
    """`evaluation.scores` as one line a task and one for all; below it the second look's work, and why answers could not be read."""
    looks = "looking" in found
    header = ["task", "n", "accuracy", "95 % interval", "chance", "format", "unread", "cut", "length"] + ["looks", "again"] * looks
    rows = []
    for task, block in [*found["tasks"].items(), ("all", found)]:
        shares = [block[key] for key in ("chance", "format", "extraction_failure", "truncated")]
        row = [task, block["questions"], percent(block["accuracy"]), interval(*block["interval"]), *map(percent, shares)]
        row.append(f"{block['mean_length']:.1f}")
        rows.append(row + [percent(block[key]) for key in ("looking", "self_correction") if looks])
    text = table(header, rows)
    if looks:
        text += f"\nsecond looks that turned wrong into right: {found['wrong_to_right']}, right into wrong: {found['right_to_wrong']}"
    if found["failures"]:
        text += "\nunread because of: " + ", ".join(f"{why} ({count})" for why, count in found["failures"].items())
    return text


def k_table(found: Mapping[str, Any]) -> str:
    """pass@k and maj@k over all questions."""
    rows = [[name, *(percent(cell["value"]) for cell in found[name].values())] for name in ("pass@k", "maj@k")]
    return table(["k", *found["pass@k"]], rows)


def difference_table(found: Mapping[str, Mapping[str, Any]], first: str, second: str) -> str:
    """Two evaluations side by side, and first minus second: paired, with how many questions only one of them got right, and McNemar's p."""
    rows = []
    for task, row in found.items():
        p = f"{row['p']:.4f}" if row["p"] >= 1e-4 else "< 0.0001"
        rows.append([task, row["n"], percent(row["first"]), percent(row["second"]), f"{100 * row['difference']:+.1f}",
                     interval(row["low"], row["high"], sign="+"), row["only_a"], row["only_b"], p])
    return table(["task", "n", first, second, "difference", "95 % interval", f"only {first}", f"only {second}", "p"], rows)


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as they need to be: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    wide = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join([row[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(row[1:], wide[1:]))]) for row in cells)


def percent(share: float) -> str:
    """0.125 → 12.5"""
    return f"{100 * share:.1f}"


def interval(low: float, high: float, sign: str = "") -> str:
    """Both ends in percent; `sign` "+" writes it before positive ones."""
    return f"{100 * low:{sign}.1f} … {100 * high:{sign}.1f}"
