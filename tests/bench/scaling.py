"""How the cost of a rollout and of a training step grows:  python tests/bench/scaling.py

A random policy (D = 256, four blocks), float32 on the CPU. One size grows at a time: the group while decoding
and while training, the prompt's length while prefilling and while training, the completions' length, the
model.

The exponent is the slope of log seconds over log x, by least squares. x is what the cost should be linear in:
tokens, decode steps, or parameters. An exponent below 1 means fixed costs that are shared. One above 1 means
attention, which is quadratic in a length. So the exponent of the work stands beside it: floating-point
operations, with attention's counted twice, because float64 takes twice as long. Where both exponents agree,
the time grows as the work does.

While decoding, the bytes of keys and values are counted where attention is called. The prompt's part must not
grow with the group. Prints a table; the last line is one JSON object.
"""

import sys
from contextlib import contextmanager
from functools import partial
from math import log
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo.parallel.openmp

import torch

from models import decoder
from tests.bench.shared_prompt import both, learn, random_policy, text_prompts
from tests.bench.timing import finish, operations, parser, take_turns

# of one turn
DECODE_STEPS = 16


@contextmanager
def traffic():
    """Count the bytes of keys and values that decoding reads. -> {"prompt": , "own": }, filled while it is
    open."""
    read, attend = {"prompt": 0, "own": 0}, decoder.decode_attention

    def counting(q, k, v, prompt_k, prompt_v, rows, bias):
        read["prompt"] += prompt_k.nbytes + prompt_v.nbytes
        read["own"] += k.nbytes + v.nbytes
        return attend(q, k, v, prompt_k, prompt_v, rows, bias)

    decoder.decode_attention = counting
    try:
        yield read
    finally:
        decoder.decode_attention = attend


@torch.no_grad()
def decode(policy, S: int, G: int, steps: int) -> None:
    """Decode steps of one group, after its prefill; any tokens do."""
    prompts = text_prompts(1, S, policy.config.vocab_size)
    cache, tokens = policy.prefill(prompts, G, steps), prompts.last.expand(G)
    for _ in range(steps):
        tokens = policy.logits(policy.decode(tokens, cache)).argmax(-1)


@torch.no_grad()
def prefill(policy, S: int) -> None:
    """The prompt alone."""
    policy.prefill(text_prompts(1, S, policy.config.vocab_size), 1, 1)


def exponent(x: list[float], seconds: list[float]) -> float:
    """Slope of log seconds over log x."""
    x, y = [log(value) for value in x], [log(value) for value in seconds]
    mx, my = fmean(x), fmean(y)
    return round(sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x), 3)


def sizes(policy) -> int:
    """Parameters of the decoder's blocks and of the head: those a token passes."""
    return sum(p.numel() for name, p in policy.named_parameters() if not name.startswith("visual."))


def main(argv: list[str] | None = None) -> dict:
    """Measure and print."""
    args = parser(__doc__, rounds=3).parse_args(argv)
    few = slice(0, 2 if args.quick else None)
    small = (
        {"width": 64, "blocks": 2, "mlp": 128, "vocabulary": 128}
        if args.quick
        else {"width": 256, "blocks": 4, "mlp": 1024, "vocabulary": 4096}
    )
    S, steps = (60, 4) if args.quick else (600, DECODE_STEPS)
    policy = random_policy(**small)
    groups, lengths, caps = (
        [1, 2, 4, 8, 16, 32, 64][few],
        [150, 300, 600, 1200][few],
        [64, 128, 256, 512][few],
    )
    widths = [64, 128] if args.quick else [128, 256, 384, 512]
    models = {width: random_policy(width, 4, 4 * width, 4096) for width in widths}

    def train(S, G, C, which=policy):
        return partial(learn, which, both(which, S, G, C)["shared"])

    # what grows -> (its unit, {its value: (x, work)})
    plan = {
        f"decoding, group ({steps} steps, S {S})": (
            "rows",
            {G: (G, partial(decode, policy, S, G, steps)) for G in groups},
        ),
        f"decoding, cap (G 8, S {S})": ("steps", {C: (C, partial(decode, policy, S, 8, C)) for C in caps}),
        "prefill, prompt": ("tokens", {n: (n, partial(prefill, policy, n)) for n in lengths}),
        f"training, group (S {S}, C 64)": ("tokens", {G: (S + 64 * G, train(S, G, 64)) for G in groups}),
        "training, prompt (G 8, C 64)": ("tokens", {n: (n + 8 * 64, train(n, 8, 64)) for n in lengths}),
        f"training, cap (G 8, S {S})": ("tokens", {C: (S + 8 * C, train(S, 8, C)) for C in caps}),
        "training, width (G 8, S 150, C 64)": (
            "parameters",
            {w: (sizes(models[w]), train(150, 8, 64, models[w])) for w in widths},
        ),
    }
    rows, found = [], {"rounds": args.rounds, "exponents": {}, "of_the_work": {}}
    for name, (unit, works) in plan.items():
        times = take_turns(
            {str(value): work for value, (_, work) in works.items()},
            1 if args.quick else args.rounds,
            args.clock,
        )
        x, seconds = [x for x, _ in works.values()], [median(times[str(value)]) for value in works]
        short, flops = (
            name.partition(" (")[0],
            [
                linear + 2 * attention
                for linear, attention in (operations(work) for _, work in works.values())
            ],
        )
        found["exponents"][short], found["of_the_work"][short] = exponent(x, seconds), exponent(x, flops)
        rows.append(
            [
                name,
                unit,
                f"{x[0]:,} – {x[-1]:,}",
                f"{seconds[0]:.3f} – {seconds[-1]:.3f}",
                exponent(x, seconds),
                exponent(x, flops),
            ]
        )
    read = {}
    for G in groups:
        with traffic() as read[G]:
            decode(policy, S, G, steps)
    first, last = groups[0], groups[-1]
    found["kv_bytes"] = read
    found["prompt_traffic_growth"] = read[last]["prompt"] / read[first]["prompt"]
    found["repeated_would_be"] = last / first
    for part in ("prompt", "own"):
        low, high = read[first][part], read[last][part]
        rows.append(
            [
                f"{part} keys and values read, G {first} – {last}",
                "bytes",
                f"{low:,} – {high:,}",
                "",
                high / low,
                "",
            ]
        )
    return finish(
        "scaling",
        [
            "what grows",
            "x",
            "x from – to",
            "seconds from – to",
            "exponent, or growth",
            "exponent of the work",
        ],
        rows,
        found,
        args,
    )


if __name__ == "__main__":
    main()
