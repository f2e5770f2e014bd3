"""Rewards: what is paid, and what must not be. Each adversarial text is a hack that was paid somewhere
(see docs/04)."""

import importlib.util

import pytest
import torch

from data.types import Example
from grpo.rewards.rules import REWARDS, overlong, rule, score

ASKED = Example(
    uid="t/0", question="Which is nearer?", choices=("the red cube", "the blue ball"), answer="the blue ball"
)
FREE = Example(uid="t/1", question="How many?", choices=(), answer="3")


def paid(text, part, example=ASKED, length=None, cap=None):
    lengths = None if length is None else torch.tensor([[length]])
    return score([[text]], [example], {part: 1.0}, lengths, cap)[1][part].item()


# one of them will be right; the paper's regex pays
# a newline is no obstacle; a tail breaks the form
@pytest.mark.parametrize(
    "text, accuracy, format, paper, hard",
    [
        ("<think>look</think><answer>B</answer>", 1, 1, 1, 1),
        ("<think>look</think>\n<answer>(B) the blue ball</answer>\n", 1, 1, None, 1),
        ("<think>look</think><answer>the blue ball</answer>", 1, 1, 1, 1),
        ("<think>look</think><answer>A</answer>", 0, 1, 1, 0),
        # the answer is inside the thinking
        ("<think>look<answer>B</answer>", 0, 0, 0, 0),
        # right without thinking: only hard_format minds
        ("<answer>B</answer>", 1, 0, 0, 0),
        # hedging
        ("<think>look</think><answer>A or B</answer>", 0, 1, 1, 0),
        # `"" in truth` is true
        ("<think>look</think><answer></answer>", 0, 1, 1, 0),
        ("<think>look</think><answer>A</answer><answer>B</answer>", 0, 0, 1, 0),
        ("<think>B</think>", 0, 0, 0, 0),
        # named, but not given as the answer
        ("the blue ball", 0, 0, 0, 0),
        ("", 0, 0, 0, 0),
        ("<think>a\nb</think> <answer>B</answer> and more", 1, 0, 0, 0),
    ],
)
def test_what_each_text_is_paid(text, accuracy, format, paper, hard):
    assert (
        paid(text, "accuracy") == accuracy
        and paid(text, "format") == format
        and paid(text, "hard_format") == hard
    )
    assert paper is None or paid(text, "format_paper") == paper


def test_free_answers():
    assert paid("<think>x</think><answer>3</answer>", "accuracy", FREE) == 1
    assert paid("<think>x</think><answer>13</answer>", "accuracy", FREE) == 0


def test_numbers_are_compared_as_numbers_only_where_the_example_asks():
    number = Example(uid="t/3", question="What share?", choices=(), answer="1/2", extra={"kind": "number"})
    assert [
        paid(f"<think>x</think><answer>{said}</answer>", "accuracy", number)
        for said in ("0.5", "50%", "\\frac{1}{2}", "1/2 or 1", "half")
    ] == [1, 1, 1, 0, 0]
    assert paid("<think>x</think><answer>3.0</answer>", "accuracy", FREE) == 0


def test_the_papers_accuracy_and_how_it_is_fooled():
    """Its own rule by name; `accuracy` pays for none of the three in the middle."""
    points = Example(uid="t/4", question="Which point is closer, A or B?", choices=("A", "B"), answer="A")
    texts = (
        "<think>x</think><answer>A</answer>",
        "<think>x</think><answer>B or A</answer>",
        "<answer>A</answer><answer>B</answer>",
        "<think><answer>A</answer>",
        "<answer>B</answer>",
    )
    assert [paid(text, "accuracy_paper", points) for text in texts] == [1, 1, 1, 1, 0]
    assert [paid(text, "accuracy", points) for text in texts] == [1, 0, 0, 0, 0]
    # no tag: the whole completion
    assert (
        paid("<think>\nthe blue ball", "accuracy_paper") == 1
        and paid("<think>it is the blue ball", "accuracy_paper") == 0
    )


def test_hard_format_is_one_only_for_both_and_knows_vision_r1s_wording():
    assert paid("<think>x</think><answer> Final Answer:B </answer>", "hard_format") == 1
    assert (
        paid("<think>x</think><answer> Final Answer:A </answer>", "hard_format")
        == 0
        == paid("<answer> Final Answer:B </answer>", "hard_format")
    )
    # as for every reward: a label is no part of the answer
    assert paid("<think>x</think><answer> Final Answer:B </answer>", "accuracy") == 1


