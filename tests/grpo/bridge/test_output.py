"""What the bridge writes: files that the project's own reader, its training and LLaMA-Factory take; a funnel
whose counts add up; a page in which no text becomes markup."""

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from random import Random

import pytest
from PIL import Image

import train
from data.answers import is_right, well_formed
from data.shapes import world
from data.shapes.documents import described
from data.shapes.reasoner import reason
from data.shapes.world import Shapes
from data.sources.table import open_split
from data.types import MARK, BadRow, Example
from grpo.bridge.filters import Known, Rules
from grpo.bridge.output import Output, document_of, save_picture, write_results
from grpo.bridge.report import counted, write_report
from grpo.bridge.store import Stored
from grpo.serving.messages import Reply, png

RULES = Rules(least_words=5)
CHAIN = "look : the description says red . but wait , let me look again : red , so it is so ."
WORLD = Output(layout="<think> {thinking} </think> <answer> ({answer}) </answer>")
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u2028\x00"


def stored(text, thinking=CHAIN, description="red x 3", attempt=0, finish="stop", error=""):
    seen = Stored("u", "describe", 0, "seer", Reply("d", description, "", "stop", 5, 7))
    reply = Reply("r", text, thinking, finish, 11, 13, 0.5, error)
    return {"describe": seen, "reason": Stored("u", "reason", attempt, "thinker", reply)}


