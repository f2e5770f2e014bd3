"""A plan (`grpo/plan/plan.py`) as a table for people."""

from __future__ import annotations

from grpo.config.parse import Config


def render(cfg: Config, plan, ranks: int = 1) -> str:
    """A `Plan` of one of `ranks` ranks as a table."""
    parts, who = (
        ", ".join(f"{name} {shown_count(count)}" for name, count in plan.parameters.items()),
        f"one of {ranks} ranks" if ranks > 1 else "one process",
    )
    lines = [
        (
            f"{cfg.recipe}: {cfg.method} on {cfg.model}, {cfg.steps:,} steps, {plan.dtype}, {who}. At most, "
            "and nothing was loaded:"
        ),
        "",
        f"{shown_count(sum(plan.parameters.values()))} parameters: {parts}",
        "",
        "held all the time",
        *map(line, plan.held),
    ]
    for stage in plan.stages:
        if len(plan.stages) > 1:
            lines += [
                "",
                f"steps {stage.first + 1:,} to {stage.last + 1:,}: group {stage.group}, cap {stage.cap:,}",
            ]
        if stage.rollout:
            lines += ["", "while sampling", *map(line, stage.rollout)]
        lines += ["", "while learning", *map(line, stage.learning), ""]
        asked, said = stage.tokens
        steps = stage.last - stage.first + 1
        if stage.rollout:
            lines.append(
                f"  decode steps            {stage.cap:>12,}  a rollout; {stage.cap * steps:,} over "
                f"{steps:,} steps"
            )
        if stage.rollout and cfg.max_rounds > 1:
            lines.append(
                f"  rollouts                {cfg.max_rounds:>12,}  a step at most (dynamic sampling); "
                "all other numbers are with one"
            )
        lines += [
            (
                f"  tokens                  {asked + said:>12,}  a step: {asked:,} of prompts, {said:,} of "
                "completions"
            ),
            f"  patches                 {stage.patches:>12,}  a step, of pictures",
            (
                f"  work                    {shown_flops(stage.flops):>12}  a step; "
                f"{shown_flops(stage.flops * steps)} over {steps:,} steps"
            ),
        ]
    lines += ["", f"peak: {shown_bytes(plan.peak)}"]
    if cfg.save.background:
        lines.append(
            f"and {shown_bytes(sum(item.bytes for item in plan.held[:2]))} of the CPU's memory, for the "
            "copy of weights and optimizer that checkpoints are written from (save.background=false: "
            "none)"
        )
    return "\n".join(lines) + "\n"


def line(item) -> str:
    """What, how many bytes, and where the number comes from."""
    return f"  {item.name:<24}{shown_bytes(item.bytes):>12}  {item.why}"


def shown_bytes(count: float) -> str:
    """In the largest unit that leaves a number of at least 1."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def shown_count(count: float) -> str:
    """Of parameters."""
    return (
        f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"
    )


def shown_flops(count: float) -> str:
    """Operations in the largest unit that leaves a number of at least 1."""
    power, unit = next(
        (p, u)
        for p, u in ((15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP"), (6, "MFLOP"))
        if count >= 10**p or p == 6
    )
    return f"{count / 10**power:,.1f} {unit}"
