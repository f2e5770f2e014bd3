"""The figures of docs/results/findings.md:  python tests/bench/findings_figures.py [--json FILE] [--out DIR]

They are drawn from the records of tests/bench/findings.py and nothing else; numbers and intervals are those
of the tables (tests/bench/findings_tables.py). A figure whose records are missing is skipped with one line.

The colours are those of Okabe and Ito, and every line has a marker or a name of its own. Text is mid-grey and
the background transparent, so a figure can be read on a light page and on a dark one.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data.shapes.world import CHANCE
from grpo.storage.atomic import write_whole
from tests.bench import findings_tables as tables
from tests.bench.findings_tables import (
    MEASURED,
    MEASURES,
    START,
    UNTRAINED,
    Estimate,
    Measure,
    Record,
    arms,
    estimate,
    name_of,
)

# Okabe and Ito's, without black and yellow, which one of the pages would swallow
BLUE = "#0072B2"
VERMILLION = "#D55E00"
COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE_FILE = Path(__file__).resolve().parents[2] / "grpo" / "monitor" / "page" / "curves.mplstyle"
# contrast of 4.3 with white and 4.4 with GitHub's dark page
GREY = "#7a7a7a"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": "#80808044",
    # text stays text: a sixth of the size, and it can be searched
    "svg.fonttype": "none",
    "svg.hashsalt": "glimpse",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}
WIDE = 8.6
# where some arms have this many times the steps of others, the axis of steps is logarithmic
FAR = 4
# neighbouring steps on each side over which a noisy curve is averaged
REACH = 4
CURVES = (
    ("accuracy", "accuracy, sampled"),
    ("length", "length, tokens"),
    ("looks", "share that looks"),
    ("entropy", "entropy, nats"),
)
# finding -> the measures of its figure
PANELS = {
    "main": ("heldout", "pairs", "length", "looks"),
    "world": ("noisy", "heldout", "length", "again"),
    "noisier": ("noisier", "noisy", "noisy_count", "heldout"),
    "a": ("heldout", "pairs", "crowd", "large", "count", "noisy"),
    "b": ("heldout", "length", "looks", "entropy"),
    "c": ("heldout", "format", "length", "truncated"),
    "d": ("heldout", "noisy", "length", "looks"),
    "e": ("heldout", "sound", "length", "looks"),
    "f": ("heldout", "sampled", "length", "truncated"),
    "g": ("heldout", "length", "again", "steps"),
    "h": ("heldout", "grey", "length", "looks"),
    "i": ("heldout", "count", "length", "looks"),
}
# arms whose lines would be too many in the figures of the mechanism
LEFT_OUT = ("base_0.003", "instruct_0.003")
Figure = Any


def plt():
    """matplotlib's pyplot, without a window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def percent(axis) -> None:
    """Show an axis of shares in percent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def trained(found: Sequence[Record], finding: str, key: str) -> dict[str, list[Record]]:
    """The arms of a finding that were trained by it and have `key` in a record."""
    rows = arms(found, finding)
    hidden = {*UNTRAINED, *LEFT_OUT, *(arm for arm in rows if arm.endswith(START))}
    return {
        arm: part for arm, part in rows.items() if arm not in hidden and any(each.get(key) for each in part)
    }


def grid(count: int, columns: int, height: float, **how: Any) -> tuple[Figure, list]:
    """A figure of `count` panels that share their axes, in rows of at most `columns`. -> the figure,
    the panels."""
    columns = min(columns, count)
    deep = -(-count // columns)
    size = (WIDE, 0.55 + height * deep)
    how = {"sharex": True, "sharey": True} | how
    figure, axes = plt().subplots(deep, columns, figsize=size, squeeze=False, layout="constrained", **how)
    for axis in axes.flat[count:]:
        axis.axis("off")
    for above in axes.flat[max(0, count - columns) : count]:
        above.tick_params(labelbottom=True)
    return figure, [*axes.flat[:count]]


# ---- one row an arm


def dots(found: Sequence[Record], finding: str) -> Figure | None:
    """A dot an arm in each panel, with its interval and a mark for each seed; a ring is the policy from which
    RL began. The dotted line is chance."""
    every = arms(found, finding)
    rows = [arm for arm in every if not arm.endswith(START)]
    panels = [MEASURES[name] for name in PANELS[finding]]
    panels = [each for each in panels if any(estimate(part, each) for part in every.values())]
    if not rows or not panels:
        return None
    size = (WIDE, 0.85 + 0.27 * len(rows))
    figure, axes = plt().subplots(
        1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for axis, measure in zip(axes[0], panels):
        for place, arm in enumerate(rows):
            first, last = (estimate(every.get(name, ()), measure) for name in (tables.before(arm), arm))
            dot(axis, place, first, last, GREY if arm in UNTRAINED else BLUE)
        scale(axis, measure)
    axes[0, 0].set_yticks(range(len(rows)), [name_of(finding, arm) for arm in rows])
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def dot(axis, place: int, before: Estimate | None, after: Estimate | None, colour: str) -> None:
    """One row of a panel."""
    if before and after:
        axis.plot([before.value, after.value], [place, place], color=colour, lw=0.8)
    if before:
        axis.plot(before.value, place, "o", ms=6, mfc="none", mec=colour)
    if after:
        axis.plot([after.low, after.high], [place, place], color=colour, lw=2.5, solid_capstyle="butt")
        axis.plot(after.value, place, "o", ms=6, color=colour)
        if len(after.values) > 1:
            axis.plot(after.values, [place] * len(after.values), "|", ms=8, mew=1.2, color=colour)


def scale(axis, measure: Measure) -> None:
    """Title, range and ticks of a panel."""
    axis.set_title(measure.label, fontsize=8.5)
    axis.grid(axis="y", visible=False)
    if measure.chance is not None:
        axis.axvline(measure.chance, color=GREY, lw=1, ls=":")
    if measure.share:
        axis.set_xlim(-0.05, 1.05)
        axis.set_xticks([0, 0.5, 1])
        percent(axis.xaxis)
    else:
        axis.set_xlim(left=0, right=1.06 * axis.get_xlim()[1])


# ---- through training


def smooth(values: Sequence[float | None]) -> np.ndarray:
    """Running mean, centred; the window is smaller near the ends. Missing numbers are left out."""
    y = np.array(values, float)
    windows = [y[max(0, i - REACH) : i + REACH + 1] for i in range(len(y))]
    return np.array([np.nan if np.isnan(window).all() else np.nanmean(window) for window in windows])


def curve(part: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps (S,), values (seeds, S)) of a curve of an arm, smoothed; None where no step has a number."""
    found = [record["curve"] for record in part if tables.known(record, key)]
    if not found:
        return None
    length = min(len(each[key]) for each in found)
    return np.array(found[0]["step"][:length]), np.stack([smooth(each[key][:length]) for each in found])


