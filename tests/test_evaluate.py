"""evaluate.py from its command line: a random checkpoint of the built-in model, in a run folder, through
every option."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
from data.shapes import tokenizer
from data.types import Example
from grpo.config import parse
from grpo.evaluation import answers as evaluation
from grpo.evaluation import passes, resume
from grpo.evaluation.answers import Asking
from grpo.evaluation.evaluated_model import banned_ids
from grpo.evaluation.scores import Answers, differences, read_completion
from grpo.evaluation.tables import difference_table, k_table, markdown, score_table, table
from models import weights
from models.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared/data/blink/Spatial_Relation/val-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as train.py leaves it: two complete checkpoints and one that was being written."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    for step, complete in ((10, True), (20, True), (30, False)):
        checkpoint = folder / "checkpoints" / (f"step_{step:06d}" if complete else f"step_{step:06d}.tmp")
        tokenizer.write(checkpoint)
        weights.save(
            weights.init(
                ModelConfig.from_dict(tokenizer.model_config(tokenizer.build().get_vocab_size())), seed=step
            ),
            checkpoint,
        )
        if complete:
            (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    parse.save(parse.load("shapes", ["cap=17", "max_prompt=150", "max_pixels=3136"]), folder)
    return folder


def call(capsys, *argv):
    status = evaluate.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


# ---- the whole thing


def test_every_pass_and_the_json(run, tmp_path, capsys):
    file, older = tmp_path / "out.json", run / "checkpoints" / "step_000010"
    status, out, err = call(
        capsys,
        "--model",
        run,
        "--items",
        8,
        "--samples",
        3,
        "--blind",
        "--ban",
        "look",
        "--prefix",
        "look :",
        "--compare",
        older,
        "--json",
        file,
    )
    assert status == 0, err
    found = json.loads(file.read_text())
    assert set(found) == {"config", "title", "answers", "scores", "skipped", "more"}
    # nothing half done is left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.json.md"]
    rows = {"greedy": found["answers"]} | {key: more["answers"] for key, more in found["more"].items()}
    assert {key: len(value) for key, value in rows.items()} == {
        "greedy": 8,
        "sampled": 24,
        "blind": 8,
        "banned": 8,
        "prefixed": 8,
        "compare": 8,
        "compare_sampled": 24,
    }
    assert {
        "uid",
        "task",
        "picture",
        "question",
        "choices",
        "completion",
        "answer",
        "letter",
        "gold",
        "correct",
        "well_formed",
        "why",
        "length",
        "stopped",
        "measured",
    } <= set(rows["greedy"][0])
    assert all(answer["picture"] == f"{answer['uid']}#1" for answer in rows["greedy"])
    page = (tmp_path / "out.json.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# shapes, split heldout",
        *(f"## {block['title']}" for block in (found, *found["more"].values())),
    ]
    cells = [
        re.findall(r"[^| ][^|]*[^| ]|[^| ]", line) for line in page.splitlines() if line.startswith("| all")
    ]
    assert (
        cells[0][:3] == ["all", "8", f"{100 * found['scores']['accuracy']:.1f}"]
        and "| maj@k |" in page
        and "mine minus step_000010" in page
    )
    first, second = found["config"]["models"]
    assert Path(first["folder"]).name == "step_000020" and Path(second["folder"]).name == "step_000010"
    # both asked as the run was: its cap, its limits, its template
    for who in (first, second):
        assert (who["cap"], who["max_prompt"], who["max_pixels"], who["template"]) == (
            17,
            150,
            3136,
            "shapes",
        )
    assert found["scores"]["questions"] == 8
    assert set(found["scores"]["tasks"]) == {"Relation", "Count", "Depth", "Distance"}
    assert list(found["more"]["sampled"]["scores"]["pass@k"]) == ["1", "2", "3"]
    assert {key for key, more in found["more"].items() if "differences" in more} == {
        "blind",
        "banned",
        "prefixed",
        "compare",
    }
    assert all(a["completion"].startswith("<think>look :") for a in rows["prefixed"])
    # given tokens do not count: the cap is the policy's own
    assert max(a["length"] for a in rows["prefixed"]) == 17
    assert found["more"]["compare"]["differences"]["all"]["n"] == 8
    assert all(" look" not in a["completion"] for a in rows["banned"])
    for words in (
        "step_000020",
        "95 % interval",
        "pass@k",
        "maj@k",
        "pictures withheld",
        "without 'look'",
        "begun with 'look :'",
        "as it is minus blind",
        "as it is minus prefixed",
        "mine minus step_000010",
        "wrote 8 answers and all",
    ):
        assert words in out, words


def test_the_table_prints_what_the_json_holds(run, tmp_path, capsys, monkeypatch):
    """Answers are invented, three of four right, and none without the picture; the rest is the real
    program."""

    def invented(policy, chat, examples, how, *rest, **options):
        answers = Answers()
        for n in range(len(examples)):
            letter = examples[n].letter if n % 4 and not how.blind else "E"
            text = f"<think> </think> <answer> ({letter}) </answer>"
            answers.append([read_completion(examples[n], text, [1] * 5, True, measure=how.measure)])
        answers.skipped = ["example 'x': damaged"]
        return answers

    monkeypatch.setattr(passes, "answer_all", invented)
    status, out, err = call(capsys, "--model", run, "--items", 16, "--blind", "--json", tmp_path / "a.json")
    assert status == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert [
        "all",
        "16",
        "75.0",
        "50.5",
        "…",
        "89.8",
        "43.8",
        "100.0",
        "25.0",
        "0.0",
        "5.0",
        "0.0",
        "0.0",
    ] in lines
    assert ["all", "16", "75.0", "0.0", "+75.0", "+42.3", "…", "+91.0", "12", "0", "0.0005"] in lines
    assert "not a choice (4)" in out and "skipped 1: example 'x': damaged" in out
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["scores"]["accuracy"], found["more"]["blind"]["scores"]["accuracy"]) == (0.75, 0.0)
    assert found["more"]["blind"]["differences"]["all"]["only_a"] == 12 and found["skipped"] == [
        "example 'x': damaged"
    ]


def test_defaults_without_a_run(run, tmp_path, capsys):
    """A folder that belongs to no run is asked as the recipe `shapes` asks; the seed draws other
    questions, the file is not needed."""
    lone = tmp_path / "lone"
    lone.mkdir()
    for path in (run / "checkpoints" / "step_000020").iterdir():
        (lone / path.name).write_bytes(path.read_bytes())
    uids = []
    for seed in (0, 1):
        file = tmp_path / f"{seed}.json"
        assert call(capsys, "--model", lone, "--items", 2, "--seed", seed, "--json", file)[0] == 0
        found = json.loads(file.read_text())
        assert (found["config"]["models"][0]["cap"], found["config"]["models"][0]["template"]) == (
            parse.load("shapes").cap,
            "shapes",
        )
        uids.append([a["uid"] for a in found["answers"]])
    assert not set(uids[0]) & set(uids[1])
    assert call(capsys, "--model", lone, "--items", 2, "--cap", 3, "--split", "pairs", "--json", file)[0] == 0
    found = json.loads(file.read_text())
    assert max(a["length"] for a in found["answers"]) <= 3 and all(
        "/pairs/" in a["uid"] for a in found["answers"]
    )


def test_how_a_model_is_asked(run, tmp_path, monkeypatch):
    """A run's checkpoint as its run was, wherever one stands; a foreign model as the protocol says; the
    command line has the last word."""

    def asked(name, *argv):
        who = evaluate.model_of(
            str(name),
            evaluate.arguments(["--task", "blink", "--data", "x.parquet", "--device", "cpu", *argv]),
        )
        return who.template, who.cap, who.max_prompt, who.max_pixels, who.dtype

    (tmp_path / "config.json").write_text("{}")
    assert (
        asked(tmp_path)
        == asked(tmp_path, "--protocol", "paper")
        == ("visualthinker", 1024, 20_000, None, "float32")
    )
    assert asked(tmp_path, "--prompt", "direct")[0] == "visualthinker_direct"
    assert asked(tmp_path, "--protocol", "chat")[0] == "visualthinker_direct"
    instruct = tmp_path / "renamed"
    instruct.mkdir()
    (instruct / "config.json").write_text("{}")
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (instruct / "chat_template.json").write_text(json.dumps({"chat_template": turns}))
    assert asked(instruct, "--protocol", "chat")[0] == "chatml_direct"
    assert asked(instruct)[0] == "chatml_eval" and asked(instruct, "--prompt", "direct")[0] == "chatml_direct"
    assert asked(instruct, "--template", "visualthinker", "--prompt", "direct")[0] == "visualthinker_direct"
    assert asked(
        tmp_path,
        "--template",
        "chatml",
        "--cap",
        "9",
        "--max-prompt",
        "7",
        "--max-pixels",
        "999",
        "--dtype",
        "bfloat16",
    ) == ("chatml", 9, 7, 999, "bfloat16")
    assert asked("tiny") == ("shapes", parse.load("shapes").cap, 1024, None, "float32")
    monkeypatch.chdir(run / "checkpoints" / "step_000010")
    assert asked(".") == asked(run) == ("shapes", 17, 150, 3136, "float32")


# ---- benchmarks


def test_the_real_photographs(tmp_path, capsys):
    """All 143, in their order, from the built-in model: the fields that others read are there, and say
    what BLINK's file says."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading parquet is an optional extra")
    if not REAL.is_file():
        pytest.skip(
            "the photographs of BLINK's Spatial_Relation are not beside the repository (../shared/data)"
        )
    status, out, err = call(
        capsys,
        "--model",
        "tiny",
        "--task",
        "blink",
        "--data",
        REAL,
        "--json",
        tmp_path / "out.json",
        "--cap",
        24,
    )
    assert status == 0, err
    found, rows = (
        json.loads((tmp_path / "out.json").read_text()),
        parquet.read_table(REAL, columns=["idx", "choices", "answer"]).to_pylist(),
    )
    assert (
        len(found["answers"]) == found["scores"]["questions"] == 143
        and "143 questions of blink, split all" in out
    )
    for answer, row in zip(found["answers"], rows):
        assert (answer["uid"], answer["picture"]) == (row["idx"], f"{row['idx']}#1")
        assert answer["gold"] == row["choices"]["ABCD".index(row["answer"].strip("()"))]
        assert {"question", "completion", "answer", "correct"} <= set(answer) and answer["correct"] == (
            answer["answer"] == answer["gold"]
        )
    assert found["scores"]["accuracy"] == pytest.approx(sum(a["correct"] for a in found["answers"]) / 143)
    assert "| Spatial_Relation | 143 |" in (tmp_path / "out.json.md").read_text()


