"""evaluate.py from its command line: a random checkpoint of the built-in model, in a run folder, through every option."""

import json
from pathlib import Path

import pytest
import torch

import evaluate
from data import tokenizer
from data.types import Example
from grpo import config
from grpo.evaluation import read_answer
from grpo.tables import difference_table, k_table, score_table, table
from models import weights
from models.config import ModelConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as train.py leaves it: two complete checkpoints and one that was being written."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    for step, complete in ((10, True), (20, True), (30, False)):
        checkpoint = folder / "checkpoints" / f"step_{step:06d}"
        tokenizer.write(checkpoint)
        weights.save(weights.init(ModelConfig.from_dict(tokenizer.model_config(tokenizer.build().get_vocab_size())), seed=step), checkpoint)
        if complete:
            (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    config.save(config.load("shapes", ["cap=17", "max_prompt=150", "max_pixels=3136"]), folder)
    return folder


def call(capsys, *argv):
    status = evaluate.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


# ---- the whole thing

def test_every_pass_and_the_json(run, tmp_path, capsys):
    file, older = tmp_path / "out.json", run / "checkpoints" / "step_000010"
    status, out, err = call(capsys, "--model", run, "--items", 8, "--samples", 3, "--blind", "--ban", "look", "--compare", older,
                            "--json", file)
    assert status == 0, err
    found = json.loads(file.read_text())
    assert set(found) == {"config", "answers", "scores", "skipped", "more"} and not list(tmp_path.glob("*.tmp"))
    rows = {"greedy": found["answers"]} | {key: more["answers"] for key, more in found["more"].items()}
    assert {key: len(value) for key, value in rows.items()} == {"greedy": 8, "sampled": 24, "blind": 8, "banned": 8, "compare": 8,
                                                                "compare_sampled": 24}
    assert {"uid", "task", "picture", "question", "choices", "completion", "answer", "letter", "gold", "correct", "well_formed", "why",
            "length", "stopped", "looked"} <= set(rows["greedy"][0])
    first, second = found["config"]["subjects"]
    assert Path(first["folder"]).name == "step_000020" and Path(second["folder"]).name == "step_000010"
    for who in (first, second):                                             # both asked as the run was: its cap, its limits, its template
        assert (who["cap"], who["max_prompt"], who["max_pixels"], who["template"]) == (17, 150, 3136, "shapes")
    assert found["scores"]["questions"] == 8
    assert set(found["scores"]["tasks"]) == {"Relation", "Count", "Depth", "Distance"}
    assert list(found["more"]["sampled"]["scores"]["pass@k"]) == ["1", "2", "3"]
    assert {key for key, more in found["more"].items() if "differences" in more} == {"blind", "banned", "compare"}
    assert found["more"]["compare"]["differences"]["all"]["n"] == 8
    assert all(" look" not in a["completion"] for a in rows["banned"])
    for words in ("step_000020", "95 % interval", "pass@k", "maj@k", "pictures withheld", "without 'look'", "as it is minus blind",
                  "mine minus step_000010", "wrote 8 answers and all"):
        assert words in out, words


def test_the_table_prints_what_the_json_holds(run, tmp_path, capsys, monkeypatch):
    """Answers are invented, three of four right, and none without the picture; the rest is the real program."""
    def invented(policy, chat, examples, *, blind=False, **options):
        answers = evaluate.Answers()
        for n in range(len(examples)):
            letter = examples[n].letter if n % 4 and not blind else "E"
            answers.append([read_answer(examples[n], f"<think> </think> <answer> ({letter}) </answer>", [1] * 5, True)])
        answers.skipped = ["example 'x': damaged"]
        return answers

    monkeypatch.setattr(evaluate, "answer_all", invented)
    status, out, err = call(capsys, "--model", run, "--items", 16, "--blind", "--json", tmp_path / "a.json")
    assert status == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert ["all", "16", "75.0", "50.5", "…", "89.8", "43.8", "100.0", "25.0", "0.0", "5.0", "0.0", "0.0"] in lines
    assert ["all", "16", "75.0", "0.0", "+75.0", "+42.3", "…", "+91.0", "12", "0", "0.0005"] in lines
    assert "not a choice (4)" in out and "skipped 1: example 'x': damaged" in out
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["scores"]["accuracy"], found["more"]["blind"]["scores"]["accuracy"]) == (0.75, 0.0)
    assert found["more"]["blind"]["differences"]["all"]["only_a"] == 12 and found["skipped"] == ["example 'x': damaged"]


