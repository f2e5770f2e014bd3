"""A checkpoint of several ranks: PyTorch's distributed checkpoints (DCP) in safetensors.

DCP's planner decides which rank writes which shard of the optimizer's state, raises an error of one rank on
all ranks, and assembles the shards for any number of ranks. DCP's own writer adds a pickle; ours writes only
safetensors, in the form that PyTorch's HuggingFaceStorageReader reads: the header of each file holds the
offsets of its shards.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.storage import StorageWriter
from torch.futures import Future

# DCP's keys in the header of a file
SHARDING = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"
Tensors = dict[str, Tensor]
Part = Callable[[Tensors, dict[str, str]], object]


def ranks() -> tuple[int, int]:
    """(this rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def write(tensors: Tensors, copies: Tensors, writer: "ShardWriter", group: dist.ProcessGroup | None) -> None:
    """Every rank writes its shards of `tensors`, with the values of `copies`. group: process group of all
    ranks; None: the default one.  Raises on every rank the error of one: OSError that names the rank, or the
    error itself if it is another one."""
    try:
        dcp.save(tensors, storage_writer=writer, planner=CopyPlanner(copies), process_group=group)
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        raise OSError(f"rank {rank}: {error}") if isinstance(error, OSError) else error from failed
    except RuntimeError as error:
        # of the communication; an error in a part is a CheckpointException
        raise OSError(f"the ranks could not agree, perhaps because one has ended: {error}") from error


def read(folder: Path, tensors: Tensors) -> None:
    """Fill tensors (whole ones or shards) with the saved values of their names. Every rank calls it. Raises
    ValueError for another name or shape, and OSError or SafetensorError for an unreadable file."""
    reader = HuggingFaceStorageReader(str(folder))
    # a name without "/" is a weight
    saved = {
        name: tuple(found.size)
        for name, found in reader.read_metadata().state_dict_metadata.items()
        if "/" in name and isinstance(found, TensorStorageMetadata)
    }
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in wanted:
            raise ValueError(f"it holds {name}, which this run does not train so")
        if saved.get(name) != wanted[name]:
            there = f"shape {saved[name]}" if name in saved else "nothing"
            raise ValueError(f"{name} of shape {wanted[name]} was expected, {there} is there")
    if tensors:
        try:
            with warnings.catch_warnings():
                # one process
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as failed:
            rank, (error, _) = min(failed.failures.items())
            raise OSError(f"rank {rank}: {error}") from failed


class CopyPlanner(dcp.DefaultSavePlanner):
    """Plans with the tensors that `dcp.save` gets, and writes copies of them: the tensors go on changing."""

    def __init__(self, copies: Tensors):
        # otherwise the rank that writes a tensor of all ranks depends on Python's hashes, and so do the files
        super().__init__(dedup_save_to_lowest_rank=True)
        self.copies = copies

    def resolve_data(self, write_item) -> Tensor:
        return self.copies[write_item.index.fqn]


class ShardWriter(StorageWriter):
    """Calls `begin` on rank 0, `part` on every rank with its shards and a header, and `finish` on rank 0 with
    the results of all parts."""

    def __init__(self, begin: Callable[[], None], part: Part, finish: Callable[[list], None]):
        self.begin = begin
        self.part = part
        self.all_written = finish

    def reset(self, checkpoint_id=None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args, **kwargs) -> None:
        pass

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans: list) -> list:
        self.begin()
        return plans

    def write_data(self, plan, planner) -> Future:
        items = sorted(plan.items, key=lambda item: item.index.fqn)
        mine = {item.index.fqn: planner.resolve_data(item) for item in items}
        where = {item.index.fqn: {OFFSETS: list(item.tensor_data.chunk.offsets)} for item in items}
        done = Future()
        try:
            # one header entry, because safetensors writes several in any order
            done.set_result(self.part(mine, {SHARDING: json.dumps(where)}))
        except SafetensorError as error:
            # which can't be sent to other ranks
            raise OSError(str(error)) from error
        return done

    def finish(self, metadata, results: list) -> None:
        self.all_written(results)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True
