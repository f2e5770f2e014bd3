"""Checkpoints of several ranks: each writes its part, any number of ranks reads it bit for bit, and
nothing is visible before all of it is on the disk."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import together
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small import small_folder, small_policy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from grpo.optim import Optimizer
from grpo.parallel import ranks
from grpo.run.setup import matrices_in_bfloat16
from grpo.storage import checkpoint
from grpo.storage.background import Background
from grpo.storage.checkpoint import CheckpointError, complete, load_optimizer, newest
from grpo.storage.model_folder import model_folder
from models import weights

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")
# bytes of a file of weights, so that there are several
SMALL = 60_000


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("base"))


def made(policy, name="adamw"):
    return Optimizer(policy, name=name, lr=1e-2, beta2=0.99, weight_decay=0.1)


def sharded(policy, name="adamw"):
    """FSDP2 over all ranks, if there are several, with the vectors whole on each; and an optimizer for it."""
    if dist.is_initialized():
        fully_shard(
            policy,
            mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
            ignored_params={p for p in policy.parameters() if p.dim() < 2},
        )
    return policy, made(policy, name)


def train(policy, optimizer, first, last):
    """Steps whose gradients depend on the step alone. On shards of other sizes they come out the same to
    rounding: at its end a vectorised AdamW adds up in another order."""
    for step in range(first, last):
        random = torch.Generator().manual_seed(step)
        for p in policy.parameters():
            gradient = torch.randn(p.shape, generator=random).to(p.dtype)
            p.grad = (
                distribute_tensor(gradient, p.device_mesh, p.placements)
                if isinstance(p, DTensor)
                else gradient
            )
        optimizer.step()


def trained(steps, name="adamw"):
    policy, optimizer = sharded(small_policy(), name)
    train(policy, optimizer, 0, steps)
    return policy, optimizer


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def everything(policy, optimizer):
    """Every number of weights and optimizer."""
    found = {name: whole(p).detach().clone() for name, p in policy.named_parameters()}
    return found | {
        f"{name}/{key}": whole(value)
        for name, p in policy.named_parameters()
        for key, value in optimizer.state(p).items()
    }


def same(a, b):
    assert a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


def save(folder, step, pair, base, keep=0, background=None):
    return checkpoint.save(folder, step, *pair, base=base, keep=keep, background=background)


def saved_by(count, folder, base, *steps):
    """Checkpoints of these steps, by `count` ranks."""

    def work(rank):
        policy, optimizer = sharded(small_policy())
        for before, step in zip((0, *steps), steps):
            train(policy, optimizer, before, step)
            save(folder, step, (policy, optimizer), base)
            held = everything(policy, optimizer)
            if rank == 0:
                save_file(held, folder / f"held_{step}")

    assert (together(count, work) if count > 1 else [work(0) or ""]) == [""] * count
    return complete(folder)


@pytest.fixture
def small_files(monkeypatch):
    """Weights in several files, for several ranks to write."""
    for function in (weights.file_layout, weights.save, weights.rank_copy):
        how = dict(function.__kwdefaults__ or {}, max_shard_bytes=SMALL) if function.__kwdefaults__ else None
        monkeypatch.setattr(function, *(("__kwdefaults__", how) if how else ("__defaults__", (SMALL,))))


# ---- there and back


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_any_number_of_ranks_wrote_any_number_reads(tmp_path, base, small_files, count):
    """Weights, optimizer, step, bit for bit; and 2 steps more are 4 steps on one. Three ranks have uneven
    shards."""
    (folder,) = saved_by(count, tmp_path, base, 2)
    held, end = load_file(tmp_path / "held_2"), everything(*trained(4))

    def work(rank):
        policy, optimizer = sharded(weights.load(folder))
        assert load_optimizer(folder, policy, optimizer) == 2
        same(everything(policy, optimizer), held)
        train(policy, optimizer, 2, 4)
        for key, value in everything(policy, optimizer).items():
            # a step is 1e-2 large
            torch.testing.assert_close(value, end[key], rtol=1e-5, atol=1e-6)

    work(0)
    for others in (2, 4):
        assert together(others, work) == [""] * others


def test_small_states_are_sharded_by_rows_and_rounded_alike_on_any_number_of_ranks(tmp_path, base):
    """Moments of one byte and bfloat16 weights: two ranks write, and one and three read the same; then they
    go on as one would have, but for roundings in the last elements of a vector (see `train`)."""
    begin = lambda policy: sharded(matrices_in_bfloat16(policy), "adamw_bf16")

    def work(rank):
        policy, optimizer = begin(small_policy())
        train(policy, optimizer, 0, 2)
        folder = save(tmp_path, 2, (policy, optimizer), base)
        held = everything(policy, optimizer)
        if rank == 0:
            save_file(held, folder / "held")

    def read(rank):
        policy, optimizer = begin(weights.load(folder))
        assert load_optimizer(folder, policy, optimizer) == 2
        same(everything(policy, optimizer), held)
        train(policy, optimizer, 2, 4)
        for key, value in everything(policy, optimizer).items():
            assert (value != end[key]).sum() <= 1e-3 * value.numel(), key

    assert together(2, work) == ["", ""]
    (folder,) = complete(tmp_path)
    held = load_file(folder / "held")
    alone = begin(small_policy())
    train(*alone, 0, 4)
    end = everything(*alone)
    read(0)
    assert together(3, read) == [""] * 3


def test_the_folder_is_the_one_of_one_rank_but_for_the_optimizers_pieces(tmp_path, base, small_files):
    """The files of weights are equal to the byte, so a program that reads a Hugging Face folder reads this
    one."""
    alone = save(tmp_path / "one", 2, trained(2), base)

    def work(rank):
        policy, optimizer = sharded(weights.load(alone))
        load_optimizer(alone, policy, optimizer)
        shares = ranks.gather_objects(
            [
                {
                    name
                    for name, p in weights.rank_copy(
                        policy, rank, 2, lambda name, whole: whole
                    ).named_parameters()
                    if not p.is_meta
                }
            ]
        )
        assert (
            all(shares)
            and not shares[0] & shares[1]
            and shares[0] | shares[1] == {name for name, _ in policy.named_parameters()}
        )
        save(tmp_path / "two", 2, (policy, optimizer), base)

    assert together(2, work) == ["", ""]
    (both,) = complete(tmp_path / "two")
    names = {path.name for path in both.iterdir()}
    assert names - {path.name for path in alone.iterdir()} == {
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
    }
    assert {path.name for path in alone.iterdir()} - names == {
        "optimizer.safetensors"
    } and "model-00003-of-00003.safetensors" in names
    for name in names:
        if name != "state.json" and not name.startswith("optimizer"):
            assert (both / name).read_bytes() == (alone / name).read_bytes(), name
    assert json.loads((both / "state.json").read_text())["files"].keys() == names - {"state.json"}
    pieces = [load_file(both / f"optimizer-0000{n}-of-00002.safetensors") for n in (1, 2)]
    key = "model.embed_tokens.weight/exp_avg"
    assert torch.equal(
        torch.cat([piece[key] for piece in pieces]), load_file(alone / "optimizer.safetensors")[key]
    )
    for key in ("model.embed_tokens.weight/step", "model.norm.weight/exp_avg"):
        # what all ranks have whole is written once
        assert sum(key in piece for piece in pieces) == 1


def test_it_opens_as_a_model(tmp_path, base, small_files):
    import transformers

    (folder,) = saved_by(2, tmp_path, base, 1)
    assert model_folder(str(tmp_path)) == model_folder(str(folder)) == folder
    held = load_file(tmp_path / "held_1")
    assert all(torch.equal(p, held[name]) for name, p in weights.load(folder).named_parameters())
    _theirs, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_moments_of_muon(tmp_path, base):
    """They have no gradient of ranks in them here; what matters is that one tensor is not taken for three."""
    folder = save(tmp_path, 2, trained(2, "muon"), base)

    def work(rank):
        policy = weights.load(folder)
        optimizer = made(policy, "muon")
        assert load_optimizer(folder, policy, optimizer) == 2
        same(everything(policy, optimizer), everything(*_unsharded(2, "muon")))
        with pytest.raises(CheckpointError, match="step_000002"):
            load_optimizer(folder, *sharded(weights.load(folder)))

    assert together(2, work) == ["", ""]


def _unsharded(steps, name):
    policy = small_policy()
    optimizer = made(policy, name)
    train(policy, optimizer, 0, steps)
    return policy, optimizer


# ---- damage


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("two")
    saved_by(2, folder, base, 1, 2)
    return folder


@pytest.mark.parametrize("harm", [cut, flipped, Path.unlink], ids=["cut", "flipped", "gone"])
@pytest.mark.parametrize(
    "name",
    [
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
        "model.safetensors",
        "state.json",
    ],
)
def test_damage_is_named_and_the_one_before_used(two_saved, tmp_path, name, harm):
    folder = Path(shutil.copytree(two_saved, tmp_path / "run"))
    first, second = complete(folder)
    harm(second / name)
    found, line = newest(folder)
    assert (
        found == first
        and line.startswith(f"damaged: {second / name}")
        and line.endswith("Going on from step_000001, the newest that is as it was written")
    )
    policy = small_policy()
    # the same without checksums
    if name.startswith("optimizer") and harm is not flipped:
        with pytest.raises(CheckpointError, match="step_000002.*remove that folder"):
            load_optimizer(second, policy, made(policy))


# ---- complete or invisible

WRITES = [
    (1, checkpoint, "save_file"),
    (1, checkpoint, "flush"),
    (1, checkpoint, "checksum"),
    (0, checkpoint.weights, "save"),
    (0, checkpoint, "write_state"),
    (0, checkpoint.os, "replace"),
    (0, checkpoint.shutil, "disk_usage"),
]
FULL = "No space left on device"


@pytest.mark.parametrize("background", [False, True], ids=["", "in the background"])
def test_an_error_on_one_rank_is_raised_on_all_and_nothing_is_left(
    two_saved, tmp_path, base, monkeypatch, background
):
    """Whichever rank it was, and wherever in a save; the next save is as if nothing had happened."""
    folder = Path(shutil.copytree(two_saved, tmp_path / "run"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def work(rank):
        pair, aside = trained(3), Background() if background else None
        for bad, place, name in WRITES:
            with monkeypatch.context() as patched:
                if rank == bad:
                    patched.setattr(
                        place,
                        name,
                        lambda *args, **how: (_ for _ in ()).throw(
                            SafetensorError(FULL) if name == "save_file" else OSError(28, FULL)
                        ),
                    )
                with pytest.raises(
                    CheckpointError, match=rf"step 3 .*rank {bad}: .*No space left on device.*out=DIR"
                ):
                    save(folder, 3, pair, base, background=aside)
                    aside.wait()
            dist.barrier()
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, name
            dist.barrier()
        save(folder, 3, pair, base, background=aside)
        if aside:
            aside.wait()
        assert [path.name for path in complete(folder)] == [
            "step_000001",
            "step_000002",
            "step_000003",
        ] and newest(folder)[1] == ""

    assert together(2, work) == ["", ""]


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_dies_within_a_save_leaves_nothing_visible(two_saved, tmp_path, base, who):
    folder = Path(shutil.copytree(two_saved, tmp_path / "run"))

    def work(rank):
        pair = trained(3)
        if rank == who:
            checkpoint.flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(CheckpointError, match="step 3 .*the ranks could not agree"):
            save(folder, 3, pair, base)

    said = together(2, work)
    assert said[who] == "killed" and said[1 - who] == "", said
    assert newest(folder) == (folder / "checkpoints" / "step_000002", "")
    # what it left disturbs nothing
    saved_by(2, folder, base, 3)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step_000001",
        "step_000002",
        "step_000003",
    ]


def test_ranks_that_do_not_share_a_disk_are_told(tmp_path, base):
    def work(rank):
        with pytest.raises(CheckpointError, match="rank 1: .*on a file system that all ranks share"):
            save(tmp_path / str(rank), 1, trained(1), base)

    assert together(2, work) == ["", ""] and complete(tmp_path / "0") == []


def test_space_is_asked_for_all_ranks_together(two_saved, tmp_path, base, monkeypatch):
    """With what such a checkpoint took and a little more it is written, with a little less it is not."""
    took, usage = (
        sum(path.stat().st_size for path in complete(two_saved)[0].iterdir()),
        shutil.disk_usage(tmp_path),
    )

    def work(rank):
        pair = trained(1)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=took - 1))
        with pytest.raises(CheckpointError, match=r"MB are needed"):
            save(tmp_path, 1, pair, base)
        monkeypatch.setattr(
            checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=took + 2 * checkpoint.HEADERS)
        )
        save(tmp_path, 1, pair, base)

    assert together(2, work) == ["", ""] and len(complete(tmp_path)) == 1
