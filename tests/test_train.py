"""train.py from its command line, with a policy of a few thousand parameters: what it learns from, what it
leaves behind, how it goes on."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small import small_config

import train
from data.shapes import tokenizer
from grpo.parallel.ranks import gather_objects, join_ranks, leave_ranks
from grpo.storage.checkpoint import complete

ROOT = Path(__file__).resolve().parents[1]
# Reward is the length: a random policy answers nothing, but its completions differ in length in every group.
QUICK = [
    "shapes",
    "seed=1",
    "steps=3",
    "prompts=3",
    "group=4",
    "cap=10",
    "rewards={length: 100, format: 1}",
    "optim.lr=1e-3",
    "optim.warmup=0",
    "eval.items=4",
    "eval.every=2",
    "save.every=0",
    "save.keep=0",
    "report.every=1",
    "report.prompts=1",
    "limit=40",
    "device=cpu",
]


pytestmark = pytest.mark.usefixtures("in_process")


def run(base, out, *settings, status=0):
    """train.main in this process. -> the run folder."""
    assert train.main([*QUICK, f"model={base}", f"out={out}", *settings]) == status
    return out


def metrics(folder, times=True):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (
        rows
        if times
        else [
            {k: v for k, v in row.items() if k != "step_time" and not k.startswith("time/")} for row in rows
        ]
    )


def weights_of(folder):
    return load_file(complete(folder)[-1] / "model.safetensors")


# ---- GRPO


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Three steps, as everything else is compared with."""
    return run(base, tmp_path_factory.mktemp("runs") / "first")


def test_a_run_leaves_everything_behind(trained):
    assert {path.name for path in trained.iterdir()} == {
        "config.yaml",
        "inputs.json",
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
        "curves.png",
        "report.html",
        "checkpoints",
    }
    assert [path.name for path in complete(trained)] == ["step_000003"]
    assert yaml.safe_load((trained / "config.yaml").read_text())["optim"]["lr"] == 1e-3
    summary = json.loads((trained / "summary.json").read_text())
    assert set(summary) >= {"base", "final", "seconds"} and {
        "accuracy",
        "accuracy/Count",
        "format",
        "mean_length",
    } <= set(summary["base"])
    page = (trained / "report.html").read_text()
    assert "shapes/train/1/" in page and "shapes/heldout/0/0" in page


def test_the_metrics_of_a_step(trained):
    rows = metrics(trained)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert ["eval/accuracy" in row for row in rows] == [True, False, True, True]
    wanted = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/length/mean",
        "rewards/length/std",
        "rewards/format/mean",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/clipped_ratio",
        "entropy",
        "kl",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "sampling/logp_gap_mean",
        "sampling/logp_gap_max",
        "accuracy",
        "aha/looking",
        "aha/self_correction",
        "frac_skipped",
        "step_time",
        "time/rollout",
        "time/learn",
    }
    for row in rows[1:]:
        assert wanted <= set(row), wanted - set(row)
        assert 0 <= row["sampling/logp_gap_mean"] <= row["sampling/logp_gap_max"] <= 1e-5
        assert row["grad_norm"] > 0 and row["entropy"] > 1 and row["frac_skipped"] == 0
        assert row["rewards/length/mean"] == pytest.approx(0.001 * row["completions/mean_length"])
        assert row["reward"] == pytest.approx(100 * row["rewards/length/mean"] + row["rewards/format/mean"])
        # the rest, such as advantages and log lines, is in no phase
        assert (
            0.5 * row["step_time"]
            < sum(v for k, v in row.items() if k.startswith("time/"))
            <= row["step_time"]
        )
        # With one update the ratio is 1. The advantages of a group cancel in a mean over completions; here
        # every token weighs alike, and longer ones more.
        assert (
            abs(row["policy_loss"]) > 1e-3
            and row["ratio"] == pytest.approx(1)
            and row["clip_ratio/region_mean"] == 0
        )
    tokens = [row["num_tokens"] for row in rows[1:]]
    assert tokens[0] > 3 * 30 + 12 and all(a < b for a, b in itertools.pairwise(tokens))


