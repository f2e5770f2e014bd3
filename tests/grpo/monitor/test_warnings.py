"""grpo/monitor/warnings.py: each guard at its threshold and beside it; and in runs: what is said, once,
what is written, and that a resumed run does the same."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from grpo import gradient, sft
from grpo.gradient import OutOfMemory, TokenBudget, retry_with_less_memory
from grpo.monitor import warnings as guards
from grpo.monitor.step_metrics import words_before_answer
from grpo.monitor.warnings import GUARDS, LONGEST, check, warnings
from grpo.rollout import DecodeOptions
from grpo.storage.checkpoint import complete

ROOT = Path(__file__).resolve().parents[3]
HEALTHY = {
    "step": 1,
    "reward": 0.5,
    "reward_std": 0.4,
    "kl": 0.1,
    "entropy": 0.7,
    "completions/clipped_ratio": 0.1,
    "completions/identical_groups": 0.1,
}
ILL = {
    "kl": {"kl": 2.01},
    "no_reward": {"reward": 0.0, "reward_std": 0.0},
    "no_thinking": {"completions/unthought_ratio": 0.9, "rewards/format/mean": 1.0},
    "truncated": {"completions/clipped_ratio": 0.9},
    "entropy": {"entropy": 0.0099},
    "identical": {"completions/identical_groups": 0.5},
}
# rewards of -1 and 1 average to 0, too
NEARLY = {
    "kl": [{"kl": 2.0}, {"kl": None}, {"kl": float("inf")}],
    "no_reward": [{"reward": 0.0}, {"reward_std": 0.0}, {"reward": -0.1, "reward_std": 0.0}],
    "no_thinking": [{"completions/unthought_ratio": 0.89}],
    "truncated": [{"completions/clipped_ratio": 0.89}],
    "entropy": [{"entropy": 0.01}, {"entropy": float("nan")}, {"entropy": None}],
    "identical": [{"completions/identical_groups": 0.49}],
}


def test_the_guard_of_the_cap_says_how_many_are_cut():
    """Of the rows that it looked at, and not of earlier ones."""
    rows = [HEALTHY] * 3 + [
        HEALTHY | {"completions/clipped_ratio": share} for share in (0.9, 0.92, 0.94, 1, 1)
    ]
    said = GUARDS["truncated"].message(rows)
    assert said.startswith(
        "95% of this stage's completions are cut; their reward is 0 whatever they say. nine"
    )
    assert GUARDS["entropy"].message(rows) == GUARDS["entropy"].says


@pytest.mark.parametrize("name", ILL)
def test_a_guard_holds_after_so_many_steps_and_not_before(name):
    ill, steps = HEALTHY | ILL[name], GUARDS[name].steps
    found = check([HEALTHY] * LONGEST + [ill] * steps)
    # a KL that is too large has grown, too
    assert {guard for guard, holds in found.items() if holds} - {"kl_grows"} == {name}
    assert check([ill] * steps)[name] and not check([ill] * (steps - 1))[name]
    assert not check([HEALTHY] * LONGEST + [ill] * (steps - 1))[name]
    assert not check([ill] * (steps - 1) + [HEALTHY])[name], "it is over"
    for nearly in NEARLY[name]:
        assert not check([ill] * LONGEST + [ill] * (steps - 1) + [HEALTHY | nearly])[name], nearly


def test_nothing_is_wrong_with_a_healthy_run_or_with_no_metrics():
    assert (
        not any(check([HEALTHY] * 100).values())
        and not any(check([]).values())
        and not any(check([{"step": 1}] * 100).values())
    )
    assert set(ILL) == set(NEARLY) == set(GUARDS) - set(TRENDS) and LONGEST == 50


def line(steps, **metrics):
    """Rows of these steps; a metric's two numbers are its first and its last value, on a straight line."""
    at = lambda pair, i: pair[0] + (pair[1] - pair[0]) * i / max(1, len(steps) - 1)
    names = {"length": "completions/mean_length", "format": "rewards/format/mean"}
    return [
        {"step": step} | {names.get(name, name): at(pair, i) for name, pair in metrics.items()}
        for i, step in enumerate(steps)
    ]


