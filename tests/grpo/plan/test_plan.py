"""--plan says what is really there: parameters and caches to the byte, activations within a tenth."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plan_peak import prompts
from small import batch_of

from grpo.batch import collate_prompts
from grpo.config import parse
from grpo.logprobs import chunk_of
from grpo.optim import OPTIMIZERS, Optimizer
from grpo.plan import known_models, learning, plan
from grpo.run.setup import matrices_in_bfloat16
from grpo.sampling import sample
from grpo.storage.model_folder import BUILT_IN
from models import weights
from models.config import ModelConfig, VisionConfig
from models.qwen_vl import QwenVL
from tests.bench.timing import PeakBytes, child

TINY = ModelConfig.from_folder(BUILT_IN)
GATED = ModelConfig(
    "qwen2_5_vl",
    vocab_size=90,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    mrope_section=(1, 1, 2),
    image_token_id=80,
    video_token_id=81,
    vision_start_token_id=82,
    vision_end_token_id=83,
    vision=VisionConfig(
        depth=2,
        width=32,
        num_heads=2,
        intermediate_size=56,
        hidden_size=48,
        gated=True,
        window_size=56,
        fullatt_block_indexes=(1,),
    ),
)
QWEN3 = ModelConfig(
    "qwen3_vl",
    vocab_size=90,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    mrope_section=(2, 2, 2),
    head_dim=12,
    image_token_id=80,
    video_token_id=81,
    vision_start_token_id=82,
    vision_end_token_id=83,
    vision=VisionConfig(
        depth=3,
        width=32,
        num_heads=2,
        intermediate_size=56,
        hidden_size=48,
        patch_size=16,
        num_position_embeddings=36,
        deepstack_visual_indexes=(0, 2),
    ),
)
MODELS = {"qwen2_vl tied": TINY, "qwen2_5_vl untied": GATED, "qwen3_vl untied": QWEN3}


def named(items):
    return {item.name: item.bytes for item in items}


def at_the_head(made):
    return made.stages[0].learning["before the backward pass"]


def in_a_block(made):
    return made.stages[0].learning["in the last block"]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_parameters_are_those_of_the_model(model):
    policy = QwenVL(model)
    count = plan.parameters(model)
    assert sum(count.values()) == sum(p.numel() for p in policy.parameters())
    assert count["vision"] == sum(p.numel() for p in policy.visual.parameters())
    assert ("head" in count) is not model.tie_word_embeddings


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_kv_cache_is_what_prefill_makes(model):
    cfg = parse.load("shapes", ["prompts=2", "group=3", "cap=7", "max_prompt=20"])
    made = weights.init(model, 0).prefill(
        collate_prompts(prompts(model, 2, 20 + 1, 4), image_token=model.image_token_id), 3, 7
    )
    planned = named(plan.make_plan(cfg, model).stages[0].rollout)
    assert (planned["KV cache, prompts"], planned["KV cache, completions"], planned["masks"]) == cache_bytes(
        made
    )
    few = weights.init(model, 0).prefill(
        collate_prompts(prompts(model, 2, 20 + 1, 4), image_token=model.image_token_id), 3, 7, max_rows=4
    )
    assert tuple(
        named(plan.make_plan(replace(cfg, max_rows=4), model).stages[0].rollout)[name]
        for name in ("KV cache, prompts", "KV cache, completions", "masks")
    ) == cache_bytes(few)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        low = weights.init(model, 0).prefill(
            collate_prompts(prompts(model, 2, 20 + 1, 4), image_token=model.image_token_id), 3, 7
        )
    halved = named(plan.make_plan(replace(cfg, device="cpu"), model, dtype="bfloat16").stages[0].rollout)
    assert (halved["KV cache, prompts"], halved["KV cache, completions"], halved["masks"]) == cache_bytes(low)


def cache_bytes(cache):
    """Of the prompts' keys and values, the rows' own, and the masks."""
    size = lambda tensors: sum(x.nbytes for x in tensors)
    return (
        size([*cache.prompt_k, *cache.prompt_v]),
        size([*cache.completion_k, *cache.completion_v]),
        cache.bias.nbytes,
    )


def kept_by_autograd(model, count, length, group, cap, side, recompute):
    policy = weights.init(model, 0)
    policy.recompute = policy.visual.recompute = recompute
    batch = collate_prompts(prompts(model, count, length, side), image_token=model.image_token_id)
    parameters, kept, alive = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            # else its address is used again
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy(batch, torch.full((count, group, cap), 11), torch.full((count, group), cap))
    return sum(kept.values())


@pytest.mark.parametrize(
    "model, shape",
    [
        (TINY, (3, 24, 4, 16, 6)),
        (TINY, (2, 40, 8, 64, 6)),
        (TINY, (2, 100, 2, 10, 18)),
        (GATED, (2, 40, 6, 30, 8)),
        (QWEN3, (2, 40, 6, 30, 8)),
        (QWEN3, (2, 100, 2, 10, 18)),
    ],
)
def test_activations_are_what_autograd_keeps(model, shape):
    count, length, group, cap, side = shape
    load = learning.Load(count, length, side * side, count * group, cap, group)
    kept, again = (learning.activations(model, load, 4, on) for on in (False, True))
    whole, inputs = (kept_by_autograd(model, *shape, on) for on in (False, True))
    assert kept.blocks + kept.head == pytest.approx(whole, rel=0.1)
    # With recomputation the hooks see the blocks' inputs; the block being recomputed comes on top, at most a
    # layer's share of the whole.
    layers = min(model.num_hidden_layers, model.vision.depth)
    assert inputs < again.blocks + again.head + again.block < inputs + 1.3 * whole / layers


MIDDLE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
LARGE = {
    "hidden_size": 640,
    "intermediate_size": 2560,
    "num_hidden_layers": 10,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
}
# Qwen3-VL
DEEPSTACK = MIDDLE | {"architecture": "qwen3_vl", "head_dim": 64, "mrope_section": [12, 10, 10]}
DEEPSTACK["vision"] = {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}


@pytest.mark.parametrize(
    "model, side, settings",
    [
        ({}, 6, "prompts=8 group=8 cap=40 max_prompt=60"),
        (MIDDLE, 12, "prompts=4 group=6 cap=60 max_prompt=100 loss.micro_tokens=1000 recompute=true"),
        pytest.param(
            MIDDLE | {"vocab_size": 50000},
            8,
            "prompts=1 group=2 cap=50 max_prompt=60 loss.logits_mib=10",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            LARGE, 8, "prompts=2 group=4 cap=30 max_prompt=100 loss.micro_tokens=250", marks=pytest.mark.slow
        ),
        (DEEPSTACK, 12, "prompts=4 group=6 cap=60 max_prompt=100"),
    ],
    ids=["built-in", "recomputed", "many words", "large, in two", "Qwen3-VL"],
)
def test_the_peak_of_learning_is_what_a_process_grows_by(model, side, settings):
    """1.5 to 100 million parameters, a picture in each prompt; a tenth is what --plan promises."""
    case = json.dumps({"model": model, "side": side, "settings": settings.split()})
    found = child(str(Path(__file__).parent / "plan_peak.py"), case)
    assert found["planned"] == pytest.approx(found["grown"], rel=0.1)


def test_micro_batches_are_cut_as_in_training():
    for budget, count, group, cap, length in (
        (400, 5, 4, 20, 30),
        (100, 3, 8, 20, 30),
        (10_000, 5, 4, 20, 30),
        (10, 2, 4, 20, 30),
    ):
        cfg = parse.load(
            "shapes",
            [
                f"loss.micro_tokens={budget}",
                f"prompts={count}",
                f"group={group}",
                f"cap={cap}",
                f"max_prompt={length}",
            ],
        )
        batch = batch_of(
            prompts(TINY, count, length, 2),
            torch.zeros(count, group, cap, dtype=torch.long),
            torch.full((count, group), cap),
        )
        largest = max(
            (batch.length[cut.groups][:, cut.rows].shape for cut in batch.cuts(budget, batch.teaching)),
            key=lambda shape: shape.numel(),
        )
        found = at_the_head(plan.make_plan(cfg, TINY))[1].why
        assert f"a micro-batch of {largest[0] * length + largest.numel() * cap:,} tokens" in found


def test_what_is_not_needed_is_not_planned():
    held = [
        named(plan.make_plan(parse.load("shapes", [f"loss.kl_coef={kl}"]), TINY).held) for kl in (0, 0.04)
    ]
    assert held[0]["reference"] == 0 and held[1]["reference"] == held[1]["weights"] > 0
    assert not plan.make_plan(parse.load("tiny_base"), TINY).stages[0].rollout


def test_the_optimizer_holds_what_is_planned():
    for name in OPTIMIZERS:
        cfg = parse.load("shapes", [f"optim.name={name}", "dtype=bfloat16", "device=cpu"])
        policy = weights.init(TINY, 0)
        if name == "adamw_bf16":
            matrices_in_bfloat16(policy)
        optimizer = Optimizer(policy, name=name, lr=1e-3, beta2=0.99, weight_decay=0.0)
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        held = sum(
            t.nbytes
            for p in policy.parameters()
            for t in optimizer.state(p).values()
            if torch.is_tensor(t) and t.dim()
        )
        planned = plan.make_plan(cfg, TINY)
        assert named(planned.held)["optimizer"] == held
        assert named(planned.held)["weights"] == sum(p.nbytes for p in policy.parameters())


@pytest.mark.parametrize("model", ["Qwen/Qwen2-VL-2B", "Qwen/Qwen2-VL-7B"])
def test_small_states_and_weights_of_real_models(model):
    """States of one byte are at most three tenths of AdamW's. bfloat16 weights halve weights and gradients,
    and leave nothing to cast."""
    made = {
        name: plan.make_plan(
            parse.load("visualthinker_sat", [f"model={model}", f"optim.name={name}", "dtype=bfloat16"]),
            known_models.KNOWN[model],
        )
        for name in ("adamw", "adamw_8bit", "adamw_bf16")
    }
    held = {name: named(made[name].held) for name in made}
    assert held["adamw_8bit"]["optimizer"] <= 0.3 * held["adamw"]["optimizer"]
    assert held["adamw_8bit"]["weights"] == held["adamw"]["weights"]
    assert held["adamw_bf16"]["optimizer"] == held["adamw_8bit"]["optimizer"]
    assert held["adamw_bf16"]["weights"] == pytest.approx(held["adamw"]["weights"] / 2, rel=1e-3)
    stage = {name: named(in_a_block(made[name])) for name in made}
    assert stage["adamw_bf16"]["gradients"] == stage["adamw"]["gradients"] // 2
    assert stage["adamw_bf16"]["bfloat16 copies"] == 0 < stage["adamw_8bit"]["bfloat16 copies"]
    assert "bfloat16 policy" not in named(made["adamw_bf16"].stages[0].rollout)
    assert made["adamw_bf16"].peak < made["adamw_8bit"].peak < made["adamw"].peak


def cast_weights(model, recompute):
    """Bytes of the bfloat16 copies of weights that autograd keeps of a forward under autocast."""
    policy, shapes = weights.init(model, 0), set()
    policy.recompute = policy.visual.recompute = recompute
    for parameter in policy.parameters():
        if parameter.dim() > 1:
            shapes |= {parameter.shape, parameter.T.shape if parameter.dim() == 2 else parameter.shape}
    kept, alive = {}, []

    def pack(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    batch = collate_prompts(prompts(model, 2, 21, 4), image_token=model.image_token_id)
    with (
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        policy(batch, torch.full((2, 3, 7), 11), torch.full((2, 3), 7))
    return sum(kept.values())


def test_bfloat16_makes_no_copy_but_those_of_autocast():
    """Weights, gradients and moments stay float32, the reference does not; of every matrix the backward
    pass keeps a copy in bfloat16, unless blocks are recomputed."""
    cfg, small = (parse.load("shapes", ["device=cpu", f"recompute={on}"]) for on in ("false", "true"))
    full, half, frugal = (
        plan.make_plan(c, TINY, dtype=dtype)
        for c, dtype in ((cfg, "float32"), (cfg, "bfloat16"), (small, "bfloat16"))
    )
    count = sum(plan.parameters(TINY).values())
    assert (
        named(half.held) == named(full.held) | {"reference": 2 * count}
        and named(full.held)["weights"] == named(full.held)["reference"] == 4 * count
    )
    away = plan.make_plan(parse.load("shapes", ["loss.reference_on=host"]), TINY)
    assert named(away.held) == named(full.held) | {"reference": 0}
    copies = [named(in_a_block(p))["bfloat16 copies"] for p in (full, half, frugal)]
    kept = cast_weights(TINY, False)
    # a bound: nothing goes back through the patch embedding
    assert copies[0] == 0 and kept < copies[1] < 1.12 * kept
    # the merger's; a block being recomputed comes on top
    assert cast_weights(TINY, True) < copies[2] < copies[1] / 2


@pytest.mark.parametrize(
    "part, kept", [("vision", lambda p: p["vision"]), ("llm", lambda p: p["embedding"] + p["decoder"])]
)
def test_frozen_parts_need_no_gradients_and_no_moments(part, kept):
    plans = [
        plan.make_plan(parse.load("shapes", [f"freeze={freeze}", "loss.micro_tokens=1000"]), TINY)
        for freeze in ("[]", f"[{part}]")
    ]
    parts = plan.parameters(TINY)
    for items, key, each in (("held", "optimizer", 8), ("learning", "gradients", 4)):
        full, frozen = (named(p.held if items == "held" else in_a_block(p))[key] for p in plans)
        assert full - frozen == each * kept(parts)
    assert named(plans[0].held)["weights"] == named(plans[1].held)["weights"]


@pytest.mark.parametrize(
    "name, size",
    [
        ("Qwen/Qwen2-VL-2B", 4_417_971_200),
        ("Qwen/Qwen2-VL-7B-Instruct", 16_582_751_232),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 7_509_245_952),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 16_584_333_312),
        ("Qwen/Qwen3-VL-2B-Instruct", 4_255_064_064),
        ("Qwen/Qwen3-VL-4B-Thinking", 8_875_631_616),
        ("Qwen/Qwen3-VL-8B-Instruct", 17_534_247_392),
    ],
)
def test_known_models_have_the_size_of_the_hubs_files(name, size):
    """`total_size` in the hub's model.safetensors.index.json, of bfloat16 weights."""
    assert 2 * sum(plan.parameters(known_models.KNOWN[name]).values()) == size


