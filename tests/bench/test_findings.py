"""Each arm is made of runs that train.py understands; a stopped measurement goes on to the same numbers."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small import small_folder

import train
from data.chat import Chat
from data.sources.table import open_split
from grpo import config
from grpo.evaluation.evaluated_model import known_ids
from grpo.evaluation.scores import read_completion
from grpo.storage import checkpoint
from tests.bench import ask, findings
from tests.bench.ask import counted, first, sound
from tests.bench.findings_plan import Plan, read_spec

pytestmark = pytest.mark.usefixtures("in_process")
SMALL = "steps=2 prompts=2 group=3 cap=6 optim.lr=1e-3 optim.warmup=0 eval.items=2 eval.every=1".split()
SMALL += "save.every=1 save.weights_every=1 report.every=0 limit=40 device=cpu".split()
# a random policy is never right, so it is paid for its length
SMALL += ["rewards={length: 100, format: 1}"]
SPEC = {
    "sets": {"heldout": {}, "pairs": {"split": "pairs"}},
    "asking": {
        "items": 4,
        "sampled": {"items": 2, "samples": 4},
        "passes": {"items": 2, "samples": 4},
        "prefixes": {"items": 4, "texts": ["so it is", "look :"]},
        "pushes": {"items": 2},
    },
    "findings": {
        "x": {
            "title": "Any",
            "measure": ["heldout", "pairs"],
            "cap": 6,
            "arms": {
                "base": {"seeds": [0]},
                "prefixed": {"seeds": [0], "prefix": True},
                "first": {"seeds": [0, 1], "stages": [["shapes", *SMALL, "method=sft"]]},
                "second": {"seeds": [0], "after": "first", "stages": [["shapes", *SMALL]], "pushes": [0, 1]},
            },
        },
        "y": {
            "title": "Other",
            "arms": {"same": {"seeds": [0], "cap": 6, "stages": [["shapes", *SMALL, "method=sft"]]}},
        },
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base, tmp_path):
    """run("x", "--arm", "first", where="a") -> the records, without times."""

    def call(*arguments, where="straight", base=base, status=0):
        spec = tmp_path / "spec.yaml"
        spec.write_text(yaml.safe_dump(SPEC, sort_keys=False))
        options = {
            "--base": base,
            "--trunk": base,
            "--spec": spec,
            "--out": tmp_path / where,
            "--json": tmp_path / where / "m.json",
        }
        given = [str(each) for pair in options.items() for each in pair]
        assert findings.main([*given, *arguments]) == status
        records = findings.read_records(tmp_path / where / "m.json")
        without = ("minutes", "commands", "commit")
        return {key: {k: v for k, v in each.items() if k not in without} for key, each in records.items()}

    return call


def test_every_arm_is_made_of_runs_that_train_py_understands(base, tmp_path):
    spec = read_spec(findings.SPEC)
    assert list(spec.findings) == ["main", "world", "noisier", *"abcdefghi"]
    arms = Plan(spec, "tiny", "models/tiny_trunk", tmp_path).arms([], [], [])
    for arm in arms:
        for stage in arm.stages:
            assert not config.contradictions(stage.cfg, 20_000), arm.title
            assert len(open_split(stage.cfg.task, stage.cfg.data, "train", 4, 0)) == 4
        if steps := [step for step in arm.entry.pushes if step]:
            every = arm.stages[-1].cfg.save.weights_every
            assert every and not any(step % every for step in steps), arm.title
    for name, questions in spec.sets.items():
        assert len(first(questions, 8)) == 8, name
    prefixes = spec.asking["prefixes"]["texts"]
    assert len(prefixes) >= 10 and all(
        known_ids(Chat(base, template="shapes"), text, "") for text in prefixes
    )
    assert [arm.seed for arm in arms] == sorted(arm.seed for arm in arms), "the first seeds come first"
    # the main job is run once for all findings that need it
    main = {arm.stages[-1].digest for arm in arms if arm.name in ("rl", "sft_0", "base_0", "none", "seeing")}
    assert len(main) == 2 * 3, "of the main job and of mini/rl, three seeds each"


def test_a_command_says_all_that_its_run_needs(base, tmp_path):
    [arm] = Plan(read_spec(findings.SPEC), str(base), str(base), tmp_path).arms(["b"], ["sft_10"], [1])
    begun, then = ([*stage.settings] for stage in arm.stages)
    assert begun[:4] == ["mini/instruct", f"model={base}", "seed=1", "steps=10"]
    assert then[:3] == ["shapes", f"model={arm.stages[0].folder}", "seed=1"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "mainn"], "unknown finding 'mainn'. Did you mean 'main'?"),
        (["--only", "a", "--arm", "sft"], "unknown arm 'sft'. Known: base, best_prefix, rl, sft_questions"),
        (["--only", "a", "--seeds", "7"], "--seeds 7: none of the chosen arms has such a seed"),
        (["--base", "nowhere"], "model 'nowhere': no config.json"),
        (["--trunk", "nowhere"], "model 'nowhere': no config.json"),
    ],
)
def test_a_wrong_name_is_one_clear_error(arguments, said, capsys):
    assert findings.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


@pytest.mark.parametrize(
    "change, said",
    [
        ({"stage": []}, "finding x, arm first: unknown 'stage'; there are after, stages"),
        ({"measure": ["held"]}, "finding x, arm first: unknown 'held'; there are heldout, pairs"),
        ({"after": "second"}, "unknown arm above first 'second'"),
        ({"stages": [["shapes", "step=3"]]}, "argument 'step=3': unknown key 'step' (did you mean 'steps'?)"),
    ],
)
def test_a_mistake_in_the_table_is_named(change, said, run, monkeypatch, capsys):
    arms = SPEC["findings"]["x"]["arms"]
    monkeypatch.setitem(arms, "first", arms["first"] | change)
    run(status=2)
    assert said in capsys.readouterr().err


def test_an_arm_that_fails_leaves_the_others(run, monkeypatch, capsys):
    arms = SPEC["findings"]["x"]["arms"]
    monkeypatch.setitem(arms, "first", arms["first"] | {"stages": [["shapes", *SMALL, "max_prompt=2"]]})
    found = run("--only", "x", "--arm", "first", "base", status=1)
    assert set(found) == {("x", "base", 0)}
    assert "x first seed 0: train.py ended with" in capsys.readouterr().err


def test_stopped_anywhere_it_goes_on_to_the_same_numbers(run, tmp_path, monkeypatch):
    """Stopped before the first checkpoint's end, and between two sets of questions."""
    straight = run("--arm", "second")
    save, asked = checkpoint.save, []

    def stopped_save(folder, step, *args, **how):
        if step == 2:
            raise KeyboardInterrupt
        return save(folder, step, *args, **how)

    def stopped_ask(policy, *args, **how):
        asked.append(policy)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask_once(policy, *args, **how)

    ask_once = ask.Policy.ask
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stopped_save)
        assert run("--arm", "second", where="stopped", status=130) == {}
    with monkeypatch.context() as patch:
        patch.setattr(ask.Policy, "ask", stopped_ask)
        assert run("--arm", "second", where="stopped", status=130) == {}
    assert run("--arm", "second", where="stopped") == straight
    [record] = straight.values()
    assert record["curve"]["step"] == [1, 2] and record["evals"]["step"] == [0, 1, 2]
    assert record["sets"]["pairs"]["items"] == 4 and record["sampled"]["heldout"]["items"] == 8
    assert sum(sum(each.values()) for each in record["lengths"].values()) == 8
    assert list(record["passes"]) == ["1", "2", "4"]
    assert [*record["pushes"]] == ["0", "1"] and record["pushes"]["0"] != record["pushes"]["1"]


