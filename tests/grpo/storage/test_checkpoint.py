"""Checkpoints: complete or invisible, and complete means bit for bit."""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small import small_folder, small_policy, small_prompts

from data.chat import Chat
from grpo.batch import collate_prompts
from grpo.optim import OPTIMIZERS, Optimizer
from grpo.run.setup import matrices_in_bfloat16
from grpo.storage import checkpoint
from grpo.storage.checkpoint import CheckpointError, complete, damage, load_optimizer, newest
from grpo.storage.model_folder import model_folder
from models import weights


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("base"))


def made(policy, name="adamw"):
    return Optimizer(policy, name=name, lr=1e-2, beta2=0.99, weight_decay=0.1)


def train(policy, optimizer, steps, first=0):
    """Steps with gradients that depend on the step alone."""
    for step in range(first, first + steps):
        random = torch.Generator().manual_seed(step)
        for p in policy.parameters():
            p.grad = torch.randn(p.shape, generator=random).to(p.dtype)
        optimizer.step()


@pytest.fixture
def trained():
    policy = small_policy()
    optimizer = made(policy)
    train(policy, optimizer, 2)
    return policy, optimizer


def save(folder, step, trained, base, keep=0):
    return checkpoint.save(folder, step, *trained, base=base, keep=keep)


# ---- there and back


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_going_on_from_a_checkpoint_is_going_on(tmp_path, base, name):
    """2 steps, save, load, 2 steps = 4 steps: every weight and every number the optimizer remembers, bit
    for bit."""
    begun = matrices_in_bfloat16 if name == "adamw_bf16" else lambda policy: policy
    straight = begun(small_policy())
    optimizer = made(straight, name)
    train(straight, optimizer, 4)

    policy = begun(small_policy())
    first = made(policy, name)
    train(policy, first, 2)
    folder = save(tmp_path, 2, (policy, first), base)
    again = begun(weights.load(folder))
    second = made(again, name)
    assert load_optimizer(folder, again, second) == 2
    train(again, second, 2, first=2)
    for (key, a), b in zip(straight.named_parameters(), again.parameters()):
        assert torch.equal(a, b), key
        state, other = optimizer.state(a), second.state(b)
        assert state and state.keys() == other.keys()
        assert all(torch.equal(state[k], other[k]) and state[k].dtype == other[k].dtype for k in state), key


def test_a_checkpoint_does_not_need_its_files_any_more(tmp_path, base, trained):
    """The newest one is pruned while the run that loaded it goes on."""
    folder = save(tmp_path, 2, trained, base)
    policy = weights.load(folder)
    optimizer = made(policy)
    load_optimizer(folder, policy, optimizer)
    for path in folder.iterdir():
        path.write_bytes(b"\0" * path.stat().st_size)
    train(policy, optimizer, 1, first=2)
    train(*trained, 1, first=2)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), trained[0].parameters()))


def test_what_a_checkpoint_holds(tmp_path, base, trained):
    folder = save(tmp_path, 50, trained, base)
    assert folder == tmp_path / "checkpoints" / "step_000050"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "optimizer.safetensors",
        "state.json",
    }
    assert (folder / "generation_config.json").read_text() == (base / "generation_config.json").read_text()
    assert not list(folder.parent.glob("*.tmp"))
    Chat(folder, template="shapes")


def test_a_checkpoint_loads_in_transformers(tmp_path, base, trained):
    """As it is: model, tokenizer, the same logits."""
    import transformers

    folder = save(tmp_path, 1, trained, base)
    theirs, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    chat, (prompt,) = Chat(folder, template="shapes"), small_prompts(folder, [0])
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        words.encode("look : red star") == chat.encode("look : red star")
        and words.eos_token == "<|endoftext|>"
    )
    ours = weights.load(folder)
    completion = torch.tensor([[chat.encode("look : red star")]])
    ids = torch.cat((torch.as_tensor(prompt.tokens), completion[0, 0]))[None]
    with torch.no_grad():
        mine = ours.logits(ours(collate_prompts([prompt], image_token=chat.image_token), completion))[0, 0]
        logits = theirs(
            input_ids=ids,
            mm_token_type_ids=(ids == chat.image_token).int(),
            pixel_values=torch.as_tensor(prompt.patches),
            image_grid_thw=torch.as_tensor(prompt.grid),
        ).logits[0, len(prompt.tokens) - 1 : -1]
    real = [t for t in range(mine.shape[-1]) if t not in ours.config.placeholder_ids]
    torch.testing.assert_close(mine[:, real], logits[:, real], atol=1e-5, rtol=1e-5)


