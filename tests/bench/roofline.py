"""How much of this machine a rollout and a training step use:  python tests/bench/roofline.py

What the machine can do: the rate of a float32 matrix product, of a float64 one (attention adds up in float64
on a CPU), and of a copy that is larger than the caches.

What is done: PyTorch counts the floating-point operations of products and attentions where they run. The
bytes that must be read are counted too: the weights once a decode step, and the keys and values of attention.
A rollout cannot take less time than operations / product rate, nor less than bytes / copy rate. The larger of
the two is its bound, and the figure is bound / time.

Two policies: the built-in one, whose weights stay in the cache (products bound it), and a random one of about
60 million parameters. Prints a table; the last line is one JSON object.
"""

import sys
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo.parallel.openmp

import torch

from data.chat import Chat
from data.shapes.world import Shapes
from grpo.batch import collate_prompts
from grpo.rollout import generate
from grpo.storage.model_folder import BUILT_IN
from models import weights
from tests.bench.scaling import traffic
from tests.bench.shared_prompt import Group, learn, random_policy, text_prompts
from tests.bench.timing import finish, operations, parser, take_turns


def machine(side: int, megabytes: int, rounds: int, clock: str) -> dict[str, float]:
    """Operations a second of matrix products, bytes a second (read and written) of a copy."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    c, d = a.double(), b.double()
    source = torch.randn(megabytes * 250_000)
    target = torch.empty_like(source)
    seconds = take_turns(
        {"float32": lambda: a @ b, "float64": lambda: c @ d, "copy": lambda: target.copy_(source)},
        3 * rounds,
        clock,
    )
    work = {"float32": 2 * side**3, "float64": 2 * side**3, "copy": 2 * source.nbytes}
    # what it reaches: the best turn
    return {name: work[name] / min(times) for name, times in seconds.items()}


def read_by_rollout(policy, work, steps: int) -> int:
    """Bytes: the decoder's weights once a step, keys and values as often as attention reads them."""
    with traffic() as read:
        work()
    decoder = sum(p.nbytes for name, p in policy.named_parameters() if not name.startswith("visual."))
    return steps * decoder + sum(read.values())


def cases(quick: bool) -> dict:
    """Name -> (policy, prompts, group, cap)."""
    chat, world, tiny = Chat(BUILT_IN, template="shapes"), Shapes("train", 100), weights.load(BUILT_IN)
    prompts = collate_prompts(
        [chat.prompt(world[i]) for i in range(2 if quick else 16)], image_token=chat.image_token
    )
    if quick:
        return {"built-in": (tiny, prompts, 2, 4)}
    middle = random_policy()
    return {
        "built-in": (tiny, prompts, 12, 40),
        "60 million": (middle, text_prompts(4, 300, middle.config.vocab_size), 8, 64),
    }


def main(argv: list[str] | None = None) -> dict:
    """Measure and print."""
    args = parser(__doc__, rounds=3).parse_args(argv)
    rounds = 1 if args.quick else args.rounds
    can = machine(256 if args.quick else 2048, 8 if args.quick else 256, rounds, args.clock)
    rows = [
        ["matrix product, float32", "", "", can["float32"] / 1e9, "", ""],
        ["matrix product, float64", "", "", can["float64"] / 1e9, "", ""],
        ["copy", "", "", "", can["copy"] / 1e9, ""],
    ]
    found = {"rounds": rounds, "machine": {name: round(value / 1e9, 2) for name, value in can.items()}}
    for name, (policy, prompts, G, C) in cases(args.quick).items():
        rollout = partial(
            generate,
            policy,
            prompts,
            group=G,
            cap=C,
            temperature=1.0,
            stop_ids=[-1],
            address=(0, 0, list(range(len(prompts.tokens)))),
        )
        train = partial(
            learn, policy, Group(prompts, rollout().tokens, torch.full((len(prompts.tokens), G), C))
        )
        flops, moved = (
            {"rollout": sum(operations(rollout)), "training": sum(operations(train))},
            read_by_rollout(policy, rollout, C),
        )
        seconds = {
            what: median(times)
            for what, times in take_turns({"rollout": rollout, "training": train}, rounds, args.clock).items()
        }
        bound = {
            "rollout": max(flops["rollout"] / can["float32"], moved / can["copy"]),
            "training": flops["training"] / can["float32"],
        }
        for what in seconds:
            memory = moved / seconds[what] / 1e9 if what == "rollout" else ""
            rows.append(
                [
                    f"{what}, {name}",
                    flops[what] / 1e9,
                    seconds[what],
                    flops[what] / seconds[what] / 1e9,
                    memory,
                    bound[what] / seconds[what],
                ]
            )
        found[name] = {f"{what}_share": round(bound[what] / seconds[what], 4) for what in seconds} | {
            "flops": flops,
            "bytes_read": moved,
            "seconds": {what: round(s, 3) for what, s in seconds.items()},
            "bound_by": "products" if flops["rollout"] / can["float32"] > moved / can["copy"] else "bytes",
            "bytes_per_second": round(moved / seconds["rollout"]),
        }
    return finish(
        "roofline", ["", "Gflop", "seconds", "Gflop/s", "GB/s", "share of the bound"], rows, found, args
    )


if __name__ == "__main__":
    main()
