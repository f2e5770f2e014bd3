"""--plan: what a run will need, computed from the config and the model's config.json alone. Nothing is loaded.

Numbers are bounds: every prompt as long as max_prompt with one picture as large as it may be, every completion as long as the cap. Parameters, caches and logits are exact under that; activations are an
estimate (what autograd keeps of the blocks in `models/`; the tests hold it to what is really kept), and libraries, fragmentation and the pictures' files come on top.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from grpo.config import Config
from grpo.run import model_folder
from grpo.schedule import stage_at
from models.config import ModelConfig, VisionConfig

FLOAT = 4           # bytes
LOGITS_ALIVE = 4    # float32 copies of a chunk's logits during its backward pass: logits, their log-softmax, the gradients of both


@dataclass(frozen=True)
class Item:
    """One line of the plan: what, how many bytes, and where the number comes from."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class StagePlan:
    """Steps first..last, which have one group size and one cap. tokens: (prompts, completions) and patches of a step, flops of a step: at most."""

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
    """What a run needs: `held` all the time, and what each stage adds. peak: bytes, the larger of rollout and learning over all stages."""

    parameters: dict[str, int]
    dtype: str
    held: tuple[Item, ...]
    stages: tuple[StagePlan, ...]

    @property
    def peak(self) -> int:
        """Bytes that exist at the same time, at most."""
        return total(self.held) + max(max(total(stage.rollout), total(stage.learning)) for stage in self.stages)


def total(items: tuple[Item, ...]) -> int:
    """Bytes of all lines."""
    return sum(item.bytes for item in items)


def parameters(model: ModelConfig) -> dict[str, int]:
    """{part: parameters} of the vision tower, the embedding, the decoder's blocks and, if it is not the embedding again, the head."""
    width, hidden, head = model.hidden_size, model.intermediate_size, model.head_size
    queries, keys = model.num_attention_heads * head, model.num_key_value_heads * head
    block = width * (queries + 2 * keys) + queries + 2 * keys + queries * width + 3 * width * hidden + 2 * width
    found = {"vision": _vision_parameters(model.vision), "embedding": model.vocab_size * width, "decoder": model.num_hidden_layers * block + width}
    return found | ({} if model.tie_word_embeddings else {"head": model.vocab_size * width})


def _vision_parameters(v: VisionConfig) -> int:
    norm = v.width if v.gated else 2 * v.width
    mlp = 3 * v.width * v.intermediate_size + 2 * v.intermediate_size + v.width if v.gated else 2 * v.width * v.intermediate_size + v.intermediate_size + v.width
    block = 4 * v.width * v.width + 4 * v.width + mlp + 2 * norm
    wide = v.width * v.spatial_merge_size**2
    return v.patch_dim * v.width + v.depth * block + norm + wide * wide + wide + wide * v.hidden_size + v.hidden_size


