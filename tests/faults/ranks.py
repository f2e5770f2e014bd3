"""Is a run on several ranks the run on one?    python tests/faults/ranks.py [--steps 20] [--ranks 1 2 4]

Comparisons in float32 on the CPU, with one thread a process. gloo joins the ranks, and FSDP2 shards the
policy:

    run       the built-in recipe with the same global batch: every token of every completion, every metric,
              and the weights at the end
    gradient  of a batch on 1 and 2 ranks, with completions of unequal lengths and a rank without a picture
    resume    a run that goes on on other numbers of ranks (2, then 1, then 4), against an undisturbed one
    cases     (--cases) two steps of a small policy in every way in which ranks may differ (CASES), on 1 and
              on 3 ranks; and the gradient
    time      (--time N) seconds of N short runs with `python train.py` and of N with
              `torchrun --nproc-per-node 1`, in turns

Processes are forked from one that has imported everything. Ends with a line of JSON. Exit status 1 if tokens
differ or weights differ by more than 1e-5.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = (
    # one thread: after a fork there are no others, and sums are cut alike on any machine
    "1"
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch
from safetensors.torch import load_file, save_file
from small import batch_of, full, small_folder

import train
from data.chat import Chat
from data.shapes.world import Shapes
from grpo.gradient import TokenBudget, passes
from grpo.logprobs import completion_logprobs
from grpo.monitor import report
from grpo.objective import policy_loss, token_weights
from grpo.parallel import fsdp
from grpo.parallel.ranks import join_ranks, leave_ranks, sum_gradients
from grpo.run import lifecycle
from grpo.storage.checkpoint import complete
from grpo.storage.model_folder import BUILT_IN
from grpo.variants import token_mean
from models import weights

# of weights, relative to the largest of their tensor
CLOSE = 1e-5
# a gradient in float32 on one and on two ranks: 7e-7 to 1.2e-6, by the processor
GRADIENT = 2e-6
QUIET = ["device=cpu", "save.keep=0"]
# each group alone: 3 does not divide 4
SMALL = [
    "seed=1",
    "steps=2",
    "prompts=5",
    "group=3",
    "cap=10",
    "rewards={length: 100, format: 1}",
    "optim.lr=1e-3",
    "optim.warmup=0",
    "eval.items=4",
    "save.every=0",
    "report.every=1",
    "limit=40",
    "loss.sections=0",
]
# two groups of five; three sections of rows, which 3 ranks divide
SPLIT = ["prompts=2", "group=5", "loss.sections=3"]
# each document alone
DOCUMENTS = [
    "method=sft",
    "task=documents",
    "data=branch=1",
    "cap=128",
    "eval.items=0",
    "loss.micro_tokens=100",
]
CASES = {
    "prompts that do not divide": [],
    "fewer prompts than ranks": [*SPLIT, "report.prompts=2", "eval.items=2"],
    "split groups, two updates, recomputed": [
        *SPLIT,
        "loss.updates=2",
        "loss.minibatches=2",
        "loss.kl_coef=0.02",
        "recompute=true",
        "loss.micro_tokens=200",
    ],
    "split groups, dynamic": [
        *SPLIT,
        "advantage=batch",
        "loss.kl_coef=0",
        "rewards={format: 1, few.py:few: 1}",
        "max_rounds=3",
    ],
    "fewer rows than ranks": ["prompts=1", "group=2", "loss.sections=3"],
    "two updates, a reference, recomputed": ["loss.updates=2", "loss.kl_coef=0.02", "recompute=true"],
    "mini-batches": ["loss.minibatches=3", "loss.updates=2"],
    "groups cut by rows": ["loss.micro_tokens=50"],
    "dynamic": ["loss.kl_coef=0", "rewards={format: 1, few.py:few: 1}", "max_rounds=3"],
    "vision frozen": ["freeze=[vision]"],
    "llm frozen": ["freeze=[llm]"],
    "LoRA": ["lora.rank=4", "lora.targets=[q_proj, up_proj, qkv]", "optim.lr=1e-2", "loss.kl_coef=0.02"],
    "LoRA in bfloat16": ["lora.rank=4", "dtype=bfloat16", "loss.micro_tokens=80", "recompute=true"],
    "muon": ["optim.name=muon"],
    "small states": ["optim.name=adamw_8bit", "loss.kl_coef=0.02"],
    "bfloat16": ["dtype=bfloat16", "loss.micro_tokens=80"],
    "imitation": DOCUMENTS,
    "imitation, fewer prompts than ranks": [*DOCUMENTS, "prompts=2", "sft.loss_on=prompt_and_answer"],
}


def on_ranks(count: int, work, log: Path) -> list[int]:
    """Fork `count` processes, which call `work` each with its rank and the environment that torchrun
    would give it. -> their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        if process := os.fork():
            processes.append(process)
            continue
        status = 3
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        report.write_curves = lambda folder, say=print: []
        with (
            open(f"{log}.{rank}", "w") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            try:
                status = work(rank)
            except BaseException:
                traceback.print_exc()
            finally:
                file.flush()
                os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


# ---- whole runs


def run(out: Path, ranks: int, settings: list[str], stop: int = 0) -> None:
    """The built-in recipe with these settings; what each rank asked and got goes to `out`.RANK.json. stop:
    leave after this step, as if told to by SIGTERM."""

    def work(rank: int) -> int:
        written, ask, leave = {}, train.sample_and_score, lifecycle.Lifecycle.leave_if_told

        def asked(cfg, run, joined, step, stage, attempt=0):
            drawn = ask(cfg, run, joined, step, stage, attempt)
            for prompt, tokens, length in zip(drawn.prompts, drawn.rollout.tokens, drawn.rollout.length):
                for g, (row, n) in enumerate(zip(tokens.tolist(), length.tolist())):
                    if n:
                        written[f"{step}/{attempt}/{prompt.uid}/{g}"] = row[:n]
            return drawn

        def left(keeper, step):
            keeper.interrupts.first = keeper.interrupts.first or signal.SIGTERM * (step == stop)
            leave(keeper, step)

        train.sample_and_score = asked
        if stop:
            lifecycle.Lifecycle.leave_if_told = left
        status = train.main(["shapes", *QUIET, *settings, f"out={out}"])
        Path(f"{out}.{ranks}.{rank}.json").write_text(json.dumps(written))
        return status

    wanted = 128 + signal.SIGTERM if stop else 0
    if any(status != wanted for status in on_ranks(ranks, work, out)):
        raise SystemExit("\n".join(Path(f"{out}.{rank}").read_text()[-3000:] for rank in range(ranks)))


def tokens_of(out: Path) -> dict:
    """Every completion of a run, of all ranks."""
    return {
        key: row
        for path in sorted(out.parent.glob(f"{out.name}.*.json"))
        for key, row in json.loads(path.read_text()).items()
    }


def metrics_of(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, without times."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in row.items() if key != "step_time" and not key.startswith("time/")}
        for row in rows
    ]


def parted(one: dict, other: dict) -> tuple[float, str]:
    """How far two sets of tensors are from each other: the largest difference in a tensor by the largest
    number in it. -> (the worst, its tensor)."""
    if one.keys() != other.keys():
        return float("inf"), min(one.keys() ^ other.keys())
    return max(
        (float((one[key] - other[key]).abs().max() / one[key].abs().max().clamp(min=1e-30)), key)
        for key in one
    )


def compare(one: Path, other: Path) -> dict:
    """Two finished runs."""
    a, b = tokens_of(one), tokens_of(other)
    # weights or an adapter
    weights_of = lambda out: load_file(next(complete(out)[-1].glob("*model.safetensors")))
    (apart, where), first, second = (
        parted(weights_of(one), weights_of(other)),
        metrics_of(one),
        metrics_of(other),
    )
    worst = max(
        (
            (abs(x - y) / max(abs(x), 1.0), key)
            for u, v in zip(first, second)
            for key in u
            if isinstance(x := u[key], float) and isinstance(y := v.get(key), float)
        ),
        default=(0.0, ""),
    )
    same_lines = [set(u) for u in first] == [set(v) for v in second] and all(
        u[key] == v[key] for u, v in zip(first, second) for key in u if not isinstance(u[key], float)
    )
    return {
        "tokens_identical": a == b,
        "completions": len(a),
        "tokens": sum(map(len, a.values())),
        "weights_max_relative": apart,
        "where": where,
        "metrics_max_difference": worst[0] if same_lines else float("inf"),
        "metric": worst[1],
    }


# ---- the gradient


def gradient(ranks: int, out: Path) -> dict[str, torch.Tensor]:
    """Of five groups, by `ranks` ranks: unequal lengths, and no picture in the last three, which of two
    ranks are the second one's."""

    def work(rank: int) -> int:
        joined = join_ranks("cpu")
        chat, shapes, policy = Chat(BUILT_IN, template="shapes"), Shapes("train", 100), weights.load(BUILT_IN)
        if joined.size > 1:
            fsdp.shard(policy, joined, use_bfloat16=False)
        random = torch.Generator().manual_seed(1)
        prompts = [chat.prompt(shapes[i] if i < 3 else replace(shapes[i], pictures=())) for i in range(5)]
        length = torch.randint(2, 40, (5, 4), generator=random) * torch.tensor([[1], [2], [1], [1], [1]])
        tokens, advantage = (
            torch.randint(8, 120, (5, 4, 80), generator=random),
            torch.randn(5, 4, generator=random),
        )
        mine = joined.share(list(range(5)))
        batch = batch_of(
            [prompts[p] for p in mine], tokens[mine], length[mine], advantage=advantage[mine].flatten()
        )
        batch.weight = token_weights(batch.mask, token_mean, tokens=length.sum(), completions=20, cap=80)
        budget = TokenBudget(10**6, 64, torch.device("cpu"))
        for part, _ in passes(policy, batch, budget, batch.teaching):
            logp, _ = completion_logprobs(policy, part, temperature=1.0, chunk=64)
            policy_loss(logp, None, None, part.advantage, part.weight)[0].backward()
        sum_gradients(policy)
        found = {name: full(p.grad).contiguous() for name, p in policy.named_parameters()}
        if joined.main:
            save_file(found, out)
        leave_ranks()
        return 0

    if any(on_ranks(ranks, work, out)):
        raise SystemExit("\n".join(Path(f"{out}.{rank}").read_text()[-3000:] for rank in range(ranks)))
    return load_file(out)


# ---- cases


def cases(place: Path, names: list[str]) -> int:
    """These cases on 1 and on 3 ranks. -> exit status; prints a line of JSON."""
    # in a process of its own: nothing may compute before a fork
    if on_ranks(1, lambda rank: small_folder(place / "base") and 0, place / "base.log") != [0]:
        raise SystemExit((place / "base.log.0").read_text())
    # some groups earn the same throughout, others do not
    (place / "few.py").write_text("def few(text, example, length):\n    return float(length > 4)\n")
    found = {}
    for number, name in enumerate(names):
        settings = [
            *SMALL,
            f"model={place / 'base'}",
            *(word.replace("few.py", f"{place}/few.py") for word in CASES[name]),
        ]
        for ranks in (1, 3):
            run(place / f"case{number}on{ranks}", ranks, settings)
        found[name] = compare(*(place / f"case{number}on{ranks}" for ranks in (1, 3)))
        shown = [place / f"case{number}on{ranks}" / "samples.jsonl" for ranks in (1, 3)]
        found[name]["samples_identical"] = shown[0].exists() == shown[1].exists() and (
            not shown[0].exists() or shown[0].read_bytes() == shown[1].read_bytes()
        )
        print(f"{name}: {found[name]}", flush=True)
    apart = parted(gradient(1, place / "gradient1"), gradient(2, place / "gradient2"))
    print(f"gradient on 1 and 2 ranks, one without a picture: {apart}", flush=True)
    print(json.dumps({"gradient_max_relative": apart[0], "cases": found}))
    return int(
        apart[0] > GRADIENT
        or not all(row["tokens_identical"] and row["weights_max_relative"] <= CLOSE for row in found.values())
    )


# ---- time


def seconds(place: Path, runs: int, steps: int) -> dict:
    """Median seconds of a step, and of a whole run, of each way to start one process; in turns."""
    ways = {
        "python": [sys.executable, "train.py"],
        "torchrun": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=1",
            "train.py",
        ],
    }
    found: dict[str, list] = {way: [] for way in ways}
    for number in range(runs * 2):
        # a b b a a b ...
        way = list(ways)[(number + number // 2) % 2]
        out = place / f"time{number}"
        subprocess.run(
            [*ways[way], "shapes", *QUIET, f"steps={steps}", "eval.items=0", "report.every=0", f"out={out}"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        found[way] += [
            json.loads(line)["step_time"] for line in (out / "metrics.jsonl").read_text().splitlines()
        ][1:]
    medians = {way: statistics.median(times) for way, times in found.items()}
    return {"step_seconds": medians, "torchrun_by_python": medians["torchrun"] / medians["python"]}


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cases", action="store_true", help="only this; settings: the names of some")
    parser.add_argument(
        "--time", type=int, default=0, metavar="N", help="only this: N runs of each way to start one process"
    )
    parser.add_argument("settings", nargs="*", help="key=value, over the recipe shapes")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="glimpse-ranks-") as folder:
        place = Path(folder)
        if asked.cases:
            return cases(place, asked.settings or list(CASES))
        if asked.time:
            print(json.dumps(seconds(place, asked.time, asked.steps)))
            return 0
        settings = [
            f"steps={asked.steps}",
            "save.every=0",
            "report.every=0",
            "eval.items=32",
            f"eval.every={max(asked.steps // 2, 1)}",
            *asked.settings,
        ]
        for ranks in asked.ranks:
            run(place / f"on{ranks}", ranks, settings)
        first, found = place / f"on{asked.ranks[0]}", {}
        for ranks in asked.ranks[1:]:
            found[f"{asked.ranks[0]} and {ranks} ranks"] = compare(first, place / f"on{ranks}")
            print(
                f"{asked.ranks[0]} and {ranks} ranks, {asked.steps} steps: "
                f"{found[f'{asked.ranks[0]} and {ranks} ranks']}",
                flush=True,
            )
        apart = parted(gradient(1, place / "gradient1"), gradient(2, place / "gradient2"))
        print(f"gradient on 1 and 2 ranks, one without a picture: {apart}", flush=True)
        third = max(asked.steps // 3, 1)
        for ranks, stop in ((2, third), (1, 2 * third), (4, 0)):
            run(place / "resumed", ranks, settings, stop)
        found["2, then 1, then 4 ranks"] = resumed = compare(first, place / "resumed")
        print(f"2, then 1, then 4 ranks: {resumed}", flush=True)
    print(
        json.dumps(
            {
                "tokens_identical": all(row["tokens_identical"] for row in found.values()),
                "weights_max_relative": max(row["weights_max_relative"] for row in found.values()),
                "metrics_max_difference": max(row["metrics_max_difference"] for row in found.values()),
                "gradient_max_relative": apart[0],
                "completions": resumed["completions"],
                "tokens": resumed["tokens"],
                "steps": asked.steps,
                "ranks": asked.ranks,
                "resume": {key: resumed[key] for key in ("tokens_identical", "weights_max_relative")},
                "torch": torch.__version__,
            }
        )
    )
    return int(
        not all(row["tokens_identical"] and row["weights_max_relative"] <= CLOSE for row in found.values())
    )


if __name__ == "__main__":
    sys.exit(main())
