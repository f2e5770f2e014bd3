"""Rollout against transformers' generate, on the CPU:  python tests/bench/rollout.py [--prompts 16] [--group
12] [--cap 40] [--exact on|off]

The built-in model in both: the same folder, prompts, pictures and dtype, temperature 1, no top-k and no
top-p, the placeholders banned. First both decode greedily and must give the same tokens. Then they sample in
turns, in two ways. *stopping*, as in training: the tokens up to each row's stop are counted. *full*: no token
stops a row, so both draw exactly P x G x cap tokens.

transformers runs with its dynamic and with its static cache; the speedup is over the faster one. Everything
is measured with PyTorch's default number of threads, and with one. *float32* is the time of our rollout
with `exact=false`: it shows the price of log-probs that equal those of the training forward. With --exact off
*glimpse* is that rollout, too. Prints tokens a second; the last line is one JSON object.
"""

import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo.parallel.openmp

import torch
import transformers

from data.chat import Chat
from data.shapes.world import Shapes
from grpo.batch import collate_prompts
from grpo.rollout import generate
from grpo.sampling import uid_hash
from grpo.storage.model_folder import BUILT_IN
from models import weights
from models.layers import attention_sums
from tests.bench.timing import finish, parser, ratio, sized, sizes, take_turns

# a stop id that no token has
NO_STOP_TOKEN = -1


class Peer:
    """transformers' generate on the same weights and prompts, padded on the left as it wants them."""

    def __init__(self, policy, prompts):
        self.model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
            BUILT_IN, attn_implementation="sdpa", dtype=torch.float32
        ).eval()
        count, longest = prompts.tokens.shape
        self.real = torch.arange(longest) >= longest - prompts.length[:, None]  # (P, S)
        tokens = torch.zeros(count, longest, dtype=torch.long)
        tokens[self.real] = prompts.tokens[torch.arange(longest) < prompts.length[:, None]]
        self.longest, self.banned = longest, list(policy.config.placeholder_ids)
        self.inputs = dict(
            input_ids=tokens,
            attention_mask=self.real.long(),
            mm_token_type_ids=(tokens == policy.config.image_token_id).int(),
            pixel_values=prompts.patches,
            image_grid_thw=prompts.grid,
        )

    def __call__(
        self, group: int, cap: int, stop_ids: list[int], *, greedy: bool = False, cache: str | None = None
    ) -> torch.Tensor:
        """-> completions (P·G, C), 0 behind their stop token."""
        how = (
            dict(do_sample=False)
            if greedy
            else dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=group)
        )
        self.model.generation_config.eos_token_id = stop_ids or None
        out = self.model.generate(
            **self.inputs,
            max_new_tokens=cap,
            suppress_tokens=self.banned,
            pad_token_id=0,
            cache_implementation=cache,
            **how,
        )
        return out[:, self.longest :]


def counted(tokens: torch.Tensor, stop_ids: list[int]) -> int:
    """Tokens of completions (B, C) up to each row's stop token, which counts."""
    stops = torch.isin(tokens, torch.tensor(stop_ids or [NO_STOP_TOKEN]))
    return int((stops.cumsum(1) - stops.long() == 0).sum())


def contest(
    policy,
    peer: Peer,
    prompts,
    uids: list[int],
    group: int,
    cap: int,
    stop_ids: list[int],
    rounds: int,
    clock: str,
    exact: bool,
) -> dict[str, tuple]:
    """Sample in turns. -> of each program its tokens and its seconds, two lists by round."""
    drawn: dict[str, list[int]] = {"glimpse": [], "float32": [], "dynamic": [], "static": []}

    def ours(name="glimpse"):
        address = (0, len(drawn[name]), uids)
        with attention_sums(exact and name != "float32"):
            rollout = generate(
                policy,
                prompts,
                group=group,
                cap=cap,
                temperature=1.0,
                stop_ids=stop_ids or [NO_STOP_TOKEN],
                address=address,
            )
        drawn[name].append(int(rollout.length.sum()))

    def theirs(cache):
        drawn[cache].append(
            counted(peer(group, cap, stop_ids, cache="static" if cache == "static" else None), stop_ids)
        )

    seconds = take_turns(
        {
            "glimpse": ours,
            "float32": lambda: ours("float32"),
            "dynamic": lambda: theirs("dynamic"),
            "static": lambda: theirs("static"),
        },
        rounds,
        clock,
    )
    return {name: (drawn[name][1:], seconds[name]) for name in drawn}


def main(argv: list[str] | None = None) -> dict:
    """Measure and print."""
    options = sized(parser(__doc__, 10))
    how = "the setting exact: sums in float64, or in float32"
    options.add_argument("--exact", choices=("on", "off"), default="on", help=how)
    args = options.parse_args(argv)
    P, G, C, rounds = sizes(args)
    policy, chat, world = weights.load(BUILT_IN), Chat(BUILT_IN, template="shapes"), Shapes("train", 1000)
    sources = [chat.prompt(world[i]) for i in range(P)]
    prompts = collate_prompts(sources, image_token=chat.image_token)
    uids, peer, stop_ids = [uid_hash(p.uid) for p in sources], Peer(policy, prompts), list(chat.stop_ids)

    greedy = generate(
        policy, prompts, group=1, cap=C, temperature=0, stop_ids=[NO_STOP_TOKEN], address=(0, 0, uids)
    ).tokens[:, 0]
    same = bool((greedy == peer(1, C, [], greedy=True)).all())
    assert same, "greedy completions differ: this would compare two different policies"

    rows, found, most = (
        [],
        {"prompts": P, "group": G, "cap": C, "rounds": rounds, "exact": args.exact, "greedy_equal": same},
        torch.get_num_threads(),
    )
    for threads in sorted({most, 1}, reverse=True):
        torch.set_num_threads(threads)
        of_these = found if threads == most else found.setdefault("one_thread", {})
        for kind, stops in (("stopping", stop_ids), ("full", [])):
            turns = contest(policy, peer, prompts, uids, G, C, stops, rounds, args.clock, args.exact == "on")
            # seconds a token, by round
            each = {name: [s / n for n, s in zip(*turn, strict=True)] for name, turn in turns.items()}
            best = min(("dynamic", "static"), key=lambda name: median(each[name]))
            for name, (tokens, seconds) in turns.items():
                rows.append(
                    [
                        f"{kind}, {name}",
                        threads,
                        median(tokens),
                        median(seconds),
                        1 / median(each[name]),
                        ratio(each[name], each["glimpse"]),
                    ]
                )
            of_these[kind] = {
                "tokens_per_second": {name: round(1 / median(each[name])) for name in each},
                "speedup_dynamic": ratio(each["dynamic"], each["glimpse"]),
                "speedup_static": ratio(each["static"], each["glimpse"]),
                "float32": ratio(each["float32"], each["glimpse"]),
                "speedup": ratio(each[best], each["glimpse"]),
            }
    torch.set_num_threads(most)
    found.setdefault("one_thread", {kind: found[kind] for kind in ("stopping", "full")})
    # of a rollout as training has it; `full` is beside it
    found["speedup"] = found["stopping"]["speedup"]
    return finish(
        "rollout", ["", "threads", "tokens", "seconds", "tokens/s", "times Glimpse's time"], rows, found, args
    )


if __name__ == "__main__":
    main()
