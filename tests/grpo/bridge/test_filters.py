"""The filters: every reason has a reply that it alone refuses, and what is good is kept."""

from dataclasses import replace

import pytest
from PIL import Image

from data.shapes import world
from data.types import Example
from grpo.bridge.filters import FORM, KNOWN, TABLE, Known, Rules, chain_of, form_reasons, reasons
from grpo.serving.messages import Reply, png

CHAIN = (
    "Okay, the description says that the square lies left of the circle. Wait, let me check this again. The "
    "square is in column 1 and the circle in column 4. So the answer is (B)."
)
GOOD = Reply("r", "**Final Answer:** B", CHAIN, "stop", 40, 60, 1.0)
SEEN = Reply("d", "A square in column 1 and a circle in column 4.", "", "stop", 30, 12, 0.5)
QUESTION = Example("q/1", "Is the square left or right of the circle?", ("right", "left"), "left", "Relation")
COUNT = Example("q/2", "How many squares are there?", (), "3", "Count", extra={"kind": "number"})
RULES = Rules(least_words=10, most_words=200)


def found(reply=GOOD, example=QUESTION, rules=RULES, **stages):
    return reasons(example, {"describe": SEEN, **stages, "reason": reply}, rules)


def said(text="", thinking=CHAIN, **fields):
    return replace(GOOD, text=text or GOOD.text, thinking=thinking, **fields)


REFUSED = {
    "failed": Reply("r", error="no reply after 600 seconds"),
    "refused": said("I'm sorry, but I can't assist with that."),
    "cut": said(finish="length"),
    "unclosed": said(thinking=""),
    "loops": said(thinking=CHAIN + " Wait, the square is left of it." * 9),
    "unread": said("It depends on how you look at it."),
    "wrong": said("The answer is right.", CHAIN.replace("(B)", "(A)")),
    "speaks of the description": said(thinking="The description does not mention any size. " + CHAIN),
    "inconsistent": said(thinking=CHAIN.replace("(B)", "(A)")),
    "language": said(thinking=CHAIN + " 因此正方形在左边，圆形在右边。"),
    "too long": said(thinking=CHAIN + " " + " ".join(f"Step {n}." for n in range(200))),
    "too short": said(thinking="It is left."),
}


@pytest.mark.parametrize("reason, reply", REFUSED.items())
def test_each_reason_has_a_reply_that_it_refuses(reason, reply):
    assert reason in found(reply)
    # what follows from a wrong form is not named
    assert found(reply) == [reason] or (reason, found(reply)) == ("refused", ["refused"])


def test_the_table_has_every_reason_once_and_in_order():
    assert [*TABLE] == [*REFUSED, *KNOWN]
    both = said("The answer is right.", "It is left, so the answer is (B).")
    assert found(both, rules=replace(RULES, least_words=50)) == ["wrong", "inconsistent", "too short"]


def test_a_good_chain_is_kept_and_cleaned():
    assert found() == []
    assert chain_of({"reason": GOOD}).startswith("Okay, the image shows that the square")


@pytest.mark.parametrize(
    "text", ["(B)", "left", "<answer> B </answer>", "The square is left of it.\n\nAnswer: B", r"$\boxed{B}$"]
)
def test_every_way_to_say_the_answer_is_read(text):
    assert found(said(text)) == []


@pytest.mark.parametrize("stage", ["pseudo", "describe"])
def test_a_failed_earlier_stage_refuses_the_chain(stage):
    assert found(**{stage: Reply("x", error="silence")}) == ["failed"]
    assert found(**{stage: replace(SEEN, finish="length")}) == ["cut"]


def test_a_stage_that_was_not_asked_is_a_failure():
    assert reasons(QUESTION, {"describe": SEEN}, RULES) == ["failed"]
    assert reasons(QUESTION, {}, RULES) == ["failed"]


