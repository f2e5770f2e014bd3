"""How far are trained log-probs from the sampled ones?  python tests/bench/gap.py [--seeds 0 1 2]

The built-in base answers 16 training questions 8 times each. Then the training forward gives the log-prob of
each token that was drawn. GRPO takes both for one number. This is measured in float32 and under bfloat16
autocast, with the setting `exact` and without (docs/ranks.md). Prints |trained - sampled| in nats, the mean
and the maximum over all tokens, and as its last line one JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import grpo.parallel.openmp

import torch

from data.chat import Chat
from data.shapes.world import Shapes
from grpo.batch import collate_prompts
from grpo.logprobs import completion_logprobs
from grpo.rollout import generate
from grpo.sampling import uid_hash
from grpo.storage.model_folder import BUILT_IN
from models import weights
from models.layers import attention_sums
from tests.bench.about import about
from tests.small import batch_of, micro_batch

PROMPTS, GROUP, CAP = 16, 8, 96


@torch.no_grad()
def gaps(policy, chat: Chat, seed: int, dtype: str, exact: bool) -> torch.Tensor:
    """|trained - sampled| of every drawn token, in nats. dtype: float32, or bfloat16 by autocast."""
    questions = Shapes("train", PROMPTS, seed=seed)
    sources = [chat.prompt(questions[i]) for i in range(PROMPTS)]
    low = torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16", cache_enabled=False)
    with low, attention_sums(exact):
        rollout = generate(
            policy,
            collate_prompts(sources, image_token=chat.image_token),
            group=GROUP,
            cap=CAP,
            temperature=1.0,
            stop_ids=list(chat.stop_ids),
            address=(seed, 0, [uid_hash(source.uid) for source in sources]),
        )
        batch = batch_of(sources, rollout.tokens, rollout.length)
        rows = micro_batch(batch, chat.image_token)
        logp, _ = completion_logprobs(policy, rows, temperature=1.0, chunk=512)
    gap = (logp - rollout.logp.view(logp.shape)).abs()
    return gap[batch.mask.view(logp.shape).bool()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of questions and answers")
    args = parser.parse_args()
    policy, chat = weights.load(BUILT_IN), Chat(BUILT_IN, template="shapes")
    found = []
    for dtype in ("float32", "bfloat16"):
        for exact in (True, False):
            for seed in args.seeds:
                gap = gaps(policy, chat, seed, dtype, exact)
                row = {"dtype": dtype, "exact": exact, "seed": seed, "tokens": len(gap)}
                found.append(row | {"mean": gap.mean().item(), "max": gap.max().item()})
                shown = f"mean {found[-1]['mean']:.2g}  max {found[-1]['max']:.2g}"
                print(f"{dtype}  exact {str(exact).lower()}  seed {seed}  {shown}", flush=True)
    print(json.dumps({"bench": "gap", "about": about(), "rows": found}))


if __name__ == "__main__":
    main()