def test_what_is_measured_is_kept_until_it_is_of_something_else(run, base, tmp_path, monkeypatch):
    before = run("--only", "x", "--arm", "first", "base")
    trained = []
    main = train.main
    monkeypatch.setattr(train, "main", lambda argv: trained.append(argv) or main(argv))
    # the same run serves another finding
    assert run("--only", "y").keys() - before.keys() == {("y", "same", 0)} and not trained
    # the records alone are enough
    for folder in filter(Path.is_dir, (tmp_path / "straight").iterdir()):
        shutil.rmtree(folder)
    assert run("--only", "x", "--arm", "first", "base").items() > before.items() and not trained
    # other weights under the same name
    other = small_folder(tmp_path / "other", seed=1)
    found = run("--only", "x", "--arm", "first", "--seeds", "1", base=other)
    assert len(trained) == 1 and found["x", "first", 1]["base"] != before["x", "first", 1]["base"]
    assert found["x", "first", 0] == before["x", "first", 0], "records of other seeds are kept"


def test_the_best_prefix_is_chosen_and_asked(run):
    found = run("--only", "x", "--arm", "base", "prefixed")
    prefix = found["x", "prefixed", 0]["prefix"]
    assert prefix["items"] == 4 and list(prefix["right"]) == ["so it is", "look :"]
    assert prefix["best"] == max(prefix["right"], key=prefix["right"].get)
    texts = [each["text"] for each in found["x", "prefixed", 0]["texts"]]
    assert all(text.startswith(f"<think>{prefix['best']}") for text in texts)
    assert "prefix" not in found["x", "base", 0]