def test_the_loss_is_zero_where_every_completion_weighs_alike(base, tmp_path):
    """docs/06: the value says nothing, the gradient does."""
    rows = metrics(run(base, tmp_path / "run", "loss.weighting=completion", "steps=2", "eval.items=0"))
    assert all(abs(row["policy_loss"]) < 1e-5 and row["grad_norm"] > 0 for row in rows[1:])


def test_the_samples_of_a_step(trained):
    lines = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert [(x["kind"], x["step"]) for x in lines if x["kind"] == "train"] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
    ]
    assert [x["step"] for x in lines if x["kind"] == "heldout"] == [0] * 4 + [2] * 4 + [3] * 4
    for line in lines:
        assert line["picture"].startswith("data:image/png;base64,") and line["answer"] in line["choices"]
        if line["kind"] == "train":
            assert len(line["completions"]) == 4
            for c in line["completions"]:
                assert (
                    len(c["tokens"])
                    == len(c["weight"])
                    == len(c["logp"])
                    == len(c["kl"])
                    == len(c["clipped"])
                )
                assert all((w > 0) == (c["advantage"] > 0) for w in c["weight"]) or c["advantage"] == 0
                assert c["reward"] == pytest.approx(
                    100 * c["parts"]["length"] + c["parts"]["format"], rel=1e-5
                )
            assert sum(c["advantage"] for c in line["completions"]) == pytest.approx(0, abs=1e-5)


def test_every_parameter_learns(base, trained):
    before, after = load_file(base / "model.safetensors"), weights_of(trained)
    assert before.keys() == after.keys()
    assert [key for key in before if torch.equal(before[key], after[key])] == []
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_what_earns_more_becomes_likelier(base, tmp_path):
    """Paid for length, and at a learning rate that shows: completions grow from step to step."""
    rows = metrics(
        run(
            base,
            tmp_path / "run",
            "steps=24",
            "cap=24",
            "group=8",
            "optim.lr=1e-2",
            "eval.items=0",
            "report.every=0",
        )
    )
    lengths = [row["completions/mean_length"] for row in rows]
    assert sum(lengths[-3:]) / 3 > sum(lengths[:3]) / 3 + 4, lengths


def test_the_same_command_gives_the_same_run(base, trained, tmp_path):
    again = run(base, tmp_path / "again")
    assert metrics(again, times=False) == metrics(trained, times=False)
    assert (again / "samples.jsonl").read_bytes() == (trained / "samples.jsonl").read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(again).values(), weights_of(trained).values()))
    other = run(base, tmp_path / "other", "seed=2")
    assert [row["reward"] for row in metrics(other)[1:]] != [row["reward"] for row in metrics(trained)[1:]]


def test_memory_settings_change_nothing_but_rounding(base, trained, tmp_path):
    frugal = run(base, tmp_path / "run", "loss.micro_tokens=60", "loss.logits_mib=0.005", "recompute=true")
    for key in ("reward", "completions/mean_length", "accuracy"):
        assert [row.get(key) for row in metrics(frugal)] == [row.get(key) for row in metrics(trained)]
    for a, b in zip(metrics(frugal)[1:], metrics(trained)[1:]):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["entropy"] == pytest.approx(
            b["entropy"], rel=1e-5
        )
    for key, b in weights_of(trained).items():
        # a step is 1e-3 large; Adam turns rounding into more
        torch.testing.assert_close(weights_of(frugal)[key], b, atol=3e-5, rtol=0)


def loads(monkeypatch):
    """Folders that weights.load is asked for."""
    from models import weights

    real, asked = weights.load, []
    monkeypatch.setattr(
        weights, "load", lambda folder, **how: asked.append(Path(folder)) or real(folder, **how)
    )
    return asked


