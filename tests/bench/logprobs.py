"""Log-probs of completions at the size of Qwen2-VL-2B's vocabulary:  python tests/bench/logprobs.py [--tokens
2048] [--chunk TOKENS]

Forward and backward of log-prob and entropy from hidden states (T, D = 1536) under a head (V = 151,936, D),
float32 on the CPU, three ways:

- *glimpse*: `grpo.logprobs.masked_logprobs`, with --chunk (default: what `loss.logits_mib` gives on a CPU)
  and with the default of a GPU;
- *full logits*: log-softmax of all logits, gathered;
- *gather - logsumexp*: the chosen logit less the logsumexp of its row, row by row (as TRL does in float32).

The other two compute their entropy without gradients, 128 rows at a time, which takes little memory. All
three must agree. Time: in turns, in this process. Memory: how much an idle process grows at its peak, less
the gradients, which all of them leave. Once with the head trained; once with it frozen, where only the memory
of the logits counts. Prints a table; the last line is one JSON object.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo.parallel.openmp

import torch
import torch.nn.functional as F

from grpo.logprobs import chunk_of, masked_logprobs
from grpo.plan.known_models import KNOWN
from models.qwen_vl import QwenVL
from tests.bench.timing import child, extra_memory, finish, parser, ratio, take_turns

# of logits whose entropy the peers take at once
ENTROPY_ROWS = 128


def policy_of(width: int, vocabulary: int, trained: bool):
    """A policy with a real tied head, and nothing else that takes memory."""
    config = KNOWN["Qwen/Qwen2-VL-2B"]
    config = replace(
        config,
        hidden_size=width,
        vocab_size=vocabulary,
        num_hidden_layers=1,
        vision=replace(config.vision, depth=1, hidden_size=width),
        **dict.fromkeys(
            ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
            vocabulary - 1,
        ),
    )
    with torch.device("meta"):
        policy = QwenVL(config)
    head = torch.empty(vocabulary, width).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    policy.model.embed_tokens.weight = torch.nn.Parameter(head, requires_grad=trained)
    return policy


def glimpse(policy, hidden, tokens, chunk):
    """-> log-probs (1, T) with gradient, entropy (1, T)."""
    return masked_logprobs(
        policy, hidden, tokens, torch.ones_like(tokens, dtype=torch.bool), temperature=1.0, chunk=chunk
    )


@torch.no_grad()
def entropy_of(logits):
    """Entropy of logits (1, T, V), a few rows at a time. -> (1, T)"""
    return torch.cat(
        [torch.special.entr(part.softmax(-1)).sum(-1) for part in logits[0].split(ENTROPY_ROWS)]
    )[None]


def full(policy, hidden, tokens):
    """-> the same from a log-softmax of all logits."""
    logits = F.linear(hidden, policy.model.embed_tokens.weight)
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0], entropy_of(logits)


def gathered(policy, hidden, tokens):
    """-> the same from the chosen logit and the logsumexp."""
    logits = F.linear(hidden, policy.model.embed_tokens.weight)
    total = torch.stack([row.logsumexp(-1) for row in logits[0]])[None]
    return logits.gather(-1, tokens[..., None])[..., 0] - total, entropy_of(logits)


def forms(chunk: int, vocabulary: int) -> dict:
    """Name -> how."""
    ours = {
        f"glimpse, chunk {c}": partial(glimpse, chunk=c)
        for c in dict.fromkeys((chunk, chunk_of(vocabulary, None, "cuda")))
    }
    return ours | {"full logits": full, "gather - logsumexp": gathered}


def inputs(width: int, vocabulary: int, count: int):
    """hidden (1, T, D) that asks for a gradient, tokens (1, T), none of them the placeholder that our head
    bans."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(1, count, width, generator=random).requires_grad_(), torch.randint(
        0, vocabulary - 1, (1, count), generator=random
    )


def main(argv: list[str] | None = None) -> dict | None:
    """Measure and print."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--chunk", type=int)
    options.add_argument("--width", type=int, default=1536)
    options.add_argument("--vocabulary", type=int, default=151936)
    options.add_argument("--memory", help="only measure the memory of this form, in this process")
    options.add_argument("--frozen", action="store_true", help="with --memory: the head has no gradient")
    args = options.parse_args(argv)
    if args.quick:
        args.tokens, args.chunk, args.width, args.vocabulary, args.rounds = 256, 32, 1536, 4096, 1
    args.chunk = args.chunk or chunk_of(args.vocabulary, None, "cpu")
    policy = policy_of(args.width, args.vocabulary, not args.frozen)
    hidden, tokens = inputs(args.width, args.vocabulary, args.tokens)
    size, all_forms = args.tokens, forms(args.chunk, args.vocabulary)

    def work(form):
        logp, entropy = form(policy, hidden[:, :size], tokens[:, :size])
        (-logp).mean().backward()
        return logp.detach(), entropy

    def forget():
        hidden.grad = policy.model.embed_tokens.weight.grad = None

    if args.memory:
        size = 2
        # libraries take their share before counting begins
        work(all_forms[args.memory])
        forget()
        size = args.tokens
        grown = extra_memory(lambda: work(all_forms[args.memory]))
        left = hidden.grad.nbytes + (0 if args.frozen else policy.model.embed_tokens.weight.grad.nbytes)
        print(json.dumps({"extra": grown - left}))
        return None

    results = {}

    def timed(name):
        forget()
        results[name] = work(all_forms[name])

    seconds = take_turns({name: partial(timed, name) for name in all_forms}, args.rounds, args.clock)
    for name, (logp, entropy) in results.items():
        for ours, theirs in zip((logp, entropy), results["full logits"]):
            # the banned word is one of V
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4, msg=name)
    same = [
        "--tokens",
        str(args.tokens),
        "--chunk",
        str(args.chunk),
        "--width",
        str(args.width),
        "--vocabulary",
        str(args.vocabulary),
    ]
    extra = {
        how: {name: child(__file__, *same, "--memory", name, *flags)["extra"] for name in all_forms}
        for how, flags in (("trained", []), ("frozen", ["--frozen"]))
    }
    first, base = next(iter(all_forms)), "full logits"
    rows = [
        [
            name,
            median(seconds[name]),
            ratio(seconds[name], seconds[base]),
            *(f for e in extra.values() for f in (e[name] / 1e6, e[name] / e[base])),
        ]
        for name in all_forms
    ]
    found = {
        "tokens": args.tokens,
        "width": args.width,
        "vocabulary": args.vocabulary,
        "rounds": args.rounds,
        "seconds": {name: round(median(s), 3) for name, s in seconds.items()},
        "extra_bytes": extra,
        "chunk": args.chunk,
        "time_ratio": ratio(seconds[first], seconds[base]),
        "memory_saving": round(extra["trained"][base] / extra["trained"][first], 2),
        "memory_ratio": round(extra["trained"][first] / extra["trained"][base], 4),
        "memory_ratio_frozen": round(extra["frozen"][first] / extra["frozen"][base], 4),
        "memory_saving_gathered": round(extra["trained"]["gather - logsumexp"] / extra["trained"][first], 2),
    }
    return finish(
        "logprobs",
        ["", "seconds", "of full", "MB extra, head trained", "of full", "MB, frozen", "of full"],
        rows,
        found,
        args,
    )


if __name__ == "__main__":
    main()