def test_defaults_without_a_run(run, tmp_path, capsys):
    """A folder that belongs to no run is asked as the recipe `shapes` asks; the seed draws other questions, the file is not needed."""
    lone = tmp_path / "lone"
    lone.mkdir()
    for path in (run / "checkpoints" / "step_000020").iterdir():
        (lone / path.name).write_bytes(path.read_bytes())
    uids = []
    for seed in (0, 1):
        file = tmp_path / f"{seed}.json"
        assert call(capsys, "--model", lone, "--items", 2, "--seed", seed, "--json", file)[0] == 0
        found = json.loads(file.read_text())
        assert (found["config"]["subjects"][0]["cap"], found["config"]["subjects"][0]["template"]) == (config.load("shapes").cap, "shapes")
        uids.append([a["uid"] for a in found["answers"]])
    assert not set(uids[0]) & set(uids[1])
    assert call(capsys, "--model", lone, "--items", 2, "--cap", 3, "--split", "pairs", "--json", file)[0] == 0
    found = json.loads(file.read_text())
    assert max(a["length"] for a in found["answers"]) <= 3 and all("/pairs/" in a["uid"] for a in found["answers"])


def test_how_a_model_is_asked(run, tmp_path, monkeypatch):
    """A run's checkpoint as its run was, wherever one stands; a foreign model as the paper does; the command line has the last word."""
    def asked(name, *argv):
        who = evaluate.subject(str(name), evaluate.arguments(["--task", "blink", "--data", "x.parquet", "--device", "cpu", *argv]))
        return who.template, who.cap, who.max_prompt, who.max_pixels, who.dtype

    (tmp_path / "config.json").write_text("{}")
    assert asked(tmp_path) == ("visualthinker", 1024, 1024, None, "float32")
    assert asked(tmp_path, "--template", "chatml", "--cap", "9", "--max-prompt", "7", "--max-pixels", "999", "--dtype", "bfloat16") == (
        "chatml", 9, 7, 999, "bfloat16")
    assert asked("tiny") == ("shapes", config.load("shapes").cap, 1024, None, "float32")
    monkeypatch.chdir(run / "checkpoints" / "step_000010")
    assert asked(".") == asked(run) == ("shapes", 17, 150, 3136, "float32")


# ---- parts

def test_differences_pair_by_question_and_point_at_the_first():
    def said(uid, task, letter):
        return [read_answer(Example(uid, "?", ("yes", "no"), "yes", task), f"<think></think><answer>{letter}</answer>", [1], True)]

    first = [said("a", "T", "A"), said("b", "T", "A"), said("c", "U", "B"), said("only first", "U", "A")]
    second = [said("c", "U", "A"), said("only second", "T", "A"), said("b", "T", "B"), said("a", "T", "A")]
    found = evaluate.differences(first, second)
    assert list(found) == ["T", "U", "all"]
    assert (found["T"]["n"], found["T"]["first"], found["T"]["second"], found["T"]["difference"]) == (2, 1.0, 0.5, 0.5)
    assert (found["U"]["only_a"], found["U"]["only_b"], found["U"]["difference"]) == (0, 1, -1.0)
    assert (found["all"]["n"], found["all"]["difference"], found["all"]["p"]) == (3, 0.0, 1.0)
    with pytest.raises(ValueError, match="both"):
        evaluate.differences(first[-1:], second)


class Pieces:
    """A tokenizer that writes `but` and ` but` differently, `house` in two pieces, and any other word behind a lone space."""

    folder = "here"
    words = {"but": [1], " but": [2], "house": [3, 4], " house": [5, 4], "odd": [6], " odd": [7, 6]}
    names = {1: "but", 2: " but", 3: "hou", 4: "se", 5: " hou", 6: "odd", 7: " "}

    @property
    def tokenizer(self):
        return self

    def encode(self, text):
        return self.words.get(text, [])

    def decode(self, ids):
        return "".join(self.names[i] for i in ids)


