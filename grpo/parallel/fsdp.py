"""One policy over many ranks: FSDP2 (`fully_shard`) shards its matrices.

A rank holds its part of every matrix, of its gradient and of its moments, in float32. A block's matrices are
gathered when the block runs, forward and backward, in the dtype of its products, as autocast would cast them.
Its gradients are reduced in float32 and *summed*, because the weights of the loss are fixed over all ranks.
Vectors (norms and biases, one parameter in three thousand) stay whole on every rank, because FSDP2 would cast
them too. So do adapters (models/lora.py), which are added to a gathered matrix in float32.

All ranks gather a block together. So all run the same number of micro-batches, each with a picture
(`grpo/gradient.py:passes`). Rollouts differ in length, so they run on weights that were gathered before
(`whole_weights`). With one rank, nothing is sharded.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from grpo.parallel.ranks import Ranks
from models.layers import to_attention_dtype
from models.lora import adapted, merged_weights
from models.qwen_vl import QwenVL
from models.weights import EMBEDDING, HEAD

# views that nothing here writes into
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def shard(policy: QwenVL, ranks: Ranks, use_bfloat16: bool) -> None:
    """Shard the policy's matrices over all ranks, in place. use_bfloat16: compute products in bfloat16."""
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    whole = {p for name, p in policy.named_parameters() if p.dim() < 2 or ".lora_" in name}
    sums = torch.float32 if use_bfloat16 else to_attention_dtype(torch.empty(0, device=ranks.device)).dtype
    # the root last: embedding, merger, head, in float32
    for module in (*policy.visual.blocks, *policy.model.layers, policy):
        products = torch.bfloat16 if use_bfloat16 and module is not policy else None
        dtypes = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=sums, cast_forward_inputs=False)
        part = fully_shard(module, mesh=mesh, ignored_params=whole, mp_policy=dtypes)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


@contextmanager
def whole_weights(policy: QwenVL) -> Iterator[QwenVL]:
    """A plain policy with all weights, in the dtypes of their use, while the context lasts. Inside, no rank
    waits for another.

    In bfloat16 the matrices are cast once, not for every token. The embedding stays as it is; a tied head
    becomes a bfloat16 copy of it. Adapters are merged (models/lora.py).
    """
    cast = [device for device in ("cuda", "cpu") if torch.is_autocast_enabled(device)]
    products = torch.get_autocast_dtype(cast[0]) if cast else None
    if not isinstance(policy, FSDPModule) and products is None and not adapted(policy):
        yield policy
        return
    # the blocks and the root; none if the policy is not sharded
    parts = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        with torch.device("meta"):
            plain = QwenVL(replace(policy.config, tie_word_embeddings=False))
        # of one without adapters: the gathered tensor, not a copy
        for name, weight in merged_weights(policy, products):
            # an untied head comes after the embedding
            for used_as in (name, HEAD) if name == EMBEDDING else (name,):
                module, _, leaf = used_as.rpartition(".")
                used = (
                    weight.to(products) if products and weight.dim() > 1 and used_as != EMBEDDING else weight
                )
                setattr(plain.get_submodule(module), leaf, nn.Parameter(used, requires_grad=False))
        yield plain
    finally:
        for part in parts:
            part.reshard()
