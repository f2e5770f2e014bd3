"""--plan: what a run will need, computed from the settings and the model's config.json. It loads no weights,
and it fetches nothing for the models of grpo/plan/known_models.py.

The numbers are bounds: every prompt has max_prompt tokens and one picture of the largest size, and every
completion is as long as the cap. Under these, parameters, caches and logits are exact. Activations are an
estimate, which tests compare with what autograd keeps. Fragmentation and data come on top.

The numbers are those of the recipe's device, which need not be in the machine that is asked. With
`device: auto` that is a GPU if products are in bfloat16.

Weights, gradients and moments are float32 for every `dtype`, if `optim.name` is adamw or muon
(grpo/plan/states.py). With bfloat16, autocast casts a float32 weight where it is used, and keeps copies for
the backward pass. Caches and the reference are in the dtype of the products.
"""

from dataclasses import dataclass
from pathlib import Path

from data.processor import NESTED, PLAIN, picture_settings
from data.sources import hub
from grpo.config.parse import Config
from grpo.memory import TokenCost
from grpo.plan import known_models
from grpo.plan.items import Item, Moments, shown_bytes, shown_count, total
from grpo.plan.learning import Load, moments
from grpo.plan.lora import with_adapters, with_frozen_tower
from grpo.plan.ranks import SAMPLER, largest_share, of_one_rank
from grpo.plan.states import (
    FLOAT,
    WHY,
    merger_parameters,
    parameter_shapes,
    state_bytes,
    update_bytes,
    weight_bytes,
)
from grpo.plan.table import render
from grpo.schedule import stage_at
from grpo.storage.model_folder import model_folder
from models.config import ModelConfig, VisionConfig
from models.layers import attention_sums

# Documents of a prompt in imitation, as `data/shapes/documents.py` writes them.
DOCUMENTS = 2
# Bytes that CUDA, cuBLAS and NCCL take before the first tensor: an estimate.
CUDA_CONTEXT = 3 << 29


@dataclass(frozen=True)
class StagePlan:
    """Steps first..last, with one group size and one cap. learning: {moment: what exists then}. Per step, at
    most: tokens (prompts, completions), patches, flops."""

    first: int
    last: int
    group: int
    cap: int
    rollout: tuple[Item, ...]
    learning: Moments
    tokens: tuple[int, int]
    patches: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """What a run needs: `held` all the time, and what each stage adds. device: "cpu" or "cuda". number: bytes
    of a number of a trained matrix. on_host: bytes of the optimizer's states that wait in CPU memory."""

    parameters: dict[str, int]
    dtype: str
    device: str
    number: int
    held: tuple[Item, ...]
    stages: tuple[StagePlan, ...]
    on_host: int = 0

    @property
    def peak(self) -> int:
        """Bytes that exist at the same time, at most: in a rollout or in a moment of learning, of any
        stage."""
        beside = (items for s in self.stages for items in (s.rollout, *s.learning.values()))
        return total(self.held) + max(map(total, beside))


def parameters(model: ModelConfig) -> dict[str, int]:
    """{part: parameters} of the vision tower, the embedding, the decoder's blocks and an untied head."""
    width, hidden, head = model.hidden_size, model.intermediate_size, model.head_size
    queries, keys = model.num_attention_heads * head, model.num_key_value_heads * head
    # Qwen3 has the norms of a query and a key in place of biases.
    vectors = 2 * head if model.qwen3 else queries + 2 * keys
    attention = width * (queries + 2 * keys) + vectors + queries * width
    block = attention + 3 * width * hidden + 2 * width
    words, decoder = model.vocab_size * width, model.num_hidden_layers * block + width
    found = {"vision": _vision_parameters(model.vision), "embedding": words, "decoder": decoder}
    return found if model.tie_word_embeddings else found | {"head": words}