def test_a_word_is_banned_however_it_is_spelt():
    assert evaluate.banned_ids(Pieces(), ["but"]) == [1, 2]
    assert evaluate.banned_ids(Pieces(), ["house", "but"]) == [1, 2, 3, 5]
    assert evaluate.banned_ids(Pieces(), ["odd"]) == [6]                    # never the space alone
    for word in ("unheard", " ", ""):
        with pytest.raises(ValueError, match="--ban"):
            evaluate.banned_ids(Pieces(), [word])


def test_tables():
    assert table(["a", "long"], [["xyz", 1], ["x", 22222]]) == "a     long\nxyz      1\nx    22222"
    row = {"n": 8, "first": 0.5, "second": 0.75, "difference": -0.25, "low": -0.5, "high": 0.0625, "only_a": 1, "only_b": 3, "p": 1e-5}
    header, line = difference_table({"all": row}, "as it is", "blind").splitlines()
    assert line.split() == ["all", "8", "50.0", "75.0", "-25.0", "-50.0", "…", "+6.2", "1", "3", "<", "0.0001"]
    assert "only as it is" in header
    assert "looks" not in score_table({"tasks": {}, "questions": 1, "accuracy": 1.0, "interval": [0.2, 1.0], "chance": 0.5, "format": 1.0,
                                       "extraction_failure": 0.0, "truncated": 0.0, "mean_length": 3.0, "failures": {}})
    cells = {1: {"value": 0.5}, 2: {"value": 0.625}}
    assert k_table({"pass@k": cells, "maj@k": cells}).splitlines()[1].split() == ["pass@k", "50.0", "62.5"]


def test_json_is_whole_or_not_there(run, tmp_path, capsys, monkeypatch):
    file = tmp_path / "out.json"
    file.write_text("the old one")

    def full(*args, **kwargs):
        args[1].write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.json, "dump", full)
    status, _, err = call(capsys, "--model", run, "--items", 1, "--cap", 1, "--json", file)
    assert status == 2 and "No space left" in err and file.read_text() == "the old one"
    monkeypatch.undo()
    assert call(capsys, "--model", run, "--items", 1, "--cap", 1, "--json", file)[0] == 0          # nothing of the half one is left in it
    assert json.loads(file.read_text())["answers"][0]["length"] == 1


# ---- mistakes

@pytest.mark.parametrize("argv, words", [
    (["--model", "nowhere"], "nowhere"),
    (["--compare", "nowhere"], "nowhere"),
    (["--task", "shape"], "shapes"),
    (["--split", "trainn"], "heldout"),
    (["--task", "blink"], "parquet"),
    (["--task", "blink", "--data", "nowhere.parquet"], "nowhere.parquet"),
    (["--data", "x.parquet"], "x.parquet"),
    (["--items", "0"], "--items"),
    (["--items", "many"], "--items"),
    (["--samples", "-1"], "--samples"),
    (["--temperature", "0.5"], "--samples"),
    (["--samples", "2", "--temperature", "0"], "above 0"),
    (["--template", "shape"], "shapes"),
    (["--ban", "unheard"], "unheard"),
    (["--json", "nowhere/out.json"], "nowhere"),
    (["--wave", "0"], "--wave"),
    (["--what"], "--what"),
    (["--max-prompt", "5"], "max_prompt"),
    *([] if torch.cuda.is_available() else [(["--device", "cuda"], "GPU")]),
])
def test_a_mistake_is_one_line(run, capsys, argv, words):
    if "--model" not in argv:
        argv = [*argv, "--model", run]
    status, _, err = call(capsys, *argv, *([] if "--items" in argv else ["--items", 2]), *([] if "--cap" in argv else ["--cap", 2]))
    assert status == 2 and words in err
    assert err.startswith("evaluate.py: ") and len(err.splitlines()) == 1 and "Traceback" not in err


def test_a_run_without_a_complete_checkpoint(tmp_path, capsys):
    (tmp_path / "checkpoints" / "step_000010").mkdir(parents=True)
    status, _, err = call(capsys, "--model", tmp_path)
    assert status == 2 and "complete checkpoint" in err


def test_a_truncated_shard_is_named(run, tmp_path, capsys):
    for path in (run / "checkpoints" / "step_000020").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:20_000 if path.suffix == ".safetensors" else None])
    status, _, err = call(capsys, "--model", tmp_path, "--items", 1)
    assert status == 2 and "model.safetensors" in err and len(err.splitlines()) == 1


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ("Wilson", "pass@k", "McNemar", "--blind", "--ban but", "runs/shapes --compare tiny"):
        assert words in out