# ---- complete or invisible


class Killed(BaseException):
    """What a kill is to Python: nothing catches it and nothing cleans up."""


WRITES = [
    (checkpoint.weights, "save", 1),
    (checkpoint.shutil, "copyfile", 1),
    (checkpoint.shutil, "copyfile", 4),
    (checkpoint, "save_file", 1),
    (checkpoint.json, "dumps", 1),
    (checkpoint, "checksum", 1),
    (checkpoint, "flush", 1),
    (checkpoint, "flush", 8),
    (checkpoint, "damage", 1),
    (checkpoint.os, "replace", 1),
]


@pytest.mark.parametrize(
    "error",
    [Killed(), OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=["killed", "full", "full for safetensors"],
)
@pytest.mark.parametrize("place, name, call", WRITES, ids=[f"{name}-{call}" for _, name, call in WRITES])
def test_whenever_it_ends_the_previous_one_is_usable(
    tmp_path, base, trained, monkeypatch, place, name, call, error
):
    before = save(tmp_path, 1, trained, base)
    content = {path.name: path.read_bytes() for path in before.iterdir()}
    policy, optimizer = trained
    train(policy, optimizer, 1, first=2)
    real, calls = getattr(place, name), []

    def ending(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, ending)
        with pytest.raises(Killed if isinstance(error, Killed) else CheckpointError) as raised:
            save(tmp_path, 2, trained, base, keep=1)
    if not isinstance(error, Killed):
        assert (
            "step 2" in str(raised.value)
            and "step_000002" in str(raised.value)
            and "No space left" in str(raised.value)
        )
        # and what it wrote is given back
        assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    assert complete(tmp_path) == [before]
    assert {path.name: path.read_bytes() for path in before.iterdir()} == content
    # the next try takes no notice of what was left
    after = save(tmp_path, 2, trained, base, keep=1)
    assert complete(tmp_path) == [after] and not list(after.parent.glob("*.tmp"))
    again = weights.load(after)
    assert load_optimizer(after, again, made(again)) == 2
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), policy.parameters()))


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, base, trained, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(checkpoint.weights, "save", lambda *args: pytest.fail("wrote"))
    with pytest.raises(CheckpointError, match=r"step 3 .* MB are needed, 0\.0 MB are free.*out=DIR"):
        save(tmp_path, 3, trained, base)
    assert complete(tmp_path) == []


def test_as_much_space_is_asked_for_as_is_written(tmp_path, base, trained, monkeypatch):
    """With what a checkpoint took and a little more it is written, with a little less it is not; the one
    before is in neither sum."""
    before = save(tmp_path, 1, trained, base)
    took, usage = sum(path.stat().st_size for path in before.iterdir()), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=took - 1))
    with pytest.raises(
        CheckpointError, match=rf"step 2 .* [\d.]+ MB are needed, {(took - 1) / 1e6:.1f} MB are free"
    ):
        save(tmp_path, 2, trained, base, keep=1)
    assert newest(tmp_path) == (before, "")
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=took + checkpoint.HEADERS)
    )
    assert complete(tmp_path) != [save(tmp_path, 2, trained, base)]


def test_a_disk_that_forgets_is_noticed_before_the_old_one_goes(tmp_path, base, trained, monkeypatch):
    """What was written is read back; only then is it a checkpoint, and only then are older ones removed."""
    before, real = save(tmp_path, 1, trained, base), checkpoint.flush

    def forgetful(path):
        real(path)
        if path.name == "model.safetensors":
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(checkpoint, "flush", forgetful)
    with pytest.raises(
        CheckpointError, match="step 2 .*does not give back what was written: model.safetensors"
    ):
        save(tmp_path, 2, trained, base, keep=1)
    assert newest(tmp_path) == (before, "") and list(before.parent.iterdir()) == [before]


