"""The tables of docs/results/findings.md, from the records that tests/bench/findings.py wrote.

A record is one arm of one finding on one seed. An arm on several seeds is shown as its mean, with the range
over the seeds behind it; a share of one seed alone has its 95 % Wilson interval instead. The figures
(tests/bench/findings_figures.py) show the same numbers, because they ask this module for them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from data.shapes.world import CHANCE
from grpo.evaluation.statistics import wilson
from tests.bench.about import weights_hash

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "docs" / "results" / "findings" / "measured.json"
Record = dict[str, Any]
# head, rows
Table = tuple[list[str], list[list[str]]]

# arms that are not trained; every table begins with them
UNTRAINED = ("base", "best_prefix")
# behind the name of an arm: the policy from which its RL begins; the same policy, trained for more steps
START, LONG = "_start", "_long"
# steps over which a noisy curve is averaged
WINDOW = 10
# the recipe reaches 0.9 only near its end, and many arms of (g) would not
GOAL = 0.85
# twice what guessing earns at counting
COUNTING_GOAL = 0.5
# finding -> {arm: its name in plain words}, in the order of the tables
ARMS = {
    "main": {"rl": "RL"},
    "world": {
        "rl_12": "RL, 18 × 12 a step, rate 1e-4",
        "rl_16": "RL, 24 × 16 a step, rate 2e-4",
        "rl_150": "RL, 150 steps, rate 2e-4, no KL penalty",
    },
    "noisier": {
        "rl_count": "RL at 90, counting alone",
        "rl_90": "RL at 90, 150 steps, rate 2e-4, no KL penalty",
        "rl_130": "RL at 130, the main job's settings",
    },
    "a": {
        "rl": "RL",
        "sft_questions": "SFT, each question once",
        "sft_compute": "SFT, as much time",
        "sft_long": "SFT, its best step",
    },
    "b": {f"sft_{n}": f"{n} steps of SFT, RL" for n in (0, 10, 20, 40, 80)},
    "c": {
        f"{start}_{weight}": f"{start}, {weight} a token"
        for start in ("base", "instruct")
        for weight in ("0", "0.003", "0.01", "0.03")
    },
    "d": {"none": "nothing frozen", "vision": "tower frozen", "llm": "decoder frozen"},
    "e": {f"looks_{share}": f"{share} % look" for share in ("0", "0.5", "2", "10", "45")}
    | {f"looks_{share}_again_0": f"{share} % look, none twice" for share in (10, 45)},
    "f": {
        "cold": "cold start",
        "long": "long caps: 256 × 4",
        "short": "short caps: 64 × 16",
        "ptst": "PTST: 64 × 16, 128 × 8",
        "zero": "PTST, no cold start",
    },
    "g": {
        "recipe": "as the recipe",
        "completion": "mean per completion",
        "constant": "constant weight",
        "kl_0": "no KL penalty",
        "kl_0.004": "KL penalty 0.004",
        "kl_0.04": "KL penalty 0.04",
        "std_none": "not divided by std",
        "clip_higher": "clip-higher, 2 updates",
        "dynamic": "dynamic sampling, no KL",
    }
    | {f"group_{size}": f"groups of {size}" for size in (2, 4, 8, 24, 36)},
    "h": {"seeing": "RL", "blind": "RL without pictures"},
    # shares of the documents about counting
    "i": {
        "counts_0": "0 % look",
        "counts_0.1": "0.1 % look",
        "counts_1": "1 % look",
        "counts_1_long": "1 % look, 300 steps",
        "counts_10": "10 % look",
    },
}
# the README's figure and table: (finding, arm) -> its name there
OVERVIEW = {
    ("main", "rl"): "RL on the base",
    ("a", "rl"): "RL without counting",
    ("a", "sft_long"): "SFT without counting",
    ("b", "sft_40"): "RL on an instruct model",
    ("c", "instruct_0.01"): "the same, paid for length",
}


@dataclass(frozen=True)
class Estimate:
    """A number of an arm: its mean over the seeds. low, high: the range over them; of one seed's share, the
    95 % Wilson interval. values: one a seed."""

    value: float
    low: float
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Measure:
    """A column. label: its head. of: a record -> (number, questions that it is a share of; None: no share),
    or None where it was not measured. share: shown in percent. chance: what guessing earns."""

    label: str
    of: Callable[[Record], tuple[float, int | None] | None]
    share: bool = True
    chance: float | None = None


def greedy(name: str, label: str, chance: float = fmean(CHANCE.values())) -> Measure:
    """The share of right answers on a set."""

    def of(record: Record):
        block = record["sets"].get(name)
        return block and (block["right"] / block["items"], block["questions"])

    return Measure(label, of, chance=chance)


def sampled(key: str, label: str, share: bool = True) -> Measure:
    """A number of the sampled answers. Those to one question are alike, so an interval counts questions and
    not answers: it is too wide rather than too narrow."""

    def of(record: Record):
        block = next(iter(record["sampled"].values()), None)
        if block is None:
            return None
        value = block["right"] / block["items"] if key == "right" else block[key]
        return value, block["questions"] if share else None

    return Measure(label, of, share, fmean(CHANCE.values()) if key == "right" else None)


def known(record: Record, key: str) -> list[float]:
    """The numbers of a curve of training, without the steps that have none."""
    return [value for value in record.get("curve", {}).get(key, ()) if value is not None]


def first_entropy(record: Record):
    """The entropy in nats, averaged over the first steps of training."""
    found = known(record, "entropy")[:WINDOW]
    return (fmean(found), None) if found else None


def to_goal(record: Record, curve: str = "accuracy", goal: float = GOAL) -> int | None:
    """Steps until a curve of training, averaged over the last WINDOW steps, first reached the goal. Steps
    without a number do not count."""
    values = record.get("curve", {}).get(curve, [])
    for end in range(WINDOW, len(values) + 1):
        part = [value for value in values[end - WINDOW : end] if value is not None]
        if part and fmean(part) >= goal:
            return end
    return None


def steps(curve: str, goal: float, label: str) -> Measure:
    """Steps until a curve of training first reached a goal."""

    def of(record: Record):
        end = to_goal(record, curve, goal)
        return end and (end, None)

    return Measure(label, of, share=False)


def completions(record: Record):
    """Completions to the goal, with those that dynamic sampling left out."""
    end = to_goal(record)
    if end is None:
        return None
    curve = record["curve"]
    rounds = curve.get("rounds") or [1] * end
    return sum(count * (more or 1) for count, more in zip(curve["completions"][:end], rounds)), None


def number(key: str, label: str) -> Measure:
    """A number of the record itself."""
    return Measure(label, lambda record: (record[key], None) if record.get(key) else None, share=False)


MEASURES = {
    "heldout": greedy("heldout", "held out"),
    "pairs": greedy("pairs", "unseen pairs"),
    "crowd": greedy("crowd", "six objects"),
    "large": greedy("large", "larger pictures"),
    "count": greedy("count", "counting", CHANCE["Count"]),
    "noisy": greedy("noisy", "noisy pictures"),
    "noisier": greedy("noisier", "noise of 130"),
    "noisy_count": greedy("noisy_count", "counting in noise", CHANCE["Count"]),
    "grey": greedy("grey", "grey pictures"),
    "sampled": sampled("right", "sampled"),
    "sound": sampled("sound", "right and true"),
    "format": sampled("format", "format"),
    "looks": sampled("looks", "looks"),
    "again": sampled("again", "looks again"),
    "truncated": sampled("truncated", "cut off"),
    "length": sampled("length", "length", share=False),
    "entropy": Measure("entropy at first", first_entropy, share=False),
    "steps": steps("accuracy", GOAL, f"steps to {100 * GOAL:.0f} %"),
    "counting_steps": steps("counting", COUNTING_GOAL, f"steps to {100 * COUNTING_GOAL:.0f} % counting"),
    "completions": Measure(f"completions to {100 * GOAL:.0f} %", completions, share=False),
    "best_step": number("best_step", "step"),
    "minutes": number("minutes", "minutes"),
}
SETS = ("heldout", "pairs", "crowd", "large", "count", "noisy", "grey")
BEHAVIOUR = ("sampled", "format", "length", "looks", "again")
# finding -> the columns of its table; those that no record has are left out
COLUMNS = {
    "main": (*SETS, *BEHAVIOUR, "minutes"),
    "world": ("noisy", "heldout", *BEHAVIOUR, "minutes"),
    "noisier": ("noisier", "noisy", "noisy_count", "heldout", *BEHAVIOUR, "minutes"),
    "a": (*SETS, "length", "best_step", "minutes"),
    "b": ("heldout", "pairs", *BEHAVIOUR, "entropy"),
    "c": ("heldout", *BEHAVIOUR, "truncated"),
    "d": ("heldout", "pairs", "noisy", *BEHAVIOUR),
    "e": ("heldout", "steps", "sampled", "sound", *BEHAVIOUR[1:]),
    "f": ("heldout", *BEHAVIOUR, "truncated", "minutes"),
    "g": ("heldout", "sampled", "length", "looks", "again", "steps", "completions"),
    "h": ("heldout", "grey", *BEHAVIOUR),
    "i": ("heldout", "count", "counting_steps", "sampled", "sound", *BEHAVIOUR[1:]),
}


def records(file: Path = MEASURED) -> list[Record]:
    """The records of measured.json, [] without the file. Raises ValueError that names it."""
    if not file.exists():
        return []
    try:
        return json.loads(file.read_text("utf-8"))["records"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the records of tests/bench/findings.py: {error!r}") from None


def arms(found: Sequence[Record], finding: str) -> dict[str, list[Record]]:
    """{arm: its records, one a seed} of a finding, in the order of ARMS, behind the untrained ones. The main
    job's untrained ones stand in where the finding has none. {} where the finding has no arm."""
    rows = grouped(found, finding)
    if not rows:
        return {}
    main = grouped(found, "main")
    order = [*UNTRAINED, *(name for arm in ARMS[finding] for name in (arm + START, arm)), *rows]
    rows |= {arm: main[arm] for arm in UNTRAINED if arm in main and arm not in rows}
    return {arm: rows[arm] for arm in dict.fromkeys(order) if arm in rows}


