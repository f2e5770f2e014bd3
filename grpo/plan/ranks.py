"""--plan=N: from the plan of a process that holds the whole policy to that of one of N ranks over which it
is cut (`grpo/parallel/fsdp.py`)."""

from dataclasses import replace

from models.config import ModelConfig

# bytes
FLOAT = 4
# of one process, cast once for a rollout; of a policy that is cut, part of what is gathered
SAMPLER = "bfloat16 policy"
CUT = ("weights", "optimizer", "reference", "gradients")


def root_parameters(parts: dict[str, int], model: ModelConfig) -> int:
    """Of the embedding, the head if it is another, the patch embedding and the merger: what is gathered
    for a whole pass. parts: parameters of each."""
    v, wide = model.vision, model.vision.width * model.vision.spatial_merge_size**2
    return parts["embedding"] + parts.get("head", 0) + v.patch_dim * v.width + wide * (wide + v.hidden_size)


def largest_block(parts: dict[str, int], model: ModelConfig) -> int:
    """Parameters of a decoder block, or of a vision block where those are larger."""
    return max(parts["decoder"] // model.num_hidden_layers, parts["vision"] // model.vision.depth)


def of_one_rank(plan, model: ModelConfig, ranks: int):
    """The `Plan` of one of `ranks` ranks, made of that of a process with as many prompts as it has."""
    parts, low = plan.parameters, plan.dtype == "bfloat16"
    count, root, size = sum(parts.values()), root_parameters(parts, model), 2 if low else FLOAT
    item, head = plan.held[0], parts.get("head", parts["embedding"])
    sampling = replace(
        item,
        name="gathered policy",
        bytes=size * (count - root)
        + FLOAT * root
        + (size * (root - parts["embedding"] + head * ("head" not in parts)) if low else 0),
        why=f"blocks x {size} bytes, embedding, merger and head x {FLOAT}"
        + (f" and once more x {size}" if low else ""),
    )
    learning = replace(
        item,
        name="gathered parts",
        bytes=2 * FLOAT * root + 3 * size * largest_block(parts, model) + (0 if low else 2 * FLOAT * count),
        why="embedding, merger, head, two blocks; gradients of these"
        + ("" if low else ", and all in float64, as on a CPU"),
    )

    def cut(item):
        if item.name == "bfloat16 copies" and low:
            return replace(
                item, bytes=size * root, why="of embedding, merger and head; blocks are gathered in bfloat16"
            )
        return (
            replace(item, bytes=-(-item.bytes // ranks), why=f"{item.why}; cut over {ranks} ranks")
            if item.name in CUT and item.bytes
            else item
        )

    stages = tuple(
        replace(
            stage,
            rollout=(*(item for item in stage.rollout if item.name != SAMPLER), sampling)
            if stage.rollout
            else (),
            learning=(*map(cut, stage.learning), learning),
        )
        for stage in plan.stages
    )
    return replace(plan, held=tuple(map(cut, plan.held)), stages=stages)
