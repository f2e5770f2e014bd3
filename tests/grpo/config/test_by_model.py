"""Settings that go with the model, and a run's own name."""

import json

import pytest
from small import small_folder

from grpo.config import ConfigError, by_model, parse
from grpo.plan import known_models, plan
from models.config import ModelConfig

GIB = 2**30
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}"
TURNS += (
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n"
)
TURNS += "{% endfor %}<|im_start|>assistant\n"


def parameters(model: ModelConfig) -> float:
    return sum(plan.parameters(model).values()) / 1e9


@pytest.mark.parametrize("name", known_models.KNOWN)
@pytest.mark.parametrize("rank", [None, 0])
def test_a_name_says_what_its_config_says(name, rank):
    """A nominal size ("7B", with 8.29 billion parameters) meets the same rules as the real one."""
    by_name = by_model.facts_of(name)
    counted = by_model.Facts(parameters(known_models.KNOWN[name]), by_name.kind, by_name.family)
    assert by_model.choices(by_name, rank) == by_model.choices(counted, rank)
    assert (by_name.family == "qwen3") == (known_models.KNOWN[name].architecture == "qwen3_vl")
    chosen = {key: value for key, (value, _) in by_model.choices(by_name, rank).items()}
    assert chosen["optim.lr"] == (1e-6 if rank == 0 else 1e-5) and chosen["lora.rank"] == 16


def test_the_built_in_model_and_its_copy_are_small(tmp_path):
    tiny = by_model.facts_of("tiny")
    assert (tiny.kind, tiny.family) == ("built-in", "qwen2") and 0.001 < tiny.size < 0.002
    copy = by_model.facts_of(str(small_folder(tmp_path / "copy")))
    assert copy.kind == "base" and copy.size < 0.001


@pytest.mark.parametrize(
    "ending, kind, template",
    [("", "instruct", "qwen3_instruct"), ("<think>\n", "thinking", "qwen3_thinking")],
)
def test_a_folder_says_how_it_is_asked(tmp_path, ending, kind, template):
    folder = small_folder(tmp_path / kind, architecture="qwen3_vl")
    (folder / "chat_template.jinja").write_text(TURNS + ending)
    assert by_model.facts_of(str(folder)).kind == kind
    assert parse.load("own", [f"model={folder}"]).template == template


def test_a_trained_policy_is_asked_as_it_was_trained(tmp_path):
    folder = small_folder(tmp_path / "policy")
    (folder / "trained_with.json").write_text(json.dumps({"settings": {"template": "shapes"}}))
    assert parse.load("own", [f"model={folder}"]).template == "shapes"


def test_an_adapter_is_as_its_base_is(tmp_path):
    adapter = {"base_model_name_or_path": "Qwen/Qwen3-VL-4B-Instruct", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert by_model.facts_of(str(tmp_path)) == by_model.Facts(4.0, "instruct", "qwen3")
    (tmp_path / "trained_with.json").write_text(json.dumps({"settings": {"template": "chatml"}}))
    by_model.facts_of.cache_clear()
    assert parse.load("own", [f"model={tmp_path}"]).template == "chatml"


def test_what_is_said_wins(tmp_path):
    """By the command line, and by a recipe on top of own."""
    (tmp_path / "mine.yaml").write_text("base: own\nmodel: tiny\noptim: {lr: 3.0e-4}\n")
    cfg = parse.load(tmp_path / "mine.yaml", ["cap=50"])
    assert (cfg.optim.lr, cfg.cap, cfg.template, cfg.lora.rank) == (3e-4, 50, "shapes", 0)
    lines = "\n".join(by_model.explained(cfg))
    assert "max_prompt=512" in lines and "lr" not in lines and "cap" not in lines
    assert parse.load("own", ["epochs=3", "model=tiny"]).steps == 0
    with pytest.raises(ValueError, match="nowhere"):
        parse.load("own", ["model=./nowhere"])
    assert not by_model.explained(parse.load("shapes"))


def test_a_run_folder_says_why(tmp_path):
    """In config.yaml, which is read again without the model."""
    folder = small_folder(tmp_path / "base")
    cfg = parse.load("own", [f"model={folder}", f"out={tmp_path / 'run'}", "name=cups"])
    text = parse.save(cfg, tmp_path).read_text()
    assert text.startswith(
        f"# chosen for {folder}, because nothing else said them:\n# lora.rank=0 optim.lr=0.0001"
    )
    (folder / "config.json").unlink()
    assert parse.load_run(tmp_path) == cfg


@pytest.mark.parametrize(
    "model, most",
    [("Qwen/Qwen2-VL-2B-Instruct", 11), ("Qwen/Qwen3-VL-2B-Instruct", 14), ("Qwen/Qwen3-VL-4B-Thinking", 22)],
)
def test_it_fits_on_one_card(model, most):
    cfg = parse.load("own", [f"model={model}"])
    assert plan.make_plan(cfg, known_models.KNOWN[model]).peak < most * GIB
    said = plan.text(cfg)
    assert f"chosen for {model}" in said and "optim.lr=1.0e-05: adapters take ten times" in said


@pytest.mark.parametrize(
    "settings, name, out",
    [
        (["own", "data=mine"], "mine", "runs/mine"),
        (["own", "data=some/mine/"], "mine", "runs/mine"),
        (["own", "data=some/cups.v2.jsonl,pictures"], "cups", "runs/cups"),
        (["own", "data=owner/cups@abc:train.jsonl"], "cups", "runs/cups"),
        (["own", "data=mine", "name=cups"], "cups", "runs/cups"),
        (["own", "data=mine", "out=elsewhere/a"], "a", "elsewhere/a"),
        (["own", "data=mine", "out=elsewhere/a", "name=cups"], "cups", "elsewhere/a"),
        (["own"], "own", "runs/own"),
        (["visualthinker_sat", "data=FILE"], "visualthinker_sat", "runs/visualthinker_sat"),
        (["visualthinker_sat", "task=jsonl", "data=mine"], "mine", "runs/mine"),
        (["shapes"], "shapes", "runs/shapes"),
    ],
)
def test_a_run_has_its_own_name(settings, name, out):
    cfg = parse.parse_args(settings)[0]
    assert (cfg.name, cfg.out) == (name, out)


def test_a_name_is_no_path():
    with pytest.raises(ConfigError, match="name"):
        parse.load("shapes", ["name=../a"])
