"""The clean-up: whole phrases, no doubled verb or word, no eaten space; and what it leaves is found."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.bridge.cleanup import REPLACED, VERBS, betrayals, clean

EXAMPLES = {
    "The description says that AB = 5.": "The image shows that AB = 5.",
    "Hmm, the description clearly states a circle.": "Hmm, the image clearly shows a circle.",
    "The description mentioned two cups.": "The image showed two cups.",
    "The description of the image says that the image is dark.": "The image is dark.",
    "According to the image description, x is 3.": "According to the image, x is 3.",
    "As stated in the description, it is red.": "As shown in the image, it is red.",
    "Let me re-read the given description.": "Let me look at the image.",
    "Wait, in the\ndescription the line is red.": "Wait, in the image the line is red.",
    "As described, the angle is 40°.": "As shown, the angle is 40°.",
}
# what the published data has instead
DOUBLED = ["The problem displays displays", "The image shows illustrates that", "the image depicts shows"]
UNCHANGED = [
    "Wait, let me check the picture again. The image shows a circle tangent to the line.",
    "As described above, the two triangles are similar.",
    "The sign says STOP, and the text is red.",
    "The description\n\nsays hello.",
    "",
    " \n ",
]


@pytest.mark.parametrize("before, after", EXAMPLES.items())
def test_whole_phrases_are_replaced(before, after):
    text, counts = clean(before)
    assert text == after
    assert sum(counts.values()) == 1 and set(counts) <= set(REPLACED)
    assert not betrayals(text)


@pytest.mark.parametrize("text", [*UNCHANGED, *DOUBLED])
def test_a_text_without_these_phrases_is_unchanged(text):
    assert clean(text) == (text, {})


@pytest.mark.parametrize(
    "text",
    [
        "The description says shows a circle.",
        "In the image description image there is a line.",
        "The caption described shown points.",
    ],
)
def test_what_would_double_a_word_or_verb_stays_and_is_found(text):
    assert doubled(clean(text)[0]) <= doubled(text)
    assert betrayals(clean(text)[0])


@pytest.mark.parametrize(
    "text",
    [
        "The description doesn't mention the radius.",
        "I cannot see the image, so I guess.",
        "Without seeing the actual picture it is hard to say.",
        "This matches the given answer.",
        "Since the answer is given, it must be B.",
        "The radius is not provided.",
        "The text says that it is red.",
    ],
)
def test_what_betrays_the_text_is_found(text):
    assert betrayals(clean(text)[0])


@pytest.mark.parametrize(
    "text",
    [
        "The answer is given by the formula a + b.",
        "As described in the problem, AB is parallel to CD.",
        "The side BC is not given, but it follows from the others.",
        "I can see the picture: a red circle.",
    ],
)
def test_what_a_geometer_says_is_no_betrayal(text):
    assert not betrayals(clean(text)[0])


def test_what_the_question_says_itself_is_no_betrayal():
    text = "The job description is the third caption."
    assert betrayals(text) == ["description", "caption"]
    assert betrayals(text, "Which caption fits the job description?") == []


def doubled(text):
    """The number of neighbours that are equal, or both a verb of showing."""
    words = [word.casefold() for word in re.findall(r"[^\W\d_]+", text)]
    return sum(a == b or (a in VERBS and b in VERBS) for a, b in pairwise(words))


PIECES = st.sampled_from(
    [
        *("the description", "The image description", "this caption", "the given description of the image"),
        *(
            "says",
            "shows",
            "states that",
            "described",
            "shown",
            "clearly",
            "displays",
            "mentioned in",
            "read",
        ),
        *(
            "as described",
            "as stated in",
            "according to",
            "based on",
            "in",
            "from",
            "the",
            "image",
            "red",
            "x",
        ),
    ]
)
TEXTS = st.lists(st.tuples(PIECES, st.sampled_from([" ", "  ", "\n", ", ", ". ", "\n\n"])), max_size=14).map(
    lambda pairs: "".join(piece + gap for piece, gap in pairs)
)


@given(TEXTS)
def test_properties_of_the_clean_up(text):
    """It is idempotent, adds no doubled word or verb, eats no space, and keeps what is outside of phrases."""
    after, counts = clean(text)
    assert clean(after) == (after, {})
    assert doubled(after) <= doubled(text)
    assert (after == text) == (not counts)
    # a letter never meets a letter that was apart from it: every word is a whole word of the input or ours
    ours = set(re.findall(r"[a-z]+", "the this that image shows showed shown look at as " + text.casefold()))
    assert set(re.findall(r"[a-z]+", after.casefold())) <= ours


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
def test_any_text_without_description_or_caption_is_unchanged(text):
    if not re.search("description|caption|described", text, re.IGNORECASE):
        assert clean(text) == (text, {})
