"""grpo.words: the words of a file of chains, counted as Vision-R1's Table 4 does."""

import gzip
import json

import pytest

from grpo import words

CHAIN = "Wait, let me check. Hmm, waiting is a mistake; WAIT. Rechecking. Alternatively: checked."
ROWS = {
    "LLaVA-CoT": {
        "id": "1",
        "conversations": [{"from": "human", "value": "wait"}, {"from": "gpt", "value": CHAIN}],
    },
    "Mulberry": {"conversations": [{"from": "user", "value": "hmm"}, {"from": "assistant", "value": CHAIN}]},
    "messages": {
        "messages": [
            {"role": "system", "content": "check"},
            {"role": "assistant", "content": [{"type": "text", "text": CHAIN}]},
        ]
    },
    "own documents": {"question": "Wait?", "answer": "check", "documents": [CHAIN]},
    "own schema": {"question": "Wait?", "answer": "check", "extra": {"documents": [CHAIN]}},
    "samples.jsonl": {"question": "Wait?", "completions": [{"text": CHAIN, "reward": 1.0}]},
    "text": {"text": CHAIN},
}
# of CHAIN: exact, with other endings
WANTED = {"wait": (2, 3), "hmm": (1, 1), "mistake": (1, 1), "alternatively": (1, 1), "check": (1, 2)}


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("form", ["lines", "array", "gzip"])
def test_every_layout_is_counted_the_same(tmp_path, layout, form):
    path = tmp_path / "file.json"
    if form == "array":
        path.write_text(json.dumps([ROWS[layout]] * 3, indent=1))
    else:
        text = (json.dumps(ROWS[layout]) + "\n") * 3
        path.write_bytes(gzip.compress(text.encode()) if form == "gzip" else text.encode())
    found = words.count([path], words.VISION_R1)
    assert found.documents == 3
    for word, (exact, stem) in WANTED.items():
        assert (found.exact[word], found.stem[word], found.holding[word]) == (3 * exact, 3 * stem, 3), word


def test_the_program_prints_a_line_for_each_word(tmp_path, capsys):
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps({"chain": CHAIN}) + "\n" + json.dumps({"chain": "no such word"}) + "\n")
    assert words.main([str(path), "--field", "chain", "--words", "wait, let me"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "2 documents"
    assert [line.split() for line in said[2:]] == [
        ["wait", "2", "1.000", "3", "1.500", "50.0%"],
        ["let", "me", "1", "0.500", "1", "0.500", "50.0%"],
    ]


@pytest.mark.parametrize(
    "text, arguments, said",
    [
        ('{"question": "?"}', (), "no row of"),
        ("not JSON", (), "is not JSON"),
        ("{}", ("--words", " , "), "--words is empty"),
        (None, (), "No such file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, text, arguments, said):
    path = tmp_path / "file.jsonl"
    if text is not None:
        path.write_text(text)
    assert words.main([str(path), *arguments]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("grpo.words: ") and said in line and line.count("\n") == 0
