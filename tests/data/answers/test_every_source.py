"""The law of the one reader: rewards and evaluation read every text of every source alike, under every
template and for every recipe; and a row's own answer can be said, or `data.check` names the row."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.answers.parser import well_formed
from data.check import why_not_right
from data.sources import SOURCES
from data.sources.rows import Row
from data.sources.table import LAYOUTS
from data.templates import TEMPLATES
from data.types import LETTERS, listed
from grpo.config.parse import RECIPES, load
from grpo.evaluation.protocols import PROTOCOLS
from grpo.rewards import rules

NUMBER_GOLDS = [
    "3",
    "-3",
    "0.5",
    "\\frac{3}{2}",
    "2\\sqrt{2}",
    "60 km/h",
    "10米",
    "1,000",
    "5K",
    "45^\\circ",
    "50%",
    "$5",
]
TEXT_GOLDS = ["B", "(3, 4)", "[2, \\infty)", "x > 2", "red", "x^2+1", "Solution A", "3:2", "can’t tell"]


def values_of(source, gold, choices):
    """A row of a file of the source, whose right answer is `gold` (or the last choice)."""
    index = len(choices) - 1
    letters = f"({LETTERS[index]})"
    asked = "Which?\n" + listed(tuple(choices))
    return {
        "sat": {
            "question": "Which?",
            "answers": choices,
            "question_type": "other",
            "correct_answer": choices[index],
        },
        "problem": {"problem": "How many?", "answer": gold},
        "solution": {"problem": "How many?", "solution": f"<answer> {gold} </answer>"},
        "own": {"question": "How many?", "answer": gold},
        "own_choices": {"question": "Which?", "choices": choices, "answer": choices[index]},
        "blink": {
            "idx": "a",
            "question": "Which?",
            "sub_task": "t",
            "choices": choices,
            "answer": letters,
            "prompt": asked,
        },
        "cvbench": {
            "idx": 1,
            "type": "2D",
            "task": "Count",
            "question": "Which?",
            "choices": choices,
            "answer": letters,
            "prompt": asked,
            "source": "COCO",
        },
        "mathvista": {
            "pid": "1",
            "question": "How many?",
            "choices": None,
            "unit": None,
            "precision": 1.0,
            "answer": gold,
            "question_type": "free_form",
            "answer_type": "integer",
            "metadata": {},
            "image": "1.jpg",
        },
        "mathverse": {
            "index": "1",
            "problem_version": "Text Lite",
            "question": "How many?",
            "answer": gold,
            "image": "1.jpg",
        },
        "mm_math": {
            "question": "How many?",
            "solution": rf"So it is \boxed{{{gold}}}.",
            "difficult": "easy",
            "file_name": "1.jpg",
        },
        "dynamath": {
            "id": "1",
            "question": "How many?",
            "answer": gold,
            "answer_type": "float",
            "subject": "algebra",
            "image": "1.jpg",
        },
        "mmstar": dict(zip(LETTERS, choices))
        | {
            "index": "1",
            "question": "Which?",
            "answer": LETTERS[index],
            "category": "math",
            "image_path": "1.jpg",
        },
        "chartqa": {"index": "1", "question": "How many?", "answer": gold, "image_path": "1.jpg"},
        "yes or no": {
            "index": "x_VD_figure_0_1_2",
            "question": "Is it?",
            "answer": "No" if index % 2 else "Yes",
            "category": "VD",
            "image_path": "1.jpg",
        },
    }[source]


LAYOUT_OF = {
    "sat": "sat",
    "sat_paper": "sat",
    "geometry3k": "problem",
    "vision_r1": "problem",
    "geoqa": "solution",
    "clevr": "solution",
    "jsonl": "own",
    "blink": "blink",
    "cvbench": "cvbench",
    **{name: name for name in ("mathvista", "mathverse", "mm_math", "dynamath", "mmstar", "chartqa")},
    "mme": "yes or no",
    "hallusion": "yes or no",
}
CHOICE_SETS = st.lists(
    st.sampled_from(["yes", "no", "30°", "60", "1,000", "left", "the left one", "x > 2", "A"]),
    min_size=2,
    max_size=4,
    unique=True,
)


def example_of(source, gold, choices, folder):
    """The example that the source's own adapter makes; of the built-in sources one that they draw."""
    if source in ("shapes", "documents"):
        return SOURCES[source](None, "heldout", 3, 0)[len(choices) % 3]
    (folder / "1.jpg").write_bytes(b"")
    if source == "vsr":
        values = {
            "image": "1.jpg",
            "image_link": "",
            "caption": "It is.",
            "label": len(choices) % 2,
            "relation": "is",
        }
    else:
        layout = LAYOUT_OF.get(source, "own")
        values = values_of("own_choices" if source == "jsonl" and gold == "B" else layout, gold, choices)
    return LAYOUTS[source].example(Row(values, "file, row 1", "file/1", folder))


SAID = st.sampled_from(
    [
        "{gold}",
        "**{gold}**",
        "Final Answer: {gold}",
        "\\boxed{{{gold}}}",
        "{letter}",
        "({letter}) {gold}",
        "{gold} or 4",
        "B",
        "x",
        "",
        "</answer>",
        "<answer>{gold}",
        "{gold}</think>",
    ]
)


@pytest.mark.parametrize("source", SOURCES)
@given(st.sampled_from(NUMBER_GOLDS + TEXT_GOLDS), CHOICE_SETS, SAID, st.sampled_from(sorted(TEMPLATES)))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reward_and_evaluation_read_every_text_alike(tmp_path, source, gold, choices, said, template):
    """For each source, template and recipe: what `accuracy` and `hard_format` pay is what `strict` counts;
    and the row's own answer, as the template writes one, is right in each reader, or named by
    `data.check`."""
    example = example_of(source, gold, choices, tmp_path)
    form = TEMPLATES[template]
    bare = form.bare if "<answer>" in form.bare else "<think></think><answer>{answer}</answer>"
    write = lambda answer: form.opening + bare.replace("{answer}", answer)
    text = write(said.format(gold=example.answer, letter=example.letter or "B"))
    correct = PROTOCOLS["strict"].read(text, example).correct
    formed = well_formed(text)
    expected = {"accuracy": correct, "hard_format": correct and formed, "format": formed}
    for rewards in REWARDS:
        for name in expected.keys() & rewards:
            assert rules.rule(name)(text, example, 1) == expected[name], (name, text)
    own = write(example.answer)
    if why_not_right(example) == "":
        assert all(
            PROTOCOLS[name].read(own, example).correct for name in ("strict", "cambrian", "blink", "chat")
        )
        # there a text is its letters, as with its owners
        assert (
            source == "mathvista"
            or rules.accuracy(own, example, 1) == rules.hard_format(own, example, 1) == 1
        )
    else:
        # a choice that is another's letter
        assert example.answer == "A" and example.letter != "A"


REWARDS = [load(recipe).rewards for recipe in RECIPES.glob("*.yaml")]


def test_the_recipes_pay_for_what_is_held_against_the_evaluation():
    assert {"accuracy", "hard_format", "format"} <= {name for rewards in REWARDS for name in rewards}
