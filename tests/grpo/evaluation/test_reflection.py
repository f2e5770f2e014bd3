"""grpo/evaluation/reflection.py against closed forms, brute force and a simulation; nothing in it may take
more than linear time."""

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.types import Example, measure_nothing
from grpo.batch import Groups
from grpo.evaluation.reflection import (
    FORMS,
    LEAST,
    LISTS,
    TAIL,
    TIMES,
    ends_in_loop,
    gain_of,
    gain_within,
    pooled,
    reflection_scores,
    reflects,
    repetition,
    said,
)
from grpo.evaluation.statistics import paired_difference
from grpo.monitor.step_metrics import completion_rows, step_metrics
from grpo.parallel.rows import Share
from grpo.rollout import Rollout

# ---- words


@pytest.mark.parametrize(
    "text, found",
    [
        ("Wait, let me check: it is possibly red.", {"wait", "check", "possibl*"}),
        ("but wait , let me look again", {"wait"}),
        ("AHA! yet", {"aha", "yet"}),
        ("I  should\n\tcheck", {"i should check", "check"}),
        ("Let me double-check. Alternatively", {"double-check", "check", "alternatively"}),
        ("等等wait一下", {"wait"}),
        ("The waiter is waiting for Ahab and the yeti; a checkered, unchecked, impossible await", set()),
        ("hi should check", {"check"}),
        ("", set()),
    ],
)
def test_keywords_are_whole_words_in_any_case(text, found):
    assert said(text) == found


def test_every_keyword_is_found_alone_and_on_its_lists():
    for name, words in LISTS.items():
        for word in words:
            plain = word.rstrip("*")
            assert word in said(f"so , {plain} .") and reflects(said(plain), name)
    assert not reflects(said("yet"), "vlaa") and reflects(said("yet"), "visualthinker")
    assert set(FORMS) == {word for words in LISTS.values() for word in words}


# ---- repetition


def test_repetition_in_closed_form():
    assert repetition([1, 2, 3]) == 0 == repetition([]) == repetition(range(100))
    # 20 4-grams, one distinct
    assert repetition([7] * 23) == 1 - 1 / 20
    # 12 and 21
    assert repetition([1, 2] * 10, n=2) == 1 - 2 / 19
    assert repetition([1, 2, 3, 4, 9, 1, 2, 3, 4]) == 1 - 5 / 6


def brute(tokens, times, least):
    """Every block length, every count of tokens at the end."""
    n = len(tokens)
    return any(
        size >= max(least, times * block)
        and all(tokens[i] == tokens[i + block] for i in range(n - size, n - block))
        for size in range(1, n + 1)
        for block in range(1, size + 1)
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=18), st.integers(2, 4), st.integers(1, 12))
def test_loops_against_brute_force(tokens, times, least):
    assert ends_in_loop(tokens, times, least) == brute(tokens, times, least)


