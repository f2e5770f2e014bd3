"""--plan: what a run will need, computed from the config and the model's config.json alone. Nothing is
loaded, and nothing fetched of the models in grpo/plan/known_models.py.

Numbers are bounds: every prompt as long as max_prompt, with one picture as large as it may be, and every
completion as long as the cap. Under that, parameters, caches and logits are exact, and activations an
estimate of what autograd keeps of the blocks in `models/` (tests hold it to what is really kept). Libraries,
fragmentation and data come on top.

Weights, gradients and moments are float32 whatever `dtype` says: with bfloat16, autocast casts a weight where
it is used, and what stays of that is the copies which the backward pass needs. Caches and the reference,
which is never trained, are in the dtype of the products.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.sources import hub
from grpo.config.parse import Config
from grpo.logprobs import chunk_of
from grpo.memory import attention_size
from grpo.plan import known_models
from grpo.plan.ranks import SAMPLER, of_one_rank
from grpo.plan.table import render, shown_bytes, shown_count
from grpo.schedule import stage_at
from grpo.storage.model_folder import model_folder
from models.config import ModelConfig, VisionConfig

# bytes
FLOAT = 4
# of a prompt in imitation, as `data/shapes/documents.py` gives them
DOCUMENTS = 2


@dataclass(frozen=True)
class Item:
    """One line of the plan: what, how many bytes, and where the number comes from."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class StagePlan:
    """Steps first..last, which have one group size and one cap; and of a step, at most: tokens (prompts,
    completions), patches, flops."""

    first: int
    last: int
    group: int
    cap: int
    rollout: tuple[Item, ...]
    learning: tuple[Item, ...]
    tokens: tuple[int, int]
    patches: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """What a run needs: `held` all the time, and what each stage adds. peak: bytes, the larger of rollout
    and learning over all stages."""

    parameters: dict[str, int]
    dtype: str
    held: tuple[Item, ...]
    stages: tuple[StagePlan, ...]

    @property
    def peak(self) -> int:
        """Bytes that exist at the same time, at most."""
        return total(self.held) + max(
            max(total(stage.rollout), total(stage.learning)) for stage in self.stages
        )


@dataclass(frozen=True)
class Load:
    """What one forward carries: prompts of `prompt` tokens with `patches` patches each, and rows of `cap`
    tokens."""

    prompts: int
    prompt: int
    patches: int
    rows: int
    cap: int

    @property
    def asked(self) -> int:
        """Tokens of all prompts."""
        return self.prompts * self.prompt

    @property
    def said(self) -> int:
        """Tokens of all completions."""
        return self.rows * self.cap


def total(items: tuple[Item, ...]) -> int:
    """Bytes of all lines."""
    return sum(item.bytes for item in items)


def parameters(model: ModelConfig) -> dict[str, int]:
    """{part: parameters} of the vision tower, the embedding, the decoder's blocks and, if it is not the
    embedding again, the head."""
    width, hidden, head = model.hidden_size, model.intermediate_size, model.head_size
    queries, keys = model.num_attention_heads * head, model.num_key_value_heads * head
    block = (
        width * (queries + 2 * keys) + queries + 2 * keys + queries * width + 3 * width * hidden + 2 * width
    )
    words, decoder = model.vocab_size * width, model.num_hidden_layers * block + width
    found = {"vision": _vision_parameters(model.vision), "embedding": words, "decoder": decoder}
    return found if model.tie_word_embeddings else found | {"head": words}


def _vision_parameters(v: VisionConfig) -> int:
    # RMSNorm and a gated MLP, or LayerNorm and a plain one
    norm, up = (v.width, 2) if v.gated else (2 * v.width, 1)
    mlp = up * (v.width + 1) * v.intermediate_size + (v.intermediate_size + 1) * v.width
    block = 4 * v.width * v.width + 4 * v.width + mlp + 2 * norm
    wide = v.width * v.spatial_merge_size**2
    return (
        v.patch_dim * v.width
        + v.depth * block
        + norm
        + wide * wide
        + wide
        + wide * v.hidden_size
        + v.hidden_size
    )


