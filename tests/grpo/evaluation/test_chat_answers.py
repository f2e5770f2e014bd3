"""The protocol `chat` on texts in the forms that models write, made up; and on recorded answers."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.types import LETTERS, Example
from grpo.evaluation import chat_answers
from grpo.evaluation.protocols import PROTOCOLS

YES_NO = ("yes", "no")
SIDES = ("left", "right")
OBJECTS = ("a red car", "a blue car", "a dog", "nothing")
POINTS = ("Point A", "Point B", "Point C", "Point D")
CLOSER = ("A is closer", "B is closer")
IMAGES = ("the third image", "the second image")
COUNTS = ("3", "2", "1", "0")
chat = PROTOCOLS["chat"].read


def letter(text, choices):
    return chat(text, Example("u", "Which?", choices, choices[0])).letter


# by choices: texts that answer with the letter
ANSWERED = {
    (
        YES_NO,
        "B",
    ): """(B)|B|B.|(B) no|B. no|no|No.|The answer is (B).|The correct answer is (B) no.|The answer is B
        |Answer: B|answer: (B) no|**Answer:** (B)|The correct answer is: **(B) no**|The answer is no.
        |The answer is "no".
        |So the answer is (B) no, because the cat is outside.|(B) No, the cat is not on the mat.
        |No, the cat is not under the table.|The cat is to the left of the dog. So the answer is **(B)**.
        |I would choose (B).|I would choose option B.|Option (B) is correct.|(B) is the correct answer.
        |Option B is the best choice.|The best option is B because the cat sits.|$\\boxed{B}$|\\boxed{no}
        |The answer is $\\boxed{\\text{B}}$.|**(B) no**|[B]|B) no|B: no
        |(b) The man is out.|As shown, (b).|(b)|The answer is (b).
        |The answer would be (B).
        |My answer is (B).|The final answer is (B) no.
        |(A) is not right, as the cat is outside. (B) is correct.
        |The picture shows a cat outside. (B)|The cat is outside (B).|It is (B).
        |Choices: (A) yes (B) no. So the answer is (B).
        |<answer>(B)</answer>|<think>(A) or so</think> <answer> The answer is (B). </answer>
        |<think>(A)?</think> (B)
        |答案是B|答案：(B)|故选B。|The answer is not (A). It is (B).|Not (A), so (B).
        |The answer is (B), not (A).|I choose B.
        |I'd say (B).|The answer is most likely (B).|The answer to the question is (B).
        |The correct option is B) no.
        |The right answer is option B.|The answer is the letter B.|B, because the cat is outside.
        |(B), as it is.|(B) - no
        |The correct answer is (B):no|- (B) no|> (B)|There is no cat in sight, so the answer is no.""",
    (SIDES, "B"): """The man is on the right.|The right one.|It's on the right|right side
        |The correct answer is (B) right.
        |The car is not on the left, it is on the right.""",
    (
        OBJECTS,
        "C",
    ): """The correct answer is (C).|a dog|The image shows a dog.|The object is a dog, so (C).|Answer: a dog
        |The correct answer is C. a dog|The correct answer is (C) a dog because it barks.
        |(C) a dog: it barks""",
    (POINTS, "B"): "Point B|The point that corresponds is Point B.|(B) Point B|The answer is **Point B**.",
    (
        CLOSER,
        "B",
    ): "B is closer|(B) B is closer.|Point B is closer to the camera.|B is closer to the camera than A.",
    (IMAGES, "B"): "The second image|the second image is more similar.|The answer is the second image.|(B)",
    (COUNTS, "B"): "2|There are 2 dogs.|(B) 2|There are 2 dogs in the picture (B).|The count is 2.|"
    "I see 2, so the answer is B",
}
# and texts that have no answer, or two
OPEN = {
    YES_NO: """ |I cannot tell.|I'm sorry, but I can't help with that.|(A) or (B)|A or B|(A) and (B)
        |Either (A) or (B).
        |yes or no|The answer is (A) or (B).|The answer is (A). The answer is (B).|(C)
        |The answer is (C).|(A) no
        |The answer is (A) no.|There is no cat.|There is no evidence of a cat in the picture.|It is not (A).
        |The answer is not (A).|I do not know whether (A) is right.|There are yes men.
        |A cat is on the mat.|A nice picture!
        |Please choose (A) yes or (B) no.|\\boxed{A} \\boxed{B}|(A)/(B)|(A), (B)
        |<answer>A</answer> <answer>B</answer>
        |I can't determine if the answer is yes.|(a) or (b)|f(a) is 3|(A) is wrong.|No cat is there.""",
    SIDES: "The man is not on the left.|Left or right?|The man on the left looks right.|"
    "I can't tell whether it is left.",
    OBJECTS: "a cat|a red car and a dog|car|It is either a dog or nothing.|The image shows a car.|A red bus",
    POINTS: "Points B and C|Neither Point A nor Point B",
    COUNTS: "There are 2 dogs and 3 cats.|There are 5 dogs.|2.5|12|0.2",
}