def test_both_totals_of_cvbench(run, tmp_path, capsys, monkeypatch):
    """A file in the hub's layout. The answers are invented: all of COCO's are right, and every second one
    of ADE20K's."""
    pytest.importorskip("pyarrow", reason="reading parquet is an optional extra")
    import layouts

    sources = ["ADE20K"] * 4 + ["COCO"] * 2 + ["Omni3D"] * 6
    rows = [
        layouts.cvbench_row(n, "3D" if source == "Omni3D" else "2D", source=source)
        for n, source in enumerate(sources)
    ]
    file = layouts.write(tmp_path / "test.parquet", "cvbench", rows)

    def invented(policy, chat, examples, how, *rest, **options):
        answers = Answers()
        for n in range(len(examples)):
            letter = "C" if examples[n].extra["source"] == "COCO" or n in (0, 2) else "A or C"
            answers.append(
                [
                    read_completion(
                        examples[n], f"<think> </think> <answer> {letter} </answer>", [1] * 5, True, how.read
                    )
                ]
            )
        return answers

    monkeypatch.setattr(passes, "answer_all", invented)
    monkeypatch.setattr("grpo.evaluation.protocols.math_verify", lambda: None)
    found = {}
    for protocol in ("strict", "cambrian", "paper"):
        status, out, err = call(
            capsys,
            "--model",
            run,
            "--task",
            "cvbench",
            "--data",
            file,
            "--protocol",
            protocol,
            "--json",
            tmp_path / "out.json",
        )
        assert status == 0, err
        found[protocol] = json.loads((tmp_path / "out.json").read_text())
        assert "source-averaged total: 37.5" in out.replace("37.50", "37.5")
        assert "12 questions of cvbench, split all" in out and f"protocol {protocol}" in out
    for scores in (each["scores"] for each in found.values()):
        assert scores["totals"]["micro"]["value"] == pytest.approx(4 / 12)
        assert scores["totals"]["source_averaged"]["value"] == pytest.approx(
            ((2 / 4 + 2 / 2) / 2 + 0 / 6) / 2
        )
    assert [found[name]["scores"]["total"]["name"] for name in found] == ["micro", "source_averaged", "micro"]
    # "A or C"
    assert found["paper"]["answers"][1]["answer"] == "3" and found["strict"]["answers"][1]["answer"] is None
    # cut, and only under `paper`
    assert "| all | 12 | 33.33 |" in (tmp_path / "out.json.md").read_text()
    assert "not installed" in found["paper"]["config"]["checker"]


