"""The peak of learning at the shapes of real models, without their memory:
python tests/grpo/plan/fake_peak.py '{"model": "Qwen/Qwen2-VL-2B", "settings": [...]}'

Large tensors of floating-point numbers are fake: they have a shape and no memory. Whole numbers, which say
how long completions are and what goes where, are real. So the code that is measured is the code that runs.
Every prompt and completion is as long as it may be, and there are two micro-batches if the plan has several.
Tensors of a CPU play those of a GPU, but for the one product that has another kernel there.
Prints {"peak": bytes, "planned": bytes} of what learning adds to weights, optimizer and reference.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (3, 2, 0)]
from plan_peak import most, prompts

from grpo.batch import Batch
from grpo.config import parse
from grpo.logprobs import chunk_of, completion_logprobs
from grpo.plan import known_models, plan
from models import layers, lora
from models.qwen_vl import QwenVL
from tests.bench.timing import PeakBytes

# A floating-point tensor with more numbers is fake.
REAL = 1 << 18


class LargeAreFake(TorchDispatchMode):
    """A context in which large floating-point tensors, and all that is computed with them, are fake."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        keywords = keywords or {}
        given = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)]
        if given and not any(isinstance(x, FakeTensor) for x in given):
            return operator(*arguments, **keywords)
        if operator is torch.ops.aten.index.Tensor:
            arguments = (arguments[0], places(arguments[1]))
        with self.fake:
            found = operator(*arguments, **keywords)
        made = isinstance(found, torch.Tensor) and not given
        if made and not (found.is_floating_point() and found.numel() > REAL):
            return operator(*arguments, **keywords)
        return found


def places(indices: list) -> list:
    """Indices without masks of real values, which select a known number of places."""
    is_mask = lambda x: (
        isinstance(x, torch.Tensor) and x.dtype == torch.bool and not isinstance(x, FakeTensor)
    )
    return [place for x in indices for place in (x.nonzero(as_tuple=True) if is_mask(x) else [x])]


def fake_policy(mode: LargeAreFake, model, cfg) -> QwenVL:
    """A policy without memory, as a run with these settings has it."""
    with torch.device("meta"):
        policy = QwenVL(model)
    small = torch.bfloat16 if cfg.lora.rank or cfg.optim.name == "adamw_bf16" else torch.float32
    for name, p in list(policy.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        with mode.fake:
            made = nn.Parameter(torch.empty(p.shape, dtype=small if p.dim() > 1 else torch.float32))
        setattr(policy.get_submodule(owner), leaf, made)
    if cfg.lora.rank:
        layers = lora.chosen(policy, cfg.lora.targets, cfg.freeze)
        with mode.fake:
            lora.attach(policy, lora.fresh(layers, cfg.lora.rank, 0), 1.0)
    policy.recompute = policy.visual.recompute = cfg.recompute
    for name, p in policy.named_parameters():
        if name.startswith("visual.") and "vision" in cfg.freeze:
            p.requires_grad_(False)
    return policy


def learn(policy, batch, cfg, passes: int) -> None:
    """The gradients of one or two micro-batches."""
    model = policy.config
    sizes = {"image_token": model.image_token_id, "merge": model.vision.spatial_merge_size}
    chunk = chunk_of(model.vocab_size, cfg.loss.logits_mib, cfg.device)
    # The first is one of the largest.
    largest = next(batch.cuts(cfg.loss.micro_tokens, batch.teaching))
    for _ in range(passes):
        part = batch.micro_batch(largest, **sizes, device="cpu")
        logp, _ = completion_logprobs(policy, part, temperature=cfg.temperature, chunk=chunk)
        logp.sum().backward()


def product_of_a_gpu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The shape of a @ b in float32. A GPU makes no copies of a and b for it."""
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.float32)


def product_of_a_gpu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The shape of a @ b in float32. A GPU makes no copies of a and b for it."""
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.float32)


def measure(name: str, recipe: str, settings: list[str], side: int = 20) -> dict[str, int]:
    """-> {"peak", "planned"} of a recipe with a known model."""
    model = known_models.KNOWN[name]
    pixels = side * side * model.vision.patch_size**2
    fixed = [f"model={name}", "device=cuda", "dtype=bfloat16", f"max_pixels={pixels}", "min_pixels=null"]
    cfg = parse.load(recipe, [*fixed, *settings])
    product = product_of_a_gpu if cfg.device == "cuda" else layers.product_in_float32
    mode = LargeAreFake()
    policy = fake_policy(mode, model, cfg)
    whole = Batch.of_documents(
        [],
        prompts(model, cfg.prompts, cfg.max_prompt, side),
        torch.full((cfg.prompts, cfg.group, cfg.cap), 11),
        torch.full((cfg.prompts, cfg.group), cfg.cap),
    )
    low = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    sums = layers.attention_sums(exact=cfg.device == "cpu")
    with patch.object(layers, "product_in_float32", product), mode, PeakBytes() as count, low, sums:
        learn(policy, whole, cfg, 2)
    return {"peak": count.peak, "planned": most(plan.make_plan(cfg, model))}


if __name__ == "__main__":
    case = json.loads(sys.argv[1])
    print(json.dumps(measure(case["model"], case["recipe"], case["settings"])))
