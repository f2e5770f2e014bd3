"""Adapter folders: PEFT opens ours and we open PEFT's, with the same outputs and gradients; wrong ones are
named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import ARCHITECTURES, completions_for, prompt_batch, tiny_policy, twin_inputs, twin_of

from grpo import export
from grpo.storage import adapter
from grpo.storage.model_folder import base_folder, load_model, model_folder
from models import lora, weights

TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
RANK, ALPHA = 4, 6.0


def adapted(architecture="qwen2_vl", seed=3):
    """A tiny policy with adapters, B not 0."""
    policy = tiny_policy(architecture)
    pairs = lora.fresh(lora.chosen(policy, TARGETS), RANK, seed)
    random = torch.Generator().manual_seed(seed)
    pairs = {name: (a, 0.1 * torch.randn(b.shape, generator=random)) for name, (a, b) in pairs.items()}
    lora.attach(policy, pairs, ALPHA / RANK)
    return policy


@pytest.fixture
def folders(tmp_path):
    """(adapter folder, base folder, the policy with adapters)"""
    policy = adapted()
    weights.save(tiny_policy(), tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    adapter.write(
        adapter.copy(policy, 0, 1, lambda _, tensor: tensor), tmp_path / "adapter", tmp_path / "base"
    )
    return tmp_path / "adapter", tmp_path / "base", policy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_computes_and_learns_the_same(architecture, tmp_path):
    """In float64, on the twin in transformers: log-probs and gradients of A and B; then PEFT's own folder is
    read back."""
    peft = pytest.importorskip("peft")
    policy = adapted(architecture)
    twin = twin_of(tiny_policy(architecture), tmp_path / "base")
    (tmp_path / "ours").mkdir()
    adapter.write(adapter.copy(policy, 0, 1, lambda _, tensor: tensor), tmp_path / "ours", tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "ours", is_trainable=True).double()
    policy.double()
    prompts = prompt_batch([[(1, 4, 6)]])
    prompts.patches = prompts.patches.double()
    completions, _ = completions_for(prompts, group=1, longest=6)
    weight = torch.randn(6, policy.config.vocab_size, generator=torch.Generator().manual_seed(4)).double()
    weight[:, policy.config.placeholder_ids] = 0
    ours = policy(prompts, completions)[0, 0] @ policy.head_weight.T
    twins = theirs(**twin_inputs(prompts, 0, completions[0, 0])).logits[0, -7:-1]
    torch.testing.assert_close(ours, twins, rtol=1e-6, atol=1e-6)
    for logits in (ours, twins):
        (logits * weight).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    names = {
        adapter.peft_name(name).replace(".weight", ".default.weight"): p
        for name, p in policy.named_parameters()
    }
    assert gradients.keys() == {name for name, p in names.items() if p.requires_grad}
    for name, gradient in gradients.items():
        assert gradient.norm() > 0 and (names[name].grad - gradient).norm() <= 1e-6 * gradient.norm(), name
    theirs.float().save_pretrained(tmp_path / "theirs")
    found, written = adapter.read(tmp_path / "theirs"), adapter.read(tmp_path / "ours")
    assert (found.rank, found.alpha, found.layers) == (RANK, ALPHA, written.layers)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in written.tensors.items())


@torch.no_grad()
def test_an_adapter_is_a_model(folders, tmp_path):
    """Its folder opens where a model's does, merged; and export writes the merged model."""
    folder, base, policy = folders
    prompts = prompt_batch([[(1, 4, 6)], []])
    rows = completions_for(prompts, group=2, longest=5)
    expected = policy(prompts, *rows)
    assert model_folder(str(folder)) == folder and base_folder(folder) == base == base_folder(base)
    merged = load_model(folder)
    assert torch.equal(merged(prompts, *rows), expected)
    exported = weights.load(export.export(str(folder), tmp_path / "out"))
    assert all(torch.equal(p, q) for p, q in zip(exported.parameters(), merged.parameters()))


def test_names_of_older_versions_are_read(folders):
    """transformers 4 had no `language_model` in the names."""
    folder, _, _ = folders
    written = adapter.read(folder)
    tensors = load_file(folder / adapter.WEIGHTS)
    save_file({k.replace(".language_model.", "."): v for k, v in tensors.items()}, folder / adapter.WEIGHTS)
    assert adapter.read(folder).tensors.keys() == written.tensors.keys()


def test_the_base_of_a_hub_model_is_its_name(tmp_path):
    folder = tmp_path / "models--Qwen--Qwen2-VL-2B" / "snapshots" / "abc"
    found = {"base_model_name_or_path": "Qwen/Qwen2-VL-2B", "revision": "abc"}
    assert adapter.base_name(folder) == found
    assert adapter.base_name(tmp_path)["base_model_name_or_path"] == str(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' is supported"),
        ({"use_dora": True}, "use_dora is True"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"r": 0}, "r must be a number above 0, got 0"),
        ({"r": True}, "r must be a number above 0, got True"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number above 0"),
        ({"base_model_name_or_path": None}, "'base_model_name_or_path' must name the base model"),
        (
            {"base_model_name_or_path": "/no/such"},
            "base_model_name_or_path: model '/no/such': no config.json",
        ),
        ({"r": 5}, r"lora_A.weight' of shape \(5, 96\) is of shape \(4, 96\)"),
    ],
    ids=str,
)
def test_a_config_that_is_not_computed_is_named(folders, change, message):
    folder, _, _ = folders
    path = folder / adapter.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, k: t.pop(k), "is missing"),
        (
            lambda t, k: [t.update({n.replace("layers.0", "layers.9"): t.pop(n)}) for n in list(t)],
            "no linear layer 'model.layers.9",
        ),
        (lambda t, k: t.update({k.replace("lora_A", "lora_E"): t.pop(k)}), "is not of a LoRA adapter"),
        (lambda t, k: t.update({k: t[k].T.contiguous()}), "is of shape"),
        (lambda t, k: t.clear(), "is not of a LoRA adapter"),
    ],
    ids=["missing", "another layer", "another kind", "another shape", "empty"],
)
def test_wrong_tensors_are_named(folders, change, message):
    folder, _, _ = folders
    tensors = load_file(folder / adapter.WEIGHTS)
    change(tensors, min(tensors))
    save_file(tensors, folder / adapter.WEIGHTS)
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert str(folder / adapter.WEIGHTS) in str(error.value)


def test_damaged_files_and_adapters_of_adapters(folders, tmp_path):
    folder, _, _ = folders
    again = tmp_path / "again"
    again.mkdir()
    (again / adapter.CONFIG).write_text(
        json.dumps(
            json.loads((folder / adapter.CONFIG).read_text()) | {"base_model_name_or_path": str(folder)}
        )
    )
    with pytest.raises(ValueError, match="is an adapter too; merge it first: python -m grpo.export"):
        base_folder(again)
    (folder / adapter.WEIGHTS).write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="missing or damaged"):
        load_model(folder)
    (folder / adapter.CONFIG).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_model(folder)