def training(found: Sequence[Record], finding: str) -> Figure | None:
    """Accuracy, length, looking and entropy over steps, and accuracy against length."""
    rows = trained(found, finding, "curve")
    if not rows:
        return None
    figure, axes = plt().subplots(2, 3, figsize=(WIDE, 4.7), layout="constrained")
    *panels, path, names = axes.flat
    look = {arm: (COLOURS[i % 6], MARKERS[i % 6]) for i, arm in enumerate(rows)}
    for axis, (key, title) in zip(panels, CURVES):
        axis.set(title=title, xlabel="step")
        for arm, part in rows.items():
            over_steps(axis, part, key, look[arm])
        if key in ("accuracy", "looks"):
            shares(axis)
        ends = [line.get_xdata()[-1] for line in axis.lines]
        if ends and max(ends) > FAR * min(ends):
            axis.set_xscale("symlog", linthresh=10, linscale=0.4)
            axis.set_xlim(left=0)
    for arm, part in rows.items():
        accuracy_by_length(path, part, *look[arm])
    path.set(title="accuracy against length", xlabel="length, tokens")
    shares(path)
    names.axis("off")
    for arm, (colour, marker) in look.items():
        names.plot([], [], color=colour, marker=marker, lw=1.6, ms=5, label=name_of(finding, arm))
    names.legend(loc="center left", borderaxespad=0)
    return figure


def shares(axis) -> None:
    """The y axis from 0 to 100 %."""
    axis.set_ylim(-0.03, 1.03)
    percent(axis.yaxis)