def make_plan(cfg: Config, model: ModelConfig, *, max_pixels: int | None = None, dtype: str | None = None, ranks: int = 1) -> Plan:
    """The plan of one rank.

    max_pixels: of a picture (None: the config's; null there: as many as fit into the prompt).  dtype: float32 or bfloat16, of matrix products (None: the config's;
    auto counts as float32).
    """
    vision = model.vision
    patches = min(cfg.max_prompt * vision.spatial_merge_size**2, (cfg.max_pixels or max_pixels or 10**12) // vision.patch_size**2)
    dtype = dtype or ("bfloat16" if cfg.dtype == "bfloat16" else "float32")
    size, parts = (2 if dtype == "bfloat16" else FLOAT), parameters(model)
    count = sum(parts.values())
    needs_reference = cfg.method == "grpo" and cfg.loss.kl_coef > 0
    held = [Item("weights", size * count, f"{_count(count)} x {size} bytes"),
            Item("master weights", FLOAT * count if size < FLOAT else 0, "in float32" if size < FLOAT else "the weights are float32 themselves"),
            Item("optimizer", 2 * FLOAT * count, "AdamW: two moments in float32"),
            Item("reference", size * count if needs_reference else 0, "the frozen base" if needs_reference else "not loaded: there is no KL penalty")]
    stages, step = [], 0
    while step < max(cfg.steps, 1):
        stage = stage_at(step, cfg.stages, cfg)
        end = min(stage.until, cfg.steps) if stage is not cfg else max(cfg.steps, 1)
        stages.append(_stage(cfg, model, size, -(-cfg.prompts // ranks), (step, end - 1), 1 if cfg.method == "sft" else stage.group, stage.cap, parts, patches))
        step = end
    return Plan(parts, dtype, tuple(held), tuple(stages))


def _stage(cfg: Config, model: ModelConfig, size: int, prompts: int, steps: tuple[int, int], group: int, cap: int, parts: dict[str, int], patches: int) -> StagePlan:
    rows, asked, said = prompts * group, prompts * cfg.max_prompt, prompts * group * cap
    per_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_size * size
    count, grpo = sum(parts.values()), cfg.method == "grpo"
    rollout = () if not grpo else (
        Item("KV cache, prompts", asked * per_token, f"{prompts} prompts x {cfg.max_prompt:,} tokens x {_bytes(per_token)}, once per group"),
        Item("KV cache, completions", said * per_token, f"{rows:,} rows x {cap:,} tokens x {_bytes(per_token)}"),
        Item("logits", 3 * rows * model.vocab_size * FLOAT, f"{rows:,} rows x {model.vocab_size:,} words in float32, their softmax and its sum"))
    micro_prompts, micro_rows = _micro_batch(cfg, prompts, group, cap)
    chunk = min(cfg.loss.head_chunk, micro_rows * cap)
    recompute = ", recomputed block by block" if cfg.recompute else ""
    learning = (
        Item("gradients", FLOAT * count, f"{_count(count)} x {FLOAT} bytes"),
        Item("activations (estimate)", activations(model, size, micro_prompts, cfg.max_prompt, patches, micro_rows, cap, cfg.recompute),
             f"a micro-batch of {micro_prompts * cfg.max_prompt + micro_rows * cap:,} tokens{recompute}"),
        Item("logits of a chunk", LOGITS_ALIVE * chunk * model.vocab_size * FLOAT, f"{chunk:,} tokens x {model.vocab_size:,} words in float32, {LOGITS_ALIVE} times"))
    decoder = count - parts["vision"] - (0 if model.tie_word_embeddings else parts["embedding"])
    forward = 2.0 * (decoder * (asked + said) + parts["vision"] * prompts * patches)
    passes = (1 if grpo else 0) + cfg.loss.updates * (4 if cfg.recompute else 3) + (cfg.loss.updates > 1) + (grpo and cfg.loss.kl_coef > 0)
    return StagePlan(*steps, group, cap, rollout, learning, (asked, said), prompts * patches, forward * passes)


def _micro_batch(cfg: Config, prompts: int, group: int, cap: int) -> tuple[int, int]:
    """Prompts and rows of the largest micro-batch, as `TrainBatch.micro_batches` cuts them."""
    cost = cfg.max_prompt + group * cap
    if cost > cfg.loss.micro_tokens:
        return 1, min(group, max(1, (cfg.loss.micro_tokens - cfg.max_prompt) // cap))
    fit = min(prompts, cfg.loss.micro_tokens // cost)
    return fit, fit * group


def activations(model: ModelConfig, size: int, prompts: int, prompt: int, patches: int, rows: int, cap: int, recompute: bool) -> int:
    """Bytes that autograd keeps of one forward of `prompts` prompts with `patches` patches each and `rows` completions: per block what its products and norms need again, or with recomputation its input alone, and one block whole."""
    width, hidden, head = model.hidden_size, model.intermediate_size, model.head_size
    queries, keys = model.num_attention_heads * head, model.num_key_value_heads * head
    tokens = prompts * prompt + rows * cap
    # In each block: the inputs of both norms in float32 and after them, q, k, v flat and padded, attention's output twice, and gate, up and their product (4 tensors).
    token = 2 * width * (FLOAT + size) + size * (3 * queries + 4 * keys) + size * 4 * hidden
    block = tokens * token + rows * (prompt + cap) * 2 * keys * size               # and the prompt's keys and values beside each row's own
    v, patches = model.vision, prompts * patches
    vision_block = patches * (2 * v.width * (FLOAT + size) + size * (7 * v.width + (4 if v.gated else 3) * v.intermediate_size))
    if recompute:
        blocks = size * (model.num_hidden_layers * tokens * width + v.depth * patches * v.width) + max(block, vision_block)
    else:
        blocks = model.num_hidden_layers * block + v.depth * vision_block
    return blocks + patches * v.patch_dim * FLOAT + rows * cap * width * (2 * FLOAT + size)


def text(cfg: Config) -> str:
    """What --plan prints. Reads config.json and preprocessor_config.json of the model's folder and nothing else. Raises ValueError if there is none."""
    folder = Path(cfg.init) if cfg.init else model_folder(cfg.model)
    model = ModelConfig.from_folder(folder)
    processor = folder.parent / "preprocessor_config.json" if folder.is_file() else folder / "preprocessor_config.json"
    pixels = json.loads(processor.read_text("utf-8")).get("max_pixels") if processor.is_file() else None
    return render(cfg, make_plan(cfg, model, max_pixels=pixels))


def render(cfg: Config, plan: Plan) -> str:
    """The plan as a table."""
    parts = ", ".join(f"{name} {_count(count)}" for name, count in plan.parameters.items())
    lines = [f"{cfg.recipe}: {cfg.method} on {cfg.model}, {cfg.steps:,} steps, {plan.dtype}, one process. At most, and nothing was loaded:",
             "", f"{_count(sum(plan.parameters.values()))} parameters: {parts}", "", "held all the time", *map(_line, plan.held)]
    for stage in plan.stages:
        if len(plan.stages) > 1:
            lines += ["", f"steps {stage.first + 1:,} to {stage.last + 1:,}: group {stage.group}, cap {stage.cap:,}"]
        if stage.rollout:
            lines += ["", "while sampling", *map(_line, stage.rollout)]
        lines += ["", "while learning", *map(_line, stage.learning), ""]
        asked, said = stage.tokens
        steps = stage.last - stage.first + 1
        if stage.rollout:
            lines.append(f"  decode steps            {stage.cap:>12,}  a rollout; {stage.cap * steps:,} over {steps:,} steps")
        lines += [f"  tokens                  {asked + said:>12,}  a step: {asked:,} of prompts, {said:,} of completions; {stage.patches:,} patches of pictures",
                  f"  work                    {_flops(stage.flops):>12}  a step, {_flops(stage.flops * steps)} over {steps:,} steps (floating-point operations)"]
    return "\n".join([*lines, "", f"peak: {_bytes(plan.peak)}"]) + "\n"


def _line(item: Item) -> str:
    return f"  {item.name:<24}{_bytes(item.bytes):>12}  {item.why}"


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def _count(count: float) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"


def _flops(count: float) -> str:
    power, unit = next((p, u) for p, u in ((15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP"), (6, "MFLOP")) if count >= 10**p or p == 6)
    return f"{count / 10**power:,.1f} {unit}"