def test_a_file_that_may_not_grow(tmp_path, base, trained):
    """The kernel itself refuses, as on a full disk: whichever way safetensors writes, it is one
    CheckpointError."""
    resource = pytest.importorskip("resource")
    before = save(tmp_path, 1, trained, base)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="step_000002"):
            save(tmp_path, 2, trained, base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert complete(tmp_path) == [before] and not list(before.parent.glob("*.tmp"))


def test_a_folder_where_nothing_can_be_written(tmp_path, base, trained):
    (tmp_path / "checkpoints").write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match="checkpoints"):
        save(tmp_path, 1, trained, base)


@pytest.mark.parametrize("keep, left", [(1, [4]), (2, [3, 4]), (0, [1, 2, 3, 4]), (9, [1, 2, 3, 4])])
def test_only_the_newest_are_kept(tmp_path, base, trained, keep, left):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, trained, base, keep)
    assert [path.name for path in complete(tmp_path)] == [f"step_{step:06d}" for step in left]
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


def test_a_removal_that_was_killed_is_finished_later(tmp_path, base, trained, monkeypatch):
    save(tmp_path, 1, trained, base)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", lambda path, **how: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            save(tmp_path, 2, trained, base, keep=1)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step_000001.old.tmp",
        "step_000002",
    ]
    found, line = newest(tmp_path)
    assert found.name == "step_000002" and not line
    checkpoint.prune(found, keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [found]


def test_a_damaged_newer_one_does_not_push_out_the_good_ones(tmp_path, base, trained):
    """Step 7 is damaged, the run went on from 2 and saves 4: with keep=1 it is 4 that stays."""
    for step in (2, 7):
        truncated(save(tmp_path, step, trained, base) / "model.safetensors") if step == 7 else save(
            tmp_path, step, trained, base
        )
    after = save(tmp_path, 4, trained, base, keep=1)
    assert [path.name for path in complete(tmp_path)] == ["step_000004", "step_000007"]
    assert newest(tmp_path)[0] == after and "step_000007/model.safetensors" in newest(tmp_path)[1]
    last = save(tmp_path, 7, trained, base, keep=1)
    assert complete(tmp_path) == [last] and newest(tmp_path) == (last, "")


def test_saving_a_step_again(tmp_path, base, trained):
    save(tmp_path, 1, trained, base)
    train(*trained, 1, first=2)
    again = weights.load(save(tmp_path, 1, trained, base))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trained[0].parameters()))


# ---- damage


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def without_a_tensor(path):
    tensors = load_file(path)
    save_file(
        {key: value for key, value in tensors.items() if not key.startswith("model.norm.weight/")}, path
    )


def with_another_tensor(path):
    save_file(load_file(path) | {"model.layers.99.weight/exp_avg": torch.zeros(7)}, path)


def of_another_shape(path):
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight/exp_avg": torch.zeros(7)}, path)


DAMAGE = {
    "optimizer.safetensors": [
        truncated,
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        without_a_tensor,
        with_another_tensor,
        of_another_shape,
    ],
    "state.json": [
        lambda path: path.write_text('{"step": null}'),
        lambda path: path.write_text(""),
        lambda path: path.write_text("{}"),
        lambda path: path.write_text("[1]"),
        lambda path: path.write_text('{"step": "two"}'),
        lambda path: path.write_text('{"step"'),
    ],
}


@pytest.mark.parametrize("name, damage", [(name, d) for name, damages in DAMAGE.items() for d in damages])
def test_damage_names_the_folder_and_what_to_do(tmp_path, base, trained, name, damage):
    folder = save(tmp_path, 2, trained, base)
    damage(folder / name)
    policy = small_policy()
    with pytest.raises(CheckpointError, match=r"step_000002.*remove that folder"):
        load_optimizer(folder, policy, made(policy))
    assert checkpoint.damage(folder).startswith(name)