def test_a_known_model_is_planned_without_being_there(monkeypatch):
    monkeypatch.setattr(plan, "model_folder", lambda *_, **__: pytest.fail("asked for the model"))
    text = plan.text(parse.load("visualthinker_sat"))
    assert "2.21 B parameters" in text and "1,500 steps" in text and "64 rows x 700 tokens" in text
    assert (
        plan.text(parse.load("visualthinker_sat", ["model=Qwen/Qwen2-VL-2B@main"])).splitlines()[2:]
        == text.splitlines()[2:]
    )


def test_stages_cover_all_steps_and_ranks_share_the_prompts():
    cfg = parse.load(
        "shapes",
        [
            "steps=50",
            "prompts=10",
            "group=4",
            "cap=32",
            "stages=[{until: 20, group: 16, cap: 64}, {until: 30, group: 8, cap: 128}]",
        ],
    )
    stages = plan.make_plan(cfg, TINY, ranks=4).stages
    assert [(s.first, s.last, s.group, s.cap) for s in stages] == [
        (0, 19, 16, 64),
        (20, 29, 8, 128),
        (30, 49, 4, 32),
    ]
    assert stages[2].tokens == (3 * cfg.max_prompt, 3 * 4 * 32)
    # no rank is without a row
    assert plan.make_plan(cfg, TINY, ranks=40).stages[2].tokens == (cfg.max_prompt, 32)
    assert plan.make_plan(cfg, TINY, ranks=20).stages[2].tokens == (cfg.max_prompt, 2 * 32)
    short = parse.load("shapes", ["steps=10", "stages=[{until: 20, group: 16, cap: 64}]"])
    assert [(s.first, s.last) for s in plan.make_plan(short, TINY).stages] == [(0, 9)]


