"""The tables of docs/results/, made from the JSON that a measurement wrote: no number is copied by hand
(`python -m tests.docs_sync`).

docs/results/shapes/measured.json is written by tests/bench/shapes.py, docs/results/base/measured.json by
tests/bench/base.py, docs/results/speed/measured.json by the six scripts that tests/bench/speed_tables.py
names, docs/results/findings/measured.json by tests/bench/findings.py. Without the file, the table says so.
"""

import json
from collections.abc import Callable
from pathlib import Path

from data.shapes.world import CHANCE, TASKS
from tests.bench import findings_figures, findings_tables, speed_tables
from tests.bench.about import base_hash

NOT_MEASURED = "*Not measured yet.*\n"
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def read(name: str) -> dict | None:
    """What was measured, or None where it was not yet."""
    file = RESULTS / name / "measured.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def percent(value: float, digits: int = 1) -> str:
    """0.934 -> 93.4 %"""
    return f"{100 * value:.{digits}f} %"


def with_interval(block: dict) -> str:
    """An accuracy with its 95 % Wilson interval."""
    low, high = block["interval"]
    return f"{percent(block['accuracy'])} ({100 * low:.1f}–{100 * high:.1f})"


def seeds(found: dict) -> list[str]:
    """The runs that differ by their seed alone."""
    return sorted(name for name in found if name.startswith("seed"))


def worst_over_chance(scores: dict) -> str:
    """The task that is farthest above chance, in points."""
    above = {task: 100 * (block["accuracy"] - CHANCE[task]) for task, block in scores["tasks"].items()}
    worst = max(above, key=above.get)
    return f"{above[worst]:+.1f} points ({worst})"


def promised(found: dict) -> str:
    """Every target of the built-in world beside what was measured."""
    runs = seeds(found)
    base, first = found["base"], found["base"]["eight sampled"]
    last = [found[run]["eight sampled"] for run in runs]
    rows = [
        ["minutes to the end, two cores", "≤ 6", *(f"{found[run]['seconds'] / 60:.1f}" for run in runs)],
        ["held-out accuracy, greedy, base", "≤ 55 %", *[with_interval(base["heldout"])] * len(runs)],
        [
            "the same, with `look :` given (the control)",
            "as it is",
            *[with_interval(base["heldout prefixed"])] * len(runs),
        ],
        [
            "held-out accuracy, greedy, after GRPO",
            "≥ 93 %",
            *(with_interval(found[run]["heldout"]) for run in runs),
        ],
        [
            "unseen colour-shape pairs, after GRPO",
            "within 5 points of it",
            *(with_interval(found[run]["pairs"]) for run in runs),
        ],
        ["format, sampled, base", "40–80 %", *[percent(first["format"])] * len(runs)],
        ["format, sampled, after GRPO", "≥ 98 %", *(percent(scores["format"]) for scores in last)],
        [
            "accuracy, sampled, base -> after GRPO",
            "as it is",
            *(f"{percent(first['accuracy'])} -> {percent(scores['accuracy'])}" for scores in last),
        ],
        [
            "mean length, sampled, base -> after GRPO",
            "≥ 1.8 times",
            *(
                f"{first['mean_length']:.1f} -> {scores['mean_length']:.1f} "
                f"({scores['mean_length'] / first['mean_length']:.2f} times)"
                for scores in last
            ),
        ],
        [
            "share that looks, sampled",
            "as it is",
            *(
                f"{first['measured']['looking']:.2f} -> {scores['measured']['looking']:.2f}"
                for scores in last
            ),
        ],
        [
            "share that looks again, sampled",
            "as it is",
            *(
                f"{first['measured']['self_correction']:.2f} -> {scores['measured']['self_correction']:.2f}"
                for scores in last
            ),
        ],
        [
            "picture withheld, the task farthest above chance",
            "≤ 5 points",
            *(worst_over_chance(found[run]["heldout blind"]) for run in runs),
        ],
        [
            "trained blind, the task farthest above chance",
            "≤ 8 points",
            worst_over_chance(found["blind"]["heldout blind"]),
            *[""] * (len(runs) - 1),
        ],
        ["largest log-prob gap of any step", "≤ 1e-5", *(f"{found[run]['gap_max']:.1e}" for run in runs)],
    ]
    return table(["what", "target", *(run.replace("seed", "seed ") for run in runs)], rows)


