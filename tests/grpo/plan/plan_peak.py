"""The memory that learning takes, in a process of its own:
python tests/grpo/plan/plan_peak.py '{"model": {...}, "side": 6, "settings": [...]}'

Every prompt and completion is as long as it may be. Prints {"grown": bytes, "planned": bytes}: by how much
the process grew at its peak over the micro-batches of one update, and what `--plan` says of it
(`tests/grpo/plan/test_plan.py` compares them).
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from grpo.batch import Batch
from grpo.config import parse
from grpo.logprobs import chunk_of, completion_logprobs
from grpo.plan import plan
from grpo.storage.model_folder import BUILT_IN
from models import weights
from models.config import ModelConfig
from tests.bench.timing import extra_memory


def prompts(model, count, length, side):
    """`count` prompts of `length` tokens, each with one picture of side x side patches."""
    picture = side * side // model.vision.spatial_merge_size**2
    return [
        SimpleNamespace(
            uid=str(i),
            tokens=np.array([model.image_token_id] * picture + [10] * (length - picture)),
            patches=np.zeros((side * side, model.vision.patch_dim), np.float32),
            grid=np.array([[1, side, side]]),
        )
        for i in range(count)
    ]


def learn(policy, cfg, count, group, cap, length, side):
    """The gradient of one update, and nothing of what comes before or after."""
    model = policy.config
    batch = Batch.of_documents(
        [],
        prompts(model, count, length, side),
        torch.full((count, group, cap), 11),
        torch.full((count, group), cap),
    )
    chunk = chunk_of(model.vocab_size, cfg.loss.logits_mib, "cpu")
    for cut in batch.cuts(cfg.loss.micro_tokens, batch.teaching):
        part = batch.micro_batch(
            cut, image_token=model.image_token_id, merge=model.vision.spatial_merge_size, device="cpu"
        )
        completion_logprobs(policy, part, temperature=1.0, chunk=chunk)[0].sum().backward()


def main(case: dict) -> None:
    """Learn something small, so that libraries take their share before counting begins, then as much as is
    planned."""
    built_in = ModelConfig.from_folder(BUILT_IN)
    model = replace(built_in, **{key: value for key, value in case["model"].items() if key != "vision"})
    tower = {"hidden_size": model.hidden_size} | case["model"].get("vision", {})
    model = replace(model, vision=replace(built_in.vision, **tower))
    side = case["side"]
    cfg = parse.load(
        "shapes",
        [
            "device=cpu",
            f"max_pixels={side * side * model.vision.patch_size**2}",
            "min_pixels=null",
            *case["settings"],
        ],
    )
    policy = weights.init(model, 0)
    policy.recompute = policy.visual.recompute = cfg.recompute
    learn(policy, cfg, 1, 2, 4, 12, 4)
    policy.zero_grad(set_to_none=True)
    grown = extra_memory(lambda: learn(policy, cfg, cfg.prompts, cfg.group, cfg.cap, cfg.max_prompt, side))
    print(json.dumps({"grown": grown, "planned": most(plan.make_plan(cfg, model))}))


def most(made: plan.Plan) -> int:
    """Bytes of the largest moment of the first stage's micro-batches."""
    return max(map(plan.total, made.stages[0].learning.values()))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
