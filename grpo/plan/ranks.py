"""--plan=N: from the plan of a process that holds the whole policy to that of one of N ranks that shard it
(`grpo/parallel/fsdp.py`)."""

from dataclasses import replace

from grpo.parallel.rows import Share, share_rows
from grpo.plan.items import Item
from grpo.plan.learning import UPDATE
from grpo.plan.states import FLOAT, largest_block, merger_parameters
from models.config import ModelConfig
from models.layers import attention_size

# The policy that a rollout casts once; where the policy is sharded, it is part of what is gathered.
SAMPLER = "bfloat16 policy"
# With adapters: the frozen weights, what is trained, and the weights that a rollout adds up.
BASE = "frozen weights"
ADAPTERS = "adapters"
MERGED = "merged weights"
SHARDED = ("weights", BASE, "optimizer", "reference", "gradients", "moments in work")


def largest_share(prompts: int, prompt: int, group: int, cap: int, sections: int, ranks: int):
    """-> (prompts, rows) that the rank with most rows has of a step, if all prompts have `prompt` tokens."""
    shared = share_rows([prompt] * prompts, [cap] * prompts, group, sections, ranks)
    shares = [Share.of(shared, rank, prompts, group) for rank in range(ranks)]
    return max(len(share.places) for share in shares), max(len(share.rows) for share in shares)


def of_one_rank(plan, model: ModelConfig, ranks: int):
    """The `Plan` of one of `ranks` ranks, made from the plan of a process with the rank's prompts."""
    in_rollout, in_learning = _gathered(plan, model)
    root = _root(plan.parameters, model)

    def shard(item):
        if item.name == "bfloat16 copies" and item.bytes:
            why = "of embedding, merger and head; blocks are gathered in bfloat16"
            return replace(item, bytes=2 * root, why=why)
        if item.name in SHARDED and item.bytes:
            why = f"{item.why}; cut over {ranks} ranks"
            return replace(item, bytes=-(-item.bytes // ranks), why=why)
        return item

    def of_stage(stage):
        rollout = tuple(item for item in stage.rollout if item.name != SAMPLER)
        learning = {
            moment: (*map(shard, items), *([in_learning] if moment != UPDATE else []))
            for moment, items in stage.learning.items()
        }
        return replace(stage, rollout=(*rollout, in_rollout) if rollout else (), learning=learning)

    # adapters are whole on every rank, and so are their states
    on_host = plan.on_host if plan.held[1].name == ADAPTERS else -(-plan.on_host // ranks)
    held, stages = tuple(map(shard, plan.held)), tuple(map(of_stage, plan.stages))
    return replace(plan, held=held, stages=stages, on_host=on_host)


def _root(parts: dict[str, int], model: ModelConfig) -> int:
    """Parameters of the root, which is gathered for a whole pass: the embedding, the head, the tower's
    embeddings and the mergers."""
    vision = model.vision
    tower = (vision.patch_dim + vision.num_position_embeddings) * vision.width
    return parts["embedding"] + parts.get("head", 0) + tower + merger_parameters(vision)


def _gathered(plan, model: ModelConfig) -> tuple:
    """-> the lines of what is gathered in a rollout and while learning."""
    parts = plan.parameters
    use_bfloat16, tied = plan.dtype == "bfloat16", "head" not in parts
    count, root = sum(parts.values()), _root(parts, model)
    size = 2 if use_bfloat16 else FLOAT
    gathered = size * (count - root) + plan.number * root
    again = ""
    learning = 2 * plan.number * root + 3 * size * largest_block(parts, model)
    gradients = "gradients of these"
    if size < plan.number:
        # The embedding is not cast; a tied head is a cast copy of it.
        gathered += size * (root if tied else root - parts["embedding"])
        again = f" and once more x {size}"
    elif size == FLOAT and attention_size(size, plan.device) > size:
        learning += 2 * FLOAT * count
        gradients += ", and all in float64, as on a CPU"
    if any(each.name == ADAPTERS for each in plan.held):
        # The frozen weights are in the dtype of the products, and have no gradients.
        gathered = size * count
        learning = size * (root + 2 * largest_block(parts, model))
        again = ""
        gradients = "no gradients"
    rest = plan.number if gradients != "no gradients" else size
    why = f"blocks x {size} bytes, embedding, merger and head x {rest}{again}"
    in_learning = Item("gathered parts", learning, f"embedding, merger, head, two blocks; {gradients}")
    return Item("gathered policy", gathered, why), in_learning
