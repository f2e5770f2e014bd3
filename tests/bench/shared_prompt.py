"""A prompt once per group against once per completion, in training:  python tests/bench/shared_prompt.py
[--prompt 600] [--group 8] [--cap 250]

Forward and backward of the completions' log-probs through a random policy of about 60 million parameters,
float32 on the CPU. *shared*: the prompt once, with G completions. *repeated*: the same code on G copies of
the prompt, one completion each. The prompts are text; with pictures the difference would be larger. The
log-probs and the gradients must be the same.

Time: in turns. Memory: what autograd keeps, and how much an idle process grows at its peak, without the
gradients. The first line is the case of the arguments; the others vary S, G and C around it. Prints a table;
the last line is one JSON object.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo.parallel.openmp

import torch
from torch import Tensor

from grpo.logprobs import completion_logprobs
from models import weights
from models.config import ModelConfig, VisionConfig
from models.qwen_vl import PromptBatch
from tests.bench.timing import child, extra_memory, finish, kept_for_backward, parser, ratio, take_turns

CHUNK = 512
SPECIAL = dict(image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4)


@dataclass
class Group:
    """What `completion_logprobs` asks of a batch."""

    prompts: PromptBatch
    tokens: Tensor  # (P, G, C)
    length: Tensor  # (P, G)

    @property
    def mask(self) -> Tensor:
        """(B, C): every completion is full."""
        return torch.ones(self.tokens.flatten(0, 1).shape, dtype=torch.bool)


def random_policy(width: int = 640, blocks: int = 10, mlp: int = 2560, vocabulary: int = 8192):
    """Heads of 64 numbers, five queries a key where the width allows it; the vision tower is there and
    idle."""
    heads = width // 64
    return weights.init(
        ModelConfig(
            "qwen2_vl",
            vocabulary,
            width,
            mlp,
            blocks,
            heads,
            2 if heads % 2 == 0 else 1,
            VisionConfig(1, 64, 2, 128, width),
            mrope_section=(8, 12, 12),
            tie_word_embeddings=True,
            **SPECIAL,
        ),
        seed=0,
    )


def text_prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> PromptBatch:
    """Prompts of random words, all of one length."""
    tokens = torch.randint(5, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return PromptBatch(
        tokens=tokens,
        length=torch.full((count,), length),
        positions=torch.arange(length).expand(count, 3, -1).contiguous(),
        next_position=torch.full((count,), length),
        image_slot=torch.full_like(tokens, -1),
        patches=torch.empty(0, 1176),
        grid=torch.empty(0, 3, dtype=torch.long),
    )


def both(policy, S: int, G: int, C: int) -> dict[str, Group]:
    """The same prompt and completions in both forms."""
    prompts = text_prompts(1, S, policy.config.vocab_size)
    again = PromptBatch(
        **{
            name: value if name in ("patches", "grid") else value.repeat_interleave(G, 0)
            for name, value in vars(prompts).items()
        }
    )
    tokens = torch.randint(5, policy.config.vocab_size, (1, G, C), generator=torch.Generator().manual_seed(1))
    return {
        "shared": Group(prompts, tokens, torch.full((1, G), C)),
        "repeated": Group(again, tokens.transpose(0, 1), torch.full((G, 1), C)),
    }


def score(policy, group: Group) -> Tensor:
    """Log-probs (B, C)."""
    return completion_logprobs(policy, group, temperature=1.0, chunk=CHUNK)[0]


def learn(policy, group: Group) -> Tensor:
    """Forward and backward, each token with a weight of its own. -> the log-probs."""
    policy.zero_grad(set_to_none=True)
    logp = score(policy, group)
    (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
    return logp.detach()


def measured(policy, S: int, G: int, C: int, rounds: int, clock: str) -> dict:
    """One case: seconds of both forms, after their results were compared."""
    groups = both(policy, S, G, C)
    shared = learn(policy, groups["shared"]), [p.grad for p in policy.parameters() if p.grad is not None]
    repeated = learn(policy, groups["repeated"]), [p.grad for p in policy.parameters() if p.grad is not None]
    torch.testing.assert_close(shared[0], repeated[0], atol=1e-4, rtol=1e-4)
    off = max(
        float((a - b).norm() / b.norm().clamp(min=1e-12))
        for a, b in zip(shared[1], repeated[1], strict=True)
        if b.norm() > 1e-6
    )
    # float32 sums in another order
    assert off < 1e-3, f"gradients differ by {off:.1e}"
    seconds = take_turns(
        {name: partial(learn, policy, group) for name, group in groups.items()}, rounds, clock
    )
    kept = {name: kept_for_backward(policy, partial(score, policy, group)) for name, group in groups.items()}
    return {"seconds": seconds, "kept": kept, "gradients_off": off}


def main(argv: list[str] | None = None) -> dict | None:
    """Measure and print."""
    options = parser(__doc__, rounds=3)
    for name, default in (("--prompt", 600), ("--group", 8), ("--cap", 250)):
        options.add_argument(name, type=int, default=default)
    options.add_argument("--one", action="store_true", help="only the case asked for")
    options.add_argument(
        "--memory",
        choices=["shared", "repeated"],
        help="only measure the memory of this form, in this process",
    )
    args = options.parse_args(argv)
    shape = {"width": 128, "blocks": 2, "mlp": 256, "vocabulary": 512} if args.quick else {}
    policy = random_policy(**shape)
    S, G, C = (60, 4, 25) if args.quick else (args.prompt, args.group, args.cap)
    if args.memory:
        # libraries take their share before counting begins
        learn(policy, both(policy, 8, 2, 4)[args.memory])
        group = both(policy, S, G, C)[args.memory]
        policy.zero_grad(set_to_none=True)
        grown = extra_memory(lambda: learn(policy, group))
        print(
            json.dumps(
                {"extra": grown - sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)}
            )
        )
        return None

    cases = (
        [(S, G, C)]
        if args.one or args.quick
        else [
            (S, G, C),
            (S // 3, G, C),
            (2 * S, G, C),
            (S, G // 4, C),
            (S, 2 * G, C),
            (S, G, C // 4),
            (S, G, 2 * C),
        ]
    )
    rows, found = (
        [],
        {
            "parameters": sum(p.numel() for p in policy.parameters()),
            "prompt": S,
            "group": G,
            "cap": C,
            "rounds": args.rounds,
            "cases": [],
        },
    )
    for s, g, c in cases:
        case = measured(
            policy, s, g, c, 1 if args.quick or (s, g, c) != (S, G, C) else args.rounds, args.clock
        )
        seconds, kept, tokens = case["seconds"], case["kept"], g * (s - 1 + c) / (s - 1 + g * c)
        faster, less = (
            ratio(seconds["repeated"], seconds["shared"]),
            round(kept["shared"] / kept["repeated"], 3),
        )
        found["cases"].append(
            {
                "prompt": s,
                "group": g,
                "cap": c,
                "speedup": faster,
                "kept_ratio": less,
                "tokens_ratio": round(tokens, 3),
                "gradients_off": case["gradients_off"],
                "seconds": {name: round(median(s), 3) for name, s in seconds.items()},
                "kept_bytes": kept,
            }
        )
        rows.append(
            [
                f"S {s}, G {g}, C {c}",
                tokens,
                median(seconds["repeated"]),
                median(seconds["shared"]),
                faster,
                kept["repeated"] / 1e6,
                kept["shared"] / 1e6,
                less,
            ]
        )
    flags = ["--quick"] if args.quick else ["--prompt", str(S), "--group", str(G), "--cap", str(C)]
    extra = {name: child(__file__, *flags, "--memory", name)["extra"] for name in ("shared", "repeated")}
    rows.append(
        [
            f"S {S}, G {G}, C {C}: peak",
            "",
            "",
            "",
            "",
            extra["repeated"] / 1e6,
            extra["shared"] / 1e6,
            extra["shared"] / extra["repeated"],
        ]
    )
    found |= {
        "speedup": found["cases"][0]["speedup"],
        "kept_ratio": found["cases"][0]["kept_ratio"],
        "extra_bytes": extra,
        "memory_ratio": round(extra["shared"] / extra["repeated"], 3),
        "memory_saving": round(extra["repeated"] / extra["shared"], 2),
    }
    return finish(
        "shared_prompt",
        ["", "tokens less", "s repeated", "s shared", "times faster", "MB repeated", "MB shared", "of it"],
        rows,
        found,
        args,
    )


if __name__ == "__main__":
    main()
