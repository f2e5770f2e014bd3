"""How ranks join, without starting any."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from grpo.parallel import ranks
from grpo.parallel.ranks import join_ranks, leave_ranks


@pytest.fixture
def joined(monkeypatch):
    """join_ranks as rank 2 of 4, the second of its machine -> the arguments of init_process_group. gpu:
    whether PyTorch sees one."""

    def join(gpu: bool, device: str = "auto") -> dict:
        found = {}
        for name, value in (("RANK", 2), ("WORLD_SIZE", 4), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        store = SimpleNamespace(wait=lambda names: None)
        monkeypatch.setattr(ranks, "_fresh_store", lambda timeout: store)
        monkeypatch.setattr(ranks, "RollCall", lambda *_: SimpleNamespace(arrive=lambda place: None))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "set_device", lambda number: found.update(set_device=number))
        monkeypatch.setattr(torch, "set_num_threads", lambda count: found.update(threads=count))
        start = lambda backend, **how: found.update(backend=backend, **how)
        monkeypatch.setattr(dist, "init_process_group", start)
        found["ranks"] = join_ranks(device)
        return found

    yield join
    leave_ranks()


def test_on_gpus_the_process_group_knows_its_device(joined):
    """Without it NCCL connects late, and a barrier guesses the device from the rank."""
    found = joined(gpu=True)
    assert found["device_id"] == found["ranks"].device == torch.device("cuda", 1) and found["set_device"] == 1
    assert found["backend"] == "cpu:gloo,cuda:nccl" and (found["rank"], found["world_size"]) == (2, 4)


@pytest.mark.parametrize("gpu, device", [(False, "auto"), (True, "cpu")])
def test_on_cpus_it_needs_none(joined, gpu, device):
    found = joined(gpu, device)
    assert found["backend"] == "gloo" and found["device_id"] is None and "set_device" not in found
    assert found["ranks"].device == torch.device("cpu")