def test_without_a_kl_penalty_no_reference_is_loaded(base, tmp_path, monkeypatch):
    asked = loads(monkeypatch)
    rows = metrics(run(base, tmp_path / "run", "loss.kl_coef=0", "eval.items=0"))
    assert asked == [base] and all(row["kl"] == 0 for row in rows)


def test_with_one_the_reference_stays_where_it_was(base, tmp_path, monkeypatch):
    asked = loads(monkeypatch)
    rows = metrics(run(base, tmp_path / "run", "loss.kl_coef=0.5", "eval.items=0", "optim.lr=5e-3"))
    assert asked == [base, base]
    kl = [row["kl"] for row in rows]
    # at first the policy is the reference
    assert kl[0] == pytest.approx(0, abs=1e-6) and min(kl[1:]) > 1e-3
    free = metrics(run(base, tmp_path / "free", "loss.kl_coef=1e-9", "eval.items=0", "optim.lr=5e-3"))
    # where the penalty has no slope
    assert rows[0]["grad_norm"] == pytest.approx(free[0]["grad_norm"], rel=1e-4)
    assert rows[1]["reward"] == free[1]["reward"] and rows[1]["grad_norm"] != pytest.approx(
        free[1]["grad_norm"], rel=0.05
    )
    assert rows[1]["loss"] - rows[1]["policy_loss"] == pytest.approx(0.5 * kl[1], rel=1e-3)


def test_groups_that_all_earned_the_same_teach_through_the_penalty_only(base, tmp_path):
    """Random completions are never well formed: every reward is 0. Nothing moves the policy but the
    penalty, which is 0 at the reference."""
    rows = metrics(run(base, tmp_path / "none", "rewards={format: 1}", "eval.items=0"))
    assert all(
        row["frac_reward_zero_std"] == 1 and row["grad_norm"] == 0 and row["loss"] == 0 for row in rows
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            load_file(base / "model.safetensors").values(), weights_of(tmp_path / "none").values()
        )
    )
    # Nothing was learned, and still the run can go on from its checkpoint.
    complete_before = complete(tmp_path / "none")
    assert (
        run(base, tmp_path / "none", "rewards={format: 1}", "eval.items=0")
        and complete(tmp_path / "none") == complete_before
    )


@pytest.mark.parametrize(
    "settings, updates",
    [(["loss.updates=2"], 2), (["loss.minibatches=3"], 3), (["loss.updates=2", "loss.minibatches=2"], 4)],
    ids=["repeated", "mini-batches", "repeated mini-batches"],
)
def test_several_updates_of_one_rollout(base, tmp_path, settings, updates):
    rows = metrics(run(base, tmp_path / "run", *settings, "optim.lr=1e-2", "eval.items=0"))
    # the stats are the last update's, of every part
    assert all(row["ratio"] != 1 for row in rows)
    assert any(row["clip_ratio/region_mean"] > 0 for row in rows)
    # the gap is the first one's
    assert all(row["sampling/logp_gap_max"] <= 1e-5 for row in rows)
    state = load_file(complete(tmp_path / "run")[-1] / "optimizer.safetensors")
    assert {float(v) for k, v in state.items() if k.endswith("/step")} == {3.0 * updates}


def test_more_mini_batches_than_prompts_are_refused(base, tmp_path, capsys):
    run(base, tmp_path / "run", "loss.minibatches=4", status=2)
    assert "loss.minibatches: 4 parts of 3 prompts; raise prompts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "choice",
    [
        "advantage=batch",
        "advantage=none",
        "loss.weighting=token",
        "loss.weighting=constant",
        "loss.surrogate=gspo",
        "loss.surrogate=cispo",
        "temperature=0.7",
        "optim.name=muon",
    ],
)
def test_named_choices_run(base, trained, tmp_path, choice):
    rows = metrics(run(base, tmp_path / "run", choice, "eval.items=0", "steps=2"), times=False)
    assert all(row["grad_norm"] > 0 and row["sampling/logp_gap_max"] <= 1e-5 for row in rows)
    # the evaluation of the other run aside
    plain = metrics(trained, times=False)[2]
    assert rows[1] != {key: plain[key] for key in rows[1]}


