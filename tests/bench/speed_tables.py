"""The tables of docs/results/speed.md, made from what the benchmarks of speed put into
docs/results/speed/measured.json with --keep."""

from statistics import median

SCRIPTS = ("rollout", "step", "logprobs", "shared_prompt", "scaling", "roofline")


def _over(least: float):
    """At least this many times as fast."""
    return f"≥ {least} ×", lambda x: x >= least, lambda x: f"{x:.2f} ×"


def _share(most: float):
    """At most this share."""
    return f"≤ {100 * most:.0f} %", lambda x: x <= most, lambda x: f"{100 * x:.1f} %"


# script, what, the figure's place in its record, (target as text, is it met, the figure as text)
TARGETS = (
    (
        "rollout",
        (
            "built-in model, 16 prompts × 12, cap 40: rollout tokens/s against transformers' generate with "
            "the faster of its caches; every row 40 tokens"
        ),
        ("full", "speedup"),
        _over(4),
    ),
    ("rollout", "the same, rows that stop as in training", ("stopping", "speedup"), _over(4)),
    (
        "rollout",
        "the same, rows that stop as in training, both on one thread",
        ("one_thread", "stopping", "speedup"),
        _over(4),
    ),
    ("step", "the same model and sizes: a whole GRPO step against TRL's GRPOTrainer", ("speedup",), _over(5)),
    (
        "step",
        "share of that step that is not rollout, forward or backward",
        ("not_arithmetic",),
        _share(0.15),
    ),
    (
        "shared_prompt",
        (
            "shared prompt, S = 600, G = 8, C = 250, a 64 M parameter policy: forward and backward against "
            "repeated"
        ),
        ("speedup",),
        _over(2.2),
    ),
    ("shared_prompt", "the same: by how much the process grows at its peak", ("memory_ratio",), _share(0.45)),
    ("shared_prompt", "the same: what autograd keeps for the backward pass", ("kept_ratio",), _share(0.45)),
    (
        "logprobs",
        (
            "log-probs at D = 1536, V = 151,936, 2,048 tokens: peak extra memory against full logits, head "
            "trained"
        ),
        ("memory_ratio",),
        _share(0.1),
    ),
    ("logprobs", "the same, head frozen: the logits' part alone", ("memory_ratio_frozen",), _share(0.1)),
    (
        "logprobs",
        "the same, head trained: time of forward and backward",
        ("time_ratio",),
        ("≤ 1.35 ×", lambda x: x <= 1.35, lambda x: f"{x:.2f} ×"),
    ),
    (
        "scaling",
        "prompt part of the keys and values read in decoding as G grows 1 -> 64, S = 600",
        ("prompt_traffic_growth",),
        ("constant", lambda x: x == 1, lambda x: f"{x:.3g} × (repeated: 64 ×)"),
    ),
)


def _lines(cells: list[list[str]]) -> str:
    head, *rows = cells
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def targets(found: dict) -> str:
    """Every target beside what was measured, and the script that measured it."""
    rows = [["what", "target", "measured", "", "script"]]
    for script, what, place, (target, met, shown) in TARGETS:
        record = found.get(script)
        for key in place[:-1]:
            record = record and record[key]
        verdict = ["not measured yet", ""]
        if record is not None:
            # of several runs the median is judged, never the best
            runs = record.get(f"{place[-1]}_runs", [])
            figure = median(runs) if runs else record[place[-1]]
            spread = f" (median of {len(runs)} runs, {min(runs):.2f} – {max(runs):.2f})" if runs else ""
            verdict = [shown(figure) + spread, "met" if met(figure) else "**missed**"]
        rows.append([what, target, *verdict, f"`tests/bench/{script}.py`"])
    return _lines(rows)


def measured(found: dict) -> str:
    """What each script printed, where and when."""
    parts = []
    for script in SCRIPTS:
        if script not in found:
            parts.append(f"### {script}.py\n\n*Not measured yet.*\n")
            continue
        about = dict(found[script]["about"])
        command = about.pop("command")
        parts.append(
            f"### {script}.py\n\n{_lines(found[script]['table'])}\n"
            f"{' · '.join(f'{key}: {value}' for key, value in about.items())}\n\n`{command}`\n"
        )
    return "\n".join(parts)