@pytest.fixture
def examples(tmp_path):
    """A drawn picture with choices, a file, two files of bytes with marks, none."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.JPG")
    bytes_of = png(Image.new("RGB", (30, 30), "blue"))
    two = Example("two", f"Is {MARK} like {MARK} ?", ("yes", "no"), "no", "Same", (bytes_of, bytes_of))
    return [
        Shapes("train", 4, seed=1)[0],
        Example("file", "How many?", (), "3", "Count", (tmp_path / "red.JPG",), {"kind": "number"}),
        two,
        Example("none", "What colour has grass?", (), "green", extra={"kind": "text"}),
        Example("wrong", "What colour has snow?", (), "white", extra={"kind": "text"}),
    ]


@pytest.fixture
def results(tmp_path, examples):
    replies = {
        example.uid: stored(f"({example.letter})" if example.choices else example.answer)
        for example in examples
    }
    replies["wrong"] = stored("black", attempt=2)
    out = tmp_path / "out"
    funnel = write_results(
        out,
        examples,
        lambda uid: replies.get(uid, {}),
        RULES,
        replace(WORLD, llama_factory=True),
        Known(RULES),
    )
    return out, funnel


def test_our_reader_gives_the_same_questions(results, examples):
    out, funnel = results
    read = open_split("jsonl", out / "train.jsonl", "all", None, 0)
    assert len(read) == funnel.kept == 4
    for example, found in zip(examples, read):
        for name in ("uid", "question", "choices", "answer", "task", "wording"):
            assert getattr(found, name) == getattr(example, name), name
        assert len(found.pictures) == len(example.pictures)
        assert found.extra["kind"] == ("text" if example.choices else example.extra["kind"])
        (document,) = found.extra["documents"]
        assert (
            well_formed(document) and is_right(document.replace("(3)", "3"), example) is not example.choices
        )
        assert "the image shows red" in document and "description" not in document
        bridge = found.extra["bridge"]
        assert bridge["description"] == "red x 3" and bridge["attempts"] == {"describe": 1, "reason": 1}
        assert bridge["models"] == {"describe": "seer", "reason": "thinker"}


def test_pictures_lie_beside_and_are_stored_once(results, examples):
    out, _ = results
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    names = [name for row in rows for name in row["pictures"]]
    assert len(names) == 4 and len(set(names)) == 3
    assert {str(path.relative_to(out)) for path in (out / "pictures").iterdir()} == set(names)
    # a file takes no space a second time
    assert os.path.samefile(out / rows[1]["pictures"][0], examples[1].pictures[0])
    assert Image.open(out / rows[0]["pictures"][0]).size == (84, 84)
    before = {path: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()}
    for example in examples:
        for picture in example.pictures:
            assert save_picture(picture, out, "x") in names
    assert before == {path: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()}


def test_llama_factory_reads_the_same(results, examples):
    out, _ = results
    info = json.loads((out / "dataset_info.json").read_text())["bridge"]
    rows = json.loads((out / info["file_name"]).read_text())
    ours = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert (info["formatting"], info["columns"]) == (
        "sharegpt",
        {"messages": "conversations", "images": "images"},
    )
    assert [row["images"] for row in rows] == [row["pictures"] for row in ours]
    for row, example in zip(rows, examples):
        human, model = row[info["columns"]["messages"]]
        assert (human["from"], model["from"]) == ("human", "gpt")
        # LLaMA-Factory wants one mark for each picture
        assert human["value"].count(MARK) == len(row["images"])
        assert human["value"].replace(MARK, "") == example.asked.replace(MARK, "")
        assert model["value"] in [row["extra"]["documents"][0] for row in ours]
    # our own reader takes that file, too
    assert len(open_split("jsonl", out / info["file_name"], "all", None, 0)) == len(rows)


def test_the_published_layout():
    example = Example("u", "Which?", ("a", "b"), "b")
    assert (
        document_of(example, "Hmm.", Output().layout)
        == "<think> Hmm. </think><answer> Final Answer:B </answer>"
    )
    document = document_of(replace(example, choices=()), "{answer} {thinking}", Output().layout)
    assert document == "<think> {answer} {thinking} </think><answer> Final Answer:b </answer>"
    assert is_right(document_of(example, "Hmm.", Output().layout), example)
    for layout in ("{thinking}", "{answer} {answer} {thinking}"):
        with pytest.raises(ValueError, match="must hold"):
            Output(layout=layout)


def test_the_counts_add_up(results, examples):
    _, funnel = results
    assert (funnel.asked, funnel.kept, funnel.first) == (5, 4, {"wrong": 1})
    assert sum(funnel.first.values()) + funnel.kept == funnel.asked
    assert {name: tuple(pair) for name, pair in funnel.kinds.items()} == {
        "choices": (2, 2),
        "number": (1, 1),
        "text": (1, 2),
    }
    assert [sum(bars) for bars in funnel.lengths.values()] == [5, 4]
    assert funnel.words["before"].exact["wait"] == 5 and funnel.words["after"].exact["wait"] == 4
    assert funnel.replaced == {"the description says": 4}
    assert "\n".join(funnel.lines()).splitlines()[-1].split() == ["kept", "4", "80.0%"]


def test_three_examples_of_each_reason_and_no_more(tmp_path):
    questions = [Example(f"q{n}", f"Question {n}?", (), "5", extra={"kind": "number"}) for n in range(20)]
    funnel = write_results(
        tmp_path, questions, lambda uid: stored("6" if uid[-1] == "1" else "5"), RULES, WORLD, Known(RULES)
    )
    assert {name: len(shown) for name, shown in funnel.shown.items()} == {"kept": 3, "wrong": 2}
    nothing = write_results(
        tmp_path, questions, lambda uid: {}, RULES, replace(WORLD, llama_factory=True), Known(RULES)
    )
    assert nothing.first == {"failed": 20} and len(nothing.shown["failed"]) == 3
    assert (tmp_path / "train.jsonl").read_text() == "" and json.loads(
        (tmp_path / "llama_factory.json").read_text()
    ) == []


def test_an_error_leaves_the_files_as_they_were(results, examples):
    out, _ = results
    before = {name: (out / name).read_bytes() for name in ("train.jsonl", "llama_factory.json")}

    def breaks(uid):
        if uid == "two":
            raise OSError("no space left on device")
        return stored("3")

    with pytest.raises(OSError, match="no space"):
        write_results(out, examples, breaks, RULES, replace(WORLD, llama_factory=True), Known(RULES))
    assert before == {name: (out / name).read_bytes() for name in before}


def test_an_example_that_cannot_be_used_is_left_out(tmp_path):
    class Rows(list):
        def __getitem__(self, index):
            if index == 1:
                raise BadRow("file, line 2", "answer", "is missing")
            return super().__getitem__(index)

    broken = Example("b", "How?", (), "5", pictures=(b"\x89PNG no picture",), extra={"kind": "number"})
    good = Example("g", "How many?", (), "5", extra={"kind": "number"})
    funnel = write_results(
        tmp_path, Rows([good, good, broken]), lambda uid: stored("5"), RULES, WORLD, Known(RULES)
    )
    assert funnel.kept == len((tmp_path / "train.jsonl").read_text().splitlines())


def test_half_a_character_of_a_server_does_no_harm(tmp_path):
    example = Example("g", "How many?", (), "5", extra={"kind": "number"})
    write_results(
        tmp_path, [example], lambda uid: stored("5", CHAIN + " \ud800 ."), RULES, WORLD, Known(RULES)
    )
    (read,) = open_split("jsonl", tmp_path / "train.jsonl", "all", None, 0)
    read.extra["documents"][0].encode()


# ---- the page


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements, self.data = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes).get("id")))

    def handle_data(self, data):
        if self.elements and self.elements[-1] == ("script", "run"):
            self.data += data


TOLD = {
    "name": f"mine {HOSTILE}",
    "task": "jsonl",
    "data": HOSTILE,
    "stages": [
        {"stage": "reason", "model": HOSTILE, "parked": 1, "replies": 7, "tokens_in": 40, "tokens_out": 90}
        | {"seconds": 61.0, "questions": 5, "money": 1.25}
    ],
    "prompts": {"reason": HOSTILE},
    "left_out": 2,
    "settings": HOSTILE,
    "versions": {"python": "3.11"},
}


def test_texts_of_models_stay_text_on_the_page(tmp_path):
    example = Example("g", HOSTILE, (HOSTILE, "no"), "no", HOSTILE, extra={"kind": "text"})
    replies = stored(f"no {HOSTILE}", CHAIN + HOSTILE, HOSTILE, error="")
    funnel = write_results(tmp_path, [example], lambda uid: replies, RULES, WORLD, Known(RULES))
    path = write_report(tmp_path, funnel, TOLD)
    page = Page(path.read_text())
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not any(tag in ("img", "b", "a") for tag, _ in page.elements)
    run = json.loads(page.data)
    assert run["examples"] and HOSTILE in next(iter(run["examples"].values()))[0]["question"]
    assert re.search(r"default-src 'none'; img-src data:", path.read_text())


def test_the_page_of_an_empty_bridge(tmp_path):
    funnel = write_results(tmp_path, [], lambda uid: {}, RULES, WORLD, Known(RULES))
    assert counted(funnel)["asked"] == 0
    assert write_report(tmp_path, funnel, TOLD).exists()


# ---- training


def test_the_results_train_the_built_in_model(tmp_path, in_process):
    """`method: sft` for two steps, from what the bridge writes about the built-in world."""
    questions = [world.item("train", 2, number) for number in range(8)]
    replies = {}
    for scene, example in questions:
        chain, _, answer = reason(f"{described(scene, Random(0))[1]}\n{example.asked}", Random(1)).partition(
            "</think>"
        )
        replies[example.uid] = stored(answer, chain.removeprefix("<think>"))
    write_results(
        tmp_path / "bridge", [example for _, example in questions], replies.get, RULES, WORLD, Known(RULES)
    )
    data = tmp_path / "bridge" / "train.jsonl"
    count = len(data.read_text().splitlines())
    settings = (
        f"init=null method=sft task=jsonl data={data} heldout=0 steps=2 prompts={count} cap=128 eval.items=0"
    )
    settings += f" save.every=0 optim.name=adamw optim.lr=1e-3 optim.warmup=0 out={tmp_path / 'run'}"
    assert train.main(["tiny_base", *settings.split()]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second = (row["loss"] for row in rows if "loss" in row)
    assert second < first < 2.5
