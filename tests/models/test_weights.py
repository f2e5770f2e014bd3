"""Weights: transformers loads what we save, we load what it saves, and a folder that does not fit is
refused, file and tensor named."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import ARCHITECTURES, TWINS, completions_for, prompt_batch, tiny_config, tiny_policy, twin_inputs

from models import weights
from models.config import ModelConfig, VisionConfig

CASES = [(architecture, tied) for architecture in ARCHITECTURES for tied in (True, False)]


@pytest.fixture(scope="module")
def rows():
    prompts = prompt_batch([[(1, 4, 6)]])
    return prompts, *completions_for(prompts, 1, 5)


@pytest.fixture
def folder(tmp_path):
    """A saved policy in one file."""
    weights.save(tiny_policy(), tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def sharded(tmp_path):
    """A saved policy in many small files."""
    weights.save(tiny_policy(), tmp_path / "policy", max_shard_bytes=20_000)
    return tmp_path / "policy"


def same(one, other):
    pairs = list(zip(one.named_parameters(), other.named_parameters(), strict=True))
    return one.config == other.config and all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def rewrite(file, change):
    """Load a safetensors file, let `change` edit the dictionary, write it back."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("architecture, tied", CASES)
@pytest.mark.parametrize("shard", [5e9, 20_000], ids=["single", "sharded"])
def test_round_trip_bit_for_bit(architecture, tied, shard, tmp_path):
    policy = tiny_policy(architecture, tied)
    weights.save(policy, tmp_path, max_shard_bytes=shard)
    assert (
        (tmp_path / weights.INDEX).exists()
        == (shard < 5e9)
        == (len(list(tmp_path.glob("*.safetensors"))) > 1)
    )
    again = weights.load(tmp_path)
    assert same(policy, again)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in again.parameters())


@pytest.mark.parametrize("architecture, tied", CASES)
@torch.no_grad()
def test_transformers_reads_ours_and_we_read_its(architecture, tied, tmp_path, rows):
    policy, (prompts, completions, _) = tiny_policy(architecture, tied), rows
    weights.save(policy, tmp_path / "ours", max_shard_bytes=50_000)
    twin = TWINS[architecture].from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert twin.dtype == torch.float32
    logits = twin(**twin_inputs(prompts, 0, completions[0, 0])).logits[0, prompts.length[0] - 1 : -1]
    torch.testing.assert_close(
        policy.logits(policy(prompts, completions))[0, 0, :, 7:], logits[:, 7:], atol=1e-5, rtol=1e-5
    )
    twin.save_pretrained(tmp_path / "theirs")
    twin.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert (tmp_path / "shards" / weights.INDEX).exists()
    for theirs in ("theirs", "shards"):
        assert same(policy, weights.load(tmp_path / theirs))


def test_names_in_memory_of_transformers_are_accepted(folder):
    policy = weights.load(folder)

    def rename(tensors):
        for key in list(tensors):
            theirs = (
                "model." + key
                if key.startswith("visual.")
                else key.replace("model.", "model.language_model.", 1)
            )
            tensors[theirs] = tensors.pop(key)

    rewrite(folder / weights.SINGLE, rename)
    assert same(policy, weights.load(folder))


def test_dtype_of_the_file_and_of_the_policy(tmp_path):
    policy = tiny_policy().bfloat16()
    weights.save(policy, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in weights.load(tmp_path).parameters()} == {torch.float32}
    assert same(policy, weights.load(tmp_path, dtype=torch.bfloat16))


def test_loaded_weights_do_not_depend_on_the_file(folder):
    """Not memory-mapped: a checkpoint may overwrite the folder that training started from."""
    policy, file = weights.load(folder), folder / weights.SINGLE
    file.write_bytes(b"\0" * file.stat().st_size)
    assert same(policy, tiny_policy())


