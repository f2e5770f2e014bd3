"""Runs with adapters: what is trained, what is saved, what the reference is, and how they go on."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_train import QUICK, complete, loads, metrics, run

from grpo import export
from grpo.config import ConfigError, parse
from grpo.evaluation.evaluated_model import Overrides, evaluated_model
from grpo.evaluation.protocols import PROTOCOLS
from grpo.storage import adapter
from grpo.storage.model_folder import load_model

pytestmark = pytest.mark.usefixtures("in_process")
LORA = ["lora.rank=4", "lora.alpha=8", "optim.lr=2e-2", "loss.kl_coef=0.5", "save.every=1"]


def tensors(folder):
    return load_file(folder / adapter.WEIGHTS)


@pytest.fixture(scope="module")
def trained(base, run_once):
    """A run with adapters of three steps."""
    return run_once(*QUICK, f"model={base}", *LORA)


def test_the_base_is_loaded_once_and_is_the_reference(base, tmp_path, monkeypatch):
    asked = loads(monkeypatch)
    rows = metrics(run(base, tmp_path / "run", *LORA, "eval.items=0"))
    assert asked == [base]
    kl = [row["kl"] for row in rows]
    assert kl[0] == 0 and min(kl[1:]) > 1e-4


def test_the_policy_that_samples_is_the_one_that_learns(trained, base, tmp_path):
    """Both multiply by the same sum of base and adapter. In bfloat16 what is left is as in full training."""
    assert all(row["sampling/logp_gap_max"] <= 1e-5 for row in metrics(trained) if row["step"])
    low = ["dtype=bfloat16", "exact=false", "eval.items=0", "save.every=0"]
    lora = metrics(run(base, tmp_path / "lora", *LORA, *low))
    full = metrics(run(base, tmp_path / "full", *low))
    for a, b in zip(lora, full):
        assert a["sampling/logp_gap_mean"] < 2 * b["sampling/logp_gap_mean"]


def test_a_checkpoint_is_an_adapter_and_only_it_has_moments(trained, base):
    first, *_, last = complete(trained)
    assert not list(last.glob("model*.safetensors")) and not (last / "config.json").exists()
    config = adapter.read_config(last)
    assert config["base_model_name_or_path"] == str(base) and (config["r"], config["lora_alpha"]) == (4, 8)
    assert len(tensors(last)) == 2 * 2 * 7
    assert all(not torch.equal(tensor, tensors(first)[name]) for name, tensor in tensors(last).items())
    moments = load_file(last / "optimizer.safetensors")
    assert len(moments) == 3 * 2 * 2 * 7 and all(".lora_" in name for name in moments)


def test_it_is_evaluated_and_exported_merged(trained, base, tmp_path):
    model = evaluated_model(str(trained), PROTOCOLS["strict"], Overrides(), "cpu", built_in=True)
    policy, chat = model.open("cpu")
    merged, plain = dict(policy.named_parameters()), dict(load_model(base).named_parameters())
    changed = {name for name, p in merged.items() if not torch.equal(p, plain[name])}
    assert merged.keys() == plain.keys() and len(changed) == 14 and chat.stop_ids
    out = export.export(str(trained), tmp_path / "out")
    assert all(
        torch.equal(tensor, merged[name]) for name, tensor in load_file(out / "model.safetensors").items()
    )
    assert (out / "tokenizer.json").exists() and (out / "config.json").exists()


def test_a_stopped_run_goes_on_bit_for_bit(trained, base, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    settings = (again / "config.yaml").read_text().replace(str(trained), str(again))
    (again / "config.yaml").write_text(settings)
    for folder in complete(again)[1:]:
        shutil.rmtree(folder)
    run(base, again, *LORA)
    assert metrics(again, times=False) == metrics(trained, times=False)
    for one, other in zip(complete(again), complete(trained)):
        for name in (adapter.WEIGHTS, adapter.CONFIG, "optimizer.safetensors"):
            assert (one / name).read_bytes() == (other / name).read_bytes()


def test_frozen_parts_have_no_adapters(base, tmp_path):
    settings = ["lora.rank=2", "steps=1", "eval.items=0", "save.every=1"]
    both = run(base, tmp_path / "both", *settings, "lora.targets=[q_proj, qkv]")
    assert {name.split(".")[3] for name in tensors(complete(both)[0])} == {"visual", "language_model"}
    tower = run(base, tmp_path / "tower", *settings, "lora.targets=[qkv, fc1]", "freeze=[llm]")
    assert {name.split(".")[3] for name in tensors(complete(tower)[0])} == {"visual"}


def test_imitation_with_adapters(base, tmp_path):
    out = run(
        base, tmp_path / "run", "method=sft", "lora.rank=2", "eval.items=0", "save.every=1", "prompts=2"
    )
    assert len(metrics(out)) == 3 and tensors(complete(out)[0]).keys() == tensors(complete(out)[-1]).keys()


def test_an_adapter_is_trained_on_or_merged(trained, base, tmp_path, capsys):
    """model=ADAPTER with lora.rank goes on with it; without, all weights of the merged model are trained."""
    start = complete(trained)[-1]
    still = [*LORA, "steps=1", "eval.items=0", "optim.lr=1e-30"]
    on = run(start, tmp_path / "on", *still)
    assert all(torch.equal(t, tensors(start)[name]) for name, t in tensors(complete(on)[-1]).items())
    assert adapter.read_config(complete(on)[-1])["base_model_name_or_path"] == str(base)
    assert metrics(on)[0]["kl"] > 1e-4
    whole = run(start, tmp_path / "whole", "steps=1", "eval.items=0", "optim.lr=1e-30")
    merged = dict(load_model(start).named_parameters())
    saved = load_file(complete(whole)[-1] / "model.safetensors")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in saved.items())
    assert metrics(whole)[0]["kl"] == pytest.approx(0, abs=1e-6)
    capsys.readouterr()
    run(start, tmp_path / "other", *LORA, "lora.rank=2", status=2)
    said = capsys.readouterr().err
    assert f"the adapter in {start} has lora.rank=4 lora.alpha=8 lora.targets=[down_proj," in said
    assert not (tmp_path / "other" / "checkpoints").exists()


@pytest.mark.parametrize(
    "settings, key",
    [
        (["lora.rank=-1"], "lora.rank: must be at least 0"),
        (["lora.alpha=0"], "lora.alpha: must be above 0"),
        (["lora.rank=2", "optim.name=muon"], "lora.rank: muon"),
        (["lora.rank=2", "method=sft", "init=x.json"], "lora.rank: random weights"),
        (["lora.rank=2", "lora.targets=[]"], "lora.targets: at least one"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings, key):
    with pytest.raises(ConfigError, match=key):
        parse.load("shapes", settings)


def test_a_target_that_is_no_layer_is_named(base, tmp_path, capsys):
    run(base, tmp_path / "run", "lora.rank=2", "lora.targets=[q_porj]", status=2)
    assert "lora.targets: no layer 'q_porj'; there are down_proj, fc1" in capsys.readouterr().err