def make_plan(
    cfg: Config,
    model: ModelConfig,
    *,
    max_pixels: int | None = None,
    dtype: str | None = None,
    ranks: int = 1,
) -> Plan:
    """The plan of one of `ranks` ranks.

    max_pixels: of a picture, where the config has none (None: as many as fit into a prompt).
    dtype: of matrix products, float32 or bfloat16 (None: the config's; auto counts as float32).
    """
    vision, parts, dtype = (
        model.vision,
        parameters(model),
        dtype or ("bfloat16" if cfg.dtype == "bfloat16" else "float32"),
    )
    size, count, trained = (
        (2 if dtype == "bfloat16" else FLOAT),
        sum(parts.values()),
        _trained(parts, cfg.freeze),
    )
    pixels = cfg.max_pixels or max_pixels or 10**12
    patches = min(cfg.max_prompt * vision.spatial_merge_size**2, pixels // vision.patch_size**2)
    anchored = cfg.method == "grpo" and cfg.loss.kl_coef > 0
    held = (
        Item("weights", FLOAT * count, f"{shown_count(count)} x {FLOAT} bytes"),
        _optimizer(cfg.optim.name, trained),
        _reference(cfg, count, size)
        if anchored
        else Item("reference", 0, "not loaded: there is no KL penalty"),
    )
    stages, step, prompts = [], 0, -(-cfg.prompts // ranks)
    while step < max(cfg.steps, 1):
        stage = stage_at(step, cfg.stages, cfg)
        end = max(cfg.steps, 1) if stage is cfg else min(stage.until, cfg.steps)
        group = stage.group if cfg.method == "grpo" else DOCUMENTS if cfg.task == "documents" else 1
        load = Load(prompts, cfg.max_prompt, patches, prompts * group, stage.cap)
        stages.append(
            StagePlan(
                step,
                end - 1,
                group,
                stage.cap,
                _rollout(model, load, size, cfg.max_rows, count) if cfg.method == "grpo" else (),
                _learning(cfg, model, load, size),
                (load.asked, load.said),
                prompts * patches,
                _work(cfg, model, load),
            )
        )
        step = end
    plan = Plan(parts, dtype, held, tuple(stages))
    return (
        of_one_rank(plan, model, ranks)
        if ranks > 1 and cfg.shard != "never" and cfg.optim.name != "muon"
        else plan
    )


def _trained(parts: dict[str, int], frozen: list[str]) -> dict[str, int]:
    """The parts that are trained, with 0 for the others."""
    return {
        name: count * (("vision" if name == "vision" else "llm") not in frozen)
        for name, count in parts.items()
    }


def _optimizer(name: str, trained: dict[str, int]) -> Item:
    count, matrices = sum(trained.values()), trained["decoder"] + trained["vision"]
    if name == "muon":
        return Item(
            "optimizer",
            FLOAT * (2 * count - matrices),
            "Muon: one moment of the blocks' matrices, AdamW: two of the rest",
        )
    return Item("optimizer", 2 * FLOAT * count, "AdamW: two moments in float32")


def _reference(cfg: Config, count: int, size: int) -> Item:
    if cfg.loss.reference_on == "host":
        return Item(
            "reference",
            0,
            f"the frozen base waits on the host; {shown_bytes(size * count)} while it scores, before "
            "there are gradients",
        )
    return Item("reference", size * count, f"the frozen base, {shown_count(count)} x {size} bytes")


def _rollout(model: ModelConfig, load: Load, size: int, slots: int | None, count: int) -> tuple[Item, ...]:
    rows, numbers, words = (
        min(slots or load.rows, load.rows),
        2 * model.num_hidden_layers * model.num_key_value_heads * model.head_size,
        model.vocab_size,
    )
    # only there products are in float32
    exact = attention_size(size, "cpu")
    why = f"{rows:,} rows" + (f" at a time of {load.rows:,}" if rows < load.rows else "")
    copies = (
        ()
        if size == FLOAT
        else (
            Item(
                SAMPLER,
                size * count,
                f"of all matrices, cast once for the rollout: {shown_count(count)} x {size} bytes",
            ),
        )
    )
    qkv = (
        model.num_hidden_layers
        * (model.num_attention_heads + 2 * model.num_key_value_heads)
        * model.head_size
        * (model.hidden_size + 1)
    )
    return (
        *copies,
        Item(
            "weights of q, k, v",
            size * qkv,
            f"once more, joined for decoding: {shown_count(qkv)} x {size} bytes",
        ),
        Item(
            "KV cache, prompts",
            load.asked * numbers * exact,
            f"{load.prompts} prompts x {load.prompt:,} tokens x {shown_bytes(numbers * exact)}",
        ),
        Item(
            "KV cache, completions",
            rows * load.cap * numbers * size,
            f"{why} x {load.cap:,} tokens x {shown_bytes(numbers * size)}",
        ),
        Item(
            "masks",
            rows * (load.prompt + load.cap) * exact,
            f"{rows:,} rows x {load.prompt + load.cap:,} places",
        ),
        Item(
            "logits", 3 * rows * words * FLOAT, f"{rows:,} rows x {words:,} words, their softmax and its sums"
        ),
    )


def _learning(cfg: Config, model: ModelConfig, load: Load, size: int) -> tuple[Item, ...]:
    (micro, several), parts = _micro_batch(load, cfg.loss.micro_tokens), parameters(model)
    trained = _trained(parts, cfg.freeze)
    words, again = model.vocab_size, ", recomputed block by block" if cfg.recompute else ""
    device = "cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu"
    chunk = min(chunk_of(words, cfg.loss.logits_mib, device), micro.said)
    # float32 copies of a chunk's logits: as they are, over the temperature, and their log-softmax
    alive = 2 + (cfg.temperature != 1)
    # a frozen tower keeps none
    kept = activations(
        model, replace(micro, patches=0) if "vision" in cfg.freeze else micro, size, cfg.recompute
    )
    copies = (
        0
        if size == FLOAT
        else size
        * (
            parts.get("head", parts["embedding"])
            + (_in_use(model) if cfg.recompute else parts["decoder"] + parts["vision"])
        )
    )
    beside = (
        Item("activations (estimate)", kept, f"a micro-batch of {micro.asked + micro.said:,} tokens{again}"),
        Item(
            "bfloat16 copies",
            copies,
            f"of the matrices in use{again}" if copies else "none: products are in float32",
        ),
        Item(
            "logits of a chunk",
            alive * chunk * words * FLOAT,
            f"{chunk:,} tokens x {words:,} words, {alive} times",
        ),
    )
    gradients, head, table = (
        FLOAT * count
        for count in (sum(trained.values()), trained.get("head", trained["embedding"]), trained["embedding"])
    )
    why = f"{shown_count(sum(trained.values()))} x {FLOAT} bytes"
    # The backward pass begins with the head, when all activations are there, and ends with the embedding,
    # whose gradient is added to the head's, when one block's are.
    last = table + kept // (model.num_hidden_layers + model.vision.depth) - total(beside)
    if several:
        return (
            Item("gradients", gradients, why),
            *beside,
            Item(
                "gradients of a part",
                max(head, table + last),
                "of head and embedding, beside the sum of the parts before",
            ),
        )
    return Item(
        "gradients",
        max(head, gradients + last),
        f"of {why}, made while activations go: there is one micro-batch",
    ), *beside


def _work(cfg: Config, model: ModelConfig, load: Load) -> float:
    """Floating-point operations of a step: two per parameter and token, forward; backward costs two
    forwards, recomputation a third."""
    parts = parameters(model)
    decoder = parts["decoder"] + parts.get("head", parts["embedding"])
    forward = 2.0 * (decoder * (load.asked + load.said) + parts["vision"] * load.prompts * load.patches)
    learning = cfg.loss.updates * (4 if cfg.recompute else 3)
    if cfg.method == "sft":
        return forward * learning
    # rollout, reference, old policy
    return forward * (1 + learning + (cfg.loss.kl_coef > 0) + (cfg.loss.updates > 1))


def _micro_batch(load: Load, budget: int) -> tuple[Load, bool]:
    """The largest micro-batch, as `TrainBatch.micro_batches` cuts them, and whether there are several."""
    group = load.rows // load.prompts
    cost = load.prompt + group * load.cap
    if cost > budget:
        part = replace(load, prompts=1, rows=min(group, max(1, (budget - load.prompt) // load.cap)))
    else:
        fit = min(load.prompts, budget // cost)
        part = replace(load, prompts=fit, rows=fit * group)
    return part, part != load


def activations(model: ModelConfig, load: Load, size: int, recompute: bool) -> int:
    """Bytes that autograd keeps of one forward: what the products and norms of all blocks need again.

    With recomputation: the input of each block, and the largest block whole. size: bytes of a number in
    matrix products.
    """
    low, width, head = size < FLOAT, model.hidden_size, model.head_size
    # attention adds up in float64 on a CPU, in which alone products are in float32
    sums = size if low else 2 * FLOAT
    queries, keys = model.num_attention_heads * head, model.num_key_value_heads * head
    # In a block: both norms' inputs and what they divide, in float32; their outputs, under autocast once for
    # each of q, k, v, gate, up; queries and attention's output as attention has them, the latter as the next
    # product has it too; gate, its silu, up, their product.
    token = (
        4 * width * FLOAT
        + (5 if low else 2) * width * size
        + queries * (2 * sums + size)
        + 4 * model.intermediate_size * size
    )
    # The prompt's keys and values, and beside each row's own the prompt's again.
    block = (load.asked + load.said) * token + 2 * keys * sums * (
        load.asked + load.rows * (load.prompt + load.cap)
    )
    # of a group and the R queries of a key head; all blocks share it
    mask = load.prompts * (load.prompt + load.cap) * sums * (queries // keys * load.cap)
    v, patches = model.vision, load.prompts * load.patches
    vision_block = patches * (
        2 * v.width * (FLOAT + size) + size * (7 * v.width + (4 if v.gated else 3) * v.intermediate_size)
    )
    if recompute:
        blocks = FLOAT * (
            model.num_hidden_layers * (load.asked + load.said) * width + v.depth * patches * v.width
        )
        # with the gradients of the widest two
        blocks += max(block + 2 * size * (load.asked + load.said) * model.intermediate_size, vision_block)
    else:
        # the last block computes the completions alone
        blocks = model.num_hidden_layers * block - load.asked * token + v.depth * vision_block
    return blocks + mask + patches * v.patch_dim * FLOAT + 4 * load.said * width * FLOAT


def _in_use(model: ModelConfig) -> int:
    """Parameters whose copies exist at the same time where blocks are recomputed: those of one block, of
    the decoder or of the tower, and of the merger."""
    parts, wide = parameters(model), model.vision.width * model.vision.spatial_merge_size**2
    return max(parts["decoder"] // model.num_hidden_layers, parts["vision"] // model.vision.depth) + wide * (
        wide + model.vision.hidden_size
    )


def text(cfg: Config, ranks: int = 1) -> str:
    """What --plan prints, for one of `ranks` ranks. Of the model's folder it reads config.json and
    preprocessor_config.json alone, of a model in grpo/plan/known_models.py nothing. Raises ValueError."""
    if (
        not cfg.init
        and not Path(cfg.model).exists()
        and (name := (hub.parts_of(cfg.model) or ("",))[0]) in known_models.KNOWN
    ):
        return render(
            cfg,
            make_plan(cfg, known_models.KNOWN[name], max_pixels=known_models.MAX_PIXELS, ranks=ranks),
            ranks,
        )
    folder = (
        Path(cfg.init)
        if cfg.init
        else model_folder(cfg.model, cfg.revision, files=("config.json", "preprocessor_config.json"))
    )
    model = ModelConfig.from_folder(folder)
    processor = (
        folder.parent / "preprocessor_config.json"
        if folder.is_file()
        else folder / "preprocessor_config.json"
    )
    pixels = json.loads(processor.read_text("utf-8")).get("max_pixels") if processor.is_file() else None
    return render(cfg, make_plan(cfg, model, max_pixels=pixels, ranks=ranks), ranks)