def test_a_tied_head_is_written_once_and_accepted_twice(folder):
    tensors = load_file(folder / weights.SINGLE)
    assert weights.HEAD not in tensors
    rewrite(folder / weights.SINGLE, lambda t: t.update({weights.HEAD: t[weights.EMBEDDING].clone()}))
    assert same(weights.load(folder), tiny_policy())
    rewrite(folder / weights.SINGLE, lambda t: t[weights.HEAD].add_(1))
    with pytest.raises(
        ValueError, match=r"model\.safetensors: 'lm_head.weight' differs from 'model.embed_tokens.weight'"
    ):
        weights.load(folder)


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda t: t.pop("model.norm.weight"), "1 tensors are missing, first 'model.norm.weight'"),
        (lambda t: t.update(surplus=torch.zeros(1)), r"model\.safetensors: unexpected tensor 'surplus'"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(65)}),
            r"'model.norm.weight' has shape \(65,\), config.json asks for \(64,\)",
        ),
        (
            lambda t: t.update({"model.language_model.norm.weight": torch.ones(64)}),
            r"'model.(language_model.)?norm.weight' is also in",
        ),
    ],
)
def test_tensors_that_do_not_fit(folder, change, why):
    rewrite(folder / weights.SINGLE, change)
    with pytest.raises(ValueError, match=why):
        weights.load(folder)


def test_more_layers_in_the_file_than_in_the_config(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"unexpected tensor 'model.layers.2\..*of 2 layers"):
        weights.load(folder)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated_file(folder, cut):
    file = folder / weights.SINGLE
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or truncated"):
        weights.load(folder)


def test_missing_and_truncated_shards(sharded):
    where = json.loads((sharded / weights.INDEX).read_text())["weight_map"]
    shard = sharded / where["model.norm.weight"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=rf"{shard.name}: damaged or truncated"):
        weights.load(sharded)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}: this shard is missing; it should hold"):
        weights.load(sharded)


def test_a_shard_without_a_tensor_of_the_index(sharded):
    where = json.loads((sharded / weights.INDEX).read_text())["weight_map"]
    shard = sharded / where["model.norm.weight"]
    rewrite(shard, lambda t: (t.pop("model.norm.weight"), t.update(other=torch.zeros(1))))
    with pytest.raises(ValueError, match=rf"{shard.name}: tensor 'model.norm.weight' is missing"):
        weights.load(sharded)


def test_folders_without_weights(folder):
    (folder / weights.SINGLE).unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor model.safetensors.index.json"):
        weights.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="no such file"):
        weights.load(folder)


# ---- two sets of weights, and tensors that are no weights


def transformers_reads(folder):
    """The sum over all parameters of the policy that transformers loads."""
    twin = TWINS["qwen2_vl"].from_pretrained(folder, dtype=torch.float32)
    return sum(float(parameter.detach().double().abs().sum()) for parameter in twin.parameters())


def we_read(folder):
    return sum(float(p.detach().double().abs().sum()) for p in weights.load(folder).parameters())


def test_a_single_file_and_shards_are_refused(folder):
    """Saved in shards, and later in one file, or the other way round: nothing tells which is newer."""
    weights.save(tiny_policy(seed=5), folder, max_shard_bytes=20_000)
    with pytest.raises(ValueError, match=r"both model\.safetensors and the shards of .*index\.json") as error:
        weights.load(folder)
    assert str(folder) in str(error.value)


def test_an_index_that_was_left_behind(folder, tmp_path):
    """Beside a single file, an index without its shards is no second set, nor one that names that file."""
    alone = transformers_reads(folder)
    keys = load_file(folder / weights.SINGLE)
    for file in ("model-00001-of-00001.safetensors", weights.SINGLE):
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, file)}
        (folder / weights.INDEX).write_text(json.dumps(index))
        assert we_read(folder) == transformers_reads(folder) == alone


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_only_the_index_has(tied, tmp_path):
    """transformers lists a tied head and does not write it. An untied one is missing."""
    policy = tiny_policy(tied=tied)
    weights.save(policy, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / weights.INDEX).read_text())
    where = index["weight_map"]
    where[weights.HEAD] = where[weights.EMBEDDING]
    (tmp_path / weights.INDEX).write_text(json.dumps(index))
    if tied:
        assert same(policy, weights.load(tmp_path))
        return
    rewrite(tmp_path / where[weights.EMBEDDING], lambda t: t.pop(weights.HEAD, None))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is missing"):
        weights.load(tmp_path)


