"""The curve of --checkpoints: one benchmark over the steps of runs, as a table, as JSON and as a picture.

A run's points are its complete checkpoints and the weights that `save.weights_every` kept. Who takes the best
of them by the same questions has chosen by chance, too: its score is too high. The table says so.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo.evaluation.protocols import rounded
from grpo.evaluation.tables import interval, markdown, table
from grpo.storage import adapter, checkpoint
from grpo.storage.atomic import write_whole

# the name of the policy from which the runs began, as step 0
BASE = "base"


class Point(NamedTuple):
    """One policy of a run: the step after which it was kept, and its folder."""

    run: str
    step: int
    folder: Path


def points_of(run: Path) -> list[Point]:
    """A run's policies in the order of their steps; of a step with both, the checkpoint. Raises
    ValueError."""
    found = {}
    for folder in sorted((run / "weights").glob("step_??????")):
        if (folder / "config.json").is_file() or adapter.is_adapter(folder):
            found[folder.name] = folder
    found |= {folder.name: folder for folder in checkpoint.complete(run)}
    if not found:
        what = "a run folder with complete checkpoints, or with weights (save.weights_every)"
        raise ValueError(f"argument --checkpoints: {run} is not {what}")
    return [Point(str(run), int(name.removeprefix("step_")), found[name]) for name in sorted(found)]


def rows_of(points: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """The table: one line a point. points: {"run", "step", "scores"}."""
    names = short_names([point["run"] for point in points])
    tasks = list(dict.fromkeys(task for point in points for task in point["scores"]["tasks"]))
    tasks = tasks if len(tasks) > 1 else []
    header = ["run", "step", "n", "score", "95 % interval", "format", "unread", "length", *tasks]
    rows = []
    for point in points:
        found = point["scores"]
        total = found["total"]
        shares = [rounded(found[name]) for name in ("format", "extraction_failure")]
        row = [names[point["run"]], point["step"], found["questions"], rounded(total["value"])]
        row += [interval(*total["interval"]), *shares, f"{found['mean_length']:.1f}"]
        accuracies = (found["tasks"].get(task, {}).get("accuracy") for task in tasks)
        rows.append(row + ["" if share is None else rounded(share) for share in accuracies])
    return header, rows


def short_names(runs: Sequence[str]) -> dict[str, str]:
    """{run: the last part of its path; the whole path where two runs share that part}."""
    last = {run: Path(run).name or run for run in runs}
    shared = [name for name in last.values() if [*last.values()].count(name) > 1]
    return {run: run if name in shared else name for run, name in last.items()}


def warnings(points: Sequence[Mapping[str, Any]], split: str) -> list[str]:
    """For each run with several points: its last score, its best one, and what the best one is worth."""
    names = short_names([point["run"] for point in points])
    lines = []
    for run in dict.fromkeys(point["run"] for point in points):
        own = [point for point in points if point["run"] == run]
        if len(own) < 2:
            continue
        score = lambda point: point["scores"]["total"]["value"]
        best = max(own, key=score)
        said = f"{names[run]}: last (step {own[-1]['step']}) {rounded(score(own[-1]))}"
        said += f", best (step {best['step']}) {rounded(score(best))}"
        picked = f"The best of {len(own)} was picked by these very questions (split {split})"
        lines.append(f"{said}. {picked}: its score is too high. Report the last, or pick on other questions.")
    return lines


def as_text(points: Sequence[Mapping[str, Any]], split: str) -> str:
    """The table and the warnings, for a terminal."""
    return "\n".join([table(*rows_of(points)), *warnings(points, split)])


def as_page(points: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    """The same as a page of Markdown."""
    lines = [f"# {config['task']} over steps, split {config['split']}", ""]
    lines += [f"Protocol `{config['protocol']}` ({config['checker']}, {config['total']} total).", ""]
    lines += [markdown(*rows_of(points)), "", *(f"- {line}" for line in warnings(points, config["split"]))]
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Mapping[str, Any]], title: str, path: Path) -> str:
    """Draw the scores over the steps, one line a run with its 95 % intervals, as a PNG file. -> what is to be
    said: nothing, or that matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return f"{path.name}: skipped, matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    names = short_names([point["run"] for point in points])
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for run in dict.fromkeys(point["run"] for point in points if point["run"] != BASE):
        # every run begins at the base
        own = [point for point in points if point["run"] in (BASE, run)]
        steps = [point["step"] for point in own]
        totals = [point["scores"]["total"] for point in own]
        (line,) = axis.plot(steps, [total["value"] for total in totals], marker="o", label=names[run])
        low, high = ([total["interval"][end] for total in totals] for end in (0, 1))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("step")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend()
    drawing = io.BytesIO()
    figure.savefig(drawing, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    write_whole(path, drawing.getvalue())
    return ""