def by_task(found: dict) -> str:
    """Accuracy of each task before and after."""
    runs = seeds(found)
    rows = [
        [
            task,
            percent(chance, 0),
            with_interval(found["base"]["heldout"]["tasks"][task]),
            with_interval(found["base"]["heldout prefixed"]["tasks"][task]),
            *(with_interval(found[run]["heldout"]["tasks"][task]) for run in runs),
        ]
        for task, chance in CHANCE.items()
    ]
    return table(
        ["task", "chance", "base", "base, `look :` given", *(run.replace("seed", "seed ") for run in runs)],
        rows,
    )


def again(found: dict) -> str:
    """What the second look does: its share and what it turns in sampled completions, and greedily what is
    lost without it; over all seeds."""
    blocks = {
        name: [
            found[run]["eight sampled"] if name == "all" else found[run]["eight sampled"]["tasks"][name]
            for run in seeds(found)
        ]
        for name in (*CHANCE, "all")
    }
    greedy = {
        name: [
            found[run]["heldout"] if name == "all" else found[run]["heldout"]["tasks"][name]
            for run in seeds(found)
        ]
        for name in blocks
    }
    banned = {
        name: [
            found[run]["heldout banned"] if name == "all" else found[run]["heldout banned"]["tasks"][name]
            for run in seeds(found)
        ]
        for name in blocks
    }

    def mean(rows: list[dict], key: str) -> float:
        return sum(row["measured"].get(key, row.get(key)) for row in rows) / len(rows)

    rows = [
        [
            "share that looks again, sampled",
            *(percent(mean(rows, "self_correction")) for rows in blocks.values()),
        ],
        [
            "wrong -> right / right -> wrong, sampled",
            *(
                f"{percent(mean(rows, 'wrong_to_right'))} / {percent(mean(rows, 'right_to_wrong'))}"
                for rows in blocks.values()
            ),
        ],
        [
            "share that looks again, greedy",
            *(percent(mean(rows, "self_correction")) for rows in greedy.values()),
        ],
        [
            "accuracy, greedy: with it / forbidden",
            *(
                f"{percent(mean(rows, 'accuracy'))} / {percent(mean(banned[name], 'accuracy'))}"
                for name, rows in greedy.items()
            ),
        ],
    ]
    return table(["", *blocks], rows)


def passes(found: dict) -> str:
    """pass@k and maj@k, base and trained."""
    ks = list(found["base"]["samples sampled"]["pass@k"])
    rows = [
        [f"{who}, {what}", *(percent(found[run]["samples sampled"][what][k]["value"]) for k in ks)]
        for what in ("pass@k", "maj@k")
        for who, run in (("base", "base"), ("trained, seed 0", "seed0"))
    ]
    return table(["k", *ks], rows)


def base(found: dict) -> str:
    """What the built-in base model reads, and what it answers before any RL."""
    readings = table(
        ["reading", *found["readings"]],
        [["share right", *(percent(value) for value in found["readings"].values())]],
    )
    tasks = found["tasks"]
    gate = table(
        ["sampled, 16 completions a question", *tasks],
        [
            ["P(right, looked)", *(percent(row["looked"]) for row in tasks.values())],
            ["P(right, terse)", *(percent(row["terse"]) for row in tasks.values())],
            [
                "difference: the gate asks for more than 30 points",
                *(f"{100 * (row['looked'] - row['terse']):+.1f} points" for row in tasks.values()),
            ],
            ["P(right, looked again)", *(percent(row["again"]) for row in tasks.values())],
            ["accuracy", *(percent(row["accuracy"]) for row in tasks.values())],
            ["format", *(percent(row["format"]) for row in tasks.values())],
        ],
    )
    return (
        f"{readings}\n{gate}\nOver all: accuracy {percent(found['accuracy'])}, format "
        f"{percent(found['format'])}, sampled.\n"
    )


def made(found: dict) -> str:
    """The bases that the recipe made from random weights: time, readings and gate of each seed."""
    runs = found.get("made")
    if not runs:
        return "*Not measured yet.*\n"
    head = ["seed", "minutes", *next(iter(runs.values()))["readings"], *TASKS, "gate"]
    rows = [
        [
            seed,
            f"{run['minutes']:.0f}",
            *(percent(value) for value in run["readings"].values()),
            *(f"{100 * value:+.0f}" for value in run["gate"].values()),
            "passed" if run["passed"] else "**not passed**",
        ]
        for seed, run in runs.items()
    ]
    return table(head, rows) + (
        "\nMinutes of the steps, by the clock. Readings right; then P(right | looked) - P(right | terse) in "
        "points, by the kind of question. The gate asks for more than 30 of each.\n"
    )