NO_INDEX = [
    "",
    "[]",
    "{}",
    "[" * 10**5,
    '{"weight_map": []}',
    '{"weight_map": {}}',
    '{"weight_map": {"a": 3}}',
]
NO_INDEX += ['{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": "b.bin"}}']


@pytest.mark.parametrize("index", NO_INDEX, ids=lambda text: text[:30])
def test_an_index_that_is_none(folder, index):
    (folder / weights.SINGLE).rename(folder / "b.safetensors")
    (folder / weights.INDEX).write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: "):
        weights.load(folder)


NAMES = ("visual.patch_embed.proj.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.bias")
NUMBERS = ["int8", "uint8", "int16", "int32", "int64", "bool", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_that_need_a_scale_are_refused(folder, kind):
    for name in NAMES:
        whole = (folder / weights.SINGLE).read_bytes()
        rewrite(
            folder / weights.SINGLE, lambda t, name=name: t.update({name: t[name].to(getattr(torch, kind))})
        )
        with pytest.raises(ValueError, match=rf"model\.safetensors: tensor '{name}' is {kind}"):
            weights.load(folder)
        (folder / weights.SINGLE).write_bytes(whole)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "float64"])
def test_every_type_of_weight_is_read(folder, kind):
    rewrite(
        folder / weights.SINGLE,
        lambda t: t.update({key: tensor.to(getattr(torch, kind)) for key, tensor in t.items()}),
    )
    assert we_read(folder) == pytest.approx(transformers_reads(folder), rel=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300], ids=str)
@pytest.mark.parametrize("name", [*NAMES, weights.EMBEDDING, weights.HEAD])
def test_values_that_are_not_finite_are_refused(folder, name, value):
    """In one place of a tensor, also of a tied head; 1e300 is finite in the file, not in the policy."""

    def damage(tensors):
        tensor = tensors[weights.EMBEDDING if name == weights.HEAD else name].double().clone()
        tensor.view(-1)[-1] = value
        tensors[name] = tensor

    rewrite(folder / weights.SINGLE, damage)
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor '{name}' holds NaN or infinite"):
        weights.load(folder)


def test_sizes_of_no_model(folder):
    values = json.loads((folder / "config.json").read_text())
    values["vision_config"]["spatial_merge_size"] = 10**6
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json: no model has these sizes"):
        weights.load(folder)


def test_random_start_is_a_function_of_config_and_seed():
    config = tiny_config()
    assert same(weights.init(config, 3), weights.init(config, 3)) and not same(
        weights.init(config, 3), weights.init(config, 4)
    )
    policy = weights.init(replace(config, initializer_range=0.5), 0)
    assert policy.model.embed_tokens.weight.std().item() == pytest.approx(0.5, rel=0.05)
    for name, parameter in policy.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


# ---- memory

BENCH = Path(__file__).resolve().parents[1] / "bench" / "load_2b.py"


def measured(*arguments):
    """The last line of tests/bench/load_2b.py, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(BENCH), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_takes_the_weights_and_one_tensor(tmp_path):
    """111 MB in one file. What was read of a memory-mapped file counts as the process's own while the file
    is open, so opening it once for all tensors took twice as much."""
    sys.path.insert(0, str(BENCH.parent))
    from load_2b import write

    vision = VisionConfig(depth=4, width=256, num_heads=4, intermediate_size=1024, hidden_size=512)
    size = write(
        ModelConfig(
            "qwen2_vl",
            5000,
            512,
            2048,
            12,
            4,
            2,
            vision,
            tie_word_embeddings=True,
            image_token_id=3,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        ),
        tmp_path,
        1e12,
    )
    found = measured("--folder", tmp_path, "--child")
    assert found["policy"] == size > 90e6
    assert found["peak"] < 1.2 * size


@pytest.mark.slow
def test_loading_the_real_2b(tmp_path):
    """4.4 GB of random weights of the real shapes, as the hub shards them. Needs that much room on the
    disk and in memory."""
    assert measured()["ratio"] <= 1.2
