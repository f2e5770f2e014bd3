"""What each rank writes and reads of a checkpoint, when there are several: PyTorch's distributed checkpoints
(DCP) in safetensors.

DCP's planner says which rank writes which piece of the optimizer's state, carries what goes wrong on one rank
to all of them, and puts the pieces together again for any number of ranks. Its own writer leaves a pickle
beside the pieces; ours writes safetensors alone, in the form that PyTorch's HuggingFaceStorageReader reads:
every file says in its header where in the whole tensors its pieces belong.
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
from torch.distributed.checkpoint.storage import StorageWriter
from torch.futures import Future

# DCP's names, in the header of a file
WHERE, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


def ranks() -> tuple[int, int]:
    """→ (this rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def write(
    tensors: dict[str, Tensor], copies: dict[str, Tensor], writer: "Parts", group: dist.ProcessGroup | None
) -> None:
    """Every rank writes its pieces of `tensors`, which it takes from `copies`.  group: of all ranks; None:
    the default one.

    Raises on every rank what went wrong on one of them: OSError that names the rank, or the error itself if
    it is no matter of files.
    """
    try:
        dcp.save(tensors, storage_writer=writer, planner=Copies(copies), process_group=group)
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        raise OSError(f"rank {rank}: {error}") if isinstance(error, OSError) else error from failed
    except RuntimeError as error:
        # of the communication itself; what goes wrong in a part comes as the above
        raise OSError(f"the ranks could not agree, perhaps because one has ended: {error}") from error


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, whole ones or shards, with what any number of ranks wrote under their names. Every rank
    calls it.

    Raises ValueError for a name or a shape that differs, OSError or SafetensorError where a file can't be
    read.
    """
    reader = HuggingFaceStorageReader(str(folder))
    # without the weights beside them
    saved = {
        name: tuple(found.size)
        for name, found in reader.read_metadata().state_dict_metadata.items()
        if "/" in name
    }
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in wanted:
            raise ValueError(f"it holds {name}, which this run does not train so")
        if saved.get(name) != wanted[name]:
            raise ValueError(
                f"{name} of shape {wanted[name]} was expected, "
                + (f"shape {saved[name]} is there" if name in saved else "nothing is there")
            )
    if tensors:
        try:
            with warnings.catch_warnings():
                # one process
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as failed:
            rank, (error, _) = min(failed.failures.items())
            raise OSError(f"rank {rank}: {error}") from failed


class Copies(dcp.DefaultSavePlanner):
    """Plans by the tensors that are given to `dcp.save`, and writes copies of this rank's pieces of them:
    the tensors themselves go on changing."""

    def __init__(self, copies: dict[str, Tensor]):
        # or which rank writes what all have would be left to Python's hashes, and files would differ from run
        # to run
        super().__init__(dedup_save_to_lowest_rank=True)
        self.copies = copies

    def resolve_data(self, write_item) -> Tensor:
        return self.copies[write_item.index.fqn]


class Parts(StorageWriter):
    """Calls `begin` on rank 0, then on every rank `part` with the file of its pieces, then on rank 0
    `finish` with what the parts returned."""

    def __init__(
        self,
        begin: Callable[[], None],
        part: Callable[[dict[str, Tensor], dict[str, str]], object],
        finish: Callable[[list], None],
    ):
        self.begin, self.part, self.all_written = begin, part, finish

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
            # one entry: safetensors writes several in any order
            done.set_result(self.part(mine, {WHERE: json.dumps(where)}))
        except SafetensorError as error:
            # which can't be sent to the other ranks
            raise OSError(str(error)) from error
        return done

    def finish(self, metadata, results: list) -> None:
        self.all_written(results)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True
