"""How long does training stop for a checkpoint?    python tests/bench/save.py [--rounds 3] [--steps 20]
[--quick]

First a policy of about 100 M parameters in float32 with AdamW's two moments (1.2 GB on the disk). It is saved
in turns in the foreground and in the background. Measured: the seconds until `checkpoint.save` returns, the
seconds until the checkpoint is complete, and how much slower a thread is that multiplies matrices meanwhile.

Then some steps of the recipe shapes, which save every fifth (--steps 0: skip this part), in the foreground
and in the background. Measured: the seconds for which a save stopped training, and the processor's seconds of
a save in either thread, as shares of fifty steps.

Prints a table, and as the last line one JSON object. Needs 4 GB in the temporary folder (TMPDIR).
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import grpo.parallel.openmp

import torch
from small import small_config, small_folder

import train
from grpo.optim import Optimizer
from grpo.run.lifecycle import Lifecycle
from grpo.storage import checkpoint
from grpo.storage.background import Background
from models import weights
from tests.bench.about import about


def policy_of(quick: bool):
    """A random policy with an optimizer that has made a step. -> (policy, optimizer)"""
    config = small_config()
    if not quick:
        config = replace(
            config,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=10,
            num_attention_heads=12,
            num_key_value_heads=12,
            vocab_size=6000,
            vision=replace(config.vision, hidden_size=768),
        )
    policy = weights.init(config, seed=0)
    optimizer = Optimizer(policy, name="adamw", lr=1e-4, beta2=0.999, weight_decay=0.0)
    for p in policy.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    return policy, optimizer


def work_rate(until) -> float:
    """Products of matrices a second, until `until()`."""
    a, count, began = torch.randn(400, 400), 0, time.perf_counter()
    while not until() or not count:
        a @ a
        count += 1
    return count / (time.perf_counter() - began)


def saves(rounds: int, quick: bool) -> dict:
    """Part 1."""
    found: dict[str, list[float]] = {
        name: []
        for name in (
            "foreground: stopped",
            "background: stopped",
            "background: until it is there",
            "work meanwhile, of what it is alone",
        )
    }
    with tempfile.TemporaryDirectory(prefix="glimpse-save-") as folder:
        base, (policy, optimizer), background = (
            small_folder(Path(folder) / "base"),
            policy_of(quick),
            Background(),
        )
        run = Path(folder) / "run"
        for step in range(1, rounds + 2):
            seconds = []
            began = time.perf_counter()
            saved = checkpoint.save(run, 2 * step, policy, optimizer, base=base, keep=1)
            seconds.append(time.perf_counter() - began)
            size = sum(path.stat().st_size for path in saved.iterdir())
            until = time.perf_counter() + 1.0
            alone = work_rate(lambda: time.perf_counter() > until)
            began = time.perf_counter()
            checkpoint.save(run, 2 * step + 1, policy, optimizer, base=base, keep=1, background=background)
            seconds.append(time.perf_counter() - began)
            meanwhile = work_rate(lambda: background.task.done())
            background.wait()
            seconds += [time.perf_counter() - began, meanwhile / alone]
            # the first one fetches the copy's memory, and is named by itself
            if step > 1:
                for values, value in zip(found.values(), seconds):
                    values.append(value)
            else:
                first = seconds[1]
    return {
        "parameters": sum(p.numel() for p in policy.parameters()),
        "megabytes": round(size / 1e6),
        "background: stopped, the first time": round(first, 3),
    } | {name: round(median(values), 3) for name, values in found.items()}


def trained(out: Path, steps: int, background: bool) -> dict:
    """The recipe without evaluation, in this process. -> {of fifty steps, the share of the clock that a
    save stopped them, the share of the processor that it took}"""
    stopped, processor, ends = [], [], []

    def timed(function, clock, found):
        def wrapped(*args, **how):
            began = clock()
            try:
                return function(*args, **how)
            finally:
                found.append(clock() - began)

        return wrapped

    def finish(*args, real=Lifecycle.finish, **how):
        ends.append((time.perf_counter(), time.process_time()))
        return real(*args, **how)

    with (
        mock.patch.object(Lifecycle, "finish", finish),
        mock.patch.object(Lifecycle, "save", timed(Lifecycle.save, time.perf_counter, stopped)),
        mock.patch.object(checkpoint, "take", timed(checkpoint.take, time.thread_time, processor)),
        mock.patch.object(checkpoint, "write", timed(checkpoint.write, time.thread_time, processor)),
        contextlib.redirect_stdout(sys.stderr),
    ):
        status = train.main(
            [
                "shapes",
                f"steps={steps}",
                "save.every=5",
                f"save.background={background}".lower(),
                "eval.items=0",
                "report.every=0",
                f"out={out}",
            ]
        )
    assert status == 0
    # with their saves
    step, work = ((ends[-1][i] - ends[0][i]) / (len(ends) - 1) for i in (0, 1))
    return {
        "seconds of a step": step,
        "seconds stopped by a save": median(stopped),
        "clock": median(stopped) / (50 * step),
        "processor": sum(processor) / len(stopped) / (50 * work),
    }


def overhead(steps: int) -> dict:
    """Part 2."""
    with tempfile.TemporaryDirectory(prefix="glimpse-save-") as folder:
        found = {
            manner: trained(Path(folder) / manner, steps, manner == "background")
            for manner in ("foreground", "background")
        }
    return {
        f"shapes, {manner}: {name}": round(value, 5)
        for manner, values in found.items()
        for name, value in values.items()
    }


def main(arguments: list[str] | None = None) -> dict:
    """-> the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--quick", action="store_true", help="a small policy, one round, no recipe: does it run at all?"
    )
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.steps = 1, 0
    found = {
        "bench": "save",
        **saves(args.rounds, args.quick),
        **(overhead(args.steps) if args.steps else {}),
    }
    for name, value in found.items():
        print(f"{name:<50} {value:>12}")
    found["about"] = about()
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
