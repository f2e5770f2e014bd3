"""--checkpoints: the curve of a benchmark over the steps of runs."""

import json

import pytest

import evaluate
from data.shapes import tokenizer
from grpo.config import parse
from grpo.evaluation import checkpoints, passes
from grpo.evaluation.checkpoints import points_of, short_names
from grpo.evaluation.scores import Answers, read_completion
from models import weights
from models.config import ModelConfig

CONFIG = tokenizer.model_config(tokenizer.build().get_vocab_size())


def policy_in(folder, seed):
    tokenizer.write(folder)
    weights.save(weights.init(ModelConfig.from_dict(CONFIG), seed=seed), folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two run folders: checkpoints at 10 and 20 and one that was being written; weights at 5, 10 and 20."""
    root = tmp_path_factory.mktemp("runs")
    for name, kept in (("rl", {"checkpoints": (10, 20), "weights": (5, 10)}), ("sft", {"weights": (10, 20)})):
        for kind, steps in kept.items():
            for step in steps:
                folder = root / name / kind / f"step_{step:06d}"
                policy_in(folder, seed=step)
                if kind == "checkpoints":
                    (folder / "state.json").write_text(json.dumps({"step": step}))
        parse.save(parse.load("shapes", ["cap=5", "max_prompt=150"]), root / name)
    (root / "rl" / "checkpoints" / "step_000030").mkdir()
    (root / "rl" / "weights" / "step_000030.tmp").mkdir()
    return root


def test_the_points_of_a_run(runs):
    """Checkpoints and weights, in the order of steps; of step 10, which has both, the checkpoint."""
    found = points_of(runs / "rl")
    assert [(point.step, point.folder.parent.name) for point in found] == [
        (5, "weights"),
        (10, "checkpoints"),
        (20, "checkpoints"),
    ]
    with pytest.raises(ValueError, match="is not a run folder with complete checkpoints, or with weights"):
        points_of(runs)


def test_names_are_short_where_they_are_clear():
    assert short_names(["runs/a", "runs/b"]) == {"runs/a": "a", "runs/b": "b"}
    assert short_names(["x/run", "y/run"]) == {"x/run": "x/run", "y/run": "y/run"}


def invented(policy, chat, examples, how, *rest, **options):
    """Of 8 questions as many are right as weights of that seed say: 10 more steps, two more."""
    seeds = {
        float(weights.init(ModelConfig.from_dict(CONFIG), seed=n).state_dict()[NAME].sum()): n
        for n in (5, 10, 20)
    }
    right = 7 - seeds[float(policy.state_dict()[NAME].sum())] // 5
    answers = Answers()
    for number in range(len(examples)):
        letter = examples[number].letter if number < right else "E"
        answers.append([read_completion(examples[number], f"<answer>{letter}</answer>", [1], True, how.read)])
    return answers


NAME = next(iter(weights.init(ModelConfig.from_dict(CONFIG), seed=0).state_dict()))


def test_two_runs_beside_each_other(runs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="curves are an optional extra")
    monkeypatch.setattr(passes, "answer_all", invented)
    file = tmp_path / "curve.json"
    argv = ["--checkpoints", str(runs / "rl"), str(runs / "sft"), "--items", "8", "--device", "cpu"]
    assert evaluate.main([*argv, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    told = json.loads(file.read_text())
    assert [(point["step"], point["scores"]["accuracy"]) for point in told["points"]] == [
        (5, 6 / 8),
        (10, 5 / 8),
        (20, 3 / 8),
        (10, 5 / 8),
        (20, 3 / 8),
    ]
    assert all(who["cap"] == 5 for who in told["config"]["models"])
    lines = [line.split() for line in out.splitlines()]
    header, row = (
        next(line for line in lines if line[:2] == each) for each in (["run", "step"], ["rl", "5"])
    )
    assert header[:4] == ["run", "step", "n", "score"]
    assert row[2:7] == ["8", "75.0", "40.9", "…", "92.9"]
    assert (
        "rl: last (step 20) 37.5, best (step 5) 75.0. The best of 3 was picked by these very questions" in out
    )
    assert "wrote 40 answers" in out and (tmp_path / "curve.json.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "curve.json.md").read_text()
    assert "# shapes over steps, split heldout" in page and "| rl | 5 | 8 | 75.0 |" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curve.json",
        "curve.json.md",
        "curve.json.png",
    ]


def test_the_base_is_step_0(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(passes, "answer_all", invented)
    base = runs / "rl" / "weights" / "step_000005"
    argv = ["--checkpoints", str(runs / "sft"), "--model", str(base), "--items", "8", "--device", "cpu"]
    assert evaluate.main([*argv, "--json", str(tmp_path / "c.json")]) == 0
    points = json.loads((tmp_path / "c.json").read_text())["points"]
    assert [(point["run"], point["step"], point["scores"]["accuracy"]) for point in points] == [
        ("base", 0, 6 / 8),
        (str(runs / "sft"), 10, 5 / 8),
        (str(runs / "sft"), 20, 3 / 8),
    ]
    # the best of a run's own policies
    assert "sft: last (step 20) 37.5, best (step 10) 62.5" in capsys.readouterr().out


def test_without_matplotlib_the_table_is_there(runs, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(passes, "answer_all", invented)
    argv = [
        "--checkpoints",
        str(runs / "sft"),
        "--items",
        "8",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "c.json"),
    ]
    assert evaluate.main(argv) == 0
    assert "c.json.png: skipped, matplotlib is not installed" in capsys.readouterr().out
    assert (
        not (tmp_path / "c.json.png").exists()
        and len(json.loads((tmp_path / "c.json").read_text())["points"]) == 2
    )


def test_the_real_program(runs, tmp_path, capsys):
    """Interrupted and gone on, it writes what an undisturbed one does."""
    argv = ["--checkpoints", str(runs / "sft"), "--items", "4", "--device", "cpu"]
    assert evaluate.main([*argv, "--json", str(tmp_path / "a.json")]) == 0
    part = tmp_path / "b.json.part"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoints, "as_text", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate.main([*argv, "--json", str(tmp_path / "b.json")])
    part.write_bytes(b"\n".join(part.read_bytes().split(b"\n")[:6]) + b"\n")
    assert evaluate.main([*argv, "--json", str(tmp_path / "b.json")]) == 0
    assert "going on: 5 answers" in capsys.readouterr().out
    a, b = (json.loads((tmp_path / name).read_text())["points"] for name in ("a.json", "b.json"))
    assert a == b and not part.exists()


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--samples", "2"], "--samples: does not go with --checkpoints"),
        (["--compare", "tiny"], "--compare: does not go with --checkpoints"),
        (["--blind"], "--blind: does not go with --checkpoints"),
    ],
)
def test_options_that_do_not_go_together(runs, capsys, extra, words):
    assert evaluate.main(["--checkpoints", str(runs / "rl"), *extra]) == 2
    assert words in capsys.readouterr().err