def over_steps(axis, part: Sequence[Record], key: str, look: tuple[str, str], whole: bool = False) -> None:
    """The mean over seeds, smoothed, in the band of their range. Imitation samples nothing: of it the greedy
    answers to held-out questions are shown, as a dashed line. look: colour and marker. whole: over the share
    of training that is done, not over steps."""
    line, how = curve(part, key), "-"
    if line is None:
        line, how = evaluated(part, key), "--"
    if line is None:
        return
    x, y = line
    x = x / x[-1] if whole else x
    colour, marker = look
    if len(y) > 1:
        axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, lw=0)
    every = max(1, len(x) // 5)
    axis.plot(x, y.mean(0), how, color=colour, lw=1.6, marker=marker, ms=4, markevery=(every // 2, every))


def evaluated(part: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps (S,), values (seeds, S)) of the evaluations during training; None where there are none."""
    found = [record["evals"] for record in part if record.get("evals", {}).get(key)]
    if not found:
        return None
    length = min(len(each[key]) for each in found)
    return np.array(found[0]["step"][:length]), np.array([each[key][:length] for each in found], float)


def accuracy_by_length(axis, part: Sequence[Record], colour: str, marker: str) -> None:
    """The way of an arm: a ring where it begins, a full mark where it ends."""
    x, y = (curve(part, key) or evaluated(part, key) for key in ("length", "accuracy"))
    if x is None or y is None:
        return
    x, y = x[1].mean(0), y[1].mean(0)
    axis.plot(x, y, color=colour, lw=1.6)
    axis.plot(x[0], y[0], marker, ms=6, mfc="none", mec=colour)
    axis.plot(x[-1], y[-1], marker, ms=6, color=colour)


# ---- what is written, and what is pushed


def lengths(found: Sequence[Record], finding: str) -> Figure | None:
    """How long right answers (up) and wrong ones (down) are, as shares of all sampled answers."""
    rows = trained(found, finding, "lengths")
    if not rows:
        return None
    rows = {arm: part for arm, part in arms(found, finding).items() if arm == "base"} | rows
    counts = {arm: counted(part) for arm, part in rows.items()}
    longest = max(length for each in counts.values() for kind in each.values() for length in kind)
    width = -(-longest // 40)
    figure, axes = grid(len(rows), 3, 1.5)
    for axis, (arm, each) in zip(axes, counts.items()):
        total = sum(sum(kind.values()) for kind in each.values())
        for kind, colour, up in (("right", BLUE, 1), ("wrong", VERMILLION, -1)):
            x, y = binned(each[kind], width)
            axis.bar(x, up * y / total, width, align="edge", color=colour, label=kind)
        axis.axhline(0, color=GREY, lw=0.8)
        axis.set_title(name_of(finding, arm))
        axis.yaxis.set_major_formatter(lambda y, _: f"{abs(y):.0%}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.supxlabel("length, tokens", fontsize=9)
    figure.supylabel("share of answers", fontsize=9)
    return figure


def counted(part: Sequence[Record]) -> dict[str, dict[int, int]]:
    """{"right", "wrong": {length: answers}} over the seeds of an arm."""
    found: dict[str, dict[int, int]] = {"right": {}, "wrong": {}}
    for record in part:
        for kind, counts in record["lengths"].items():
            for length, count in counts.items():
                found[kind][int(length)] = found[kind].get(int(length), 0) + count
    return found


def binned(counts: dict[int, int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(left edges, answers) of bins of `width` tokens from 0 on."""
    y = np.zeros(max(counts, default=0) // width + 1)
    for length, count in counts.items():
        y[length // width] += count
    return width * np.arange(len(y)), y


def pushed(found: Sequence[Record], finding: str, most: int = 6) -> Figure | None:
    """The words that the gradient pushes up and down most, at each step where it was asked."""
    rows = trained(found, finding, "pushes")
    if not rows:
        return None
    at = sorted({int(step) for part in rows.values() for each in part for step in each.get("pushes", ())})
    panels = [(arm, step) for arm in rows for step in at]
    figure, axes = grid(len(panels), len(at), 0.6 + 0.17 * 2 * most, sharex="row", sharey=False)
    for axis, (arm, step) in zip(axes, panels):
        each = [record["pushes"][str(step)] for record in rows[arm] if str(step) in record.get("pushes", {})]
        when = f"after {step} steps" if step else f"{name_of(finding, arm)}, at first"
        axis.set_title(when, fontsize=8.5)
        words = {word for push in each for word in push}
        push_bars(axis, {word: np.mean([push.get(word, 0) for push in each]) for word in sorted(words)}, most)
    return figure


def push_bars(axis, push: dict[str, float], most: int) -> None:
    """Bars of the words that are pushed most, up above down."""
    ranked = sorted(push, key=lambda word: -push[word])
    words = ranked[:most] + ranked[-most:]
    for place, word in enumerate(words):
        axis.barh(place, push[word], color=BLUE if push[word] > 0 else VERMILLION, height=0.75)
    axis.set_yticks(range(len(words)), words)
    axis.set_ylim(len(words) - 0.5, -0.5)
    axis.axvline(0, color=GREY, lw=0.8)
    # numbers such as -0.0025 are wide
    axis.locator_params(axis="x", nbins=3)
    axis.grid(axis="y", visible=False)


def passes(found: Sequence[Record], finding: str) -> Figure | None:
    """pass@k of sound answers: a panel for each arm, its base dashed."""
    rows = trained(found, finding, "passes")
    if not rows:
        return None
    every = arms(found, finding)
    figure, axes = grid(len(rows), 4, 1.7)
    for axis, arm in zip(axes, rows):
        pair = ((tables.before(arm), GREY, "--", "before RL"), (arm, BLUE, "-", "after"))
        for name, colour, how, label in pair:
            line = tables.passes_of(every.get(name, ()))
            low, high = ([getattr(each, end) for each in line.values()] for end in ("low", "high"))
            axis.fill_between([*line], low, high, color=colour, alpha=0.2, lw=0)
            axis.plot([*line], [each.value for each in line.values()], how, color=colour, lw=1.6, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
        axis.set_title(name_of(finding, arm))
        shares(axis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.supxlabel("k", fontsize=9)
    figure.supylabel("pass@k", fontsize=9)
    return figure


# ---- the page's list


def overview(found: Sequence[Record], finding: str = "") -> Figure | None:
    """The README's figure: accuracy against length through training, and accuracy over steps."""
    ways = tables.overview_arms(found)
    if len(ways) < 2:
        return None
    figure, (path, steps) = plt().subplots(
        1, 2, figsize=(WIDE, 3.3), width_ratios=(1.25, 1), sharey=True, layout="constrained"
    )
    for (name, part), *look in zip(ways.items(), COLOURS, MARKERS):
        accuracy_by_length(path, part, *look)
        over_steps(steps, part, "accuracy", tuple(look), whole=True)
        steps.plot([], [], color=look[0], marker=look[1], ms=4, lw=1.6, label=name)
    path.axhline(np.mean([*CHANCE.values()]), color=GREY, lw=1, ls=":")
    path.set(
        title="ring: at first, full mark: at last", xlabel="length of answers, tokens", ylabel="accuracy"
    )
    steps.set(xlabel="share of training")
    percent(steps.xaxis)
    shares(path)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


# behind the name of a finding -> what the figure shows, how it is drawn
KINDS: dict[str, tuple[str, Callable[[Sequence[Record], str], Figure | None]]] = {
    "": ("every arm with its interval", dots),
    "-training": ("accuracy, length, looking and entropy through training", training),
    "-lengths": ("lengths of right and wrong answers", lengths),
    "-pushes": ("the words that the gradient pushes at first, after 20 and after 100 steps", pushed),
    "-passes": ("pass@k of answers that are right and true, before RL and after", passes),
    "overview": ("accuracy and length through training, five ways", overview),
}
# file -> (finding, kind)
MECHANISM = {
    f"{finding}{kind}": (finding, kind) for finding in "abc" for kind in ("-training", "-lengths", "-pushes")
}
FIGURES = {"overview": ("", "overview")} | {finding: (finding, "") for finding in PANELS}
FIGURES |= {"e-passes": ("e", "-passes"), "f-lengths": ("f", "-lengths"), "i-passes": ("i", "-passes")}
FIGURES |= MECHANISM


def draw(file: Path = MEASURED, folder: Path | None = None, say: Callable[[str], None] = print) -> list[Path]:
    """Draw every figure whose records are there, into `folder` (default: beside the file), as SVG. -> the
    paths written. Raises ValueError that names the file."""
    folder = folder or file.parent
    found = tables.records(file)
    written = []
    with plt().style.context([STYLE_FILE, STYLE]):
        for name, (finding, kind) in FIGURES.items():
            figure = KINDS[kind][1](found, finding)
            if figure is None:
                say(f"{name}: skipped, its records are not measured yet")
                continue
            drawing = io.BytesIO()
            figure.savefig(drawing, format="svg", metadata={"Date": None})
            plt().close(figure)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / f"{name}.svg", drawing.getvalue())
            written.append(folder / f"{name}.svg")
    return written


def markdown(names: Sequence[str], folder: Path, ahead: str = "") -> str:
    """The figures of these names that are in the folder. ahead: of the links, docs/results/ for the
    README."""
    drawn = [name for name in names if (folder / f"{name}.svg").exists()]
    return "".join(f"![{about(name)}]({ahead}findings/{name}.svg)\n\n" for name in drawn)


def about(name: str) -> str:
    """What a figure shows, for who cannot see it."""
    finding, kind = FIGURES[name]
    return f"{finding}: {KINDS[kind][0]}".removeprefix(": ")


def of_section(finding: str) -> list[str]:
    """The figures that stand in the section of a finding."""
    return [name for name, (of, _) in FIGURES.items() if of == finding and name not in MECHANISM]


def main(argv: list[str] | None = None) -> int:
    """Draw. -> exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=MEASURED)
    parser.add_argument("--out", type=Path, help="folder of the figures; default: beside the file")
    args = parser.parse_args(argv)
    try:
        for path in draw(args.json, args.out):
            print(path)
    except (ValueError, OSError, ImportError) as error:
        print(f"findings_figures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
