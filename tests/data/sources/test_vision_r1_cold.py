"""Vision-R1-cold as published: two JSON arrays of different fields, and the folder of their pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from data.sources.jsonl import JsonlShard
from data.sources.table import open_split
from data.types import BadRow

CHAIN = "<think> Wait, the image shows 3. </think><answer> Final Answer:B </answer>"
LLAVA = {
    "id": "7",
    "image": "llava_cot_images/coco/1.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhich?\nA. 2\nB. 3"},
        {"from": "gpt", "value": CHAIN},
    ],
}
MULBERRY = {
    "images": "mulberry_images/geo/2.png",
    "conversations": [
        {"from": "user", "value": '<image>How many? Return the final answer as "Final Answer:option".'},
        {"from": "assistant", "value": CHAIN.replace("B", "3")},
    ],
}


@pytest.fixture
def cold(tmp_path):
    for name in (LLAVA["image"], MULBERRY["images"]):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((28, 28, 3), 9, np.uint8)).save(path)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "vision_r1_llava_cot_full.json").write_text(json.dumps([LLAVA, LLAVA | {"id": "7"}], indent=2))
    (folder / "vision_r1_mulberry_sft_full.json").write_text(json.dumps([MULBERRY]))
    (folder / "dataset_info.json").write_text(json.dumps({"vision_r1": {"file_name": "x.json"}}))
    return folder, tmp_path / "pictures"


def test_both_arrays_are_read(cold):
    folder, pictures = cold
    found = list(open_split("vision_r1_cold", f"{folder},{pictures}", "train", None, 0, heldout=0))
    assert [e.extra["documents"] for e in found] == [(CHAIN,), (CHAIN,), (CHAIN.replace("B", "3"),)]
    assert len({e.uid for e in found}) == 3 and [len(e.pictures) for e in found] == [1, 1, 1]
    assert found[0].question == "Which?\nA. 2\nB. 3" and found[2].question.startswith("How many? Return")
    assert found[0].pictures[0] == pictures / LLAVA["image"]


def test_the_answers_without_their_chains(cold):
    """Imitation then learns what the template makes of the answer."""
    folder, pictures = cold
    where = f"{folder},{pictures}"
    whole, bare = (
        list(open_split(name, where, "train", None, 0, heldout=0))
        for name in ("vision_r1_cold", "vision_r1_cold_answers")
    )
    assert [e.answer for e in bare] == ["Final Answer:B", "Final Answer:B", "Final Answer:3"]
    assert not any("documents" in e.extra for e in bare)
    assert [e.uid for e in bare] == [e.uid for e in whole]


def test_a_missing_picture_is_named(cold):
    folder, pictures = cold
    (pictures / MULBERRY["images"]).unlink()
    found = open_split("vision_r1_cold", f"{folder},{pictures}", "all", None, 0)
    with pytest.raises(BadRow, match=r"mulberry_sft_full.json, item 1: .*mulberry_images/geo/2.png in"):
        found[2]


def test_opening_reads_no_row_where_nothing_is_held_out(cold, monkeypatch):
    folder, pictures = cold
    monkeypatch.setattr(JsonlShard, "row", lambda *_: 1 / 0)
    where = f"{folder},{pictures}"
    assert len(open_split("vision_r1_cold", where, "train", None, 0, heldout=0)) == 3
    assert len(open_split("vision_r1_cold", where, "heldout", None, 0, heldout=0)) == 0