def test_the_best_step_of_a_run_is_asked(run, monkeypatch):
    arms = SPEC["findings"]["x"]["arms"]
    monkeypatch.setitem(arms, "first", arms["first"] | {"best": True, "seeds": [0]})
    record = run("--only", "x", "--arm", "first")["x", "first", 0]
    scores = dict(zip(record["evals"]["step"], record["evals"]["accuracy"]))
    del scores[0]
    assert record["best_step"] == max(scores, key=scores.get)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_arms_at_a_time_killed_in_the_middle_are_the_same_records(run, base, tmp_path):
    """All processes are killed as soon as a run has a row. Both arms begin with the same run."""
    chosen = ["--only", "x", "--arm", "second", "first", "--seeds", "0"]
    straight = run(*chosen)
    where = tmp_path / "killed"
    options = ["--base", base, "--spec", tmp_path / "spec.yaml", "--out", where, "--json", where / "m.json"]
    command = [sys.executable, findings.__file__, *map(str, options), *chosen, "--jobs", "2"]
    process = subprocess.Popen(command, start_new_session=True)
    while not any(file.stat().st_size for file in where.glob("*/metrics.jsonl")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert findings.read_records(where / "m.json") != straight
    assert run(*chosen, "--jobs", "2", where="killed") == straight


def test_the_list_counts_what_is_measured(run, capsys):
    run("--only", "x", "--arm", "base")
    capsys.readouterr()
    run("--list")
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0] == "x  Any"
        and said[1].split()[:2] == ["base", "1"]
        and said[2].split()[:2] == ["prefixed", "0"]
    )


def completion(example, text):
    """The record of a completion; its words stand for tokens."""
    tokens = range(len(text.split()))
    return read_completion(example, f"<think>{text}", tokens, stopped=True, measure=ask.measure)


def test_a_guess_is_right_and_not_sound():
    example = first({}, 1)[0]
    true = f"look : {ask.reading(example, example.extra['named'])} , so it is {example.answer} ."
    false = f"look : {ask.reading(example, example.extra['named'][::-1])} , so it is {example.answer} ."
    ends = f"</think> <answer> {example.answer} </answer>"
    rows = [
        completion(example, text) for text in (f"{true} {ends}", ends, f"{false} {ends}", f"{true} </think>")
    ]
    again = completion(example, f"{true} but wait , let me look again : {false} {ends}")
    assert [sound(row, example) for row in [*rows, again]] == [True, False, False, False, False]
    found = counted([[*rows]], [example])
    assert (found["right"], found["sound"], found["items"], found["questions"]) == (3, 0.25, 4, 1)
    assert found["passes"] == {"1": 0.25, "2": 0.5, "4": 1.0}
    assert found["tasks"] == {example.task: [3, 4]} and sum(found["lengths"]["wrong"].values()) == 1


@pytest.mark.parametrize("recipe", [name for name in config.recipes() if name.startswith("mini/")])
def test_a_recipe_in_miniature_is_found_by_its_name(recipe, base, tmp_path, capsys):
    assert train.main([recipe, f"model={base}", f"out={tmp_path / 'run'}", "--dry-run"]) == 0
    assert f"run (recipe {recipe}): " in capsys.readouterr().out
    assert config.load(recipe).out == f"runs/{recipe}"