def cases(table):
    return [(key, text.strip()) for key, texts in table.items() for text in texts.split("|")]


@pytest.mark.parametrize(
    "key, text", cases(ANSWERED), ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_letter_that_a_model_states(key, text):
    choices, expected = key
    assert letter(text, choices) == expected
    # the same answers with a line of talk before and behind, and on lines of their own
    assert letter(f"Sure, I can help.\n\n{text}", choices) == expected
    assert "\n" in text or letter(f"{text}\n\nI hope this helps!", choices) == expected


@pytest.mark.parametrize(
    "choices, text", cases(OPEN), ids=lambda value: value if isinstance(value, str) else ""
)
def test_no_answer_and_two_answers_are_unread(choices, text):
    found = chat(text, Example("u", "Which?", choices, choices[0]))
    assert found.letter is None and found.why and not found.correct


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(A) yes\n(B) no\n\nThe answer is (B).", "B"),
        ("To decide this, look at both.\n\n(B)", "B"),
        ("Look at it: a mat.\n\nTherefore, the answer is:\n(B) no", "B"),
        ("(B)\nUser: And now?\nAssistant: (A)", "B"),
        ("Select from the following choices.\n(A) yes\n(B) no", None),
        ("(A)\n(B)", None),
    ],
)
def test_answers_on_lines(text, expected):
    assert letter(text, YES_NO) == expected


@pytest.mark.parametrize(
    "text, right",
    [
        ("3", True), ("There are 3 dogs.", True), ("The answer is 3.", True), ("The answer is 3 cm.", True),
        ("We have 2 + 1 = 3.\n\nThe answer is 3", True), ("Of 5 dogs, 2 go.\n\n3", True),
        ("\\boxed{3}", True),
        ("There are 5 dogs and 2 go, so **3** stay.", True), ("x = 3", True),
        ("The answer is $\\frac{6}{2}$.", True),
        ("2 and 3", False), ("The answer is 3 or 4", False), ("none", False), ("The answer is 4.", False),
    ],
)  # fmt: skip
def test_free_answers(text, right):
    assert chat(text, Example("u", "How many?", (), "3", extra={"kind": "number"})).correct == right
    listed = Example("u", "How many?\nChoices:\nA: 4\nB: 3", (), "B", extra={"kind": "text"})
    assert (
        chat("The correct answer is (B).", listed).correct and not chat("The answer is (A).", listed).correct
    )


def test_a_choice_that_is_another_s_letter_is_meant_by_its_letter():
    shuffled = Example("u", "Which?", ("B", "A"), "B")
    assert chat("The correct answer is (A).", shuffled).correct