def test_a_table_of_vlmevalkit(run, tmp_path, capsys, monkeypatch):
    """MME's layout, with pictures in base64. The invented answers are all yes: one of each pair is right."""

    def invented(policy, chat, examples, how, *rest, **options):
        answers = Answers()
        for example in examples:
            assert chat.prompt(example).grid.shape == (1, 3)
            answers.append([read_completion(example, "<answer> Yes. </answer>", [1], True, how.read)])
        return answers

    monkeypatch.setattr(passes, "answer_all", invented)
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(buffer, "PNG")
    rows = ["index\timage\tquestion\tanswer\tcategory\timage_path"]
    for n in range(8):
        picture = base64.b64encode(buffer.getvalue()).decode() if n == 0 else "0"
        answer = "No" if n % 2 else "Yes"
        rows.append(
            f"{n}\t{picture}\tIs it red ?\t{answer}\t{'OCR' if n < 4 else 'code_reasoning'}\t{n // 2}.png"
        )
    (tmp_path / "MME.tsv").write_text("\n".join(rows) + "\n")
    argv = ["--model", run, "--task", "mme", "--data", tmp_path, "--protocol", "official"]
    status, out, err = call(capsys, *argv, "--json", tmp_path / "out.json")
    assert status == 0, err
    assert "8 questions of mme, split all" in out
    assert "mme total: 100.0 of 400 points (perception 50.0, cognition 50.0)" in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["scores"]["totals"]["mme"]["value"] == 0.25 and found["scores"]["accuracy"] == 0.5
    assert found["answers"][3]["groups"] == {"picture": "OCR/1.png"}