def flipped(path):
    """One bit, in the middle: of a weight, say. Everything still loads."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        truncated,
        flipped,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b" "),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "flipped", "empty", "longer", "gone"],
)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "optimizer.safetensors",
        "state.json",
    ],
)
def test_the_newest_undamaged_one_is_taken(tmp_path, base, trained, name, harm):
    first, second = (save(tmp_path, step, trained, base) for step in (1, 2))
    assert newest(tmp_path) == (second, "")
    before = (second / name).read_bytes()
    harm(second / name)
    if name == "state.json" and (second / name).exists() and (second / name).read_bytes() == before + b" ":
        # a space after the JSON: it says the same
        assert newest(tmp_path) == (second, "")
        return
    found, line = newest(tmp_path)
    assert found == first and line.count("\n") == 0
    assert line.startswith(f"damaged: {second / name}") and line.endswith(
        "Going on from step_000001, the newest that is as it was written"
    )


def test_when_all_are_damaged_each_is_named(tmp_path, base, trained):
    for step, name in ((1, "model.safetensors"), (2, "state.json")):
        (save(tmp_path, step, trained, base) / name).unlink()
    found, line = newest(tmp_path)
    assert found is None and line.count("\n") == 0
    assert (
        "step_000001/model.safetensors is missing" in line
        and "step_000002/state.json is missing" in line
        and f"remove {tmp_path / 'checkpoints'}" in line
    )
    assert newest(tmp_path / "nowhere") == (None, "")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"step": 3},
        lambda state: state | {"files": {}},
        lambda state: {"step": state["step"], "files": state["files"]},
        lambda state: state | {"more": 1},
        lambda state: [state],
    ],
)
def test_what_state_json_says_is_checked_too(tmp_path, base, trained, change):
    """A step of 3 instead of 2 would go on with other questions and other random numbers, unnoticed."""
    file = save(tmp_path, 2, trained, base) / "state.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert damage(file.parent).startswith("state.json: ")


def test_files_of_another_checkpoint_are_damage(tmp_path, base, trained):
    first = save(tmp_path, 1, trained, base)
    train(*trained, 1, first=2)
    second = save(tmp_path, 2, trained, base)
    shutil.copyfile(first / "optimizer.safetensors", second / "optimizer.safetensors")
    assert damage(second) == "optimizer.safetensors has other content than was written"
    # an evaluation does not need it
    assert damage(second, lambda name: name != "optimizer.safetensors") == ""
    (second / "notes.txt").write_text("mine")
    shutil.copyfile(first / "state.json", second / "state.json")
    assert damage(second).startswith("model.safetensors")


def test_a_checkpoint_from_before_there_were_checksums(tmp_path, base, trained):
    folder = save(tmp_path, 2, trained, base)
    (folder / "state.json").write_text('{"step": 2}\n')
    assert newest(tmp_path) == (folder, "")


def test_a_model_is_not_taken_from_a_damaged_checkpoint(tmp_path, base, trained, capsys):
    first, second = (save(tmp_path, step, trained, base) for step in (1, 2))
    truncated(second / "optimizer.safetensors")
    # nothing reads that
    assert model_folder(str(tmp_path)) == model_folder(str(second)) == second and not capsys.readouterr().err
    flipped(second / "model.safetensors")
    assert (
        model_folder(str(tmp_path)) == first
        and "step_000002/model.safetensors has other content" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match=r"damaged: .*step_000002/model.safetensors.*state\.json"):
        model_folder(str(second))
    (second / "state.json").unlink()
    assert model_folder(str(second)) == second
    flipped(first / "model.safetensors")
    with pytest.raises(ValueError, match="No checkpoint is left"):
        model_folder(str(tmp_path))


def test_the_state_of_another_optimizer(tmp_path, base, trained):
    """Muon remembers one tensor where AdamW remembers three: not to be mistaken for one another."""
    folder = save(tmp_path, 2, trained, base)
    policy = small_policy()
    with pytest.raises(CheckpointError, match="step_000002"):
        load_optimizer(folder, policy, made(policy, "muon"))


def test_incomplete_folders_are_no_checkpoints(tmp_path, base, trained):
    folder = save(tmp_path, 3, trained, base)
    (folder.parent / "step_000007.tmp").mkdir()
    # the renaming brings the files along: here someone has removed them
    (folder.parent / "step_000008").mkdir()
    (folder.parent / "step_000009").write_text("mine")
    (folder.parent / "notes.txt").write_text("mine")
    assert complete(tmp_path) == [folder]
    found, line = newest(tmp_path)
    assert found == folder and "step_000008/state.json is missing" in line
    assert complete(tmp_path / "nowhere") == []


def test_before_the_first_step_there_is_nothing_to_remember(tmp_path, base):
    policy = small_policy()
    folder = save(tmp_path, 0, (policy, made(policy)), base)
    assert load_optimizer(folder, policy, made(policy)) == 0
    assert json.loads((folder / "state.json").read_text())["step"] == 0 and newest(tmp_path) == (folder, "")