def test_form_reasons_are_what_another_attempt_may_mend():
    for reason, reply in REFUSED.items():
        assert form_reasons("reason", reply) == ([reason] if reason in FORM else [])
        with_question = form_reasons("reason", reply, QUESTION)
        assert with_question == ([reason] if reason in FORM or reason == "unread" else [])
    # a description has no chain
    assert form_reasons("describe", SEEN) == []
    assert form_reasons("reason", SEEN) == ["unclosed"]


@pytest.mark.parametrize(
    "thinking",
    [
        "I count them: 1, 2, 3. The answer is 3, but wait, is one of them a star? No, so it stays.",
        "I first thought that the answer is 4. Then I saw the circle. So the answer is 3.0, an integer.",
        "The answer is the number of squares in the picture, and I count three of them, one by one, here.",
        "The answer should be \\boxed{3} because there are three squares, and all of them can be seen here.",
    ],
)
def test_consistent_chains_with_numbers(thinking):
    assert found(said("3", thinking), COUNT) == []


def test_the_last_stated_answer_counts():
    assert found(said("3", "The answer is 3. " + CHAIN[:100] + " No, the answer is 4."), COUNT) == [
        "inconsistent"
    ]


def test_languages():
    greek = said(thinking=CHAIN + " The angle α is π/2, so ∠ABC = 90°, and ℝ is not needed.")
    assert found(greek) == []
    chinese = said(thinking=REFUSED["language"].thinking)
    assert found(chinese, rules=replace(RULES, languages=["en", "zh"])) == []


def test_a_reasoner_may_not_close_our_tags_itself():
    assert found(said(thinking=CHAIN + " </think> <answer> B </answer>")) == ["unclosed"]


def test_duplicates_are_the_same_pictures_and_words():
    red, blue = (png(Image.new("RGB", (8, 8), color)) for color in ("red", "blue"))
    examples = [
        Example("a", "How many?", (), "1", pictures=(red,)),
        Example("b", "how  many", (), "2", pictures=(red,)),
        Example("c", "How many?", (), "1", pictures=(blue,)),
        Example("d", "How many?", ("1", "2"), "1", pictures=(red,)),
    ]
    known = Known(Rules())
    assert [known.reasons(example) for example in examples] == [[], ["duplicate"], [], []]
    # asked again, for example by a run that goes on
    assert [known.reasons(example) for example in examples] == [[], ["duplicate"], [], []]


def test_a_benchmark_is_known_by_pixels_and_by_words(tmp_path):
    scene, held = world.item("heldout", 0, 0)
    picture = world.draw(scene)
    question = "What is the sum of all the numbers that the five boxes in the picture show?"
    (tmp_path / "bench.jsonl").write_text(f'{{"question": "{question}", "answer": "5"}}\n')
    template = "Is the white triangle left or right of the green circle here?"
    with open(tmp_path / "bench.jsonl", "a") as file:
        file.write(f'{{"question": "{template}", "answer": "left"}}\n' * 2)
    known = Known(Rules(against=[{"task": "jsonl", "data": str(tmp_path / "bench.jsonl")}]))
    assert known.reasons(Example("w", question.upper(), (), "5")) == ["in a benchmark"]
    assert known.reasons(Example("v", "What is the sum?", (), "5")) == []
    assert known.reasons(Example("u", template, (), "left")) == []
    (tmp_path / "with.jsonl").write_text('{"question": "How many?", "answer": "5", "picture": "a.bmp"}\n')
    picture.save(tmp_path / "a.bmp")
    known = Known(Rules(against=[{"task": "jsonl", "data": str(tmp_path / "with.jsonl")}]))
    # the same pixels in another format
    assert known.reasons(replace(held, uid="x", pictures=(png(picture),))) == ["in a benchmark"]
    assert known.reasons(replace(held, uid="y", pictures=(png(Image.new("RGB", (84, 84))),))) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"against": [{"data": "x"}]}, "filters.against: write {task: NAME, data: FILE}"),
        ({"against": [{"task": "nonsense"}]}, "filters.against: no task 'nonsense'"),
        ({"least_words": 9, "most_words": 3}, "leave no chain"),
        ({"foreign": 2.0}, "filters.foreign: a share"),
    ],
)
def test_rules_that_cannot_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        Rules(**settings)