def grouped(found: Sequence[Record], finding: str) -> dict[str, list[Record]]:
    """{arm: its records, by seed} of a finding."""
    rows: dict[str, list[Record]] = {}
    for record in sorted(found, key=lambda record: record["seed"]):
        if record["finding"] == finding:
            rows.setdefault(record["arm"], []).append(record)
    return rows


def name_of(finding: str, arm: str) -> str:
    """An arm in plain words."""
    names = {"base": "base", "best_prefix": "base, best prefix"} | ARMS[finding]
    behind = arm.removesuffix(START)
    return names.get(arm) or (f"{names[behind]}: before" if behind in names else arm)


def before(arm: str) -> str:
    """The arm that is the policy from which the RL of an arm begins."""
    return arm.removesuffix(LONG) + START


def estimate(found: Sequence[Record], measure: Measure) -> Estimate | None:
    """A number of one arm over its seeds; None where no seed has it."""
    parts = [part for part in map(measure.of, found) if part]
    if not parts:
        return None
    values = tuple(value for value, _ in parts)
    low, high = min(values), max(values)
    if len(parts) == 1 and parts[0][1] is not None:
        count = parts[0][1]
        low, high = wilson(values[0] * count, count)
    return Estimate(fmean(values), low, high, values)


def shown(number: Estimate | None, share: bool) -> str:
    """An estimate as text; "" for None."""
    if number is None:
        return ""
    whole = not share and all(isinstance(value, int) for value in number.values)
    scale, digits = 100 if share else 1, 0 if whole else 1
    value, low, high = (f"{scale * x:,.{digits}f}" for x in (number.value, number.low, number.high))
    spread = "" if low == high else f" ({low}–{high})"
    return f"{value} %{spread}" if share else f"{value}{spread}"


