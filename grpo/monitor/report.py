"""report.html: one page, without network or server, that shows what a run learned and why.

It has the curves; the scores before and after; the same held-out questions, answered again and again while
the policy learns; and groups of completions with every token coloured by its gradient weight.
`grpo/monitor/page/` has the skeleton, the style and the scripts; they are put into one file, with the data
as JSON.

Texts of models and data sets may be hostile. Three measures keep them text: the JSON is escaped, so that no
string can leave its <script> element; the scripts make text nodes, never markup; and the page's
Content-Security-Policy runs only scripts with a known hash, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from data.types import TaskHook
from grpo.evaluation import reflection
from grpo.monitor import warnings
from grpo.monitor.curves import PAGE, WORDS, charts, hook_of_run, settings_of, with_arrow, write_curves
from grpo.storage.atomic import write_whole
from grpo.storage.jsonl import read

__all__ = ["read_metrics", "write_curves", "write_report"]

# of what the page shows: characters of a text, tokens of a completion, and so on
MOST_TEXT = 6000
MOST_TOKENS = 3000
MOST_STEPS = 12
MOST_GROUPS = 6
MOST_QUESTIONS = 12
# what a score is called and means; scale: share unless said otherwise
NAMES = yaml.safe_load((PAGE / "names.yaml").read_text("utf-8"))
# seconds without a new step after which a run is no longer taken to be alive, and steps
QUIET_SECONDS = 600
QUIET_STEPS = 30
SETTINGS = "recipe method model task steps prompts group cap seed temperature blind rewards".split()
PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}")


def read_metrics(run_folder: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, [] if there are none yet."""
    return read(Path(run_folder) / "metrics.jsonl")


def write_report(run_folder: str | Path, ended: str = "") -> list[Path]:
    """Write report.html from a run folder's config.yaml, metrics.jsonl, summary.json and samples.jsonl, and
    return the paths written. ended: why a run is over that has not come to its end. A missing file leaves a
    gap. Raises ValueError if one is broken."""
    folder = Path(run_folder)
    run = collect(folder, ended)
    write_page(folder / "report.html", run["name"], run, ("charts.js", "questions.js", "page.js"))
    return [folder / "report.html"]


def write_page(path: Path, title: str, data: Any, scripts: Sequence[str]) -> None:
    """One page without network or server. scripts: files of `grpo/monitor/page/`, behind dom.js; they find
    the data as `run`."""
    script = "\n".join((PAGE / name).read_text("utf-8") for name in ("dom.js", *scripts))
    style = (PAGE / "style.css").read_text("utf-8")
    policy = (
        f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src {_hash(style)}; "
        f"script-src {_hash(script)}"
    )
    parts = {"POLICY": policy, "TITLE": html.escape(f"{title} · Glimpse", quote=False)}
    parts |= {"STYLE": style, "DATA": embedded(data), "SCRIPT": script}
    skeleton = (PAGE / "page.html").read_text("utf-8")
    page = re.sub(r"<!--(POLICY|TITLE|STYLE|DATA|SCRIPT)-->", lambda match: parts[match[1]], skeleton)
    write_whole(path, page)


