"""--plan while learning: what exists at each moment of a micro-batch.

A step of learning has no single list of tensors. The logits exist while the head is at work, and a recomputed
block exists after that. So the plan counts moments, and the largest is what a step needs.
tests/grpo/plan/test_fake_peak.py compares it with the code at the shapes of real models.
"""

from dataclasses import dataclass, replace

from grpo.config.parse import Config
from grpo.logprobs import TOKENS_PER_BLOCK, chunk_of
from grpo.plan.items import Item, Moments, shown_count
from grpo.plan.states import FLOAT, largest_block, merger_parameters
from models.config import ModelConfig
from models.layers import attention_size

# The last moment, after the micro-batches.
UPDATE = "in the update"


@dataclass(frozen=True)
class Load:
    """What one forward computes: prompts of `prompt` tokens with `patches` patches each, and rows of `cap`
    tokens, `group` of a prompt at most."""

    prompts: int
    prompt: int
    patches: int
    rows: int
    cap: int
    group: int

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of all prompts, and of all completions."""
        return self.prompts * self.prompt, self.rows * self.cap


@dataclass(frozen=True)
class Kept:
    """Bytes of a micro-batch's activations. blocks: what autograd keeps of all blocks until their backward
    passes; head: the completions' hidden states, until the head's; block: what comes on top while one block
    goes backward, which is the block itself if it is recomputed."""

    blocks: int
    head: int
    block: int


def moments(
    cfg: Config, model: ModelConfig, parts: dict[str, int], load: Load, size: int, device: str, update: int
) -> Moments:
    """What exists at each moment of learning, beside `Plan.held`. parts: parameters of each part. size: bytes
    of a number in products. update: bytes of an update, beside weights and gradients."""
    micro, several = _micro_batch(load, cfg.loss.micro_tokens)
    number = size if cfg.lora.rank else 2 if cfg.optim.name == "adamw_bf16" else FLOAT
    trained = _trained(cfg, parts)
    count, tied = sum(trained.values()), "head" not in parts
    whole, table = number * count, number * trained["embedding"]
    head = table if tied else number * trained["head"]
    # A frozen tower keeps no activations.
    seen = replace(micro, patches=0) if "vision" in cfg.freeze else micro
    kept = activations(model, seen, size, cfg.recompute, device, norms=not cfg.lora.rank)
    hidden = FLOAT * model.hidden_size
    # The share of the block that the backward pass comes to last.
    share = 0 if cfg.recompute else kept.blocks // (model.num_hidden_layers + model.vision.depth)
    merger = merger_parameters(model.vision)
    through = merger if cfg.recompute else parts["decoder"] + parts["vision"]
    block = largest_block(parts, model) if cfg.recompute else 0
    again = ", recomputed block by block" if cfg.recompute else ""
    made = f"{shown_count(count)} x {number} bytes"
    made = made if several else f"of {made}, made while activations go: there is one micro-batch"
    casts = f"of the matrices in use{again}" if size < number else "none: weights have the dtype of products"

    def moment(gradients: int, activation_bytes: int, cast: int, *more: Item) -> tuple[Item, ...]:
        tokens = f"a micro-batch of {sum(micro.tokens):,} tokens{again}"
        used = size * cast if size < number else 0
        lines = ("gradients", gradients, made), ("activations (estimate)", activation_bytes, tokens)
        return *(Item(*line) for line in lines), Item("bfloat16 copies", used, casts), *more

    summed = whole if several else 0
    # The head's gradient is added to a tied embedding's at the end.
    waiting = Item("gradient of the head", head if tied or not several else 0, "until it is added")
    both = (table + head * tied) if several else table * tied
    of_head = size * (size < number) + size * (head > 0)
    scoring, slopes = _of_chunk(cfg, model, micro, size, device, of_head)
    return {
        "before the backward pass": moment(
            summed, kept.blocks + kept.head, through + parts.get("head", parts["embedding"]), *scoring
        ),
        "at the head": moment(
            summed,
            kept.blocks + kept.head + hidden * micro.tokens[1],
            through,
            *slopes,
            replace(waiting, bytes=head),
        ),
        "in the last block": moment(summed, kept.blocks + kept.block, through + block, waiting),
        "in the first block": moment(whole, share + kept.block, merger + block),
        "at the embedding": moment(
            whole, hidden * sum(micro.tokens), 0, Item("gradients of a part", both, "of head and embedding")
        ),
        UPDATE: (
            Item("gradients", whole, made),
            Item("moments in work", update, "of some rows in float32, and what comes from the host"),
        ),
    }


def _of_chunk(
    cfg: Config, model: ModelConfig, micro: Load, size: int, device: str, of_head: int
) -> tuple[list[Item], list[Item]]:
    """What exists beside the logits of a chunk, forward, and of a block of words, backward. of_head: bytes of
    a weight's cast copy and of its gradient in products."""
    words, completions = model.vocab_size, micro.tokens[1]
    chunk = min(chunk_of(words, cfg.loss.logits_mib, device), completions)
    # Float32 copies: themselves, divided by the temperature, and their log-softmax.
    alive = 2 + (cfg.temperature != 1)
    forward = [
        Item("logits of a chunk", alive * chunk * words * FLOAT, f"{chunk:,} tokens x {words:,} words")
    ]
    if device == "cpu" and size < FLOAT:
        why = "a CPU has no product of bfloat16 numbers with a result in float32"
        forward.append(Item("head in float32", FLOAT * words * model.hidden_size, why))
    # Their slope, and its bfloat16 copy. A single chunk's log-probs are kept for it; an entropy bonus needs
    # probabilities, too.
    copies = 1 + (chunk == completions) + (cfg.loss.entropy_coef > 0)
    each = copies * FLOAT + size * (size < FLOAT)
    block = words if chunk == completions else chunk * words // TOKENS_PER_BLOCK
    slopes = Item("slopes of logits", each * chunk * words, "as many as of a chunk, for a block of words")
    part = Item("part of the head", of_head * block * model.hidden_size, "cast weights and their gradient")
    return forward, [slopes, part]


