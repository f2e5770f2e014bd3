"""A plan (`grpo/plan/plan.py`) as a table for people."""

from grpo.config import by_model
from grpo.config.parse import Config
from grpo.plan.items import Moments, shown_bytes, shown_count, total
from grpo.plan.ranks import BASE


def render(cfg: Config, plan, ranks: int = 1) -> str:
    """A `Plan` of one of `ranks` ranks as a table."""
    parts = ", ".join(f"{name} {shown_count(count)}" for name, count in plan.parameters.items())
    process = f"one of {ranks} ranks" if ranks > 1 else "one process"
    where = f"{plan.dtype} on a {'GPU' if plan.device == 'cuda' else 'CPU'}"
    length = f"{cfg.steps:,} steps" if cfg.steps or cfg.epochs is None else f"{cfg.epochs:g} epochs"
    run = f"{cfg.name or cfg.recipe}: {cfg.method} on {cfg.model}, {length}, {where}, {process}"
    lines = [f"{run}. At most, and nothing was loaded:", ""]
    lines += [f"{shown_count(sum(plan.parameters.values()))} parameters: {parts}", ""]
    lines += ["held all the time", *map(line, plan.held)]
    for stage in plan.stages:
        steps = stage.last - stage.first + 1
        prompts, completions = stage.tokens
        if len(plan.stages) > 1:
            first, last = f"{stage.first + 1:,}", f"{stage.last + 1:,}"
            lines += ["", f"steps {first} to {last}: group {stage.group}, cap {stage.cap:,}"]
        if stage.rollout:
            lines += ["", "while sampling", *map(line, stage.rollout)]
        lines += ["", *learning_lines(stage.learning), ""]
        if stage.rollout:
            over = f"a rollout; {stage.cap * steps:,} over {steps:,} steps"
            lines.append(count_line("decode steps", f"{stage.cap:,}", over))
        if stage.rollout and cfg.max_rounds > 1:
            over = "a step at most (dynamic sampling); all other numbers are with one"
            lines.append(count_line("rollouts", f"{cfg.max_rounds:,}", over))
        over = f"a step: {prompts:,} of prompts, {completions:,} of completions"
        lines.append(count_line("tokens", f"{prompts + completions:,}", over))
        lines.append(count_line("patches", f"{stage.patches:,}", "a step, of pictures"))
        over = f"a step; {shown_flops(stage.flops * steps)} over {steps:,} steps"
        lines.append(count_line("work", shown_flops(stage.flops), over))
    lines += ["", f"peak: {shown_bytes(plan.peak)}"]
    if plan.on_host:
        lines.append(f"and {shown_bytes(plan.on_host)} of the CPU's memory, for the optimizer's states")
    if cfg.save.background:
        trained = sum(item.bytes for item in plan.held[:2] if item.name != BASE)
        copied = shown_bytes(trained + plan.on_host)
        copy = "the copy of weights and optimizer that checkpoints are written from"
        lines.append(f"and {copied} of the CPU's memory, for {copy} (save.background=false: none)")
    if chosen := [f"  {line}" for line in by_model.explained(cfg)]:
        lines += ["", f"chosen for {cfg.model}, because nothing else said them:", *chosen]
    return "\n".join(lines) + "\n"


def learning_lines(learning: Moments) -> list[str]:
    """The moment of learning that needs most, and what the others need."""
    largest = max(learning, key=lambda moment: total(learning[moment]))
    less = [f"{shown_bytes(total(learning[moment]))} {moment}" for moment in learning if moment != largest]
    there = [line(item) for item in learning[largest] if item.bytes]
    return [f"while learning, {largest}", *there, f"  less: {', '.join(less)}"]


def line(item) -> str:
    """What, how many bytes, and where the number comes from."""
    return count_line(item.name, shown_bytes(item.bytes), item.why)


def count_line(name: str, count: str, why: str) -> str:
    """One line of the table."""
    return f"  {name:<24}{count:>12}  {why}"


def shown_flops(count: float) -> str:
    """Operations in the largest unit that leaves a number of at least 1."""
    for power, unit in ((15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP")):
        if count >= 10**power:
            return f"{count / 10**power:,.1f} {unit}"
    return f"{count / 10**6:,.1f} MFLOP"