def finding_table(found: Sequence[Record], finding: str) -> Table | None:
    """One row an arm, one column a measure. None where the finding has no records; so do the others."""
    rows = arms(found, finding)
    columns = [MEASURES[name] for name in COLUMNS[finding]]
    columns = [each for each in columns if any(estimate(part, each) for part in rows.values())]
    return made(rows, finding, columns)


def made(rows: dict[str, list[Record]], finding: str, columns: Sequence[Measure]) -> Table | None:
    """The table of some arms and measures; None without arms."""
    lines = [
        [
            name_of(finding, arm),
            str(len(part)),
            *(shown(estimate(part, each), each.share) for each in columns),
        ]
        for arm, part in rows.items()
    ]
    return (["", "seeds", *(each.label for each in columns)], lines) if lines else None


def overview_arms(found: Sequence[Record]) -> dict[str, list[Record]]:
    """{name: records} of the arms of OVERVIEW that are measured."""
    every = {name: grouped(found, finding).get(arm) for (finding, arm), name in OVERVIEW.items()}
    return {name: part for name, part in every.items() if part}


def overview_table(found: Sequence[Record]) -> Table | None:
    """The README's table. None where the main job was not measured."""
    main = arms(found, "main")
    rows = {name_of("main", arm): main[arm] for arm in UNTRAINED if arm in main} | overview_arms(found)
    columns = [MEASURES[name] for name in ("heldout", "pairs", "length")]
    lines = [
        [name, *(shown(estimate(part, each), each.share) for each in columns)] for name, part in rows.items()
    ]
    return (["", *(each.label for each in columns)], lines) if main else None