def test_overlong_is_dapos_equation():
    """arXiv 2503.14476, Eq. 13, with its own numbers: L_max 20,480, L_cache 4,096; and on the two sides of
    each corner."""
    lengths = {
        0: 0,
        16384: 0,
        16385: -1 / 4096,
        18432: -0.5,
        20479: -4095 / 4096,
        20480: -1,
        20481: -1,
        10**9: -1,
    }
    assert {n: overlong(n, 20480, 4096) for n in lengths} == lengths
    # without a slope: a step
    assert [overlong(n, 10, 0) for n in (9, 10, 11)] == [0, 0, -1]
    assert [paid("x", "overlong", length=n, cap=700) for n in (1, 560, 630, 700)] == pytest.approx(
        [0, 0, -0.5, -1]
    )
    for missing in ({"length": 5}, {"cap": 5}):
        with pytest.raises(ValueError, match="cap=cap"):
            paid("x", "overlong", **missing)


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is not None, reason="the extra math is installed")
def test_a_missing_extra_is_named():
    with pytest.raises(
        ValueError,
        match="'accuracy_math_verify' needs math-verify, an optional extra: pip install math-verify",
    ):
        rule("accuracy_math_verify")


def test_length_counts_tokens_not_words():
    assert paid("one two", "length", length=250) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="lengths=rollout.length"):
        paid("one two", "length")


def test_score_is_the_weighted_sum_and_keeps_the_parts():
    good, plain, bad = "<think>x</think><answer>B</answer>", "<answer>B</answer>", "no"
    lengths = torch.tensor([[10, 20, 30], [40, 50, 60]])
    reward, parts = score(
        [[good, plain, bad], [bad, bad, good]],
        [ASKED, ASKED],
        {"accuracy": 1.0, "format": 0.5, "length": 0.0},
        lengths,
    )
    assert parts["accuracy"].tolist() == [[1, 1, 0], [0, 0, 1]] and parts["format"].tolist() == [
        [1, 0, 0],
        [0, 0, 1],
    ]
    # a weight of 0 is logged, not paid
    torch.testing.assert_close(parts["length"], 0.001 * lengths)
    torch.testing.assert_close(reward, torch.tensor([[1.5, 1.0, 0.0], [0.0, 0.0, 1.5]]))
    assert reward.dtype == torch.float32 and list(parts) == ["accuracy", "format", "length"]


def test_each_group_is_scored_against_its_own_example():
    other = Example(
        uid="t/2", question="Which?", choices=("the blue ball", "the red cube"), answer="the blue ball"
    )
    text = "<think>x</think><answer>A</answer>"
    reward, _ = score([[text], [text]], [ASKED, other], {"accuracy": 1.0})
    assert reward.tolist() == [[0.0], [1.0]]


def test_a_row_of_another_rank_is_not_read():
    """A split group: the row of length 0 earns nothing here, whatever its text is."""
    text = "<think>x</think><answer>the blue ball</answer>"
    reward, parts = score(
        [[text, text], [text, text]], [ASKED] * 2, {"format": 1.0}, torch.tensor([[3, 0], [0, 2]])
    )
    assert reward.tolist() == parts["format"].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_every_part_is_documented_and_stays_within_one():
    for name, part in REWARDS.items():
        assert part.__doc__ and (
            name == "overlong" or 0 <= part("<think>x</think><answer>the blue ball</answer>", ASKED, 9) <= 1
        ), name


def test_mistakes_are_named():
    group = [["a", "b"]]
    for call, message in (
        (
            lambda: score(group, [ASKED], {"acuracy": 1.0}),
            "unknown reward 'acuracy'. Did you mean 'accuracy'",
        ),
        (lambda: score(group, [ASKED], {}), "at least one part"),
        (lambda: score(group, [ASKED], {"format": float("nan")}), "finite"),
        (lambda: score(group, [ASKED, FREE], {"format": 1.0}), "1 groups .* for 2 examples"),
        (lambda: score([["a"], ["a", "b"]], [ASKED, FREE], {"format": 1.0}), r"sizes \[1, 2\]"),
        (lambda: score(group, [ASKED], {"format": 1.0}, torch.ones(2, 1)), r"lengths has shape \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