def test_the_table_loads_nothing_and_adds_up(monkeypatch):
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("--plan loaded weights"))
    cfg = parse.load("shapes")
    text = plan.text(cfg)
    for word in (
        "weights",
        "gradient of the head",
        "optimizer",
        "reference",
        "KV cache, prompts",
        "KV cache, completions",
        "logits",
        "activations",
        "decode steps",
        "tokens",
        "peak",
    ):
        assert f"\n  {word}" in text or f"\n{word}" in text
    assert f"{cfg.cap * cfg.steps:,} over {cfg.steps:,} steps" in text
    assert "rollouts" not in text and "\n  rollouts                           3  a step" in plan.text(
        parse.load("shapes", ["loss.kl_coef=0", "max_rounds=3"])
    )
    made = plan.make_plan(cfg, TINY)
    assert made.peak == max(
        plan.total(made.held) + plan.total(part)
        for stage in made.stages
        for part in (stage.rollout, *stage.learning.values())
    )


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_states_on_the_host_leave_the_device(name):
    """But for those of one parameter in the update."""
    settings = [f"optim.name={name}", "device=cuda", "save.background=true"]
    here, away = (
        plan.make_plan(parse.load("shapes", [*settings, f"optim.states_on={on}"]), known_models.SMALL)
        for on in ("device", "host")
    )
    states = named(here.held)["optimizer"]
    assert named(away.held) == named(here.held) | {"optimizer": 0}
    assert (here.on_host, away.on_host) == (0, states)
    work = [named(p.stages[0].learning["in the update"])["moments in work"] for p in (here, away)]
    assert 0 < work[1] - work[0] < 0.2 * states
    text = plan.text(parse.load("shapes", [*settings, "optim.states_on=host"]))
    assert "of the CPU's memory, for the optimizer's states" in text and "wait on the host" in text


