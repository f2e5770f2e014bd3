"""The curves of a run: which metrics are shown together; and curves.png (needs matplotlib).

curves.png and report.html share `PANELS` (page/panels.yaml). Thin lines are measurements, thick lines their
running mean, dots are held-out questions.
"""

from __future__ import annotations

import fnmatch
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.sources.table import hook_of
from data.types import TaskHook
from grpo.storage.atomic import write_whole
from grpo.storage.jsonl import read


@dataclass(frozen=True)
class Panel:
    """One chart. lines, dots: {pattern of training metrics, of held-out metrics: label}; "*" becomes the
    label. scale: number, share (0-1, shown in percent) or log. band: the metrics below and above the line.
    main: False hides it in the report until asked for, and leaves it out of curves.png. exact: the numbers
    have no noise, so there is no running mean."""

    title: str
    note: str
    lines: Mapping[str, str]
    scale: str = "number"
    dots: Mapping[str, str] = field(default_factory=dict)
    band: Sequence[str] = ()
    main: bool = True
    exact: bool = False


PAGE = Path(__file__).parent / "page"
WORDS = {"visualthinker": "VisualThinker’s list", "vlaa": "VLAA’s list"}
PANELS = tuple(Panel(**panel) for panel in yaml.safe_load((PAGE / "panels.yaml").read_text("utf-8")))


def own_panels(hook: TaskHook) -> list[Panel]:
    """The panels of a task's own measurements."""
    return [
        Panel(title, note, {f"aha/{name}": with_arrow(label) for name, label in labels.items()}, "share")
        for title, note, labels in hook.charts
    ]


def with_arrow(label: str) -> str:
    """A label with a real arrow."""
    return label.replace("->", "\u2192")


def charts(rows: Sequence[Mapping[str, Any]], hook: TaskHook, most: int = 600) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl -> what each panel draws: {title, note, scale, main, zero, lines: [{label, x, y,
    smooth, dots, band}]}. Panels and metrics without a number are left out. Lines of more than `most` points
    are thinned by averaging neighbours. zero: a sentence to show instead, if every number is 0; else None."""
    drawn = []
    for panel in [*PANELS, *own_panels(hook)]:
        lines = [line for how in ("lines", "dots") for line in _lines(rows, panel, how, most)]
        if lines:
            about = {name: getattr(panel, name) for name in ("title", "note", "scale", "main")}
            steps = len({x for line in lines for x in line["x"] if x})
            zero = not any(any(line["y"]) or any(map(any, line.get("band", ()))) for line in lines)
            drawn.append(about | {"zero": f"0 in all {steps} steps" if zero else None, "lines": lines})
    return drawn


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of a run, {} if its config.yaml is not there. Raises ValueError if it is not YAML."""
    path = folder / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text("utf-8")) if path.exists() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    return tree if isinstance(tree, dict) else {}


def hook_of_run(folder: Path) -> TaskHook:
    """The hook of the task of a run."""
    return hook_of(str(settings_of(folder).get("task")))


def _lines(rows: Sequence[Mapping[str, Any]], panel: Panel, how: str, most: int) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    found = []
    for pattern, label in getattr(panel, how).items():
        for key in fnmatch.filter(keys, pattern):
            x, y = _points(rows, key)
            if not x:
                continue
            name = label.replace("*", key.removeprefix(pattern.removesuffix("*")))
            line: dict[str, Any] = {"label": name, "dots": how == "dots"}
            line |= {"x": _thinned(x, most), "y": _thinned(y, most)}
            if how == "lines":
                line["smooth"] = line["y"] if panel.exact else _smooth(line["y"])
                band = [_thinned(_points(rows, edge)[1], most) for edge in panel.band]
                if band and all(len(edge) == len(line["x"]) for edge in band):
                    line["band"] = band
            found.append(line)
    return found


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    measured = [row for row in rows if type(row.get(key)) in (int, float)]
    return [row["step"] for row in measured], [row[key] for row in measured]


def _thinned(values: list[float], most: int) -> list[float]:
    if len(values) <= most:
        return values
    size = -(-len(values) // most)
    return [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]


def _smooth(values: list[float]) -> list[float]:
    """Running mean over about a twelfth of the run, centred; the window is smaller near the ends."""
    reach = [min(len(values) // 24, i, len(values) - 1 - i) for i in range(len(values))]
    windows = [values[i - r : i + r + 1] for i, r in enumerate(reach)]
    return [sum(window) / len(window) for window in windows]


def write_curves(run_folder: str | Path, say: Callable[[str], None] = print) -> list[Path]:
    """Draw curves.png from metrics.jsonl, and return the paths written: none, and `say` is called with the
    reason, without matplotlib or without metrics."""
    path = Path(run_folder) / "curves.png"
    try:
        import matplotlib
    except ImportError:
        say("curves.png: skipped, matplotlib is not installed (pip install matplotlib)")
        return []
    metrics = path.with_name("metrics.jsonl")
    drawn = [chart for chart in charts(read(metrics), hook_of_run(path.parent)) if chart["main"]]
    if not drawn:
        say(f"curves.png: skipped, {metrics} holds no metrics yet")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(drawn))
    deep = -(-len(drawn) // columns)
    size = (3.7 * columns, 2.75 * deep)
    with plt.style.context(PAGE / "curves.mplstyle"):
        figure, axes = plt.subplots(deep, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, chart in zip(axes.flat, drawn):
            _draw(axis, chart)
        for axis in axes.flat[len(drawn) :]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("step")
        drawing = io.BytesIO()
        figure.savefig(drawing, format="png", dpi=150, metadata={"Software": None})
        plt.close(figure)
    write_whole(path, drawing.getvalue())
    return [path]


COLOURS = ("#3a6ea5", "#d07c2e", "#3d8f6e", "#a4527c", "#7a6cb5", "#8a7a3c", "#5b8a99", "#b05050")


def _draw(axis: Any, chart: Mapping[str, Any]) -> None:
    axis.set_title(chart["title"])
    if chart["zero"]:
        axis.text(0.5, 0.5, chart["zero"], transform=axis.transAxes, ha="center", va="center")
        axis.set(yticks=[], xticks=[])
        return
    labels = list(dict.fromkeys(line["label"] for line in chart["lines"]))
    for line in chart["lines"]:
        colour = COLOURS[labels.index(line["label"]) % len(COLOURS)]
        if line["dots"]:
            alone = not any(other["label"] == line["label"] and not other["dots"] for other in chart["lines"])
            look = dict(ms=4, color=colour, mec="#fdfcf9", mew=0.7, zorder=5)
            axis.plot(line["x"], line["y"], "o", label=line["label"] if alone else None, **look)
            continue
        if "band" in line:
            axis.fill_between(line["x"], *line["band"], color=colour, alpha=0.10, lw=0)
        axis.plot(line["x"], line["y"], color=colour, alpha=0.28, lw=0.8)
        axis.plot(line["x"], line["smooth"], color=colour, lw=1.8, label=line["label"], zorder=4)
    if chart["scale"] == "log" and any(y > 0 for line in chart["lines"] for y in line["y"]):
        axis.set_yscale("log", nonpositive="mask")
    if chart["scale"] == "share":
        from matplotlib.ticker import PercentFormatter

        high = max(y for line in chart["lines"] for y in line["y"])
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high > 0.25 else 1))
        axis.set_ylim(*((-0.03, 1.03) if high > 0.25 else (-0.03 * max(high, 0.01), 1.1 * max(high, 0.01))))
    if len(labels) > 1:
        axis.legend(loc="best", handlelength=1.2, borderaxespad=0.2, labelspacing=0.25)