def test_stages(base, tmp_path):
    """A stage has its own group and cap; after the last one the recipe's own are in force."""
    out = run(
        base,
        tmp_path / "run",
        "stages=[{until: 1, group: 2, cap: 3}, {until: 2, group: 6, cap: 20}]",
        "eval.items=0",
    )
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [len(line["completions"]) for line in lines] == [2, 6, 4]
    longest = [row["completions/max_length"] for row in metrics(out)]
    assert longest[0] == 3 and 10 < longest[1] <= 20 and longest[2] == 10


def test_blind(base, trained, tmp_path, monkeypatch):
    """Every picture is grey: in training, and in its evaluation."""
    from data.chat import Chat

    real, seen = Chat.prompt, []

    def spy(self, example, **how):
        prompt = real(self, example, **how)
        seen.append(float(prompt.patches.std(0).max()))
        return prompt

    monkeypatch.setattr(Chat, "prompt", spy)
    blind = run(base, tmp_path / "run", "blind=true", "steps=1")
    assert len(seen) > 7 and max(seen) < 1e-6
    assert metrics(blind)[1]["reward"] != metrics(trained)[1]["reward"]


def test_bfloat16_learns(base, trained, tmp_path):
    """Matrix products in bfloat16, weights in float32: the policy moves at every step, much as it does in
    float32."""
    low = run(base, tmp_path / "run", "dtype=bfloat16", "exact=false", "eval.items=0", "save.every=1")
    for folder in complete(low):
        assert all(
            tensor.dtype == torch.float32 for tensor in load_file(folder / "model.safetensors").values()
        )
    rows, before = metrics(low), load_file(base / "model.safetensors")
    first = load_file(complete(low)[0] / "model.safetensors")
    assert [key for key in before if torch.equal(before[key], first[key])] == []
    assert rows[0]["grad_norm"] == pytest.approx(metrics(trained)[1]["grad_norm"], rel=0.5)
    # The weights that sampled and the ones that are trained are the same, at the last step as at the first.
    assert all(1e-5 < row["sampling/logp_gap_max"] < 0.2 for row in rows)
    assert rows[0]["sampling/logp_gap_mean"] == pytest.approx(rows[2]["sampling/logp_gap_mean"], rel=2)


def test_no_steps_at_all(base, tmp_path):
    """Only the evaluation of the base, and a checkpoint of it."""
    out = run(base, tmp_path / "run", "steps=0")
    assert [row["step"] for row in metrics(out)] == [0] and [path.name for path in complete(out)] == [
        "step_000000"
    ]


def test_dry_run_and_words(base, tmp_path, capsys):
    assert train.main([*QUICK, f"model={base}", f"out={tmp_path / 'run'}", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert (
        "3 prompts x 4" in out and "held out: heldout: 4, pairs: 4" in out and not (tmp_path / "run").exists()
    )
    for flags, words in (
        (["--help"], "loss.kl_coef"),
        (["--list"], "tiny_base"),
        (["shapes", "--plan", f"model={base}"], "parameters"),
    ):
        assert train.main(flags) == 0
        assert words in capsys.readouterr().out


# ---- imitation


def test_imitation(tmp_path):
    """The recipe that makes the base, in small: from random weights, over captions and documents, with
    Muon; the documents become likelier."""
    tokenizer.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small_config().to_dict()))
    out = tmp_path / "run"
    assert (
        train.main(
            [
                "tiny_base",
                f"init={tmp_path / 'config.json'}",
                f"out={out}",
                "steps=20",
                "prompts=6",
                "optim.lr=4e-3",
                "eval.items=4",
                "eval.every=0",
                "save.every=0",
                "optim.warmup=2",
                "cap=128",
                "device=cpu",
            ]
        )
        == 0
    )
    rows = metrics(out)
    assert (
        [row["step"] for row in rows] == list(range(21))
        and "eval/accuracy" in rows[0]
        and "eval/accuracy" in rows[-1]
    )
    assert {
        "nll",
        "loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "skipped",
        "step_time",
        "nll/Caption coloured",
    } <= set().union(*rows)
    # 127 words, 4 of them placeholders
    assert rows[1]["nll"] == pytest.approx(torch.tensor(123.0).log().item(), rel=0.1)
    assert sum(row["nll"] for row in rows[-4:]) / 4 < rows[1]["nll"] - 0.3
    # weighting: token
    assert rows[1]["loss"] == pytest.approx(rows[1]["nll"])
    state = load_file(complete(out)[-1] / "optimizer.safetensors")
    assert (
        "model.layers.0.mlp.up_proj.weight/momentum_buffer" in state
        and "model.embed_tokens.weight/exp_avg" in state
    )


