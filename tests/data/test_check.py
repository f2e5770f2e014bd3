"""`python -m data.check`: every bad row by number, field and remedy, and its exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

from data import check

pytest.importorskip("pyarrow", reason="reading parquet is an optional extra")
from layouts import cvbench_row, png, sat_row, shown, vsr_row, write, write_lines

ROW = {"question": "What is it?", "choices": ["a cup", "a jug"], "answer": "a cup"}


def said(capsys, *argv):
    """(exit status, the lines it prints)"""
    capsys.readouterr()
    status = check.main([str(a) for a in argv])
    out = capsys.readouterr()
    return status, (out.out + out.err).splitlines()


def test_every_bad_row_is_reported(tmp_path, capsys):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png()[:-40])
    (tmp_path / "narrow.png").write_bytes(png(size=(500, 2)))
    rows = [
        ROW | {"picture": "good.png"},
        ROW | {"answer": "C"},
        ROW | {"picture": "cut.png"},
        ROW,
        "{",
        ROW | {"pictures": ["good.png", "narrow.png"]},
        ROW | {"uid": "mine/0"},
    ]
    status, lines = said(capsys, write_lines(tmp_path / "mine.jsonl", rows))
    assert status == 1 and len(lines) == 6
    for line, number, field, remedy in zip(
        lines,
        (2, 3, 5, 6, 7),
        ("answer", "picture 1", "not JSON", "picture 2", "uid"),
        (
            "its letter, or its index from 0",
            "leave the row out",
            "one object a line",
            "leave the row out",
            "give each row its own",
        ),
    ):
        assert (
            line.startswith(f"{tmp_path / 'mine.jsonl'}, line {number}: ")
            and field in line
            and remedy in line
        ), line
    assert lines[-1] == "1 files, 7 rows, 7 of them questions of jsonl, 5 of these bad"


def test_a_good_file(tmp_path, capsys):
    assert said(capsys, write_lines(tmp_path / "mine.jsonl", [ROW])) == (
        0,
        ["1 files, 1 rows, 1 of them questions of jsonl, 0 of these bad"],
    )
    assert said(capsys, write_lines(tmp_path / "none.jsonl", []))[0] == 1


def test_parquet_of_a_named_source(tmp_path, capsys):
    rows = [
        sat_row(0),
        sat_row(1, pictures=2),
        sat_row(2, correct_answer="up"),
        sat_row(3, image_bytes=[{"bytes": b"no picture", "path": None}]),
    ]
    status, lines = said(capsys, write(tmp_path / "SAT_train.parquet", "sat", rows), "--task", "sat")
    assert status == 1 and lines[-1] == "1 files, 4 rows, 3 of them questions of sat, 2 of these bad"
    assert (
        "row 2: correct_answer: 'up'" in lines[0]
        and "row 3: picture 1: the picture (10 bytes) cannot be read" in lines[1]
    )
    status, lines = said(
        capsys,
        write(tmp_path / "test.parquet", "cvbench", [cvbench_row(image=shown(1)[0])]),
        "--task",
        "cvbench",
    )
    assert status == 0 and lines[-1].endswith("0 of these bad; the published benchmark has 2638 rows")


def test_what_cannot_be_read(tmp_path, capsys):
    assert said(capsys, tmp_path / "gone.jsonl") == (
        2,
        [f"data.check: {tmp_path / 'gone.jsonl'}: no such file or folder"],
    )


def test_as_a_command(tmp_path):
    file = write_lines(tmp_path / "mine.jsonl", [ROW, ROW | {"answer": "C"}])
    done = subprocess.run(
        [sys.executable, "-m", "data.check", file],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "line 2: answer: 'C'" in done.stdout and "Traceback" not in done.stderr


def test_a_kind_of_error_is_shown_five_times_and_then_counted(tmp_path, capsys):
    rows = [ROW | {"answer": f"cup {i}"} for i in range(30)] + [ROW | {"question": ""}, ROW]
    status, lines = said(capsys, write_lines(tmp_path / "mine.jsonl", rows))
    assert status == 1 and len(lines) == 8 and all("line" in line for line in lines[:6])
    assert lines[5].endswith("the question is empty; correct it, or leave the row out")
    assert (
        lines[6].startswith("and 25 more rows like the 5 above: ")
        and "is not one of the … choices" in lines[6]
    )
    assert lines[7] == "1 files, 32 rows, 32 of them questions of jsonl, 31 of these bad"


def test_the_list_of_missing_pictures(tmp_path, capsys):
    """VSR names COCO's files with their addresses: each that is not there, once. Others have names only."""
    coco = tmp_path / "coco"
    (coco / "train2017").mkdir(parents=True)
    (coco / "train2017" / f"{7:012}.jpg").write_bytes(png())
    rows = [vsr_row(n) for n in (5, 7, 5, 9)] + [vsr_row(1, label=3)]
    file = write_lines(tmp_path / "test.jsonl", rows)
    status, lines = said(capsys, f"{file},{coco}", "--task", "vsr", "--missing", tmp_path / "missing.txt")
    assert status == 0 and lines == [f"wrote the names of 2 missing pictures to {tmp_path / 'missing.txt'}"]
    link = "http://images.cocodataset.org/train2017/{:012}.jpg"
    assert (tmp_path / "missing.txt").read_text().splitlines() == [link.format(5), link.format(9)]
    own = write_lines(tmp_path / "mine.jsonl", [ROW | {"picture": "a.png"}, ROW | {"picture": "b.png"}])
    assert said(capsys, own, "--missing", tmp_path / "missing.txt")[0] == 0
    assert (tmp_path / "missing.txt").read_text() == "a.png\nb.png\n"
    assert said(capsys, own, "--missing", tmp_path / "nowhere" / "missing.txt")[0] == 2
