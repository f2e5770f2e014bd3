"""`python -m grpo.bridge RECIPE [key=value ...]`: from questions with pictures to chains that train."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import grpo.parallel.openmp

from data.sources.table import LAYOUTS, open_split
from data.types import Example
from grpo.bridge import plan
from grpo.bridge.filters import Known
from grpo.bridge.output import TRAIN, write_results
from grpo.bridge.report import about, write_report
from grpo.bridge.run import Bridge
from grpo.bridge.settings import Settings, load, recipes
from grpo.bridge.store import Store
from grpo.config.parse import setting_help
from grpo.config.typed import ConfigError, leaves, nearest
from grpo.run import lock
from grpo.run.signals import Interrupts

HELP = Path(__file__).with_name("help.txt")
OPTIONS = ("--help", "-h", "--plan")
# exit statuses; after a signal it is 128 + signal
DONE, WRONG, LEFT = 0, 2, 3


def arguments(argv: Sequence[str]) -> tuple[str, list[str], bool]:
    """-> recipe, key=value arguments, whether to plan. Raises ConfigError."""
    names = []
    for argument in argv:
        if argument.startswith("-") and argument not in OPTIONS:
            name = argument.lstrip("-").partition("=")[0].replace("-", "_")
            wrong = f"unknown option{nearest(argument, OPTIONS)}; options are {', '.join(OPTIONS)}"
            if name in leaves(Settings):
                wrong = f"settings are written without dashes: {name}=VALUE"
            raise ConfigError(f"argument {argument!r}: {wrong}")
        if not argument.startswith("-") and "=" not in argument:
            names.append(argument)
    if len(names) != 1:
        given = f"{len(names)} recipes are given ({', '.join(names)})" if names else "give a recipe"
        raise ConfigError(f"{given}; there are {', '.join(recipes())}, or give one .yaml file")
    return names[0], [argument for argument in argv if "=" in argument], "--plan" in argv


def help_text() -> str:
    """The text of --help."""
    known = recipes()
    wide = max(map(len, known), default=0)
    lines = ["Recipes:", *(f"  {name:<{wide}}  {about}" for name, about in known.items()), ""]
    lines.append(
        "Settings (key=value), with their defaults; `pseudo`, `describe` and `reason` have the same, and"
    )
    lines.append("so have the writers `vision` (of the first two) and `reasoner`:")
    repeated = ("describe.", "reason.", "reasoner.")
    keys = [key for key in leaves(Settings) if not key.startswith(repeated)]
    shown = [line for key in keys for line in setting_help(Settings, key)]
    return f"{HELP.read_text('utf-8')}\n" + "\n".join([*lines, "", *shown]) + "\n"


def open_examples(settings: Settings) -> Sequence[Example]:
    """The questions. Raises BadSource."""
    return open_split(
        settings.task,
        settings.data,
        "train",
        settings.limit,
        settings.seed,
        columns=settings.columns or None,
        heldout=settings.heldout if settings.task in LAYOUTS else settings.heldout or None,
    )


def bridge(settings: Settings, stop: Interrupts) -> int:
    """Ask, filter and write. -> exit status. Raises ValueError and OSError."""
    examples = open_examples(settings)
    # before anything is asked: a benchmark may not be there
    known = Known(settings.filters)
    with Store(Path(settings.out)) as store:
        work = Bridge(settings, examples, store, stop, known)
        work.run()
        if stop.first:
            print(f"stopped; the same command goes on from here ({settings.out})", file=sys.stderr)
            return 128 + stop.first
        funnel = write_results(store.folder, examples, store.of, settings.filters, settings.output, known)
        page = write_report(store.folder, funnel, about(settings, store, work.parked, work.left_out))
        print(*funnel.lines(), store.folder / TRAIN, page, sep="\n")
        return after(work)


def after(work: Bridge) -> int:
    """Say what is left. -> exit status."""
    if work.left_out:
        print(f"{work.left_out} questions cannot be used, and were left out", file=sys.stderr)
    if work.over:
        ways = "raise budget, and the same command goes on"
        print(f"the budget is used up ({work.spent_text()}): {ways}", file=sys.stderr)
        return LEFT
    if sum(work.parked.values()):
        which = ", ".join(f"{count} at {stage}" for stage, count in work.parked.items() if count)
        print(f"parked: {which}; the same command tries them again", file=sys.stderr)
        return LEFT
    return DONE


def measure(settings: Settings, stop: Interrupts) -> int:
    """--plan: ask the first questions, and say what all of them will take. -> exit status."""
    total = len(open_examples(settings))
    few = replace(settings, limit=min(plan.MEASURED, total))
    examples = open_examples(few)
    with Store(Path(settings.out)) as store:
        work = Bridge(few, examples, store, stop, Known(settings.filters))
        work.run(whole=False)
        if stop.first:
            return 128 + stop.first
        measured = store.questions(settings.active[0])
        print(plan.table(plan.estimates(settings, store.spent, measured, total), measured, total))
        return DONE


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit status: see help.txt."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(), end="")
        return DONE
    try:
        recipe, given, planning = arguments(argv)
        settings = load(recipe, given)
        lock.claim(Path(settings.out))
        with Interrupts(saying="finishing what is in flight, at most 10 seconds") as stop:
            return (measure if planning else bridge)(settings, stop)
    except ValueError as error:
        print(f"grpo.bridge: {error}", file=sys.stderr)
    except (OSError, sqlite3.Error) as error:
        ways = "what is stored is whole; the same command goes on when that is mended"
        print(f"grpo.bridge: {error}: {ways}", file=sys.stderr)
    finally:
        lock.leave()
    return WRONG


if __name__ == "__main__":
    sys.exit(main())