def bridge_world(found: dict) -> str:
    """What is kept of a caption that says everything, and of one that lacks what the question needs."""
    from tests.bench.bridge_world import HEAD, rows

    return table(HEAD, rows(found))


def of_finding(make: Callable, finding: str, figure: bool = False) -> Callable[[dict], str]:
    """A table of a finding, as findings_tables makes it. figure: its figures above it, its commands below."""

    def text(found: dict) -> str:
        made = make(found["records"], finding)
        if made is None:
            return NOT_MEASURED
        if not figure:
            return table(*made)
        lines = findings_tables.commands(found["records"], finding)
        head = "<details><summary>The commands of the first seed</summary>"
        behind = f"\n{head}\n\n```\n{lines}\n```\n\n</details>\n"
        shown = findings_figures.markdown(findings_figures.of_section(finding), RESULTS / "findings")
        return shown + table(*made) + behind * bool(lines)

    return text


def texts_of(finding: str) -> Callable[[dict], str]:
    """What the arms of a finding write."""

    def text(found: dict) -> str:
        lines = findings_tables.texts(found["records"], finding)
        return f"```\n{lines}\n```\n" if lines else NOT_MEASURED

    return text


def mechanism(found: dict) -> str:
    """The figures of what changes through training, those of one finding after the other."""
    return findings_figures.markdown([*findings_figures.MECHANISM], RESULTS / "findings") or NOT_MEASURED


def overview(found: dict) -> str:
    """The README's figure and table of the findings, and where they are; nothing before they are measured."""
    made = findings_tables.overview_table(found["records"])
    if made is None:
        return ""
    figure = findings_figures.markdown(["overview"], RESULTS / "findings", "docs/results/")
    lines = (
        "*Without counting*: these two never train counting questions, a quarter of those asked. Lines are "
        "sampled training answers; SFT's, dashed, is greedy held-out ones of the kinds it trains. "
    )
    more = (
        "Every finding of both papers, with commands and intervals: [findings](docs/results/findings.md).\n"
    )
    return f"{figure}{table(*made)}\n{lines if figure else ''}{more}"


def link(found: dict) -> str:
    """Where the findings are, for docs/00-map.md; nothing before they are measured."""
    if not found["records"]:
        return ""
    return "What RL does to a policy, finding by finding: [the papers in miniature](results/findings.md).\n"


def about(found: dict) -> str:
    """Where and when it was measured, and with which base, if that is not the one that is here now."""
    told = " · ".join(f"{key}: {value}" for key, value in found["about"].items())
    if found["about"]["base"] != base_hash():
        told += (
            "\n\n**These numbers are of an earlier base.** The one in `models/tiny` has replaced it since."
        )
    return told + "\n"


TABLES = {
    "shapes/promised": ("shapes", promised),
    "shapes/tasks": ("shapes", by_task),
    "shapes/again": ("shapes", again),
    "shapes/passes": ("shapes", passes),
    "shapes/about": ("shapes", about),
    "base/all": ("base", base),
    "base/made": ("base", made),
    "base/about": ("base", about),
    "bridge/world": ("bridge", bridge_world),
    "bridge/about": ("bridge", about),
    "findings/about": ("findings", lambda found: findings_tables.about(found["records"])),
    "findings/overview": ("findings", overview),
    "findings/link": ("findings", link),
    "findings/mechanism": ("findings", mechanism),
    "speed/targets": ("speed", speed_tables.targets),
    "speed/measured": ("speed", speed_tables.measured),
}
for _finding in findings_tables.COLUMNS:
    _parts = {
        "": of_finding(findings_tables.finding_table, _finding, figure=True),
        ".tasks": of_finding(findings_tables.task_table, _finding),
        ".passes": of_finding(findings_tables.pass_table, _finding),
        ".texts": texts_of(_finding),
    }
    TABLES |= {f"findings/{_finding}{part}": ("findings", make) for part, make in _parts.items()}


def results(which: str) -> str:
    """A table by its name, or a line that says it is not measured yet; README and map then stay silent."""
    folder, make = TABLES[which]
    found = read(folder)
    if found is None:
        return "" if make in (overview, link) else NOT_MEASURED
    return make(found)