# ---- an evaluation that was killed

KILLER = """
import os, signal, sys
from grpo.evaluation import passes, resume
import evaluate

real, left = resume.Log._append, [int(sys.argv.pop(1))]

def append(self, row):
    left[0] -= 1
    if not left[0]:
        with open(self.path, "ab") as file:
            file.write(b'{"asked": "torn in the mid')
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, row)

resume.Log._append = append
evaluate.main(sys.argv[1:])
"""


@pytest.mark.timeout(900)
def test_killed_and_gone_on_is_as_if_nothing_had_happened(run, tmp_path, capsys, monkeypatch):
    """8 questions, greedy and sampled; killed within the sampled ones: the same command gives what an
    uninterrupted one gives, to the letter."""

    def command(name, *argv):
        return [
            str(a)
            for a in (
                "--model",
                run,
                "--items",
                8,
                "--samples",
                2,
                "--wave",
                1,
                "--device",
                "cpu",
                "--json",
                tmp_path / name,
                *argv,
            )
        ]

    done = subprocess.run(
        [sys.executable, "-c", KILLER, "13", *command("killed.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    part = tmp_path / "killed.json.part"
    assert len(part.read_bytes().splitlines()) == 13 and not (tmp_path / "killed.json").exists()
    before = part.read_bytes()

    for other, words in (
        (("--cap", 9), "cap: 17 there, 9 now"),
        (("--seed", 1), "seed: 0 there, 1 now"),
        (("--blind",), "blind: False there, True now"),
    ):
        status, _, err = call(capsys, *command("killed.json", *other))
        assert status == 2 and words in err and "killed.json.part" in err and len(err.splitlines()) == 1
    assert part.read_bytes().splitlines()[:12] == before.splitlines()[:12]

    written, real = [], evaluation._write
    monkeypatch.setattr(
        evaluation,
        "_write",
        lambda policy, chat, asked, how: written.append(len(asked)) or real(policy, chat, asked, how),
    )
    status, out, err = call(capsys, *command("killed.json"))
    assert status == 0 and "going on: 11 answers" in out, err
    # what was kept was not written again
    assert sum(written) == 16 - 11
    assert call(capsys, *command("straight.json"))[0] == 0 and sum(written) == 16 - 11 + 16
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("straight.json", "killed.json"))
    assert a.pop("config") and b.pop("config") and a == b
    assert not part.exists()


def test_a_file_that_is_not_ours_is_left_alone(run, tmp_path, capsys):
    part = tmp_path / "out.json.part"
    part.write_text("my notes\n")
    status, _, err = call(capsys, "--model", run, "--items", 1, "--json", tmp_path / "out.json")
    assert status == 2 and "out.json.part, line 1" in err and part.read_text() == "my notes\n"


def test_other_weights_are_another_model(run, tmp_path):
    first, second = (run / "checkpoints" / f"step_0000{step}" for step in (10, 20))
    assert resume.weights_digest(first) == resume.weights_digest(first) != resume.weights_digest(second)


# ---- one question


@pytest.fixture
def pictures(tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (56, 56), color).save(tmp_path / name)
    return [tmp_path / "a.png", tmp_path / "b.png"]


def test_one_question(run, pictures, capsys, monkeypatch):
    status, out, err = call(
        capsys,
        "--model",
        run,
        "--ask",
        pictures[0],
        "Is the circle red ?",
        "--choice",
        "yes",
        "--choice",
        "no",
    )
    assert status == 0, err
    assert out.startswith("<think>") and len(out.split("answer")) >= 2 and "cut off after 17 tokens" in out
    again = call(
        capsys,
        "--model",
        run,
        "--ask",
        pictures[0],
        "Is the circle red ?",
        "--choice",
        "yes",
        "--choice",
        "no",
    )[1]
    # greedy
    assert out == again
    status, out, err = call(
        capsys, "--model", run, "--ask", pictures[0], "What is it ?", "--samples", 3, "--temperature", 2
    )
    assert status == 0 and [f"--- {n} of 3" in out for n in (1, 2, 3)] == [True] * 3
    # they differ
    assert len(set(re.split(r"--- \d of 3\n", out))) > 2

    def answered(policy, chat, examples, how):
        assert (
            how.cap == 17 and examples[0].pictures == tuple(pictures) and examples[0].choices == ("yes", "no")
        )
        return [
            [
                read_completion(
                    examples[0], "<think> red </think> <answer> (B) </answer>", [1] * 9, True, how.read
                )
            ]
        ]

    monkeypatch.setattr("grpo.evaluation.conversation.answer_all", answered)
    out = call(capsys, "--model", run, "--ask", *pictures, "Red?", "--choice", "yes", "--choice", "no")[1]
    assert out == "<think> red </think> <answer> (B) </answer>\nanswer: (B) no\n"


def test_a_question_that_cannot_be_asked(run, tmp_path, pictures, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    for argv, words in (
        ([tmp_path / "broken.png", "What?"], "picture 1"),
        ([pictures[0], "long " * 500], "max_prompt"),
        ([pictures[0], " "], "empty"),
    ):
        status, _, err = call(capsys, "--model", run, "--ask", *argv)
        assert status == 2 and words in err and len(err.splitlines()) == 1, err


def test_the_saved_folder_loads_in_transformers(run, capsys):
    """The lines of docs/evaluation.md, on a checkpoint of the run: what `transformers` writes to a prompt
    of ours is what we write."""
    text = (ROOT / "docs/evaluation.md").read_text("utf-8")
    lines = [
        line.removeprefix(">>> ")
        for line in re.search(r"```python\n(.*?transformers.*?)```", text, re.DOTALL)[1].splitlines()
        if line.startswith(">>> ")
    ]
    folder = run / "checkpoints" / "step_000020"
    names: dict = {}
    exec("\n".join(lines[:3]).replace("models/tiny", str(folder)), names)
    model, tokenizer_of_theirs = names["model"], names["tokenizer"]
    policy, chat = evaluate.model_of(str(run), evaluate.arguments(["--device", "cpu"])).open("cpu")
    image = Image.new("RGB", (56, 56), "red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    example = Example("u", "Is it red ?", ("yes", "no"), "yes", pictures=(buffer.getvalue(),))
    prompt = chat.prompt(example)
    answer = evaluation.answer_all(policy, chat, [example], Asking(cap=8))[0][0]
    ids = torch.tensor([prompt.tokens.tolist()])
    theirs = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.from_numpy(prompt.patches),
        image_grid_thw=torch.from_numpy(prompt.grid),
        mm_token_type_ids=(ids == chat.image_token).long(),
        do_sample=False,
        max_new_tokens=8,
        bad_words_ids=[[i] for i in policy.config.placeholder_ids],
        eos_token_id=list(chat.stop_ids),
    )[0, ids.shape[1] :]
    assert tuple(theirs.tolist()) == answer.tokens
    assert (
        tokenizer_of_theirs.decode(list(answer.tokens)).split()
        == chat.tokenizer.decode(list(answer.tokens), skip_special_tokens=False).split()
    )


# ---- parts


def test_differences_pair_by_question_and_point_at_the_first():
    def said(uid, task, letter):
        return [
            read_completion(
                Example(uid, "?", ("yes", "no"), "yes", task),
                f"<think></think><answer>{letter}</answer>",
                [1],
                True,
            )
        ]

    first = [said("a", "T", "A"), said("b", "T", "A"), said("c", "U", "B"), said("only first", "U", "A")]
    second = [said("c", "U", "A"), said("only second", "T", "A"), said("b", "T", "B"), said("a", "T", "A")]
    found = differences(first, second)
    assert list(found) == ["T", "U", "all"]
    assert (found["T"]["n"], found["T"]["first"], found["T"]["second"], found["T"]["difference"]) == (
        2,
        1.0,
        0.5,
        0.5,
    )
    assert (found["U"]["only_a"], found["U"]["only_b"], found["U"]["difference"]) == (0, 1, -1.0)
    assert (found["all"]["n"], found["all"]["difference"], found["all"]["p"]) == (3, 0.0, 1.0)
    with pytest.raises(ValueError, match="both"):
        differences(first[-1:], second)


class Pieces:
    """A tokenizer that writes `but` and ` but` differently, `house` in two pieces, and any other word
    behind a lone space."""

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
    assert banned_ids(Pieces(), ["but"]) == [1, 2]
    assert banned_ids(Pieces(), ["house", "but"]) == [1, 2, 3, 5]
    # never the space alone
    assert banned_ids(Pieces(), ["odd"]) == [6]
    for word in ("unheard", " ", ""):
        with pytest.raises(ValueError, match="--ban"):
            banned_ids(Pieces(), [word])


def test_tables():
    assert table(["a", "long"], [["xyz", 1], ["x", 22222]]) == "a     long\nxyz      1\nx    22222"
    row = {
        "n": 8,
        "first": 0.5,
        "second": 0.75,
        "difference": -0.25,
        "low": -0.5,
        "high": 0.0625,
        "only_a": 1,
        "only_b": 3,
        "p": 1e-5,
    }
    header, line = difference_table({"all": row}, "as it is", "blind").splitlines()
    assert line.split() == [
        "all",
        "8",
        "50.0",
        "75.0",
        "-25.0",
        "-50.0",
        "…",
        "+6.2",
        "1",
        "3",
        "<",
        "0.0001",
    ]
    assert "only as it is" in header
    assert "looks" not in score_table(
        {
            "tasks": {},
            "questions": 1,
            "accuracy": 1.0,
            "interval": [0.2, 1.0],
            "chance": 0.5,
            "format": 1.0,
            "extraction_failure": 0.0,
            "truncated": 0.0,
            "mean_length": 3.0,
            "failures": {},
            "measured": {},
        }
    )
    cells = {1: {"value": 0.5}, 2: {"value": 0.625}}
    assert k_table({"pass@k": cells, "maj@k": cells}).splitlines()[1].split() == ["pass@k", "50.0", "62.5"]


def test_a_cell_may_hold_a_line():
    assert markdown(["a", "b"], [["x|y", 1]]).splitlines() == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]


def test_json_is_whole_or_not_there(run, tmp_path, capsys, monkeypatch):
    file = tmp_path / "out.json"
    file.write_text("the old one")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume.os, "fsync", full)
    status, _, err = call(capsys, "--model", run, "--items", 1, "--cap", 1, "--json", file)
    assert status == 2 and "No space left" in err and file.read_text() == "the old one"
    monkeypatch.undo()
    status, out, _ = call(capsys, "--model", run, "--items", 1, "--cap", 1, "--json", file)
    # after a full disk, no question is asked again
    assert status == 0 and "going on: 1 answers" in out
    assert json.loads(file.read_text())["answers"][0]["length"] == 1


# ---- mistakes


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model", "nowhere"], "nowhere"),
        (["--prefix", "xyzzy"], "argument --prefix: the tokenizer of"),
        (["--prefix", "look", "--ask", "a.png", "What?"], "argument --prefix: does not go with --ask"),
        (["--compare", "nowhere"], "nowhere"),
        (["--task", "shape"], "shapes"),
        (["--split", "trainn"], "heldout"),
        (["--task", "blink"], "data=FILE"),
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
        (["--wave", "some"], "--wave"),
        (["--markdown", "nowhere/out.md"], "--markdown"),
        (["--protocol", "papers"], "strict"),
        (["--protocol", "cambrian"], "cvbench"),
        (["--prompt", "direct"], "no direct form"),
        (["--ask", "What is it?"], "--ask"),
        (["--ask", "a.png", "What is it?", "--compare", "tiny"], "--compare"),
        (["--ask", "nowhere.png", "What is it?"], "nowhere.png"),
        (["--choice", "yes"], "--ask"),
        (["--what"], "--what"),
        (["--max-prompt", "5"], "max_prompt"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "GPU")]),
    ],
)
def test_a_mistake_is_one_line(run, capsys, argv, words):
    if "--model" not in argv:
        argv = [*argv, "--model", run]
    status, _, err = call(
        capsys,
        *argv,
        *([] if "--items" in argv else ["--items", 2]),
        *([] if "--cap" in argv else ["--cap", 2]),
    )
    assert status == 2 and words in err
    assert err.startswith("evaluate.py: ") and len(err.splitlines()) == 1 and "Traceback" not in err


def test_a_run_without_a_complete_checkpoint(tmp_path, capsys):
    (tmp_path / "checkpoints" / "step_000010.tmp").mkdir(parents=True)
    status, _, err = call(capsys, "--model", tmp_path)
    assert status == 2 and "complete checkpoint" in err


def test_a_truncated_shard_is_named(run, tmp_path, capsys):
    for path in (run / "checkpoints" / "step_000020").iterdir():
        (tmp_path / path.name).write_bytes(
            path.read_bytes()[: 20_000 if path.suffix == ".safetensors" else None]
        )
    status, _, err = call(capsys, "--model", tmp_path, "--items", 1)
    assert status == 2 and "model.safetensors" in err and len(err.splitlines()) == 1


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for words in (
        "Wilson",
        "pass@k",
        "McNemar",
        "--blind",
        "--ban but",
        "runs/shapes --compare tiny",
        "--ask photo.jpg",
        *evaluate.PROTOCOLS,
    ):
        assert words in out