def test_what_is_a_loop_and_what_is_not():
    text = list(range(100, 160))
    assert ends_in_loop(text + [1, 2, 3, 4, 5, 6] * 3) and not ends_in_loop(text + [1, 2, 3, 4, 5, 6] * 2)
    # cut off within a block
    assert ends_in_loop(text + [1, 2, 3, 4, 5, 6] * 3 + [1, 2])
    # it got out again
    assert not ends_in_loop([1, 2, 3, 4, 5, 6] * 3 + text)
    assert ends_in_loop([7] * LEAST) and not ends_in_loop([7] * (LEAST - 1)) and not ends_in_loop([])
    block = list(range(TAIL // TIMES))
    # longer blocks are not looked for
    assert ends_in_loop(block * 5) and not ends_in_loop([*block, -1] * 5)


def test_a_million_characters_take_no_time():
    """Linear, on what is worst for a matcher with second thoughts: what is quadratic takes hours."""
    start = time.process_time()
    for text in (
        "i should " * 110_000,
        "i" + " " * 1_000_000 + "should",
        "double-" * 140_000,
        "possib" * 160_000,
    ):
        assert not said(text) & {"i should check", "double-check", "possibl*"}
    for tokens in ([1] * 599 + [2], [*range(300)] * 2, [1, 1, 2] * 200 + [3]):
        ends_in_loop(tokens * 300, least=10**6, tail=10**6)
    assert repetition([1, 2, 3] * 100_000) > 0.99
    # 0.5 s on a free core
    assert time.process_time() - start < 10


# ---- what reflection is worth

# says "wait", says nothing
W, N = {"wait"}, frozenset()


def test_the_gain_is_taken_inside_each_question():
    """Simpson's paradox: reflection does no harm and looks harmful, because it is the hard question that
    draws it."""
    easy = [(W, True)] + [(N, True)] * 7
    hard = [(W, False)] * 6 + [(W, True)] + [(N, False)]
    found = reflection_scores([easy, hard])
    # overall: it seems to cost 62 points
    assert found["vlaa/accuracy_with"] == 2 / 8 and found["vlaa/accuracy_without"] == 7 / 8
    # inside: it brings 7
    assert found["vlaa/gain"] == pytest.approx((0 + 1 / 7) / 2) and found["vlaa/gain_groups"] == 2
    assert (
        found["vlaa"] == found["visualthinker"] == found["word/wait"] == 0.5
        and found["word/i_should_check"] == found["word/possibl"] == 0
    )
    assert found["vlaa/gain_low"] < found["vlaa/gain"] < found["vlaa/gain_high"]


def test_questions_with_one_kind_only_say_nothing_and_absent_kinds_are_left_out():
    assert gain_within([[(True, True), (True, False)], [(False, True)], []]) is None
    found = reflection_scores([[(N, True), (N, False)]])
    assert found["vlaa"] == 0 and found["vlaa/accuracy_without"] == 0.5
    assert not {"vlaa/accuracy_with", "vlaa/gain", "vlaa/gain_low", "vlaa/gain_groups"} & set(found)


@pytest.mark.parametrize(
    "pairs", [[(1, 0)], [(1, 0), (0, 1), (1, 1)], [(1, 0)] * 9 + [(0, 0)] * 4 + [(0, 1)] * 2, [(1, 1)] * 5]
)
def test_with_one_completion_of_each_kind_it_is_the_paired_difference(pairs):
    found = gain_within([[(True, bool(a)), (False, bool(b))] for a, b in pairs])
    known = paired_difference([bool(a) for a, _ in pairs], [bool(b) for _, b in pairs])
    assert (found.groups, found.mean, found.low, found.high) == pytest.approx(
        (known.n, known.difference, known.low, known.high)
    )


def test_the_interval_covers():
    """Groups of 8, reflection worth +0.15: the truth lies inside the interval in about 95 of 100 steps,
    with 5 questions as with 40."""
    draw = random.Random(0)
    for questions in (5, 40):
        inside = trials = 0
        for _ in range(400):
            groups = []
            for _ in range(questions):
                base = draw.choice((0.2, 0.5, 0.8))
                group = [(i < 3, draw.random() < base + 0.15 * (i < 3)) for i in range(8)]
                groups.append(group)
            gain = gain_within(groups)
            inside, trials = inside + (gain.low <= 0.15 <= gain.high), trials + 1
        assert 0.92 <= inside / trials <= 1.0, questions


# ---- from a rollout to a line of metrics


def test_the_metrics_of_a_rollout():
    """Two questions of any data set, two completions each: one loops, two are one and the same, one waits
    and is right."""
    examples = [
        Example(uid=f"mine/{i}", question="Is it red?", choices=("yes", "no"), answer="yes", task="T")
        for i in range(2)
    ]
    right, wrong = "</think> <answer> (A) </answer>", "</think> <answer> (B) </answer>"
    texts = [[f"<think> Wait , {right}", f"<think> {wrong}"], [f"<think> {wrong}"] * 2]
    tokens = torch.zeros(2, 2, 18, dtype=torch.long)
    tokens[0, 0, :17], tokens[0, 1, :5], tokens[1, :, :3] = 7, torch.arange(5), torch.tensor([1, 2, 3])
    # the stop token, behind sixteen sevens
    tokens[0, 0, 16] = 9
    length, stopped = torch.tensor([[17, 5], [3, 3]]), torch.tensor([[True, False], [True, True]])
    rollout, reward = (
        Rollout(tokens, length, stopped, torch.zeros(2, 2, 18)),
        torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    )
    found = step_metrics(
        completion_rows(
            Groups(examples, [], rollout, texts, reward, {"accuracy": reward}, 0, Share.whole(2, 2)),
            measure_nothing,
        )
    )
    assert found["completions/count"] == 4 and found["completions/identical_groups"] == 0.5
    assert found["completions/loop_ratio"] == 0.25 and found["completions/repetition"] == pytest.approx(
        (1 - 1 / 13) / 4
    )
    assert found["completions/mean_length_right"] == 17 and found[
        "completions/mean_length_wrong"
    ] == pytest.approx(11 / 3)
    assert (
        found["aha/vlaa"] == 0.25
        and found["aha/vlaa/accuracy_with"] == 1
        and found["aha/vlaa/accuracy_without"] == 0
    )
    assert (
        found["aha/vlaa/gain"] == 1 and found["aha/vlaa/gain_groups"] == 1 and found["aha/word/wait"] == 0.25
    )
    assert "aha/looking" not in found, "only the hook of the built-in world measures that"


# ---- over many steps


def line(groups, step):
    return {"step": step, "completions/count": sum(map(len, groups))} | {
        f"aha/{key}": value for key, value in reflection_scores(groups).items()
    }


def test_pooled_steps_equal_one_great_step():
    draw = random.Random(1)
    steps = [
        [
            [(W if draw.random() < share else N, draw.random() < 0.6) for _ in range(size)]
            for _ in range(questions)
        ]
        for share, size, questions in ((0.5, 4, 3), (0.0, 6, 2), (1.0, 3, 2), (0.3, 8, 5))
    ]
    rows = [{"step": 0, "eval/accuracy": 0.5}] + [line(groups, 1 + i) for i, groups in enumerate(steps)]
    whole, found = reflection_scores([group for groups in steps for group in groups]), pooled(rows, "vlaa")
    assert found["share"] == pytest.approx(whole["vlaa"])
    assert found["with"] == pytest.approx(whole["vlaa/accuracy_with"]) and found["without"] == pytest.approx(
        whole["vlaa/accuracy_without"]
    )
    gain = found["gain"]
    assert gain.groups == whole["vlaa/gain_groups"] > 3
    assert (gain.mean, gain.sd, gain.low, gain.high) == pytest.approx(
        [whole[f"vlaa/{key}"] for key in ("gain", "gain_sd", "gain_low", "gain_high")]
    )


def test_pooling_says_none_where_there_is_nothing():
    assert pooled([], "vlaa") is None and pooled([{"step": 0, "eval/accuracy": 1.0}], "vlaa") is None
    assert pooled([line([[(N, True)]], 1)], "vlaa") == {"share": 0, "with": None, "without": 1, "gain": None}
    assert pooled([line([[(W, False)]], 1)], "vlaa") == {"share": 1, "with": 0, "without": None, "gain": None}
    assert gain_of(1, 0.5, 0.25).sd == 0