def embedded(data: Any) -> str:
    """JSON that is safe inside <script>: ASCII without `<`, `>`, `&` or control characters."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return re.sub(r"[<>&\x7f]", lambda match: f"\\u{ord(match[0]):04x}", text)


def collect(folder: Path, ended: str = "") -> dict[str, Any]:
    """Everything the page shows, as plain values. ended: as in `write_report`."""
    path = folder / "config.yaml"
    rows = read_metrics(folder)
    shown = read(folder / "samples.jsonl")
    known = settings_of(folder)
    settings = {key: known[key] for key in SETTINGS if key in known}
    settings = {key: _cut(value, 200) if isinstance(value, str) else value for key, value in settings.items()}
    hook = hook_of_run(folder)
    done = max((row["step"] for row in rows), default=0)
    # a run that was made longer has a summary from before; without evaluations there is none
    reached = done >= known["steps"] if rows and known.get("steps") else (folder / "summary.json").exists()
    summary = _summary(folder, rows, reached and not ended)
    data = Path(str(known["data"])).name if known.get("data") else ""
    # a run of an earlier version has no name
    name = known.get("name") or (data if known.get("task") == "jsonl" else known.get("recipe"))
    return {
        "name": _cut(str(name or folder.resolve().name), 80),
        "data": _cut(data, 80),
        "config": _cut(path.read_text("utf-8") if path.exists() else "", 60_000),
        "settings": settings,
        "summary": summary,
        "written": None if summary["finished"] else round(time.time()),
        "state": {"name": "finished"} if summary["finished"] else _state(folder, rows, known, ended),
        "compared": compared(both(summary), summary["final"], hook),
        "step": done,
        "charts": _rounded(charts(rows, hook)),
        "warnings": warnings.warnings(rows),
        "reflection": _rounded(_reflection(rows)),
        "questions": _questions(shown),
        "moments": _moments(shown),
    }


def _summary(folder: Path, rows: Sequence[Mapping[str, Any]], finished: bool) -> dict[str, Any]:
    """{"base": {name: number}, "final": {...}, "seconds", "finished"}. Unfinished: first, last evaluation."""
    path = folder / "summary.json"
    if finished and path.exists():
        try:
            raw = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        scores = {name: _numbers(raw.get(name, {})) for name in ("base", "final")}
        # of a resumed run it has those of the last start
        seconds = None if raw.get("resumed_after") else raw.get("seconds")
        return scores | {"seconds": seconds, "finished": True}
    found = [{key.removeprefix("eval/"): row[key] for key in row if key.startswith("eval/")} for row in rows]
    evaluations = [_numbers(scores) for scores in found if scores] or [{}]
    return {"base": evaluations[0], "final": evaluations[-1], "seconds": None, "finished": finished}


def _state(
    folder: Path, rows: Sequence[Mapping[str, Any]], known: Mapping[str, Any], ended: str
) -> dict[str, Any]:
    """Whether an unfinished run lives: {"name": stopped | running | silent, "why", "until"}. until: of a
    running one, when the page will have been written again (seconds since 1970)."""
    if ended:
        return {"name": "stopped", "why": _cut(ended, 500)}
    path = folder / "metrics.jsonl"
    if not rows:
        return {"name": "silent", "why": "No step is done yet."}
    seconds = [row["step_time"] for row in rows[-20:] if row.get("step_time")]
    pace = median(seconds) if seconds else 60.0
    last = path.stat().st_mtime
    if time.time() - last > QUIET_SECONDS + QUIET_STEPS * pace:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last))
        return {
            "name": "silent",
            "why": f"The last step was written on {when}: the run has stopped, or hangs.",
        }
    every = (known.get("eval") or {}).get("every") or (known.get("save") or {}).get("every") or 0
    return {"name": "running", "until": round(time.time() + QUIET_SECONDS + (QUIET_STEPS + 2 * every) * pace)}


def both(summary: Mapping[str, Any]) -> dict[str, float]:
    """The first evaluation; of an unfinished run without the sets that are asked again at the end only."""
    base, final = summary["base"], summary["final"]
    return base if summary["finished"] else {key: value for key, value in base.items() if key in final}


def compared(base: Mapping[str, float], final: Mapping[str, float], hook: TaskHook) -> list[dict[str, Any]]:
    """The table of before and after, a part for each set of questions: {title, rows, same}. A row: {label,
    says, inner, share, n, before, after}. n: questions. same: the rows whose number has not changed."""
    own = {**hook.columns, **{name: label for *_, labels in hook.charts for name, label in labels.items()}}
    known = {name: {"label": with_arrow(label)} for name, label in own.items()} | NAMES["scores"]
    titles = {"": "", **NAMES["sets"], **hook.sets}
    parts: dict[str, dict[str, Any]] = {}
    # each task's accuracy below the accuracy of all
    for key in sorted(dict.fromkeys([*base, *final]), key=lambda key: "accuracy" not in key.split("/")):
        title, _, name = key.partition("/")
        # "pairs/accuracy" is of a set of questions, "accuracy/Count" is not
        title = title if title in titles or name.partition("/")[0] in known else ""
        name = name if title else key
        kind, _, task = name.partition("/")
        if kind in NAMES["hidden"] or (kind == "aha" and "/" in task):
            continue
        inner = bool(task) and kind != "aha"
        about = known.get(kind if inner else name)
        before, after = base.get(key), final.get(key)
        part = parts.setdefault(title, {"title": titles.get(title, title), "rows": [], "same": []})
        part["same" if before == after else "rows"].append(row := about_row(about, name))
        row |= {"label": task, "says": ""} if inner else {}
        row |= {"inner": inner, "before": before, "after": after, "n": None}
        row["share"] &= all(0 <= value <= 1 for value in (before, after) if value is not None)
        if row["share"] and about and "of" not in about:
            count = "/".join(filter(None, (title, "questions", task if inner else "")))
            row["n"] = final.get(count, base.get(count))
    return list(parts.values())


def about_row(about: Mapping[str, str] | None, name: str) -> dict[str, Any]:
    """What a score is called and means. None: the page does not know it, so it may be about some questions
    only, and a number of them is not given."""
    about = about or {}
    share = about.get("scale", "share") == "share"
    return {
        "label": about.get("label", name.replace("_", " ")),
        "says": about.get("says", ""),
        "share": share,
    }


def _reflection(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each list of words and third of the run: how often completions reflected, and what went with it.
    Parts without reflection are left out."""
    steps = [row for row in rows if "completions/count" in row]
    third = -(-len(steps) // 3)
    found = []
    for name, title in WORDS.items():
        parts = [steps[at : at + third] for at in range(0, len(steps), third)] if len(steps) >= 6 else [steps]
        for part in [*parts, steps] if len(parts) > 1 else parts:
            if (pooled := reflection.pooled(part, name)) and pooled["share"]:
                gain = pooled.pop("gain")
                words = [word.replace("*", "…") for word in reflection.LISTS[name]]
                line = {"list": title, "words": words, "from": part[0]["step"], "to": part[-1]["step"]}
                gain = gain and [gain.mean, gain.low, gain.high, gain.groups]
                found.append(line | pooled | {"gain": gain})
    return found


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            flat[prefix + str(key)] = value
    return flat


def _questions(shown: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each held-out question with its answers, step by step."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for group in shown:
        if group.get("kind") == "heldout" and group.get("completions"):
            # a run folder of an earlier version may have one uid twice
            key = (str(group.get("uid")), str(group.get("question")))
            question = found.setdefault(key, _asked(group) | {"answers": []})
            question["answers"].append({"step": group["step"], **_completion(group["completions"][0])})
    for question in found.values():
        question["answers"] = _spread(question["answers"], MOST_STEPS)
    # first those whose answer became right, because they show what was learned
    right = lambda answer: (answer["parts"] or {}).get("accuracy", answer["reward"]) or 0
    learned = lambda question: right(question["answers"][-1]) - right(question["answers"][0])
    return sorted(list(found.values())[:MOST_QUESTIONS], key=learned, reverse=True)


def _moments(shown: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Steps spread over the run, each with its groups of completions."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for group in shown:
        if group.get("kind") == "train":
            by_step.setdefault(group["step"], []).append(group)

    def shown_group(group: Mapping[str, Any]) -> dict[str, Any]:
        return _asked(group) | {"completions": [_completion(c) for c in group.get("completions", [])]}

    return [
        {"step": step, "groups": [shown_group(group) for group in by_step[step][:MOST_GROUPS]]}
        for step in _spread(sorted(by_step), MOST_STEPS)
    ]


def _asked(group: Mapping[str, Any]) -> dict[str, Any]:
    picture = group.get("picture")
    safe = isinstance(picture, str) and PICTURE.fullmatch(picture) is not None
    return {
        "uid": _cut(group.get("uid", ""), 200),
        "question": _cut(group.get("question", ""), MOST_TEXT),
        "task": _cut(group.get("task", ""), 80),
        "choices": [_cut(choice, 500) for choice in group.get("choices", [])],
        "answer": _cut(group.get("answer", ""), 500),
        "picture": picture if safe else None,
    }


def _completion(completion: Mapping[str, Any]) -> dict[str, Any]:
    kept = {
        "tokens": [_cut(token, 200) for token in completion.get("tokens", [])[:MOST_TOKENS]],
        "length": len(completion.get("tokens", [])),
        "text": _cut(completion.get("text", ""), MOST_TEXT),
        "stopped": bool(completion.get("stopped", True)),
        "clipped": [bool(c) for c in completion.get("clipped", [])[:MOST_TOKENS]],
    }
    for name in ("reward", "parts", "advantage"):
        kept[name] = _rounded(completion.get(name))
    for name in ("weight", "logp", "kl"):
        kept[name] = _rounded(list(completion.get(name) or [])[:MOST_TOKENS])
    return kept


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _rounded(value: Any) -> Any:
    """Numbers with four significant digits, which keep the page small; null for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def _cut(text: Any, most: int) -> str:
    text = str(text)
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters not shown)"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
