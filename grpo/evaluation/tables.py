"""Scores as tables for people: shares in percent, differences in points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.types import TaskHook
from grpo.evaluation.protocols import rounded as percent

NO_HOOK = TaskHook()
# prints an accuracy; None: in percent
Shown = Callable[[float], str] | None
# a header, and a line of cells for each row
Rows = tuple[list[Any], list[list[Any]]]


def score_table(found: Mapping[str, Any], shown: Shown = None, hook: TaskHook = NO_HOOK) -> str:
    """`scores` as one line a task and one for all; below it `notes`."""
    return "\n".join([table(*score_rows(found, shown, hook)), *notes(found, shown, hook)])


def score_rows(found: Mapping[str, Any], shown: Shown = None, hook: TaskHook = NO_HOOK) -> Rows:
    """The cells of the table of scores. hook: the task's own columns."""
    shown = shown or percent
    own = [name for name in hook.columns if name in found["measured"]]
    header = ["task", "n", "accuracy", "95 % interval", "chance", "format", "unread", "cut", "length"]
    rows = []
    for task, block in [*found["tasks"].items(), ("all", found)]:
        shares = [block[key] for key in ("chance", "format", "extraction_failure", "truncated")]
        row = [task, block["questions"], shown(block["accuracy"]), interval(*block["interval"])]
        row += [*map(percent, shares), f"{block['mean_length']:.1f}"]
        rows.append(row + [percent(block["measured"].get(name, 0.0)) for name in own])
    return header + [hook.columns[name] for name in own], rows


def notes(found: Mapping[str, Any], shown: Shown = None, hook: TaskHook = NO_HOOK) -> list[str]:
    """Lines below the table: totals that are no plain average, other measurements of the task, failures."""
    lines = [_total(name, total, shown or percent) for name, total in found.get("totals", {}).items()]
    lines = lines[1:]
    for kind, parts in found.get("by", {}).items():
        shares = (f"{name} {percent(part['value'])} ({part['questions']})" for name, part in parts.items())
        lines.append(f"by {kind}: {', '.join(shares)}")
    if own := [name for name in found["measured"] if name not in hook.columns]:
        shares = ", ".join(f"{name.replace('_', ' ')} {percent(found['measured'][name])}" for name in own)
        lines.append(f"in percent: {shares}")
    if found["failures"]:
        failures = ", ".join(f"{why} ({count})" for why, count in found["failures"].items())
        lines.append(f"unread because of: {failures}")
    return lines


def _total(name: str, total: Mapping[str, Any], shown: Callable[[float], str]) -> str:
    """A total in one line, with its parts; points where the benchmark counts points."""
    value = f"{shown(total['value'])} ({interval(*total['interval'])})"
    parts = ", ".join(f"{source} {percent(value)}" for source, value in total.get("parts", {}).items())
    if "points" in total:
        sums = ", ".join(f"{part} {total['points'][part]:.1f}" for part in ("perception", "cognition"))
        reached = sum(total["points"][part] for part in ("perception", "cognition"))
        value = f"{reached:.1f} of {total['of']} points ({sums}); in percent {value}"
    return f"{name.replace('_', '-')} total: {value}{f', from {parts}' if parts else ''}"


def k_table(found: Mapping[str, Any]) -> str:
    """pass@k and maj@k over all questions."""
    return table(*k_rows(found))


def k_rows(found: Mapping[str, Any]) -> Rows:
    """Its cells."""
    names = ("pass@k", "maj@k")
    rows = [[name, *(percent(cell["value"]) for cell in found[name].values())] for name in names]
    return ["k", *found["pass@k"]], rows


def difference_table(found: Mapping[str, Mapping[str, Any]], first: str, second: str) -> str:
    """First minus second, paired, with the questions that only one got right, and McNemar's p."""
    return table(*difference_rows(found, first, second))


def difference_rows(found: Mapping[str, Mapping[str, Any]], first: str, second: str) -> Rows:
    """Its cells."""
    rows = []
    for task, row in found.items():
        p = f"{row['p']:.4f}" if row["p"] >= 1e-4 else "< 0.0001"
        shares = [percent(row["first"]), percent(row["second"]), f"{100 * row['difference']:+.1f}"]
        interval_of = interval(row["low"], row["high"], sign="+")
        rows.append([task, row["n"], *shares, interval_of, row["only_a"], row["only_b"], p])
    sides = [first, second, "difference", "95 % interval", f"only {first}", f"only {second}"]
    return ["task", "n", *sides, "p"], rows


