"""Tables and figures of docs/results/findings.md, from made-up records."""

import json
import re
from pathlib import Path

import pytest
import yaml

from grpo.evaluation.statistics import wilson
from tests import result_tables
from tests.bench import findings_figures as figures
from tests.bench import findings_tables as tables
from tests.bench.findings_example import record, records

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "findings.md"


def written(folder, found):
    file = folder / "measured.json"
    file.write_text(json.dumps({"records": found}))
    return file


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """All findings, in a docs/results/ of its own."""
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    (tmp_path / "findings").mkdir()
    return written(tmp_path / "findings", records())


# ---- numbers


def test_three_seeds_have_a_range_and_one_has_wilsons_interval():
    found = [record("a", "rl", seed) for seed in range(3)]
    shares = [each["sets"]["heldout"]["right"] / 400 for each in found]
    number = tables.estimate(found, tables.MEASURES["heldout"])
    assert (number.low, number.high) == (min(shares), max(shares))
    assert number.value == pytest.approx(sum(shares) / 3) and number.values == tuple(shares)
    alone = tables.estimate(found[:1], tables.MEASURES["heldout"])
    assert (alone.low, alone.high) == pytest.approx(wilson(shares[0] * 400, 400))


def test_an_interval_of_sampled_answers_counts_questions():
    one = record("a", "rl", 0)
    number = tables.estimate([one], tables.MEASURES["sampled"])
    share = one["sampled"]["heldout"]["right"] / 800
    assert (number.low, number.high) == pytest.approx(wilson(100 * share, 100))


def test_the_goal_is_reached_where_ten_steps_average_it():
    curve = {"accuracy": [0.0] * 5 + [1.0] * 20, "completions": [10] * 25}
    # steps 5 to 14: one of ten is wrong
    assert tables.MEASURES["steps"].of({"curve": curve}) == (14, None)
    assert tables.MEASURES["completions"].of({"curve": curve}) == (140, None)
    rounds = {"rounds": [2] * 4 + [1] * 21}
    assert tables.MEASURES["completions"].of({"curve": curve | rounds}) == (180, None)
    assert tables.MEASURES["steps"].of({"curve": curve | {"accuracy": [0.84] * 25}}) is None
    assert tables.MEASURES["steps"].of({}) is None


def test_steps_without_a_counting_question_do_not_count():
    # nine numbers in ten steps, and their mean is one half
    counting = [*[1.0] * 3, *[0.25] * 6]
    of = tables.MEASURES["counting_steps"].of
    assert of({"curve": {"counting": [None, *counting]}}) == (10, None)
    assert of({"curve": {"counting": [0.0, *counting]}}) is None
    assert of({"curve": {"counting": [None] * 12}}) is None


def test_numbers_as_text():
    number = tables.Estimate(0.9734, 0.965, 0.98, (0.965, 0.98))
    assert tables.shown(number, True) == "97.3 % (96.5–98.0)"
    steps = tables.Estimate(28080.4, 28080, 28081, (28080, 28081))
    assert tables.shown(steps, False) == "28,080 (28,080–28,081)"
    assert tables.shown(tables.Estimate(3.0, 3.0, 3.0, (3.0,)), False) == "3.0"
    assert tables.shown(None, True) == ""


def test_the_main_jobs_base_stands_in_where_a_finding_has_none():
    rows = tables.arms(records(), "d")
    assert [*rows] == ["base", "best_prefix", "none", "vision", "llm"]
    assert [each["seed"] for each in rows["none"]] == [0, 1, 2]
    assert rows["base"][0]["finding"] == "main"
    # the prefix of another world
    assert tables.arms(records(), "world")["best_prefix"][0]["finding"] == "world"
    assert tables.arms([record("main", "base", 0)], "d") == {}


def test_every_arm_that_is_run_has_a_name_in_plain_words():
    spec = yaml.safe_load(Path(figures.__file__).with_name("findings.yaml").read_text("utf-8"))
    for finding, values in spec["findings"].items():
        for arm in values["arms"]:
            assert tables.name_of(finding, arm) != arm or arm == "base", f"{finding}: {arm}"
        assert {*tables.ARMS[finding]} <= {*values["arms"]}, finding
    assert spec["findings"].keys() == tables.COLUMNS.keys() == figures.PANELS.keys()
    assert all(arm in tables.ARMS[finding] for finding, arm in tables.OVERVIEW)


def test_an_arm_of_no_known_name_comes_last_under_its_own():
    found = [record("d", "another", 0), record("d", "none", 0)]
    assert [*tables.arms(found, "d")] == ["none", "another"]
    assert tables.name_of("d", "another") == "another"
    assert tables.name_of("b", "sft_10_start") == "10 steps of SFT, RL: before"


# ---- tables and page


def test_every_table_of_the_page_is_made(measured):
    for which in re.findall(r"<!-- generated: results (findings/\S+) -->", PAGE.read_text("utf-8")):
        text = result_tables.results(which)
        assert text and (text != result_tables.NOT_MEASURED or which == "findings/mechanism"), which


