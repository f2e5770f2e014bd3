"""The pipeline of Vision-R1 on the built-in world runs from end to end, at a tiny size."""

import json

import pytest

from tests.bench import vision_r1


@pytest.mark.slow
def test_every_stage_runs_once_and_the_last_line_has_its_figures(tmp_path, capsys):
    size = ["--questions", "24", "--items", "4", "--samples", "1", "--arms", "ptst", "long"]
    argv = ["--out", str(tmp_path), *size, "--settings", "steps=2", "prompts=4", "eval.items=0"]
    found = vision_r1.main(argv)
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1]) == json.loads(json.dumps(found)) and found["minutes"] > 0
    assert list(found["stages"]) == ["bridge", "base", "cold", "ptst", "long"]
    for stage, each in found["stages"].items():
        assert 0 <= each["accuracy"] <= 1 and each["length"] > 0
        assert stage == "base" or 0 <= each["kept"] <= 1
    assert (tmp_path / "bridge" / "report.html").is_file() and (tmp_path / "ptst" / "report.html").is_file()
    # what is there is read, not repeated
    again = vision_r1.main(argv)
    assert "$ python" not in capsys.readouterr().out and again == found
