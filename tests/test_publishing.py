"""What a person meets before the code: extras, citation, changelog, issue templates, workflow, a report."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


def extras():
    """{extra: its requirements}."""
    return tomllib.loads(PROJECT)["project"]["optional-dependencies"]


def test_all_holds_every_extra_that_a_user_may_want():
    [inside] = extras()["all"]
    assert set(re.findall(r"\w+", inside.partition("[")[2])) == set(extras()) - {"all", "dev"}


def test_each_logger_is_an_extra_of_its_name():
    from grpo.config.settings import Config
    from grpo.config.typed import leaves

    kind = leaves(Config)["log"][0]
    for name in re.findall(r"tensorboard|wandb|trackio", str(kind)):
        assert extras()[name][0].startswith(name)
    assert len(set(re.findall(r"tensorboard|wandb|trackio", str(kind)))) == 3


def test_the_citation_names_the_version_of_the_project():
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cite["cff-version"] == "1.2.0" and cite["authors"] == [{"name": "The Glimpse authors"}]
    assert f'version = "{cite["version"]}"' in PROJECT
    assert f"\n## {cite['version']}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem
)
def test_an_issue_template_asks_for_the_plan_and_the_settings(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    asked = " ".join(str(field["attributes"]) for field in form["body"])
    assert "--plan" in asked and "config.yaml" in asked
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) and form["name"] and form["description"]


def test_the_workflow_calls_the_tests_of_a_stranger():
    [path] = (ROOT / ".github/workflows").glob("*.yml")
    steps = yaml.safe_load(path.read_text("utf-8"))["jobs"]["tests"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]


def test_the_shipped_report_is_a_finished_run_of_the_main_job():
    page = (ROOT / "docs/results/shapes/report.html").read_text("utf-8")
    assert '"finished":true' in page and "<title>shapes · Glimpse</title>" in page
    assert len(page) < 3_000_000
    # the folder of a run is the first path that a config names
    assert "out: runs/shapes\\n" in page