LONG = range(1, 301)
# {guard: (runs in which it holds at the end, runs in which it does not)}
TRENDS = {
    "kl_grows": (
        [line(range(20), kl=(0, 1.2))],
        [
            line(range(30), kl=(0, 0.6)),
            line(range(300), kl=(0, 1.9)),
            line(range(30), kl=(1, 1)),
            line(range(30)),
        ],
    ),
    "format_only": (
        [line(LONG, format=(0.95, 1), accuracy=(0.4, 0.5), chance=(0.5, 0.5))],
        [
            line(LONG, format=(0.95, 1), accuracy=(0.4, 0.7), chance=(0.5, 0.5)),
            line(LONG, format=(0.8, 0.9), accuracy=(0.4, 0.5), chance=(0.5, 0.5)),
            # a free answer is never guessed
            line(LONG, format=(0.95, 1), accuracy=(0.06, 0.06), chance=(0, 0)),
            line(LONG, accuracy=(0.4, 0.5), chance=(0.5, 0.5)),
            line(range(49), format=(1, 1), accuracy=(0.5, 0.5), chance=(0.5, 0.5)),
        ],
    ),
    "shrinking": (
        [
            line(LONG, length=(100, 40), accuracy=(0.5, 0.5)),
            line(range(1, 41), length=(90, 5), accuracy=(0.5, 0.4)),
        ],
        [
            line(LONG, length=(100, 60), accuracy=(0.5, 0.5)),
            line(LONG, length=(100, 40), accuracy=(0.5, 0.6)),
            line(range(1, 40), length=(90, 5), accuracy=(0.5, 0.4)),
            line(LONG, length=(100, 40)),
        ],
    ),
    "no_progress": (
        [line(LONG, reward=(1, 1), accuracy=(0.5, 0.5)), line(LONG, reward=(1, 0.5), accuracy=(0.5, 0.2))],
        [
            line(LONG, reward=(1, 1.2), accuracy=(0.5, 0.6)),
            # nothing is left to learn
            line(LONG, reward=(2, 2), accuracy=(1, 1)),
            line(range(1, 200), reward=(1, 1), accuracy=(0.5, 0.5)),
        ],
    ),
}


@pytest.mark.parametrize("name", TRENDS)
def test_a_guard_of_a_trend(name):
    holds, does_not = TRENDS[name]
    for rows in holds:
        assert check(rows)[name] and check(rows[-LONGEST:], rows[: guards.FIRST])[name]
    for rows in does_not:
        assert not check(rows)[name], rows[-1]


@pytest.mark.parametrize(
    "run, wanted", [("seed0", set()), ("seed1", set()), ("seed2", set()), ("blind", {"format_only"})]
)
def test_the_shipped_runs(run, wanted):
    """The good ones raise no guard; the one with grey pictures learns the form alone."""
    path = ROOT / f"docs/results/shapes/{run}.metrics.jsonl.gz"
    rows = [json.loads(text) for text in gzip.open(path, "rt")]
    rows = [row | {"chance": 0.4375} for row in rows if "reward" in row]
    found = {name for end in range(1, len(rows) + 1) for name, held in check(rows[:end]).items() if held}
    assert found == wanted


@pytest.mark.parametrize(
    "text, words",
    [
        ("<think> </think> <answer> ( A ) </answer>", 0),
        ("it must be . </think> <answer> B </answer> and more words", 4),
        ("<think>a b\nc</think><answer>", 3),
        ("no answer at all", 4),
    ],
)
def test_words_before_the_answer(text, words):
    assert words_before_answer(text) == words


def test_each_guard_says_what_to_do():
    for name, guard in GUARDS.items():
        assert f" {guard.steps} steps" in guard.says and len(guard.says) > 100, name
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert all(f"`guard/{name}`" in page for name in [*GUARDS, "nonfinite"])


def test_the_warnings_of_a_run():
    rows = [{"step": 0}] + [
        {"step": step, "guard/kl": int(step in (7, 8)), "guard/nonfinite": int(step == 3), "guard/entropy": 0}
        for step in range(1, 10)
    ]
    assert [(w["name"], w["first"], w["steps"]) for w in warnings(rows)] == [
        ("nonfinite", 3, 1),
        ("kl", 7, 2),
    ]
    assert warnings([]) == []


# ---- out of memory


class Once:
    """Work that needs the memory of `room` tokens. With less it leaves half a gradient behind."""

    def __init__(self, room):
        self.policy = torch.nn.Linear(4, 1, bias=False)
        self.room = room
        self.budget = TokenBudget(1024, 1, torch.device("cpu"))
        self.tried = []
        # 1024 tokens
        self.data = torch.eye(4).repeat(256, 1)

    def __call__(self):
        self.tried.append(self.budget.tokens)
        for part in self.data.split(self.budget.tokens):
            self.policy(part).sum().backward()
            if self.budget.tokens > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return "done"

    def run(self):
        return retry_with_less_memory(self, self.policy, self.budget), self.budget.tokens