def test_the_copy_that_checkpoints_are_written_from():
    """Weights and two moments; Muon has one of most."""
    weights, optimizer, _ = plan.make_plan(parse.load("shapes", ["optim.name=adamw"]), TINY).held
    assert optimizer.bytes == 2 * weights.bytes
    said = plan.text(parse.load("shapes", ["optim.name=adamw"])).splitlines()[-1]
    assert said.startswith(f"and {plan.shown_bytes(3 * weights.bytes)} of the CPU's memory, for the copy")
    assert plan.text(parse.load("shapes", ["save.background=false"])).splitlines()[-1].startswith("peak: ")


@pytest.mark.parametrize("gpu_here", [False, True])
@pytest.mark.parametrize(
    "settings, device, dtype, chunk",
    [
        ("device=auto dtype=auto", "cpu", "float32", 115),
        ("device=auto dtype=bfloat16", "cuda", "bfloat16", 512),
        ("device=cuda dtype=auto", "cuda", "bfloat16", 512),
        ("device=cuda dtype=float32", "cuda", "float32", 512),
        ("device=cpu dtype=bfloat16", "cpu", "bfloat16", 115),
    ],
)
def test_the_plan_is_for_the_recipes_device_wherever_it_is_made(
    monkeypatch, gpu_here, settings, device, dtype, chunk
):
    """A plan made on a login node without a GPU gave a chunk of logits a quarter of its size."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_here)
    cfg = parse.load("shapes", ["cap=5000", "max_prompt=100", "group=30", "prompts=9", *settings.split()])
    model = known_models.SMALL
    made = plan.make_plan(cfg, model)
    assert (made.device, made.dtype) == (device, dtype)
    tokens = chunk_of(model.vocab_size, None, device)
    assert tokens == chunk_of(model.vocab_size, chunk, "cpu")
    scoring = named(at_the_head(made))
    assert scoring["logits of a chunk"] == 2 * tokens * model.vocab_size * 4
    # a CPU has no product of bfloat16 numbers with a result in float32
    assert ("head in float32" in scoring) == (device == "cpu" and dtype == "bfloat16")
    # attention on a CPU sums in float64
    size = 8 if device == "cpu" else 4 if dtype == "float32" else 2
    row = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_size
    assert named(made.stages[0].rollout)["KV cache, prompts"] == 9 * 100 * row * size
    assert ("CUDA and its libraries" in named(made.held)) == (device == "cuda")


def test_the_plan_knows_the_memory_of_recordings():
    """As many bytes as a step's draw makes that are not its result, and more."""
    cfg = parse.load("shapes", ["device=cuda", "prompts=1", "group=8", "cap=20"])
    without, recorded = (
        plan.make_plan(replace(cfg, cuda_graphs=on), known_models.SMALL).stages[0].rollout
        for on in (False, True)
    )
    assert recorded[: len(without)] == without and recorded[-1].name == "graph pool"
    logits, u = torch.zeros(8, known_models.SMALL.vocab_size), torch.rand(8)
    with PeakBytes() as made:
        sample(logits, u, 1.0)
    # attention's scores come on top
    assert logits.nbytes + made.peak <= recorded[-1].bytes <= 1.3 * (logits.nbytes + made.peak)


def test_a_model_that_is_not_there():
    with pytest.raises(ValueError, match="no config.json"):
        plan.text(parse.load("shapes", ["model=nowhere"]))
