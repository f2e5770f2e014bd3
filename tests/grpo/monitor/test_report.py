"""The report: complete, self-contained, and nothing that a model or a data set says can become part of the
page."""

import base64
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from fake_run import fake_run, question
from PIL import Image

from data.shapes import looking
from data.types import Example, TaskHook
from grpo import report as report_command
from grpo.evaluation.scores import flat_scores, read_completion, scores
from grpo.monitor import report
from grpo.monitor.curves import PANELS, charts, own_panels
from grpo.monitor.warnings import GUARDS
from grpo.storage.jsonl import Metrics, read

HOSTILE = (
    "</script><script>document.title='owned'</script><!--<img src=x onerror=\"document.title='owned'\">"
    "\u2028\x00\x1b[31m\u202eevil\u202c &amp; <b>bold</b>"
)
ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = fake_run(tmp_path_factory.mktemp("run"), steps=40, size=4)
    report.write_report(folder)
    return folder


class Page(HTMLParser):
    """What a browser would find: elements, the scripts' and the style's text, the policy."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.policy, self.inside = (
            [],
            {"script": [], "style": [], "title": []},
            "",
            None,
        )
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.inside = tag
        if tag in self.texts:
            self.texts[tag].append("")
        if dict(attributes).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attributes)["content"]

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside in self.texts:
            self.texts[self.inside][-1] += data


def data_of(folder):
    return json.loads(Page((folder / "report.html").read_text("utf-8")).texts["script"][0])


def sha256(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_page_loads_nothing_and_runs_only_its_own_script(run):
    text = (run / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.texts["script"].__len__() == 2
    assert page.policy.startswith("default-src 'none'; img-src data:")
    assert (
        f"script-src {sha256(page.texts['script'][1])}" in page.policy
        and f"style-src {sha256(page.texts['style'][0])}" in page.policy
    )
    assert "unsafe" not in page.policy
    # a name, not an address
    assert set(re.findall(r"https?://[\w./-]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not {"link", "img", "iframe", "object", "base"} & set(page.elements)
    assert "innerHTML" not in text and "outerHTML" not in text and "insertAdjacentHTML" not in text


def test_everything_a_run_wrote_is_in_the_page(run):
    data = data_of(run)
    assert [moment["step"] for moment in data["moments"]] == list(range(4, 41, 4))
    assert [answer["step"] for answer in data["questions"][0]["answers"]] == [0, 10, 20, 30, 40]
    group = data["moments"][0]["groups"][0]
    source = next(row for row in read(run / "samples.jsonl") if row["kind"] == "train")
    assert group["question"] == source["question"] and group["picture"] == source["picture"]
    for shown, written in zip(group["completions"], source["completions"], strict=True):
        assert (
            shown["tokens"] == written["tokens"]
            and shown["parts"] == written["parts"]
            and shown["clipped"] == written["clipped"]
        )
        for name in ("weight", "logp", "kl"):
            assert shown[name] == pytest.approx(written[name], rel=1e-3)
    assert {chart["title"] for chart in data["charts"]} == {
        panel.title for panel in [*PANELS, *own_panels(looking.HOOK)]
    } - {"Imitation"}
    assert data["summary"]["final"]["accuracy"] == 0.941 and data["summary"]["finished"]


def test_hostile_text_stays_text(tmp_path):
    folder = fake_run(tmp_path, steps=4, size=2)
    line = question(0, "train", 4) | {
        "question": HOSTILE,
        "uid": HOSTILE,
        "task": HOSTILE,
        "choices": [HOSTILE, "b"],
        "answer": HOSTILE,
        "picture": "https://example.com/x.png",
    }
    line["completions"] = [
        {
            "tokens": [HOSTILE, "\x00"],
            "text": HOSTILE,
            "reward": float("nan"),
            "parts": {HOSTILE: 1.0},
            "advantage": None,
            "weight": [1.0, 0.0],
            "logp": [-1.0, None],
            "kl": [],
            "clipped": [],
            "stopped": False,
        }
    ]
    Metrics(folder / "samples.jsonl").write(line)
    Metrics(folder / "samples.jsonl").write(line | {"kind": "heldout"})
    report.write_report(folder)
    text = (folder / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.elements.count("script") == 2 and "b" not in page.elements and "img" not in page.elements
    assert not re.search("[\x00-\x08\x0b-\x1f\u2028\u202e]", text)
    shown = data_of(folder)["moments"][-1]["groups"][-1]
    # as said, to the letter; nothing is fetched
    assert shown["question"] == HOSTILE and shown["picture"] is None


@pytest.mark.parametrize(
    "picture",
    [
        "data:image/svg+xml;base64,PHN2Zz4=",
        "data:text/html;base64,AAAA",
        'data:image/png;base64,AA" onload="x',
        "javascript:1",
        7,
        None,
    ],
)
def test_only_pixels_are_pictures(tmp_path, picture):
    Metrics(tmp_path / "samples.jsonl").write(
        question(0, "train", 1) | {"picture": picture, "completions": []}
    )
    report.write_report(tmp_path)
    assert data_of(tmp_path)["moments"][0]["groups"][0]["picture"] is None


def test_long_text_is_cut_with_a_note(tmp_path):
    long = "x" * 1_000_000
    line = question(0, "train", 1) | {"question": long}
    line["completions"] = [{"tokens": ["y"] * 50_000, "text": long, "reward": 1.0, "weight": [0.1] * 50_000}]
    Metrics(tmp_path / "samples.jsonl").write(line)
    report.write_report(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 300_000
    group = data_of(tmp_path)["moments"][0]["groups"][0]
    assert group["question"].endswith("… (994,000 more characters not shown)")
    assert (
        len(group["completions"][0]["tokens"]) == report.MOST_TOKENS
        and group["completions"][0]["length"] == 50_000
    )


def test_steps_are_spread_over_the_run(tmp_path):
    for step in range(1, 1001):
        Metrics(tmp_path / "samples.jsonl").write(question(0, "train", step) | {"completions": []})
    report.write_report(tmp_path)
    steps = [moment["step"] for moment in data_of(tmp_path)["moments"]]
    assert len(steps) == report.MOST_STEPS and steps[0] == 1 and steps[-1] == 1000
    assert (
        max(b - a for a, b in itertools.pairwise(steps)) - min(b - a for a, b in itertools.pairwise(steps))
        <= 1
    )


def test_an_empty_folder_and_an_unfinished_run(tmp_path):
    report.write_report(tmp_path)
    assert data_of(tmp_path)["charts"] == []
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(7):
        metrics.write(
            {"step": step, "reward": None if step == 3 else 0.1 * step}
            | ({"eval/accuracy": step / 10} if step % 3 == 0 else {})
        )
    report.write_report(tmp_path)
    data = data_of(tmp_path)
    assert data["summary"] == {
        "base": {"accuracy": 0.0},
        "final": {"accuracy": 0.6},
        "seconds": None,
        "finished": False,
    }
    assert data["charts"][0]["lines"][0]["x"] == [0, 1, 2, 4, 5, 6] and data["step"] == 6


def test_broken_files_are_named(tmp_path):
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="summary.json: not JSON"):
        report.write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="config.yaml: not YAML"):
        report.write_report(tmp_path)


def test_what_the_guards_found_and_what_reflection_goes_with(run):
    """The page's own sums: the table by thirds and for the whole run, from the steps' numbers; the guard
    that held, where it first did and how often."""
    data, rows = data_of(run), [row for row in read(run / "metrics.jsonl") if row["step"]]
    [warning] = data["warnings"]
    held = [row["step"] for row in rows if row["guard/truncated"]]
    assert (
        warning
        == {"name": "truncated", "says": GUARDS["truncated"].says, "first": held[0], "steps": len(held)}
        and len(held) > 1
    )
    vlaa = [part for part in data["reflection"] if part["list"].startswith("VLAA")]
    assert [(part["from"], part["to"]) for part in vlaa] == [(1, 14), (15, 28), (29, 40), (1, 40)]
    whole = vlaa[-1]
    assert (
        whole["share"] == pytest.approx(sum(row["aha/vlaa"] for row in rows) / 40, rel=1e-3)
        and whole["words"][1] == "double-check"
    )
    assert (
        whole["gain"][0] == pytest.approx(sum(row["aha/vlaa/gain"] for row in rows) / 40, rel=1e-3)
        and whole["gain"][3] == 120
    )
    assert whole["gain"][1] < whole["gain"][0] < whole["gain"][2]
    assert whole["with"] == pytest.approx(
        sum(r["aha/vlaa"] * r["aha/vlaa/accuracy_with"] for r in rows) / sum(r["aha/vlaa"] for r in rows),
        rel=1e-3,
    )


def test_without_words_of_reflection_there_is_no_table(tmp_path):
    Metrics(tmp_path / "metrics.jsonl").write(
        {"step": 1, "reward": 1.0, "completions/count": 4, "aha/vlaa": 0.0, "aha/visualthinker": 0.0}
    )
    report.write_report(tmp_path)
    assert data_of(tmp_path)["reflection"] == [] and data_of(tmp_path)["warnings"] == []


def test_long_runs_are_thinned_and_keep_their_shape():
    rows = [{"step": step, "reward": step / 10_000} for step in range(10_000)]
    line = charts(rows, TaskHook(), most=500)[0]["lines"][0]
    assert len(line["x"]) == len(line["y"]) == len(line["smooth"]) == 500
    assert line["y"] == pytest.approx([x / 10_000 for x in line["x"]])
    assert line["smooth"][30:-30] == pytest.approx(line["y"][30:-30])


def test_curves_are_a_picture(run):
    pytest.importorskip("matplotlib")
    [path] = report.write_curves(run)
    with Image.open(path) as image:
        assert (
            path.name == "curves.png"
            and image.width > 1200
            and len(image.convert("RGB").getcolors(1 << 20)) > 100
        )


def test_without_matplotlib_one_line_says_so(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.write_curves(run) == []
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "matplotlib is not installed" in said


@pytest.mark.skipif(CHROMIUM is None, reason="draws the page in chromium, which is not installed")
def test_a_browser_draws_it_and_hostile_text_does_nothing(tmp_path):
    folder = fake_run(tmp_path / "run", steps=20, size=4)
    line = question(0, "train", 40) | {"question": HOSTILE, "choices": [HOSTILE, "b"], "answer": HOSTILE}
    line["completions"] = [
        {
            "tokens": ["look", HOSTILE],
            "text": f"<think> look {HOSTILE}",
            "reward": 1.0,
            "parts": {HOSTILE: 1.0},
            "advantage": 0.5,
            "weight": [0.1, -0.1],
            "logp": [-1.0, -2.0],
            "kl": [0.0, 0.1],
            "clipped": [False, True],
            "stopped": False,
        }
    ]
    samples = folder / "samples.jsonl"
    samples.write_bytes(
        b"".join(x for x in samples.read_bytes().splitlines(keepends=True) if b'"heldout"' in x)
    )
    Metrics(folder / "samples.jsonl").write(line)
    report.write_report(folder)
    drawn = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=3000",
            "--enable-logging=stderr",
            "--dump-dom",
            (folder / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = drawn.stdout
    # no script error, nothing refused by the policy
    assert "CONSOLE" not in drawn.stderr, drawn.stderr
    assert (
        "<title>shapes · Glimpse</title>" in dom
        and "owned'</script>" not in dom.partition("<main")[2].partition("</main>")[0]
    )
    main = dom.partition("<main")[2].partition("</main>")[0]
    assert (
        main.count("<figure") == len([*PANELS, *own_panels(looking.HOOK)]) - 1
        and main.count('class="card"') == 1
        and main.count('class="said"') == 5
    )
    assert (
        "⟨U+202E⟩evil" in main
        and "⟨U+0000⟩⟨U+001B⟩[31m" in main
        and "&lt;b&gt;bold&lt;/b&gt;" in main
        and "<b>bold" not in main
    )
    assert 'class="t clipped"' in main and 'style="background: rgba(var(--more)' in main


# ---- everything at once

# 300,000 characters
HUGE = (
    HOSTILE
    + "\udfff \ud800 \x7f\x85\u200b\u2066\u2029\ufffe"
    + "e"
    + "\u0301" * 50
    + "]]>*/-->${alert(1)}`'\"\\"
) * 2_000


@pytest.fixture(scope="module")
def besieged(tmp_path_factory):
    """A run in which every text that a recipe, a data set, a tokenizer or a policy brings is hostile and
    long: settings, names of rewards and tasks, tokens."""
    folder = fake_run(tmp_path_factory.mktemp("besieged"), steps=8, size=2)
    safe = HUGE.encode("utf-8", "replace").decode()
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            tree | {"name": safe, "recipe": safe, "model": safe, "task": safe, "rewards": {safe[:300]: 1.0}},
            allow_unicode=True,
        ),
        encoding="utf-8",
    )
    Metrics(folder / "metrics.jsonl").write(
        {
            "step": 9,
            "reward": 1.0,
            f"rewards/{HUGE[:300]}/mean": 0.5,
            f"eval/accuracy/{HUGE[:300]}": 0.5,
            "eval/accuracy": 0.5,
            "guard/kl": 1,
            "guard/nonfinite": 1,
            "guard/nonfinite_uids": [HUGE],
        }
    )
    (folder / "summary.json").unlink()
    line = question(0, "train", 9) | {
        "uid": HUGE,
        "question": HUGE,
        "task": HUGE,
        "choices": [HUGE, "b"],
        "answer": HUGE,
    }
    line["completions"] = [
        {
            "tokens": [HUGE[:300]] * 3000,
            "text": HUGE,
            "reward": 1.0,
            "parts": {HUGE[:300]: 1.0},
            "advantage": 0.5,
            "weight": [0.1] * 3000,
            "logp": [-1.0] * 3000,
            "kl": [0.1] * 3000,
            "clipped": [False] * 3000,
            "stopped": True,
        }
    ]
    Metrics(folder / "samples.jsonl").write(line)
    Metrics(folder / "samples.jsonl").write(line | {"kind": "heldout"})
    assert max(map(len, (folder / "samples.jsonl").read_bytes().splitlines())) > 300_000
    report.write_report(folder)
    return folder


def test_hostile_text_in_every_place_stays_text(besieged):
    raw = (besieged / "report.html").read_bytes()
    page = Page(raw.decode("utf-8"))
    assert len(raw) < 8_000_000 and page.elements.count("script") == 2 and page.elements.count("style") == 1
    assert page.elements == Page((Path(report.PAGE) / "page.html").read_text("utf-8")).elements, (
        "not one element more than the skeleton has"
    )
    data = page.texts["script"][0]
    assert data.isascii() and data.isprintable() and not set("<>&") & set(data)
    assert (
        page.texts["title"][0].startswith("</script><script>document.title='owned'")
        and len(page.texts["title"][0]) < 200
    )
    assert json.loads(data)["moments"][-1]["groups"][-1]["question"].startswith(HUGE[:6000])


@pytest.mark.skipif(CHROMIUM is None, reason="draws the page in chromium, which is not installed")
def test_a_browser_draws_that_too_and_nothing_runs(besieged, tmp_path):
    drawn = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            "--enable-logging=stderr",
            "--dump-dom",
            (besieged / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "CONSOLE" not in drawn.stderr, drawn.stderr
    head, _, rest = drawn.stdout.partition("<main")
    main = rest.partition("</main>")[0]
    assert "<title>owned" not in head and "<title>&lt;/script&gt;" in head, head[:2000]
    assert (
        "⟨U+D800⟩" in main
        and "\u202e" not in main
        and "⟨U+2028⟩" in main
        and "⟨47 more marks⟩" in main
        and "more characters not shown" in main
    )
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(main)
    assert (
        not {"script", "iframe", "object", "embed", "link"} & {tag for tag, _ in found}
        and "<b>bold" not in main
    )
    assert not [(tag, name) for tag, attributes in found for name in attributes if name.startswith("on")]
    assert {attributes["src"][:11] for _, attributes in found if "src" in attributes} == {"data:image/"}


def test_the_public_name_writes_the_report_of_a_run(tmp_path, capsys):
    run = fake_run(tmp_path / "run", steps=4, size=2)
    assert report_command.main([str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "curves.png"), str(run / "report.html")]
    for argv, said in (
        ([], "usage: python -m grpo.report RUN"),
        ([str(run / "no")], f"grpo.report: {run / 'no'} holds no run"),
        ([str(tmp_path)], f"grpo.report: {tmp_path} holds no run"),
    ):
        assert report_command.main(argv) == 2
        assert said in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [run]


# ---- a run that is not finished, and what the page says of it


def unfinished(folder, steps=20, done=12, **settings):
    """A run that has come to step `done`."""
    fake_run(folder, steps=steps, size=2)
    (folder / "summary.json").unlink()
    tree = yaml.safe_load((folder / "config.yaml").read_text()) | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    for name in ("metrics.jsonl", "samples.jsonl"):
        Metrics(folder / name).resume(done)
    return folder


@pytest.mark.parametrize(
    "ended, age, name",
    [
        ("", 0, "running"),
        ("stopped by SIGINT", 0, "stopped"),
        ("", 100_000, "silent"),
        ("error", 100_000, "stopped"),
    ],
)
def test_the_page_says_whether_the_run_lives(tmp_path, ended, age, name):
    folder = unfinished(tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    os.utime(metrics, (time.time() - age,) * 2)
    report.write_report(folder, ended)
    state = data_of(folder)["state"]
    assert state["name"] == name
    assert state.get("why", "") == (ended or state.get("why", "")) and ("until" in state) == (
        name == "running"
    )
    if name == "running":
        # 5 steps between evaluations, of about two seconds
        assert time.time() + report.QUIET_SECONDS < state["until"] < time.time() + 2000


def test_a_prolonged_run_is_not_finished_by_its_old_summary(tmp_path):
    folder = fake_run(tmp_path, steps=6, size=2)
    assert report.collect(folder)["state"] == {"name": "finished"}
    tree = yaml.safe_load((folder / "config.yaml").read_text()) | {"steps": 9}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    found = report.collect(folder)
    assert found["state"]["name"] == "running" and not found["summary"]["finished"]


@pytest.mark.parametrize(
    "settings, name, data",
    [
        ({}, "shapes", ""),
        ({"task": "jsonl", "data": "/somewhere/mine", "name": None}, "mine", "mine"),
        ({"task": "jsonl", "data": "cups.jsonl", "name": None}, "cups.jsonl", "cups.jsonl"),
        ({"task": "sat", "data": "array/SAT", "name": None}, "shapes", "SAT"),
        ({"task": "jsonl", "data": "mine", "name": "second try"}, "second try", "mine"),
    ],
)
def test_a_page_has_the_name_of_its_run(tmp_path, settings, name, data):
    found = report.collect(unfinished(tmp_path, steps=2, done=1, **settings))
    assert (found["name"], found["data"]) == (name, data)


def test_a_resumed_run_does_not_say_how_long_it_took(tmp_path):
    """Its summary has the seconds of the last start."""
    folder = fake_run(tmp_path / "run", steps=8, size=2)
    assert report.collect(folder)["summary"]["seconds"]
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"resumed_after": 5}))
    assert report.collect(folder)["summary"]["seconds"] is None


# ---- the table of before and after


def rows_of(base, final, hook=looking.HOOK):
    parts = report.compared(base, final, hook)
    return {
        (part["title"], row["label"]): row | {"same": row in part["same"]}
        for part in parts
        for row in part["rows"] + part["same"]
    }


def test_shares_counts_and_numbers_of_questions(tmp_path):
    base = {"accuracy": 0.0, "accuracy/Count": 0.25, "skipped": 0, "mean_length": 0.5, "wrong_to_right": 0}
    base |= {"questions": 200, "questions/Count": 50, "sampled/format": 0.5, "sampled/questions": 199}
    base |= {"first_look_right": 0.5, "aha/vlaa": 0.0, "aha/vlaa/gain": 0.1, "sampled/aha/vlaa": 0.1}
    base |= {"pairs/accuracy/Count": 0.1, "pairs/questions/Count": 20, "odd": 3.0}
    rows = rows_of(base, base | {"skipped": 1, "mean_length": 0.75, "wrong_to_right": 5, "accuracy": 1.0})
    assert ("", "accuracy/Count") not in rows and len(rows) == 11
    shares = {key: row["n"] for key, row in rows.items() if row["share"]}
    assert shares == {
        ("", "Accuracy"): 200,
        ("", "Count"): 50,
        ("", "First look right"): None,
        ("", "VLAA’s list"): 200,
        ("sampled at temperature 1", "Format"): 199,
        ("sampled at temperature 1", "VLAA’s list"): 199,
        ("unseen pairs", "Count"): 20,
    }
    assert {key for key, row in rows.items() if not row["same"]} == {
        ("", "Accuracy"),
        ("", "Skipped"),
        ("", "Mean length"),
        ("", "wrong \u2192 right"),
    }


def test_every_score_of_an_evaluation_is_in_the_table_with_what_it_is():
    """Of what `flat_scores` writes, only these are no shares."""
    example = Example("u", "Which?", ("a", "b"), "a", task="Count")
    answer = read_completion(example, "<answer> (A) </answer>", [1], True, measure=looking.measure)
    found = flat_scores(scores([[answer]]))
    rows = rows_of(found, found)
    assert {label for (_, label), row in rows.items() if not row["share"]} == {"Mean length", "Skipped"}
    hidden = {key for key in found if key.startswith("questions") or key.count("/") > 1}
    assert len(rows) == len(found) - len(hidden)


def test_a_panel_of_zeros_is_a_sentence(tmp_path):
    gap = {"sampling/logp_gap_mean": 0.0, "sampling/logp_gap_max": 0.0}
    rows = [{"step": step, "reward": step, **gap} for step in range(1, 131)]
    drawn = {chart["title"]: chart["zero"] for chart in charts([{"step": 0}, *rows], TaskHook())}
    assert drawn == {"Reward": None, "Log-prob gap": "0 in all 130 steps"}
    rows[7] |= {"sampling/logp_gap_max": 1e-9}
    assert {chart["zero"] for chart in charts(rows, TaskHook())} == {None}


def test_questions_that_were_learned_come_first(tmp_path):
    for uid, right in {"always": (1, 1), "lost": (1, 0), "learned": (0, 1), "never": (0, 0)}.items():
        for step, score in enumerate(right):
            done = {"tokens": ["a"], "text": "a", "reward": 0.0, "parts": {"accuracy": score}}
            line = {"kind": "heldout", "step": step, "uid": uid, "completions": [done]}
            Metrics(tmp_path / "samples.jsonl").write(line)
    found = report.collect(tmp_path)["questions"]
    assert [question["uid"] for question in found] == ["learned", "always", "never", "lost"]


def test_an_unfinished_run_compares_what_was_asked_twice(tmp_path):
    folder = unfinished(tmp_path / "run")
    rows = read(folder / "metrics.jsonl")
    rows[0] |= {"eval/sampled/accuracy": 0.5, "eval/pairs/accuracy": 0.5, "eval/questions": 200}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = report.collect(folder)["compared"]
    assert [part["title"] for part in parts] == [""]
    assert parts[0]["rows"][0]["label"] == "Accuracy" and parts[0]["rows"][1]["inner"]
