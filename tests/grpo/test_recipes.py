"""Every recipe: its plan, its dry setup, and two steps of it with its own choices, scaled down, on a tiny
random checkpoint; and what its settings promise."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import train
from data.sources import hub
from grpo.config import parse
from grpo.plan import plan
from grpo.storage import checkpoint
from grpo.storage.checkpoint import complete
from grpo.storage.model_folder import HUB_FILES, load_model, model_folder
from models import lora

pytest.importorskip("pyarrow", reason="reading parquet is an optional extra")
from qwen import qwen_folder
from tiny_recipes import bases, data_of, metrics, moved, small

from tests.bench.every_recipe import tried

RECIPES = list(parse.recipes())
REAL = [name for name in RECIPES if "tiny" not in parse.load(name).model]
pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return qwen_folder(tmp_path_factory.mktemp("models") / "qwen2_vl")


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """The tiny twin of a recipe's model."""
    return bases(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """{task: a file or folder in its layout}."""
    return data_of(tmp_path_factory.mktemp("data"))


def trained(recipe, base, data, out, *settings):
    assert train.main(small(recipe, base, data, out, *settings)) == 0
    return out


# ---- all of them


@pytest.mark.parametrize("recipe", RECIPES)
def test_plan(recipe, capsys, monkeypatch):
    """Without the model, without the data, without a network."""
    monkeypatch.setattr(hub, "snapshot", lambda *_, **__: pytest.fail("--plan asked the hub"))
    assert train.main([recipe, "--plan"]) == 0
    assert "peak: " in capsys.readouterr().out


@pytest.mark.parametrize("recipe", REAL)
def test_two_steps(recipe, base_of, data, tmp_path, capsys):
    base = base_of(recipe)
    assert train.main(small(recipe, base, data, tmp_path / "run", "--dry-run")) == 0
    assert recipe in capsys.readouterr().out
    out = trained(recipe, base, data, tmp_path / "run")
    cfg, rows = parse.load(tmp_path / "run" / "config.yaml"), [row for row in metrics(out) if row["step"]]
    assert [row["step"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0 for row in rows)
    assert all(row.get("sampling/logp_gap_max", 0) <= 1e-5 for row in rows)
    named = {
        "group",
        "cap",
        "loss",
        "rewards",
        "advantage",
        "template",
        "task",
        "freeze",
        "max_rounds",
        "enough",
        "sft",
    }
    # own takes what goes with the twin
    ours = parse.load(recipe, [f"model={base}"] if cfg.by_model else [])
    assert cfg.max_rounds == min(ours.max_rounds, 2)
    smaller = {"group", "cap", "rewards", "max_rounds"}
    assert [key for key in named - smaller if getattr(cfg, key) != getattr(ours, key)] == []
    assert cfg.optim.decay == ours.optim.decay and set(ours.rewards) <= set(cfg.rewards)
    changed, kept = moved(base, out)
    if cfg.lora.rank:
        layers = lora.chosen(load_model(base), cfg.lora.targets, cfg.freeze)
        assert changed == {f"{name}.weight" for name in layers}
        return
    frozen = {
        "vision": {n for n in changed | kept if n.startswith("visual.")},
        "llm": {n for n in changed | kept if not n.startswith("visual.")},
    }
    assert kept == set().union(*(frozen[part] for part in cfg.freeze)), (
        "what is frozen stays, to the bit, and all else moves"
    )
    assert bool(kept) == bool(cfg.freeze)


@pytest.mark.parametrize("recipe", ["vision_r1_rl", "vision_r1_cold_answers"])
def test_a_third_step_goes_on_from_the_checkpoint(recipe, base_of, data, tmp_path):
    """As `python tests/bench/every_recipe.py` does for all; RL goes on in its second stage."""
    assert tried(recipe, base_of(recipe), data, tmp_path / "run")["wrong"] == ""


# ---- what single recipes promise


def test_the_papers_numbers_are_the_recipes():
    """arXiv 2503.05132, Table 2 and the released script."""
    cfg = parse.load("visualthinker_sat")
    assert (cfg.prompts, cfg.group, cfg.cap, cfg.max_prompt, cfg.steps) == (8, 8, 700, 1024, 1500)
    assert (cfg.min_pixels, cfg.max_pixels, cfg.temperature, cfg.template, cfg.model) == (
        3136,
        401408,
        1.0,
        "visualthinker",
        "Qwen/Qwen2-VL-2B",
    )
    assert (
        cfg.optim.lr,
        cfg.optim.decay,
        cfg.optim.warmup,
        cfg.optim.weight_decay,
        cfg.optim.max_grad_norm,
    ) == (1e-6, "linear", 0, 0, 1.0)
    assert (cfg.loss.kl_coef, cfg.loss.kl, cfg.loss.updates, cfg.loss.weighting, cfg.advantage) == (
        0.04,
        "k3",
        1,
        "completion",
        "std",
    )
    sft = parse.load("sat_sft")
    assert (sft.method, sft.optim.lr, sft.sft.loss_on) == ("sft", 2e-5, "answer")
    for name in ("sat_gpg", "sat_dapo"):
        assert parse.load(name).loss.kl_coef == 0 and parse.load(name).max_rounds > 1


VISION_R1 = {
    "vision_r1_rl": ((16, 4096, 100), (8, 8192, 200)),
    "vision_r1_easyr1": ((16, 4096, 100), (8, 8192, 200)),
    "vision_r1_long": ((4, 16384, 300),),
    "vision_r1_16k16": ((16, 16384, 200),),
    "vision_r1_4k16": ((16, 4096, 200),),
    "vision_r1_4k16_8k16": ((16, 4096, 100), (16, 8192, 200)),
    "vision_r1_4k16_6k12_8k8": ((16, 4096, 100), (12, 6144, 200), (8, 8192, 300)),
    "vision_r1_third_stage": ((16, 4096, 100), (8, 8192, 200), (4, 16384, 300)),
    "vision_r1_zero": ((16, 4096, 300),),
    "vision_r1_zero_ptst": ((16, 4096, 100), (8, 8192, 200)),
    "vision_r1_zero_sft_ptst": ((16, 4096, 100), (8, 8192, 200)),
}


@pytest.mark.parametrize("recipe", VISION_R1)
def test_vision_r1s_stages_are_the_papers(recipe):
    """arXiv 2503.06749, Tables 3, 5 and 6: (group, cap, last step) of each stage. What is not the stages is
    the same in all, but for the reward and the prompt of Zero, and the values of EasyR1."""
    cfg, main = parse.load(recipe), parse.load("vision_r1_rl")
    stages = [(s.group, s.cap, s.until) for s in cfg.stages]
    assert (*stages, (cfg.group, cfg.cap, cfg.steps)) == VISION_R1[recipe]
    other = {difference.partition(":")[0] for difference in parse.differences(main, cfg)}
    other -= {"recipe", "name", "out", "stages", "group", "cap", "steps"}
    if "zero" in recipe:
        assert other == {"rewards", "system"} and cfg.rewards == {"accuracy": 1, "format": 1}
        assert cfg.system.startswith("A conversation between User and Assistant. ") and "\n" not in cfg.system
    elif recipe == "vision_r1_easyr1":
        loss = {"loss.weighting", "loss.minibatches", "loss.entropy_coef"}
        assert other == loss | {"prompts", "max_prompt", "min_pixels", "max_pixels", "optim.weight_decay"}
        assert (cfg.prompts / cfg.loss.minibatches, cfg.loss.weighting, cfg.loss.entropy_coef) == (
            128,
            "token",
            1e-3,
        )
    else:
        assert not other


def test_every_recipe_is_in_the_docs_with_its_command():
    page = (Path(train.__file__).parent / "docs" / "recipes.md").read_text()
    assert [name for name in REAL if f"train.py {name}" not in page] == []


@pytest.mark.parametrize("loss_on", ["answer", "prompt_and_answer"])
def test_imitation_of_the_papers_kind(base, data, tmp_path, loss_on):
    rows = metrics(
        trained(
            "sat_sft",
            base,
            data,
            tmp_path / "run",
            f"sft.loss_on={loss_on}",
            "steps=6",
            "optim.lr=1e-2",
            "eval.items=0",
        )
    )
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    # nll is that of the answers alone
    assert (rows[0]["loss"] == pytest.approx(rows[0]["nll"])) == (loss_on == "answer")


def test_sampling_settings_of_the_folder_do_not_leak(base, data, tmp_path):
    """generation_config.json says greedy, twice over; only its stop tokens are read."""
    plain = Path(shutil.copytree(base, tmp_path / "plain"))
    values = json.loads((plain / "generation_config.json").read_text())
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": values["eos_token_id"]}))
    runs = [
        trained("visualthinker_sat", folder, data, tmp_path / name, "eval.items=0")
        for folder, name in ((base, "a"), (plain, "b"))
    ]
    assert metrics(runs[0]) == metrics(runs[1])
    # and it is sampled, at temperature 1
    assert metrics(runs[0])[0]["entropy"] > 1


def ends_as(straight, killed, monkeypatch, run_it):
    """A run whose save is `killed`, started again, ends as the `straight` one: its metrics and every file
    of the last checkpoint."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", killed)
        run_it()
    again = run_it()
    assert metrics(again) == metrics(straight)
    for path in complete(straight)[-1].iterdir():
        assert path.read_bytes() == (complete(again)[-1] / path.name).read_bytes(), path.name


# ---- dynamic sampling, in a run


def test_dynamic_sampling_draws_again_and_goes_on_exactly(base, data, tmp_path, monkeypatch):
    """Paid for format, as a random policy never is, all groups are idle: every round is used. Paid for
    length, next to none is."""
    idle = metrics(
        trained(
            "sat_gpg", base, data, tmp_path / "idle", "rewards={format: 1}", "max_rounds=3", "eval.items=0"
        )
    )
    assert all(row["sampling/rounds"] == 3 and row["grad_norm"] == 0 for row in idle)
    # in the second step a question came up twice, and was asked once
    assert [row["sampling/frac_resampled"] for row in idle] == pytest.approx([4 / 6, 3 / 5])
    settings = ("max_rounds=4", "enough=1", "group=2", "steps=3", "cap=6", "eval.items=0")
    straight = trained("sat_dapo", base, data, tmp_path / "straight", *settings)
    assert any(row["sampling/rounds"] > 1 for row in metrics(straight)), (
        "cap 6 and groups of 2: some end alike"
    )
    assert all(row["grad_norm"] > 0 and row["sampling/logp_gap_max"] < 1e-4 for row in metrics(straight))

    real = checkpoint.save

    def killed(folder, step, *args, **how):
        real(folder, step, *args, **how)
        if step == 2:
            raise KeyboardInterrupt

    ends_as(
        straight, killed, monkeypatch, lambda: trained("sat_dapo", base, data, tmp_path / "killed", *settings)
    )


# ---- each architecture, from files, end to end


@pytest.mark.parametrize(
    "architecture, task", [("qwen2_vl", "jsonl"), ("qwen2_5_vl", "sat"), ("qwen3_vl", "sat")]
)
def test_three_steps_and_an_exact_resume(architecture, task, data, tmp_path, monkeypatch):
    """A JSONL folder and a parquet file with photographs: all parameters move, and a run that was stopped
    ends as one that was not."""
    model = qwen_folder(tmp_path / "model", architecture)
    settings = (f"task={task}", f"data={data[task]}", "steps=3", "cap=12", "loss.kl_coef=0.04")
    straight = trained("visualthinker_sat", model, data, tmp_path / "straight", *settings)
    _changed, kept = moved(model, straight)
    assert not kept and [row["step"] for row in metrics(straight)] == [0, 1, 2, 3]
    real = checkpoint.save

    def killed(folder, step, *args, **how):
        if step == 3:
            raise KeyboardInterrupt
        return real(folder, step, *args, **how)

    ends_as(
        straight,
        killed,
        monkeypatch,
        lambda: trained("visualthinker_sat", model, data, tmp_path / "killed", *settings),
    )


# ---- where a model comes from


def test_a_hub_model_is_fetched_by_pattern_at_its_revision(base, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "snapshot", lambda *args: asked.append(args) or base)
    assert (
        model_folder("Qwen/Qwen2-VL-2B", "abc") == base and model_folder("Qwen/Qwen2-VL-2B@v1", "abc") == base
    )
    assert asked == [
        ("Qwen/Qwen2-VL-2B", HUB_FILES, "model", "abc"),
        ("Qwen/Qwen2-VL-2B", HUB_FILES, "model", "v1"),
    ]
    from fnmatch import fnmatch

    fetched = lambda name: any(fnmatch(name, pattern) for pattern in HUB_FILES)
    assert all(
        map(
            fetched,
            (
                "config.json",
                "model-00001-of-00002.safetensors",
                "model.safetensors.index.json",
                "tokenizer.json",
                "merges.txt",
                *checkpoint.SIDE_FILES,
            ),
        )
    )
    assert not any(
        map(
            fetched,
            (
                "pytorch_model.bin",
                "modeling_qwen.py",
                "model.pt",
                "README.md",
                "training_args.bin",
                "model.gguf",
            ),
        )
    )
    # a folder that is there wins
    assert model_folder(str(base)) == base and len(asked) == 2


def test_a_run_keeps_to_the_commit_it_began_with(base, data, tmp_path, monkeypatch):
    """The branch moves between two starts: the second still asks for the first one's commit, and the
    weights of its reference are that one's."""
    asked, cache = [], tmp_path / "hub" / "snapshots"
    for commit in ("c0ffee", "decaf0"):
        shutil.copytree(base, cache / commit)

    def snapshot(repo, files, kind, revision):
        asked.append(revision)
        return cache / (
            "c0ffee"
            if revision in ("main", "c0ffee") and not moved
            else revision
            if revision in ("c0ffee", "decaf0")
            else "decaf0"
        )

    moved = []
    monkeypatch.setattr(hub, "snapshot", snapshot)
    how = ("steps=1", "eval.items=0")
    trained("visualthinker_sat", "Qwen/Qwen2-VL-2B", data, tmp_path / "run", *how)
    assert json.loads((tmp_path / "run" / "base.json").read_text()) == {
        "model": "Qwen/Qwen2-VL-2B",
        "revision": "c0ffee",
    }
    moved.append(True)
    trained("visualthinker_sat", "Qwen/Qwen2-VL-2B", data, tmp_path / "run", *how)
    assert asked == ["main", "c0ffee"]
    trained("visualthinker_sat", "Qwen/Qwen2-VL-2B", data, tmp_path / "other", *how)
    assert (
        asked[-1] == "main"
        and json.loads((tmp_path / "other" / "base.json").read_text())["revision"] == "decaf0"
    )


def test_a_hub_out_of_reach_is_one_line(monkeypatch, tmp_path, capsys):
    def unreachable(repo, *_):
        raise hub.HubError(f"model {repo}: the hub is out of reach and the cache does not hold it")

    monkeypatch.setattr(hub, "snapshot", unreachable)
    assert train.main(["visualthinker_sat", f"out={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err.strip()
    assert (
        "\n" not in said
        and "Qwen/Qwen2-VL-2B" in said
        and "no such folder" in said
        and "out of reach" in said
    )
    assert not (tmp_path / "run").exists()


def test_a_plan_of_another_hub_model_reads_three_small_files(base, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "snapshot", lambda *args: asked.append(args) or base)
    assert "peak: " in plan.text(parse.load("visualthinker_sat", ["model=somebody/else", "revision=v2"]))
    assert asked == [
        ("somebody/else", ("config.json", "preprocessor_config.json", "processor_config.json"), "model", "v2")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sat_dapo", "sat_sft"])
def test_two_ranks(recipe, base, data, tmp_path):
    """Ranks that draw again different numbers of times do not wait for each other, and write one setup.
    (Imitation with the prompt is that of one rank: test_train.py.)"""
    import os
    import subprocess

    settings = (
        ["sft.loss_on=prompt_and_answer", "eval.items=0"]
        if recipe == "sat_sft"
        else ["max_rounds=4", "enough=1", "group=2", "cap=6", "eval.items=0"]
    )
    folders = {}
    for ranks in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "train.py",
            *small(recipe, base, data, tmp_path / str(ranks), "prompts=4", *settings),
        ]
        done = subprocess.run(
            command,
            cwd=Path(train.__file__).parent,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        folders[ranks] = tmp_path / str(ranks)
    rows = metrics(folders[2])
    assert [row["step"] for row in rows] == [1, 2] and not moved(base, folders[2])[1]
    if recipe == "sat_dapo":
        assert all(row["sampling/rounds"] >= 1 and row["frac_reward_zero_std"] < 1 for row in rows)
    else:
        for a, b in zip(metrics(folders[1]), rows):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4) and b["grad_norm"] == pytest.approx(
                a["grad_norm"], rel=1e-3
            )