def test_out_of_memory_halves_the_micro_batches_and_keeps_the_gradient(capsys):
    enough, little = Once(1024), Once(300)
    assert enough.run() == ("done", 1024) and not capsys.readouterr().err
    assert little.run() == ("done", 256)
    said = capsys.readouterr().err
    assert little.tried == [1024, 512, 256] and said.count("out of memory") == 2
    assert "micro_tokens=512" in said and "micro_tokens=256" in said
    assert torch.equal(enough.policy.weight.grad, little.policy.weight.grad)
    assert enough.policy.weight.grad.tolist() == [[256.0] * 4]


def test_without_end_it_is_an_error_and_other_errors_are_not_its_business():
    nothing = Once(1)
    with pytest.raises(OutOfMemory, match="Set loss.micro_tokens=128 or less, and start again"):
        nothing.run()
    assert nothing.tried == [1024, 512, 256]

    def another():
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        retry_with_less_memory(another, nothing.policy, nothing.budget)


def test_several_ranks_do_not_try_again(monkeypatch):
    """The others wait for this rank's part of the weights."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(gradient, "rank", lambda: 1)
    little = Once(300)
    with pytest.raises(
        OutOfMemory, match=r"rank 1 is out of memory with loss.micro_tokens=1024 \(CUDA out of memory. Tried"
    ):
        little.run()
    assert little.tried == [1024]


# ---- in runs

QUICK = [
    "shapes",
    "steps=4",
    "prompts=3",
    "group=4",
    "cap=8",
    "rewards={length: 1000}",
    "eval.items=0",
    "save.every=1",
    "save.keep=0",
    "report.every=0",
    "limit=40",
    "device=cpu",
    "optim.warmup=0",
]


pytestmark = pytest.mark.usefixtures("in_process")


def poison(monkeypatch, *steps):
    """The loss of these steps (from 1) is not a number. The other numbers of a run do not change."""
    now, stage_at, policy_loss = [0], train.stage_at, train.policy_loss

    def watched(step, *rest):
        now[0] = step + 1
        return stage_at(step, *rest)

    def poisoned(*args, **how):
        loss, stats = policy_loss(*args, **how)
        return (
            (loss * float("nan"), replace(stats, loss=stats.loss * float("nan")))
            if now[0] in steps
            else (loss, stats)
        )

    monkeypatch.setattr(train, "stage_at", watched)
    monkeypatch.setattr(train, "policy_loss", poisoned)


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "step_time" and not k.startswith("time/")} for row in rows]


def files_of(run, step):
    folder = run / "checkpoints" / f"step_{step:06d}"
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def test_one_update_is_skipped_and_a_resumed_run_skips_it_too(base, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 2)
    out = tmp_path / "run"
    assert train.main([*QUICK, f"model={base}", f"out={out}"]) == 0
    said = capsys.readouterr().err
    assert said.count(guards.NONFINITE) == 1 and "step 2: " in said
    rows = rows_of(out)
    assert [row["guard/nonfinite"] for row in rows] == [0, 1, 0, 0] and rows[1]["loss"] is None
    assert len(rows[1]["guard/nonfinite_uids"]) == 3 and all(
        uid.startswith("shapes/train/0/") for uid in rows[1]["guard/nonfinite_uids"]
    )
    assert (
        files_of(out, 1) == files_of(out, 2)
        and files_of(out, 2)["model.safetensors"] != files_of(out, 3)["model.safetensors"]
    )
    whole = files_of(out, 4)
    # killed before the bad step, and after it
    for kept in (1, 3):
        again = Path(shutil.copytree(out, tmp_path / f"from_{kept}"))
        (again / "config.yaml").write_text(
            (again / "config.yaml").read_text().replace(f"out: {out}", f"out: {again}")
        )
        for folder in complete(again)[kept:]:
            shutil.rmtree(folder)
        assert train.main([*QUICK, f"model={base}", f"out={again}"]) == 0
        assert files_of(again, 4) == whole and rows_of(again) == rows
        assert capsys.readouterr().err.count(guards.NONFINITE) == (kept < 2)


def test_the_second_time_it_stops_also_after_a_resume(base, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 2, 4)
    for _ in range(2):
        assert train.main([*QUICK, f"model={base}", f"out={tmp_path / 'run'}"]) == 2
        assert "train.py: step 4: the loss is nan" in capsys.readouterr().err
        assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3]
        assert complete(tmp_path / "run")[-1].name == "step_000003"


def test_at_the_first_step_it_is_no_accident(base, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 1)
    assert train.main([*QUICK, f"model={base}", f"out={tmp_path / 'run'}"]) == 2
    assert "train.py: step 1: the loss is nan" in capsys.readouterr().err and not complete(tmp_path / "run")


def test_a_guard_speaks_once_and_a_resumed_run_knows(base, tmp_path, monkeypatch, capsys):
    """A policy that never stops: every completion is cut."""
    generate = train.generate

    def endless(*args, **how):
        rollout = generate(*args, **how)
        rollout.stopped.zero_()
        return rollout

    monkeypatch.setattr(train, "generate", endless)
    argv = [*QUICK[:1], *QUICK[2:], "steps=8", f"model={base}", f"out={tmp_path / 'run'}", "save.every=6"]
    assert train.main(argv) == 0
    said = capsys.readouterr().err
    assert (
        said.count(GUARDS["truncated"].says) == 1
        and "step 5: 100% of this stage's completions are cut" in said
    )
    rows = rows_of(tmp_path / "run")
    assert [row["guard/truncated"] for row in rows] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert not any(
        row[f"guard/{name}"]
        for row in rows
        for name in ("kl", "no_reward", "entropy", "identical", "nonfinite")
    )
    shutil.rmtree(complete(tmp_path / "run")[-1])
    assert train.main(argv) == 0
    assert GUARDS["truncated"].says not in capsys.readouterr().err and rows_of(tmp_path / "run") == rows


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_a_run_that_is_out_of_memory_learns_what_one_with_smaller_micro_batches_does(
    base, tmp_path, monkeypatch, capsys, method
):
    where = train if method == "grpo" else sft
    real, argv = (
        where.completion_logprobs,
        [
            *QUICK,
            "steps=2",
            "prompts=6",
            f"method={method}",
            "cap=60" if method == "sft" else "cap=8",
            f"model={base}",
        ],
    )

    def crowded(policy, part, **how):
        if torch.is_grad_enabled() and part.prompts.tokens.numel() + part.tokens.numel() > 256:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(policy, part, **how)

    # as on a GPU: groups share a micro-batch
    monkeypatch.setattr(gradient, "sum_dtype", lambda device: torch.float32)
    assert train.main([*argv, "loss.micro_tokens=256", f"out={tmp_path / 'small'}"]) == 0
    monkeypatch.setattr(where, "completion_logprobs", crowded)
    capsys.readouterr()
    assert train.main([*argv, "loss.micro_tokens=1024", f"out={tmp_path / 'crowded'}"]) == 0
    # 512, then 256, and no more in the second step
    assert capsys.readouterr().err.count("out of memory") == 2
    assert files_of(tmp_path / "crowded", 2) == files_of(tmp_path / "small", 2)


def test_a_run_that_stays_out_of_memory_says_what_to_set_and_where_it_goes_on(
    base, tmp_path, monkeypatch, capsys
):
    argv = [*QUICK, f"model={base}", "loss.micro_tokens=300"]
    out = tmp_path / "run"
    assert train.main([*argv, f"out={out}"]) == 0
    shutil.rmtree(complete(out)[-1])

    def full(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. Much more text.")

    monkeypatch.setattr(train, "completion_logprobs", full)
    capsys.readouterr()
    assert train.main([*argv, f"out={out}"]) == 2
    said = capsys.readouterr().err
    wanted = "Set loss.micro_tokens=150 or less, and start again: the run goes on from"
    assert f"{wanted} {complete(out)[-1]}" in said and "Much more text" not in said
    assert train.main([*argv, f"out={tmp_path / 'new'}"]) == 2
    assert "and start again: no checkpoint is saved yet" in capsys.readouterr().err


def test_out_of_memory_while_sampling_draws_the_same_with_fewer_rows(base, tmp_path, monkeypatch, capsys):
    asked, real = [], train.generate

    def tight(*args, options, **how):
        asked.append(options.max_rows)
        if options.max_rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(*args, options=options, **how)

    how = [
        "shapes",
        f"model={base}",
        "steps=2",
        "prompts=3",
        "group=4",
        "cap=8",
        "eval.items=0",
        "save.every=0",
        "report.every=0",
        "limit=40",
        "rewards={length: 1000}",
    ]
    assert train.main([*how, f"out={tmp_path / 'straight'}"]) == 0
    monkeypatch.setattr(train, "generate", tight)
    assert train.main([*how, f"out={tmp_path / 'tight'}"]) == 0
    assert asked == [12, 6, 3] * 2 and "retrying with max_rows=3" in capsys.readouterr().err
    weights = [
        (tmp_path / name / "checkpoints" / "step_000002" / "model.safetensors").read_bytes()
        for name in ("straight", "tight")
    ]
    assert weights[0] == weights[1]
    crowded = DecodeOptions(max_rows=99)
    monkeypatch.setattr(train, "generate", lambda *args, **how: tight(*args, **how | {"options": crowded}))
    with pytest.raises(torch.OutOfMemoryError):
        train.main([*how, f"out={tmp_path / 'full'}"])