def test_the_readme_shows_the_findings_once_they_are_measured(measured):
    lines = result_tables.results("findings/overview").splitlines()
    assert lines[0] == "|  | held out | unseen pairs | length |" and len(lines) == 2 + 2 + 5 + 2
    assert lines[3].startswith("| base, best prefix | ") and lines[4].startswith("| RL on the base | ")
    assert "(results/findings.md)" in result_tables.results("findings/link")
    measured.unlink()
    assert result_tables.results("findings/overview") == result_tables.results("findings/link") == ""


def test_the_page_has_every_finding():
    made = re.findall(r"<!-- generated: results findings/(\w+) -->", PAGE.read_text("utf-8"))
    assert set(made) == {*tables.COLUMNS, "about", "mechanism"}


def test_a_table_has_an_arm_a_row_and_no_empty_column(measured):
    text = result_tables.results("findings/a")
    lines = text.splitlines()
    assert lines[0].startswith("|  | seeds | held out | unseen pairs | six objects |")
    assert "| step |" not in lines[0], "no record says which step was asked"
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:8]]
    assert names == ["base", "base, best prefix", *tables.ARMS["a"].values()]
    assert "\npython train.py shapes seed=0 out=runs/rl\n" in text and "the prefix: look :" in text


def test_tasks_are_of_the_set_that_the_finding_is_about(measured):
    found = [each for each in records() if each["finding"] == "world" and each["arm"] == "rl_12"]
    shares = [right / count for right, count in (each["sets"]["noisy"]["tasks"]["Count"] for each in found)]
    [line] = [x for x in result_tables.results("findings/world.tasks").splitlines() if "18 × 12" in x]
    assert f"{100 * sum(shares) / 3:.1f} % ({100 * min(shares):.1f}–" in line


def test_what_is_written_stands_below_its_question(measured):
    lines = result_tables.results("findings/d.texts").splitlines()
    assert lines[1:3] == ["How many stars are there?", "    nothing frozen (right): <think> none </think>"]
    assert len(lines) == 2 + 2 * (1 + 3), "two questions, three arms"


def test_without_records_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    assert result_tables.results("findings/a") == result_tables.NOT_MEASURED
    (tmp_path / "findings").mkdir()
    written(tmp_path / "findings", [record("main", "rl", 0)])
    for which in ("a", "a.tasks", "e.passes", "c.texts", "mechanism"):
        assert result_tables.results(f"findings/{which}") == result_tables.NOT_MEASURED
    assert result_tables.results("findings/main") != result_tables.NOT_MEASURED


def test_a_file_that_holds_something_else_is_named(tmp_path):
    file = tmp_path / "measured.json"
    for text in ("{", "[]", '{"a": 1}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(file))):
            tables.records(file)
    assert tables.records(tmp_path / "none.json") == []


# ---- figures


def test_every_figure_is_drawn_and_alike_every_time(measured, tmp_path):
    pytest.importorskip("matplotlib")
    said = []
    paths = figures.draw(measured, tmp_path, said.append)
    assert {path.stem for path in paths} == {*figures.FIGURES} and not said
    assert all(path.read_text("utf-8").count("<path") > 10 for path in paths)
    only = [each for each in records() if each["finding"] in ("d", "main")]
    again = figures.draw(written(tmp_path, only), tmp_path / "again", said.append)
    assert {path.stem for path in again} == {"d", "main"}
    assert all(path.read_bytes() == (tmp_path / path.name).read_bytes() for path in again)


def test_what_is_missing_is_skipped_with_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    only = [record("d", arm, 0) for arm in tables.ARMS["d"]]
    assert figures.main(["--json", str(written(tmp_path, only))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "d.svg")
    skipped = [line.split(":")[0] for line in lines[:-1]]
    assert skipped == [name for name in figures.FIGURES if name != "d"]
    (tmp_path / "measured.json").write_text("{")
    assert figures.main(["--json", str(tmp_path / "measured.json")]) == 2
    assert str(tmp_path / "measured.json") in capsys.readouterr().err


def test_a_figure_stands_on_the_page_once_it_is_drawn(tmp_path):
    assert figures.markdown(["a"], tmp_path) == ""
    (tmp_path / "a.svg").write_text("<svg/>")
    assert figures.markdown(["a", "b"], tmp_path) == ("![a: every arm with its interval](findings/a.svg)\n\n")
    # every one has its place
    placed = [name for finding in tables.COLUMNS for name in figures.of_section(finding)]
    assert sorted(["overview", *placed, *figures.MECHANISM]) == sorted(figures.FIGURES)


def test_bins_hold_every_answer():
    edges, answers = figures.binned({0: 1, 4: 2, 5: 3, 11: 4}, 5)
    assert edges.tolist() == [0, 5, 10] and answers.tolist() == [3, 3, 4]


def test_a_curve_is_smoothed_over_what_is_there():
    assert figures.smooth([None, None]).tolist() == pytest.approx([float("nan")] * 2, nan_ok=True)
    assert figures.smooth([None, 1.0, 3.0]).tolist() == [2.0, 2.0, 2.0]


def test_the_page_says_if_records_are_of_an_earlier_base(measured):
    found = tables.records(measured)
    assert f"**{len(found)} of the records are of an earlier base" in tables.about(found)
    shipped = tables.weights_hash(tables.ROOT / "models/tiny")
    assert "earlier base" not in tables.about([record | {"base": shipped} for record in found])