def _trained(cfg: Config, parts: dict[str, int]) -> dict[str, int]:
    """The parameters that are trained; 0 for a frozen part, and beside adapters."""
    freeze = {name: "vision" if name == "vision" else "llm" for name in parts}
    frozen = cfg.lora.rank > 0
    return {name: 0 if frozen or freeze[name] in cfg.freeze else count for name, count in parts.items()}


def _micro_batch(load: Load, budget: int) -> tuple[Load, bool]:
    """The largest micro-batch, as `grpo/batch.py` cuts them, and whether there are several."""
    group = min(load.group, load.rows)
    fit = min(load.prompts, budget // (load.prompt + group * load.cap))
    rows = min(fit * group, load.rows) or min(group, max(1, (budget - load.prompt) // load.cap))
    part = replace(load, prompts=max(fit, 1), rows=rows)
    return part, part != load


def activations(
    model: ModelConfig, load: Load, size: int, recompute: bool, device: str = "cpu", norms: bool = True
) -> Kept:
    """Bytes of activations of one forward: what the products and norms of all blocks need again. With
    recomputation: each block's input, and the largest block whole. size: bytes of a number in products.
    norms: whether norms are trained."""
    autocast = size < FLOAT
    width, head = model.hidden_size, model.head_size
    attention = attention_size(size, device)
    prompt_tokens, completion_tokens = load.tokens
    tokens, places = prompt_tokens + completion_tokens, load.prompt + load.cap
    queries, keys = model.num_attention_heads * head, model.num_key_value_heads * head
    # Of a token in a block: the inputs and, for their weights, the normalised values of both norms, in
    # float32; their outputs, under autocast once for each of q, k, v, gate, up; queries and attention's
    # output in attention's dtype, the output once more for the next product; gate, its silu, up, their
    # product.
    token = (4 if norms else 2) * width * FLOAT + (5 if autocast else 2) * width * size
    token += queries * (2 * attention + size) + 4 * model.intermediate_size * size
    # Qwen3 normalises queries and keys in float32.
    token += (queries + keys) * FLOAT if model.qwen3 else 0
    # The prompt's keys and values, and each row's: the prompt's again and its own.
    block = tokens * token + 2 * keys * attention * (prompt_tokens + load.rows * places)
    # One mask for each prompt and the R queries of a key head; all blocks share it.
    mask = load.prompts * places * attention * (queries // keys * load.cap)
    v = model.vision
    patches = load.prompts * load.patches
    mlp = (4 if v.gated else 2 if model.qwen3 else 3) * v.intermediate_size
    vision_block = patches * (2 * v.width * (FLOAT + size) + size * (7 * v.width + mlp))
    # The gradients of the two widest activations; or of one, and of the largest matrix, also as it is cast.
    # Beside adapters a merged matrix takes as much.
    wide = size * tokens * model.intermediate_size
    of_matrix = (FLOAT + size * autocast) * width * model.intermediate_size
    wide += max(wide, of_matrix)
    if recompute:
        # Under autocast the tower's are in bfloat16.
        blocks = FLOAT * model.num_hidden_layers * tokens * width + size * v.depth * patches * v.width
        wide = max(block + wide, vision_block)
    else:
        # The last block computes only the completions.
        blocks = model.num_hidden_layers * block - prompt_tokens * token + v.depth * vision_block
    # The input of each product in the DeepStack mergers, and of the gelu between.
    blocks += 3 * len(v.deepstack_visual_indexes) * patches * v.width * size
    blocks += mask + patches * v.patch_dim * FLOAT
    return Kept(blocks, 4 * completion_tokens * width * FLOAT, wide)
