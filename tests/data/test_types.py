"""Examples that cannot be are refused by name."""

import pytest

from data.types import BadExample, BadPicture, Example, PromptTooLong

GOOD = {"uid": "q1", "question": "Is it red?", "choices": ("yes", "no"), "answer": "no"}


def test_letter_and_asked():
    asked = Example(**GOOD)
    assert asked.letter == "B"
    assert asked.asked == "Is it red?\nSelect from the following choices.\n(A) yes\n(B) no"
    free = Example("q2", "How many?", (), "3")
    assert free.letter is None and free.asked == "How many?"


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"question": ""}, "question is empty"),
        ({"question": " \n"}, "question is empty"),
        ({"choices": ("no",)}, "1 choices"),
        ({"choices": ("yes", "maybe")}, "not among the choices"),
        ({"answer": "No"}, "not among the choices"),
        ({"choices": ("no", "no")}, "are the same"),
        ({"choices": ("no", " ")}, "choice is empty"),
        ({"choices": tuple(map(str, range(27))), "answer": "3"}, "27 choices"),
        ({"choices": (), "answer": ""}, "answer is empty"),
        ({"choices": "no"}, "tuples"),
        ({"pictures": b"\x89PNG"}, "tuples"),
    ],
)
def test_a_bad_example_is_named(changed, reason):
    with pytest.raises(BadExample, match=reason) as error:
        Example(**{**GOOD, **changed})
    assert "'q1'" in str(error.value)


def test_a_missing_uid():
    with pytest.raises(BadExample, match="no uid.*Is it red"):
        Example(**{**GOOD, "uid": ""})


def test_all_that_may_be_wrong_with_one_example_can_be_skipped_at_once():
    assert (
        issubclass(BadPicture, BadExample)
        and issubclass(PromptTooLong, BadExample)
        and issubclass(BadExample, ValueError)
    )