def test_imitation_without_documents_writes_the_answer(base, tmp_path):
    rows = metrics(
        run(
            base,
            tmp_path / "run",
            "method=sft",
            "loss.weighting=completion",
            "steps=10",
            "optim.lr=1e-2",
            "eval.items=0",
            "cap=20",
        )
    )
    assert rows[-1]["nll"] < rows[0]["nll"] - 1 and "nll/Count" in set().union(*rows)


def test_a_fast_run_learns_the_same_up_to_rounding(trained, base, tmp_path, monkeypatch):
    """exact=false: nothing is added up in float64, and the gap is what docs/ranks.md promises."""
    seen = set()
    attend = torch.nn.functional.scaled_dot_product_attention

    def noting(q, *args, **how):
        seen.add(q.dtype)
        return attend(q, *args, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    rows = metrics(run(base, tmp_path / "fast", "exact=false", "eval.items=0"), times=False)
    assert seen == {torch.float32}
    exact = [row for row in metrics(trained, times=False) if row["step"]]
    rows = [row for row in rows if row["step"]]
    assert all(row["sampling/logp_gap_max"] < 1e-4 for row in rows)
    assert rows[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=1e-3)
    assert rows[0]["grad_norm"] != exact[0]["grad_norm"]


# ---- going on


def command(base, out, *settings, ranks=0):
    args = [f"{ROOT / 'train.py'}", *QUICK, f"model={base}", f"out={out}", *settings]
    return [
        sys.executable,
        *(["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []),
        *args,
    ]


# everything that a checkpoint may hold
ELABORATE = ("optim.name=muon", "loss.kl_coef=0.02", "loss.updates=2")
# train.py, that is killed where a checkpoint becomes visible: before the renaming.
KILLER = """
import os, signal, sys
name = sys.argv.pop(1)
rename = os.replace
def replace(source, target):
    if str(target).endswith(name):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
import train
train.main(sys.argv[1:])
"""


def called(args):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def finished(process):
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 0, out[-3000:]
    return out


@pytest.mark.timeout(900)
def test_killed_and_gone_on_is_as_if_nothing_had_happened(base, tmp_path):
    """6 steps straight = 3 steps, SIGKILL within a checkpoint, the same command again: weights, optimizer
    and logs, bit for bit (times aside). tests/faults/kills.py kills at random."""
    settings = ("steps=6", "eval.every=4", "save.every=1", *ELABORATE)
    straight = called(command(base, tmp_path / "straight", *settings))
    killed = called(
        [sys.executable, "-c", KILLER, "step_000004", *command(base, tmp_path / "killed", *settings)[2:]]
    )
    assert killed.communicate(timeout=600) and killed.returncode == -signal.SIGKILL
    assert complete(tmp_path / "killed")[-1].name == "step_000003"
    assert (tmp_path / "killed" / "checkpoints" / "step_000004.tmp" / "state.json").exists()
    # What a kill may leave besides: a line of a step that is in no checkpoint, and half of another.
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "reward": 0}\n{"step": 6, "rew')

    said = finished(called(command(base, tmp_path / "killed", *settings)))
    assert "going on after step 3" in said
    finished(straight)
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["resumed_after"] == 3
    a, b = (complete(tmp_path / name)[-1] for name in ("straight", "killed"))
    assert a.name == b.name == "step_000006"
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name
    assert metrics(tmp_path / "straight", times=False) == metrics(tmp_path / "killed", times=False)
    assert (tmp_path / "straight" / "samples.jsonl").read_bytes() == (
        tmp_path / "killed" / "samples.jsonl"
    ).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [["optim.name=adamw_bf16", "dtype=bfloat16"], ["optim.name=adamw_8bit", "optim.states_on=host"]],
    ids=["weights rounded at random", "states on the host"],
)
def test_small_states_go_on_bit_for_bit(base, tmp_path, settings):
    """From the checkpoint of the first of three steps."""
    settings = [*settings, "eval.items=0", "save.every=1"]
    out = run(base, tmp_path / "run", *settings)
    rows, last = metrics(out, times=False), contents(complete(out)[-1])
    for folder in complete(out)[1:]:
        shutil.rmtree(folder)
    run(base, out, *settings)
    assert metrics(out, times=False) == rows and contents(complete(out)[-1]) == last
    assert len(rows) == len(complete(out)) == 3 and len(last) == 2


def contents(folder):
    """Weights and optimizer of a checkpoint."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_finished_run_is_not_run_again(trained, base, capsys):
    before = {path.name: path.read_bytes() for path in complete(trained)[-1].iterdir()}
    lines, summary = (trained / "metrics.jsonl").read_bytes(), (trained / "summary.json").read_bytes()
    run(base, trained)
    assert "going on after step 3" in capsys.readouterr().out
    assert (trained / "metrics.jsonl").read_bytes() == lines and (
        trained / "summary.json"
    ).read_bytes() == summary
    assert {path.name: path.read_bytes() for path in complete(trained)[-1].iterdir()} == before


def test_killed_before_the_first_checkpoint_starts_anew(base, trained, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    (out / "metrics.jsonl").write_bytes(
        b"".join((trained / "metrics.jsonl").read_bytes().splitlines(True)[:2])
    )
    (out / "samples.jsonl").write_bytes((trained / "samples.jsonl").read_bytes()[:1000])
    assert metrics(run(base, out), times=False) == metrics(trained, times=False)
    assert (out / "samples.jsonl").read_bytes() == (trained / "samples.jsonl").read_bytes()


# ---- ranks


@pytest.mark.timeout(900)
def test_two_ranks_do_what_one_does(base, tmp_path):
    """Odd numbers of prompts, so the ranks have different shares: the same completions, the same weights
    to rounding. tests/faults/ranks.py has the other kinds of runs."""
    settings = ("steps=2", "report.every=0", "save.every=1", "prompts=3", "advantage=batch")
    both = [
        called(command(base, tmp_path / name, *settings, ranks=ranks))
        for name, ranks in (("one", 1), ("two", 2))
    ]
    said = [finished(process) for process in both]
    # one of them talks
    assert said[1].count("writes to") == 1 and "2 x cpu" in said[1]
    for a, b in zip(metrics(tmp_path / "one", times=False), metrics(tmp_path / "two", times=False)):
        assert a.keys() == b.keys()
        for key, value in a.items():
            # rounding, and sums that cancel to 0
            if key.startswith("sampling/") or key in ("loss", "policy_loss"):
                assert b[key] == pytest.approx(value, abs=1e-5), key
            else:
                assert b[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    for one, two in zip(complete(tmp_path / "one"), complete(tmp_path / "two")):
        other = load_file(two / "model.safetensors")
        for key, value in load_file(one / "model.safetensors").items():
            # a step is 1e-3 large
            torch.testing.assert_close(other[key], value, atol=5e-5, rtol=0)
    assert len(complete(tmp_path / "two")) == 2


def test_one_process_is_a_world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = join_ranks("cpu")
    assert (ranks.rank, ranks.size, ranks.main, ranks.device.type) == (0, 1, True, "cpu")
    x = torch.tensor([1, 2])
    assert ranks.sum(x) is x and gather_objects([3]) == [3]
    leave_ranks()