def task_table(found: Sequence[Record], finding: str) -> Table | None:
    """Greedy accuracy by kind of question, beside chance, on the first set of the finding's table."""

    def of(task: str) -> Measure:
        def share(record: Record):
            right, count = record["sets"].get(COLUMNS[finding][0], {}).get("tasks", {}).get(task, (0, 0))
            return (right / count, count) if count else None

        return Measure(task, share)

    table = made(arms(found, finding), finding, [of(task) for task in CHANCE])
    chance = ["chance", "", *(f"{100 * share:.0f} %" for share in CHANCE.values())]
    return table and (table[0], [chance, *table[1]])


def passes_of(found: Sequence[Record]) -> dict[int, Estimate]:
    """{k: pass@k of sound answers} of one arm."""
    ks = sorted({int(k) for record in found for k in record["passes"]})
    every = {k: estimate(found, Measure("", lambda record, k=str(k): pass_at(record, k))) for k in ks}
    return {k: number for k, number in every.items() if number}


def pass_at(record: Record, k: str) -> tuple[float, None] | None:
    """pass@k of a record."""
    return (record["passes"][k], None) if k in record["passes"] else None


def pass_table(found: Sequence[Record], finding: str) -> Table | None:
    """pass@k of sound answers, one row an arm of the finding's own."""
    rows = {arm: passes_of(part) for arm, part in arms(found, finding).items() if arm not in UNTRAINED}
    ks = sorted({k for numbers in rows.values() for k in numbers})
    lines = [
        [name_of(finding, arm), *(shown(numbers.get(k), True) for k in ks)] for arm, numbers in rows.items()
    ]
    return (["k", *map(str, ks)], lines) if lines else None


def texts(found: Sequence[Record], finding: str, most: int = 2) -> str:
    """Sampled answers of the trained arms of a finding, on their first seed: below each of the first
    questions one answer of each arm. "" where the finding has no records."""
    rows = {
        arm: part[0]["texts"][:most] for arm, part in arms(found, finding).items() if arm not in UNTRAINED
    }
    lines = []
    for place in range(most):
        answers = {arm: texts[place] for arm, texts in rows.items() if place < len(texts)}
        lines += [next(iter(answers.values()))["asked"]] if answers else []
        for arm, answer in answers.items():
            verdict = "right" if answer["right"] else "wrong"
            lines.append(f"    {name_of(finding, arm)} ({verdict}): {answer['text']}")
    return "\n".join(lines)


def commands(found: Sequence[Record], finding: str) -> str:
    """The commands of every arm of a finding, of its first seed, and the prefix that was chosen."""
    lines = []
    for arm, (first, *_) in arms(found, finding).items():
        said = [f"python {command}" for command in first["commands"]]
        if "prefix" in first:
            said = [f"the prefix: {first['prefix']['best']}"]
        lines += [f"# {name_of(finding, arm)}", *said] if said else []
    return "\n".join(lines)


def about(found: Sequence[Record]) -> str:
    """What the records are made of: the bases, the commits, the time."""
    bases, commits = (
        ", ".join(f"`{each}`" for each in dict.fromkeys(record[key] for record in found))
        for key in ("base", "commit")
    )
    took = sum(record["minutes"] for record in found)
    line = f"records: {len(found)} · bases: {bases} · commits: {commits} · minutes in all: {took:.0f}\n"
    shipped = [weights_hash(ROOT / "models" / name) for name in ("tiny", "tiny_trunk")]
    earlier = sum(record["base"] not in shipped for record in found)
    warning = f"\n**{earlier} of the records are of an earlier base than the one in `models/tiny`.**\n"
    return line + (warning if earlier else "")