def before_after(base: Mapping[str, float], final: Mapping[str, float], hook: TaskHook) -> str:
    """The table at the end of a run, from the first and the last evaluation (names without "eval/")."""
    kinds = [name.partition("/")[2] for name in final if name.startswith("accuracy/")]
    tasks = [(f"  {task}", f"accuracy/{task}", f"questions/{task}") for task in kinds]
    sets = [
        (f"accuracy, {label}", f"{split}/accuracy", f"{split}/questions")
        for split, label in hook.sets.items()
    ]
    means = [("accuracy", "accuracy"), ("format", "format"), ("mean_length", "mean length")]
    means += hook.columns.items()
    sampled = [(f"{label}, sampled", f"sampled/{name}", "sampled/questions") for name, label in means]
    lines = [f"{'':<24} {'n':>5} {'before':>8} {'after':>8}"]
    for label, name, count in [("accuracy, held out", "accuracy", "questions"), *tasks, *sets, *sampled]:
        if name in base and name in final:
            style = ".1f" if "length" in name else ".1%"
            lines.append(
                f"{label:<24} {final.get(count, ''):>5} {base[name]:>8{style}} {final[name]:>8{style}}"
            )
    return "\n".join(lines)


def ladder_table(steps: Sequence[Mapping[str, Any]]) -> str:
    """What each step of a published evaluation adds, in points."""
    return table(*ladder_rows(steps))


def ladder_rows(steps: Sequence[Mapping[str, Any]]) -> Rows:
    """Its cells."""
    rows = [
        [each["step"], percent(each["accuracy"]), interval(*each["interval"]), f"{100 * each['adds']:+.1f}"]
        for each in steps
    ]
    rows[0][-1] = ""
    return ["", "accuracy", "95 % interval", "adds"], rows


def markdown(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, the first column aligned left, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def labels(key: str, names: Sequence[str]) -> tuple[str, str]:
    """Short names of the two sides of a comparison. key: the way of asking. names: of the models."""
    if key != "compare":
        return "as it is", key
    first, second = (Path(name).name for name in names)
    return (first, second) if first != second else ("first", "second")


def as_markdown(result: Mapping[str, Any], shown: Shown = None, hook: TaskHook = NO_HOOK) -> str:
    """The result of `evaluate.py` as a page of Markdown: how it was asked, and each way's table."""
    config = result["config"]
    names = [who["name"] for who in config["models"]]
    rules = f"({config['checker']}, {config['total']} total), seed {config['seed']}"
    lines = [f"# {config['task']}, split {config['split']}", ""]
    lines += [f"Protocol `{config['protocol']}` {rules}.", ""]
    for who in config["models"]:
        pixels = f", pictures of at most {who['max_pixels']} pixels" if who["max_pixels"] else ""
        asked = f"template `{who['template']}`, at most {who['cap']} tokens{pixels}"
        lines.append(f"- `{who['name']}`: {asked}, {who['dtype']}, weights {who['digest']}")
    for key, block in [("first", result), *result["more"].items()]:
        lines += ["", f"## {block['title']}", "", markdown(*score_rows(block["scores"], shown, hook)), ""]
        lines += [f"- {note}" for note in notes(block["scores"], shown, hook)]
        lines += [f"- skipped: {why}" for why in block["skipped"]]
        if "pass@k" in block["scores"]:
            lines += ["", markdown(*k_rows(block["scores"]))]
        if "differences" in block:
            left, right = labels(key, names)
            lines += ["", f"{left} minus {right}, question by question:", ""]
            lines.append(markdown(*difference_rows(block["differences"], left, right)))
    if "steps" in result:
        lines += ["", "What each step of the evaluation adds:", "", markdown(*ladder_rows(result["steps"]))]
    return "\n".join(lines) + "\n"


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table in plain text, the first column aligned left, the others right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    wide = [max(map(len, column)) for column in zip(*cells)]
    aligned = ([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])] for row in cells)
    return "\n".join("  ".join(row) for row in aligned)


def interval(low: float, high: float, sign: str = "") -> str:
    """Both ends in percent; `sign` "+" writes it before positive ones."""
    return f"{100 * low:{sign}.1f} … {100 * high:{sign}.1f}"