SETS = [
    ("yes", "no"), ("left", "right"), ("3", "2", "1", "0"), ("the left one", "left", "the one above"), POINTS,
    CLOSER, IMAGES, ("30°", "60°", "90°"), ("1,000", "2,000"), ("a red car", "a car", "a blue car"),
    ("The current increases.", "The current decreases."), ("x > 2", "x < 2"), ("5 cm", "5 m", "15 cm"),
    ("\\frac{1}{2}", "\\frac{1}{3}"), ("above", "below", "above the table"), ("no", "yes", "not sure"),
    ("(3, 4)", "(4, 3)"), ("image B", "image A"), ("half", "quarter", "quarter to", "quarter past"),
    ("neither; both are the same", "Solution B", "Solution A"),
    ("about the same", "A is darker", "B is darker"),
    ("True", "False"), ("12", "2", "21"), ("the cat on the mat", "the cat", "the mat"), ("0.5", "1", "1.5"),
]  # fmt: skip
FORMS = """({L})|{L}|{L}.|({L}) {t}|{L}. {t}|{L}: {t}|{L}) {t}|**({L}) {t}**|The answer is ({L}).
    |The answer is ({L}) {t}.|The correct answer is ({L}) {t}|The correct answer is {L}. {t}|Answer: {L}
    |The correct answer is: **({L}) {t}**|Answer: ({L}) {t}|**Answer:** ({L}) {t}|So the answer is {L}.
    |Therefore, the correct option is {L}: {t}.|I would choose ({L}).|({L}) is correct.|Option {L} is correct.
    |\\boxed{{{L}}}|The answer is $\\boxed{{\\text{{{L}}}}}$.|<answer>{L}</answer>|The answer is {t}.
    |Answer: {t}|{t}
    |<think>hm</think> <answer>({L}) {t}</answer>|The final answer is **{L}**.|答案是{L}|故选{L}。|Sure! ({L})
    |Based on what I see, ({L}).|The correct answer is ({L}), {t}.|({L}), {t}|It is ({L}) {t}, I think.
    |({L}) {t}.
    |My choice: ({L})|The right answer is option ({L}) because it fits.|({L}) because it fits
    |The best answer is ({L}): {t}.|Choice ({L}) fits best."""


@pytest.mark.parametrize("choices", SETS, ids=lambda choices: choices[0])
def test_every_form_of_every_choice_is_read_as_its_letter(choices):
    for form in map(str.strip, FORMS.split("|")):
        for said, choice in zip(LETTERS, choices):
            text = form.format(L=said, t=choice)
            assert letter(text, choices) == letter(f"Look closely.\n\n{text}", choices) == said, text


PIECES = st.sampled_from(
    ["(A)", "(B)", "yes", "no", "The answer is", "not", "or", " ", ".", "\n", "is", "A", "**", "correct"]
)


@given(st.lists(PIECES, max_size=9).map(" ".join))
@settings(max_examples=200, deadline=None)
def test_one_statement_decides_and_two_that_differ_never_do(text):
    assert letter(f"{text}\nThe answer is (A). The answer is (B).", YES_NO) is None
    found = chat(text, Example("u", "Which?", YES_NO, "yes"))
    assert (found.letter is None) == bool(found.why)
    if "A" not in text and "yes" not in text:
        assert found.letter != "A"


@pytest.mark.parametrize(
    "piece", ["answer is ", "(A) ", "\n", " ", "\\boxed{", "not ", "1,", "User", "A yes ", "(", "**a "]
)
def test_long_texts_take_linear_time(piece):
    """A second for 50,000 characters; what is longer is unread."""
    text = (piece * chat_answers.LONGEST)[: chat_answers.LONGEST]
    start = time.process_time()
    letter(text, YES_NO)
    chat(text, Example("u", "How many?", (), "3", extra={"kind": "number"}))
    assert time.process_time() - start < 4
    assert chat("(A) " * chat_answers.LONGEST, Example("u", "?", YES_NO, "yes")).why == "answer too long"


RECORDED = Path(__file__).resolve().parents[4] / "shared/data/mathvista/output_bard.json"


@pytest.mark.skipif(not RECORDED.is_file(), reason="MathVista is not beside the repository (../shared/data)")
def test_recorded_answers_are_read_as_their_owners_read_them():
    """Of 540 answers of Bard: the letter that MathVista's extraction (by GPT-4) recorded."""
    agree = differ = unread = 0
    for pid, row in json.loads(RECORDED.read_text("utf-8")).items():
        if not row["choices"]:
            continue
        choices = tuple(row["choices"])
        found = chat(row["response"], Example(pid, row["question"], choices, row["answer"], may_repeat=True))
        said = re.findall(r"\(([A-Z])\)", row["extraction"]) or [row["extraction"].strip()]
        official = said[0] if said[0] in LETTERS[: len(choices)] else None
        unread += found.letter is None
        agree += found.letter is not None and official == found.letter
        differ += found.letter is not None and official not in (None, found.letter)
    assert agree >= 485 and differ <= 2 and unread <= 35, (agree, differ, unread)
