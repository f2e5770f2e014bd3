"""report.html of a bridge: what was kept and why the rest was not, with examples; and what it cost.

The page is made like a run's (`grpo/monitor/report.py`): texts of models stay text.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from grpo.bridge.filters import TABLE
from grpo.bridge.funnel import EDGES, KEPT, Funnel
from grpo.bridge.settings import Settings
from grpo.bridge.store import Store
from grpo.evaluation.statistics import wilson
from grpo.evaluation.word_counts import TITLES
from grpo.monitor.report import write_page

PACKAGES = ("glimpse-grpo", "torch", "tokenizers", "pillow", "openai")


def about(settings: Settings, store: Store, parked: Mapping[str, int], left_out: int) -> dict[str, Any]:
    """How the replies were asked for, and what they cost. parked: questions that wait for another try, by
    stage. left_out: questions that cannot be used."""
    stages = []
    for stage in settings.active:
        spent, writer = store.spent[stage], settings.writer(stage)
        cost = {"questions": store.questions(stage), "money": writer.money(spent.tokens_in, spent.tokens_out)}
        stages.append(
            {"stage": stage, "model": writer.name, "parked": parked.get(stage, 0)} | asdict(spent) | cost
        )
    return {
        "name": Path(settings.out).resolve().name,
        "task": settings.task,
        "data": Path(settings.data).name if settings.data else "",
        "stages": stages,
        "prompts": settings.prompts(),
        "left_out": left_out,
        "settings": yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that replies and results may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_report(folder: Path, funnel: Funnel, told: Mapping[str, Any]) -> Path:
    """Write report.html. told: what `about` returns. -> its path."""
    path = folder / "report.html"
    write_page(path, str(told["name"]), {**told, **counted(funnel)}, ("questions.js", "funnel.js"))
    return path


def counted(funnel: Funnel) -> dict[str, Any]:
    """The funnel as plain values."""
    words = {when: count.table() for when, count in funnel.words.items()}
    return {
        "asked": funnel.asked,
        "kept": funnel.kept,
        "reasons": [
            {"name": name, "first": funnel.first[name], "every": funnel.every[name]}
            for name in TABLE
            if funnel.every[name]
        ],
        "tasks": _shares(funnel.tasks),
        "kinds": _shares(funnel.kinds),
        "edges": EDGES,
        "lengths": funnel.lengths,
        "word_titles": TITLES,
        "words": words,
        "documents": {when: count.documents for when, count in funnel.words.items()},
        "replaced": funnel.replaced.most_common(),
        "examples": {name: funnel.shown[name] for name in (KEPT, *TABLE) if funnel.shown.get(name)},
    }


def _shares(counts: Mapping[str, list[int]]) -> list[dict[str, Any]]:
    """What was kept of each, with a 95 % interval; the most asked first."""
    rows = sorted(counts.items(), key=lambda row: (-row[1][1], row[0]))
    return [
        {"name": name, "kept": kept, "asked": asked, "interval": wilson(kept, asked)}
        for name, (kept, asked) in rows
    ]