def _vision_parameters(v: VisionConfig) -> int:
    # RMSNorm and a gated MLP, or LayerNorm and a plain one.
    norm, up = (v.width, 2) if v.gated else (2 * v.width, 1)
    mlp = up * (v.width + 1) * v.intermediate_size + (v.intermediate_size + 1) * v.width
    block = 4 * v.width * v.width + 4 * v.width + mlp + 2 * norm
    # Each DeepStack merger has a norm of its merged width.
    merged, deep = v.width * v.spatial_merge_size**2, len(v.deepstack_visual_indexes)
    vectors = norm + (1 + deep) * (merged + v.hidden_size) + 2 * deep * merged
    places = (v.num_position_embeddings + 1) * v.width if v.num_position_embeddings else 0
    return v.patch_dim * v.width + places + v.depth * block + merger_parameters(v) + vectors


def device_and_dtype(device: str, dtype: str) -> tuple[str, str]:
    """The device that a recipe is for, and the dtype of its products, if one or both are `auto`."""
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if device == "auto":
        device = "cuda" if dtype == "bfloat16" else "cpu"
    return device, dtype


def make_plan(
    cfg: Config,
    model: ModelConfig,
    *,
    max_pixels: int | None = None,
    dtype: str | None = None,
    ranks: int = 1,
) -> Plan:
    """The plan of one of `ranks` ranks.

    max_pixels: of a picture, if the settings have none (None: as many as fit into a prompt).
    dtype: of matrix products, float32 or bfloat16 (None: the setting; auto is bfloat16 with device=cuda).
    """
    device, dtype = device_and_dtype(cfg.device, dtype or cfg.dtype)
    size = 2 if dtype == "bfloat16" else FLOAT
    if cfg.lora.rank:
        cfg = with_frozen_tower(cfg, model)
    parts = parameters(model)
    count = sum(parts.values())
    patches = cfg.max_prompt * model.vision.spatial_merge_size**2
    patches = min(patches, (cfg.max_pixels or max_pixels or 10**12) // model.vision.patch_size**2)
    optimizer = cfg.optim.name
    number = 2 if optimizer == "adamw_bf16" else FLOAT
    weights = weight_bytes(optimizer, parameter_shapes(model).values())
    trained = parameter_shapes(model, cfg.freeze)
    states = state_bytes(optimizer, trained)
    on_host = states if cfg.optim.states_on == "host" else 0
    waits = f"; {shown_bytes(on_host)} wait on the host" if on_host else ""
    # those of adapters are small
    update = 0 if cfg.lora.rank else update_bytes(optimizer, trained, bool(on_host))
    held = (
        Item("weights", weights, f"{shown_count(count)} x {number} bytes"),
        Item("optimizer", states - on_host, WHY[optimizer] + waits),
        _reference(cfg, count, size),
    )
    if device == "cuda":
        held += (Item("CUDA and its libraries", CUDA_CONTEXT, "an estimate"),)
    stages: list[StagePlan] = []
    step = 0
    steps = max(cfg.steps, 1)
    while step < steps:
        stage = stage_at(step, cfg.stages, cfg)
        end = steps if stage is cfg else min(stage.until, cfg.steps)
        group = stage.group if cfg.method == "grpo" else DOCUMENTS if cfg.task == "documents" else 1
        # groups of documents are not split
        split = (group, cfg.loss.sections) if cfg.method == "grpo" else (1, 0)
        prompts, rows = largest_share(cfg.prompts, cfg.max_prompt, split[0], stage.cap, split[1], ranks)
        load = Load(prompts, cfg.max_prompt, patches, rows * (group // split[0]), stage.cap, group)
        rollout = _rollout(cfg, model, load, size, device) if cfg.method == "grpo" else ()
        most = (load.tokens, prompts * patches, _work(cfg, model, load))
        learning = moments(cfg, model, parts, load, size, device, update)
        stages.append(StagePlan(step, end - 1, group, stage.cap, rollout, learning, *most))
        step = end
    plan = Plan(parts, dtype, device, number, held, tuple(stages), on_host)
    if cfg.lora.rank:
        plan = with_adapters(plan, cfg, model)
    sharded = ranks > 1 and cfg.shard != "never" and cfg.optim.name != "muon"
    return of_one_rank(plan, model, ranks) if sharded else plan


def _reference(cfg: Config, count: int, size: int) -> Item:
    if cfg.method != "grpo" or cfg.loss.kl_coef == 0:
        return Item("reference", 0, "not loaded: there is no KL penalty")
    if cfg.loss.reference_on == "host":
        scores = f"{shown_bytes(size * count)} while it scores, before there are gradients"
        return Item("reference", 0, f"the frozen base waits on the host; {scores}")
    return Item("reference", size * count, f"the frozen base, {shown_count(count)} x {size} bytes")


def _rollout(cfg: Config, model: ModelConfig, load: Load, size: int, device: str) -> tuple[Item, ...]:
    cost, count = TokenCost.of(model, size, device), sum(parameters(model).values())
    rows = min(cfg.max_rows or load.rows, load.rows)
    places = load.prompt + load.cap
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    qkv = model.num_hidden_layers * heads * model.head_size * (model.hidden_size + (not model.qwen3))
    cast = f"of all matrices, cast once for the rollout: {shown_count(count)} x {size} bytes"
    joined = f"once more, joined for decoding: {shown_count(qkv)} x {size} bytes"
    prompts = f"{load.prompts} prompts x {load.prompt:,} tokens x {shown_bytes(cost.prompt_kv)}"
    of_all = f" at a time of {load.rows:,}" if rows < load.rows else ""
    completions = f"{rows:,} rows{of_all} x {load.cap:,} tokens x {shown_bytes(cost.completion_kv)}"
    words = f"{rows:,} rows x {model.vocab_size:,} words, their softmax and its sums"
    items = (
        Item(SAMPLER, size * count, cast),
        Item("weights of q, k, v", size * qkv, joined),
        Item("KV cache, prompts", load.tokens[0] * cost.prompt_kv, prompts),
        Item("KV cache, completions", rows * load.cap * cost.completion_kv, completions),
        Item("masks", rows * places * cost.mask, f"{rows:,} rows x {places:,} places"),
        Item("logits", rows * cost.logits, words),
    )
    if cfg.cuda_graphs:
        # A graph's memory is its own: logits, their softmax, its exponentials, their sums with and without
        # the impossible words, two masks; and a block's attention scores, thrice.
        graph = 4 * (5 * model.vocab_size + 3 * model.num_attention_heads * places) + 2 * model.vocab_size
        items += (Item("graph pool", rows * graph, f"{rows:,} rows, shared by all CUDA graphs"),)
    return items if size < FLOAT and cfg.optim.name != "adamw_bf16" else items[1:]


def _work(cfg: Config, model: ModelConfig, load: Load) -> float:
    """Floating-point operations of a step. A forward takes two per parameter and token; a backward is two
    forwards, recomputation a third."""
    parts = parameters(model)
    decoder = parts["decoder"] + parts.get("head", parts["embedding"])
    forward = 2.0 * (decoder * sum(load.tokens) + parts["vision"] * load.prompts * load.patches)
    # Beside adapters the weights are frozen: of them a backward makes no gradient.
    learning = cfg.loss.updates * (3 + cfg.recompute - bool(cfg.lora.rank))
    if cfg.method == "sft":
        return forward * learning
    # Rollout, learning, reference, old policy.
    return forward * (1 + learning + (cfg.loss.kl_coef > 0) + (cfg.loss.updates * cfg.loss.minibatches > 1))


def text(cfg: Config, ranks: int = 1) -> str:
    """What --plan prints, for one of `ranks` ranks. It reads config.json and the processor's file of the
    model's folder, and nothing for a model of grpo/plan/known_models.py. Raises ValueError."""
    name = (hub.parts_of(cfg.model) or ("",))[0]
    if not cfg.init and not Path(cfg.model).exists() and name in known_models.KNOWN:
        model = known_models.KNOWN[name]
        pixels = known_models.MAX_PIXELS[model.architecture]
    else:
        files = ("config.json", PLAIN, NESTED)
        folder = Path(cfg.init) if cfg.init else model_folder(cfg.model, cfg.revision, files=files)
        model = ModelConfig.from_folder(folder)
        folder = folder.parent if folder.is_file() else folder
        limits = {"min_pixels": cfg.min_pixels, "max_pixels": cfg.max_pixels}
        has_processor = (folder / PLAIN).is_file() or (folder / NESTED).is_file()
        pixels = picture_settings(folder, **limits).max_pixels if has_processor else None
    with attention_sums(cfg.exact):
        return render(cfg, make_plan(cfg, model, max_pixels=pixels, ranks=ranks), ranks)
