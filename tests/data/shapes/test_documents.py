"""What the built-in base model reads: the stated mixture, careless and careful looks, and a vocabulary that
covers all of it.

A share is counted over n texts and may be off by 5 of its standard deviations. Were the texts drawn anew,
that would happen once in 1.7 million times by chance for each share; the seeds are fixed, so a failure means
that the mixture is another.
"""

import functools
import itertools
import operator
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from data.answers.parser import extract, is_right, well_formed
from data.shapes import documents, tokenizer
from data.shapes.documents import AGAIN, CARELESS, MALFORMED, TERSE, Documents, answer_document, look
from data.shapes.looking import SECOND_LOOKS, agrees, conclusion, read_looks
from data.shapes.world import COLORS, GRID, SIZES, TASKS, Shapes, free_pairs, gap, scatter
from data.templates import TEMPLATES
from grpo.config import load
from models.config import ModelConfig
from train import learning_rate

TINY = Path(__file__).resolve().parents[3] / "models" / "tiny"


@pytest.fixture(scope="module")
def questions():
    """{task: examples}, 64 each: every answer behind every letter."""
    shapes = Shapes("train", 256, seed=11)
    return {task: [e for e in shapes if e.task == task] for task in TASKS}


@pytest.fixture(scope="module")
def read(questions):
    """[(example, document)], 4,096 of them."""
    rng = random.Random(0)
    return [
        (e, answer_document(e, rng))
        for e in functools.reduce(operator.iadd, questions.values(), [])
        for _ in range(16)
    ]


def share(found, n, expected):
    """found of n, within 5 standard deviations of the expected share."""
    deviation = (expected * (1 - expected) / n) ** 0.5
    assert abs(found / n - expected) <= 5 * deviation, (
        f"{found / n:.3f} of {n}, expected {expected:.3f} ± {5 * deviation:.3f}"
    )


# ---- the mixture


def test_the_stated_mixture():
    assert (TERSE, AGAIN, CARELESS, MALFORMED) == (0.65, 1 / 2, 0.20, 0.30)


def test_terse_or_looking(read):
    looks = [read_looks("<think>" + text) for _, text in read]
    share(sum(not x.looked for x in looks), len(looks), 0.65)
    looked = [x for x in looks if x.looked]
    share(sum(x.again for x in looked), len(looked), 1 / 2)
    assert not any(x.again for x in looks if not x.looked)


def test_thirty_per_cent_are_malformed_whatever_they_say(read):
    for kind in (True, False):
        mine = [well_formed("<think>" + text) for _, text in read if read_looks(text).looked == kind]
        share(len(mine) - sum(mine), len(mine), 0.30)
    endings = Counter(
        re.sub(r"\([A-D]\)", "X", text.removeprefix(documents.POLITE_STARTS[0]).rpartition(" .")[2]).strip()
        for _, text in read
        if not well_formed("<think>" + text)
    )
    assert len(endings) == 4 and min(endings.values()) > 0.2 * sum(endings.values())


def test_terse_guesses_are_right_by_chance(read):
    for task in TASKS:
        mine = [
            (e, text)
            for e, text in read
            if e.task == task and not read_looks(text).looked and well_formed("<think>" + text)
        ]
        share(
            sum(extract("<think>" + text, e.choices).letter == e.letter for e, text in mine),
            len(mine),
            1 / len(mine[0][0].choices),
        )


def test_no_behaviour_depends_on_the_kind_of_question(read):
    for task in TASKS:
        mine = [(e, read_looks(text)) for e, text in read if e.task == task]
        looked = [(e, x) for e, x in mine if x.looked]
        share(len(looked), len(mine), 0.35)
        share(sum(x.again for _, x in looked), len(looked), 1 / 2)
        share(sum(not agrees(x.first, e) for e, x in looked), len(looked), 0.20)


def test_looking_again_does_not_depend_on_the_first_look(read):
    """Whether a document looks again says nothing about its first look: that a second look helps is for
    the policy to find out."""
    for right in (True, False):
        mine = [
            x
            for e, x in ((e, read_looks(text)) for e, text in read)
            if x.looked and agrees(x.first, e) == right
        ]
        share(sum(x.again for x in mine), len(mine), 1 / 2)


def test_the_second_look_is_careful_and_the_last_look_is_what_is_answered(read):
    for example, text in read:
        seen = read_looks(text)
        if seen.again:
            assert agrees(seen.last, example)
        if seen.looked:
            letters = [
                f"({letter})"
                for letter, choice in zip("ABCD", example.choices)
                if choice.split()[0] == seen.last
            ]
            assert len(letters) == 1 and letters[0] in text.rpartition(" .")[2]
            # each look names the letter of what it concludes
            assert f"so it is {seen.last} {letters[0]} ." in text


# ---- one look


@pytest.mark.parametrize("task", TASKS)
def test_careful_looks_conclude_rightly_and_careless_ones_wrongly(questions, task):
    rng = random.Random(1)
    for example in questions[task]:
        first_words = {choice.split()[0] for choice in example.choices}
        assert {conclusion(look(example, rng, careless=False)) for _ in range(5)} == {
            example.answer.split()[0]
        }
        astray = {conclusion(look(example, rng, careless=True)) for _ in range(20)}
        assert example.answer.split()[0] not in astray and astray <= first_words


@pytest.mark.parametrize("task", TASKS)
def test_a_careful_look_reads_the_truth(questions, task):
    """Each reading is compared with the scene, in the words of the text."""
    rng = random.Random(2)
    for example in questions[task]:
        text, things = look(example, rng, careless=False), {t.color: t for t in example.extra["named"]}
        if task == "Count":
            listed = re.findall(r"(\w+) shape (\w+) (\d) ,", text)
            assert [color for color, _, _ in listed] == [c for c in COLORS if c in things]
            assert all(things[color].shape == shape for color, shape, _ in listed)
            counts = [int(n) for _, _, n in listed]
            assert counts == [
                sum(shape == example.extra["shape"] for _, shape, _ in listed[: k + 1])
                for k in range(len(listed))
            ]
            continue
        for color, x, y in re.findall(r"(\w+) x (\d) y (\d)", text):
            assert (things[color].x, things[color].y) == (int(x), int(y))
        for color, number in re.findall(r"(\w+) x \d y \d gap (\d)", text):
            assert int(number) == gap(example.extra["named"][0], things[color])
        readings = re.findall(r"(\w+) (x|y|size) (\d)", text)
        assert all(
            getattr(things[color], unit) == int(number) for color, unit, number in readings if color in things
        )
        unit = {"Relation": example.extra.get("axis"), "Depth": "size", "Distance": "gap"}[task]
        assert text.count(f" {unit} ") == 2


@pytest.mark.parametrize("task", ["Relation", "Depth", "Distance"])
def test_a_careless_look_is_consistent_with_itself(questions, task):
    """What is false is what was read; the conclusion follows from it, so that reading well is what pays."""
    rng = random.Random(3)
    for example in questions[task]:
        text = look(example, rng, careless=True)
        unit = {"Relation": example.extra.get("axis"), "Depth": "size", "Distance": "gap"}[task]
        (a, b) = (int(n) for n in re.findall(rf" {unit} (\d)", text))
        first, second = (t.color for t in example.extra["named"][-2:])
        assert a != b and max(a, b) <= {"x": GRID - 1, "y": GRID - 1, "size": SIZES, "gap": 7}[unit]
        words = {"x": ("left", "right"), "y": ("above", "below")}.get(unit, (first, second))
        assert conclusion(text) == words[(a < b) if unit == "size" else (a > b)]


# ---- reading behaviours back


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think></think> <answer> (A) </answer>", (False, False, "", "")),
        (
            "<think>look : red star x 1 , blue circle x 4 , so it is left . </think>",
            (True, False, "left", "left"),
        ),
        (
            "<think>look : so it is left . but wait , let me look again : so it is right . </think>",
            (True, True, "left", "right"),
        ),
        (
            "<think>look : red star . but wait , let me look again : so it is red . </think>",
            (True, True, "", "red"),
        ),
        ("<think>look : so it is 3 . but wait </think> <answer> (A) </answer>", (True, True, "3", "3")),
        ("<think>but wait , let me look again : so it is 2 .", (False, True, "", "2")),
        ("<think>look : so it is 3 . hmm , let me check : so it is 2 .", (True, True, "3", "2")),
        ("<think>look : so it is 3 . alternatively , look again : so", (True, True, "3", "3")),
        ("<think>look : so it is 3 . is this a mistake ? look again : so it is 1", (True, True, "3", "1")),
        # not the tokenizer's spelling
        ("look: so it is left.", (False, False, "left", "left")),
        ("outlook so it is", (False, False, "", "")),
        ("", (False, False, "", "")),
    ],
)
def test_read_looks(text, expected):
    seen = read_looks(text)
    assert (seen.looked, seen.again, seen.first, seen.last) == expected


def test_reading_takes_linear_time():
    # seconds would be minutes, were it quadratic
    read_looks("so it is " * 200_000 + "but wait " * 200_000)


# ---- documents as examples


def test_documents_are_a_function_of_seed_and_index():
    ours, other = Documents(seed=1), Documents(seed=2)
    for i in (0, 7, 123_456):
        assert (
            ours[i].extra["documents"] == Documents(seed=1)[i].extra["documents"]
            and ours[i].uid == Documents(seed=1)[i].uid
        )
        assert ours[i].uid != other[i].uid
    # terse ones may agree
    assert sum(ours[i].extra["documents"] == other[i].extra["documents"] for i in range(20)) < 10
    last = documents.TRUNK
    assert len(ours[last].extra["documents"]) == 2 and len(Documents(each=5)[last].extra["documents"]) == 5


def parts_read(documents, start, count=1000):
    """(captions, letters, the others) of `count` items from `start`."""
    items = [documents[start + i] for i in range(count)]
    assert len({e.uid for e in items}) == len(items)
    captions = [e for e in items if e.uid.startswith("caption/")]
    letters = [e for e in items if e.uid.startswith("letters/")]
    others = [e for e in items if e.uid.startswith("shapes/train/")]
    assert len(captions) + len(letters) + len(others) == count
    return captions, letters, others


def starts():
    """The first item of each part."""
    return [0, *(part.until for part in documents.PARTS[:-1])]


def test_the_first_part_is_colours_alone():
    captions, _, _ = parts_read(Documents(seed=3), 0)
    assert len(captions) == 1000 and {e.task for e in captions} == {"Caption coloured"}


# of each part but the first and the last: the shares of captions and of letters, the kinds of captions and
# the tasks of lessons, each as often as its share
MIDDLE = [
    (0.6, 0.0, ["sized"], ["Depth"]),
    (0.6, 0.0, ["placed", "placed", "gaps"], ["Relation", "Depth", "Distance"]),
    (
        0.5,
        0.1,
        ["described", "listed", "listed", "gaps"],
        ["Relation", "Count", "Count", "Depth", "Distance", "Distance"],
    ),
    (0.1, 0.1, ["described", "listed", "gaps"], ["Relation", *TASKS, "Depth", "Distance", "Distance"]),
]


@pytest.mark.parametrize("number, expected", list(enumerate(MIDDLE, 1)))
def test_a_part_of_the_trunk_has_what_is_new_and_no_answer(number, expected):
    captioned, lettered, kinds, tasks = expected
    captions, letters, lessons = parts_read(Documents(seed=3), starts()[number])
    share(len(captions), 1000, captioned)
    share(len(letters), 1000, lettered)
    found = Counter(e.task.removeprefix("Caption ") for e in captions)
    assert set(found) == set(kinds)
    for kind in kinds:
        # a sixth of the scenes hold one object, which only the first kind describes
        alone = (kind == kinds[0]) / 6
        share(found[kind], len(captions), alone + 5 / 6 * kinds.count(kind) / len(kinds))
    found = Counter(e.task.removeprefix("Letter " if number == 4 else "Lesson ") for e in lessons)
    assert set(found) == set(tasks)
    for task in tasks:
        share(found[task], len(lessons), tasks.count(task) / len(tasks))
    assert all(bool(e.pictures) == (number == 4) for e in letters)
    texts = [text for e in captions + lessons for text in e.extra["documents"]]
    assert not any("answer" in text or "look" in text for text in texts)
    assert any("shape" in text for text in texts) == (number > 2)


def test_the_branch_reads_answers():
    captions, letters, others = parts_read(Documents(seed=3), documents.TRUNK)
    share(len(captions), 1000, 0.1)
    share(len(letters), 1000, 0.1)
    assert all(e.pictures for e in letters)
    assert {e.task for e in others} == set(TASKS)
    assert all("answer" in text or "think" in text for e in others for text in e.extra["documents"])
    ours, behind_the_trunk = Documents(seed=3, branch=True), Documents(seed=3)
    for i in (0, 5, 1000):
        assert ours[i].extra["documents"] == behind_the_trunk[documents.TRUNK + i].extra["documents"]


def test_the_recipe_ends_the_trunk_where_the_list_does():
    base, branch = load("tiny_base"), load("tiny_branch")
    trunk = documents.TRUNK // base.prompts
    assert branch.steps == base.steps - trunk
    assert branch.optim.lr == pytest.approx(learning_rate(base, trunk), rel=0.02)
    assert learning_rate(branch, branch.steps - 1) == pytest.approx(
        learning_rate(base, base.steps - 1), rel=0.1
    )


def test_a_lesson_reads_the_truth_and_concludes(questions):
    for example in itertools.chain(*questions.values()):
        taught = documents.lesson(example)
        [text] = taught.extra["documents"]
        assert taught.choices == () and conclusion(text) == example.answer.split()[0]
        # a careful look is the same, and has the letter behind it
        careful = look(example, random.Random(0), careless=False)
        assert careful == text.removesuffix(".") + f"({example.letter}) ."
        lettered = documents.lesson_with_letter(example, random.Random(0))
        assert lettered.choices == example.choices and lettered.extra["documents"] == (careful,)


@pytest.mark.parametrize("looks, again, counts", [(0.0, 0.0, None), (0.1, 0.5, None), (0.5, 0.0, 0.02)])
def test_a_branch_may_read_other_shares(looks, again, counts):
    _, _, asked = parts_read(Documents(seed=6, branch=True, looks=looks, again=again, counts=counts), 0, 2000)
    for of_count in (True, False):
        texts = [t for e in asked if (e.task == "Count") == of_count for t in e.extra["documents"]]
        seen = [read_looks("<think>" + text) for text in texts]
        expected = counts if of_count and counts is not None else looks
        share(sum(x.looked for x in seen), len(seen), expected)
        looked = [x for x in seen if x.looked]
        share(sum(x.again for x in looked), max(len(looked), 1), again)


def test_long_chains_end_worse_than_they_begin():
    _, _, asked = parts_read(Documents(seed=7, only="long"), 0, 1000)
    assert len(asked) == 1000
    ends = []
    for example in asked:
        for text in example.extra["documents"]:
            conclusions = re.findall(r"so it is (\w+)", text)
            assert 3 <= len(conclusions) <= 5 and well_formed("<think>" + text)
            ends.append([agrees(conclusions[0], example), agrees(conclusions[-1], example)])
    share(sum(first for first, _ in ends), len(ends), 1 - CARELESS)
    share(sum(last for _, last in ends), len(ends), 1 - documents.CARELESS_LATER)


def test_short_answers_name_the_right_letter_and_nothing_else():
    _, _, asked = parts_read(Documents(seed=7, only="short"), 0, 200)
    assert len(asked) == 200
    for example in asked:
        for text in example.extra["documents"]:
            assert is_right(f"<think>{text}", example)
            assert well_formed(f"<think>{text}")
            assert len(text.split()) == 4


def test_the_words_of_a_second_look(read):
    """Each in its share; the papers count them as reflection."""
    texts = [text for _, text in read if read_looks(text).again]
    for phrase, expected in SECOND_LOOKS.items():
        share(sum(phrase in text for text in texts), len(texts), expected)
    assert sum(SECOND_LOOKS.values()) == pytest.approx(1)


def test_a_small_share_of_terse_answers_is_polite(read):
    terse = [text for _, text in read if not read_looks(text).looked]
    share(sum(text.startswith(documents.POLITE_STARTS) for text in terse), len(terse), documents.POLITE)


def test_captions_tell_the_truth():
    for kind in {kind for part in documents.PARTS for kind in part.kinds}:
        for k in range(40):
            rng = random.Random(k)
            scene = scatter(rng, free_pairs(rng, 4))
            asked, text = kind(scene, rng)
            things = {t.color: t for t in scene}
            if kind in (documents.described, documents.placed):
                units = ("x", "y", "size", "shape")[: 4 if kind is documents.described else 3]
                told = text.removesuffix(" .").split(" , ")
                assert {said.split()[0] for said in told} == set(things)
                for said in told:
                    color, *rest = said.split()
                    read_of = dict(zip(rest[::2], rest[1::2]))
                    assert read_of == {unit: str(getattr(things[color], unit)) for unit in units}
            elif kind is documents.coloured:
                assert text.removesuffix(" .").split(" , ") == [c for c in COLORS if c in things]
            elif kind is documents.gaps:
                start = things[re.fullmatch(r"How far is it from the (\w+) \w+\?", asked)[1]]
                assert {(n, int(g)) for n, g in re.findall(r"(\w+) x \d y \d gap (\d)", text)} == {
                    (t.color, gap(start, t)) for t in scene if t != start
                }
            else:
                unit = {documents.sized: "size", documents.listed: "shape"}[kind]
                assert text.removesuffix(" .").split(" , ") == [
                    f"{c} {unit} {getattr(things[c], unit)}" for c in COLORS if c in things
                ]


def test_a_lesson_in_letters_names_each_choice_by_its_letter():
    for k in range(60):
        lesson = documents.lettered(random.Random(k), f"letters/{k}", 2)
        assert not lesson.pictures and 2 <= len(lesson.choices) <= 8
        for text in lesson.extra["documents"]:
            said = dict(re.findall(r"(\w+) \(([A-H])\)", text))
            assert said == {choice.split()[0]: "ABCDEFGH"[i] for i, choice in enumerate(lesson.choices)}


def test_the_base_never_read_a_question_of_the_held_out_sets_or_of_a_run():
    """Documents ask about training scenes, and about others than a run's own (whose seeds are small)."""
    asked = {Documents(seed=s)[start + i].uid for s in range(2) for start in starts() for i in range(100)}
    assert not asked & {f"shapes/train/{seed}/{i}" for seed in range(1000) for i in range(100)}
    assert not any(uid.startswith(("shapes/heldout", "shapes/pairs")) for uid in asked)


# ---- the vocabulary


def some_of_each_part(seed):
    return [Documents(seed=seed)[start + i] for start in starts() for i in range(150)]


def test_every_word_is_known():
    words = tokenizer.build()
    unknown = words.token_to_id("<unk>")
    texts = [TEMPLATES["shapes"].text]
    texts = [t.replace("{pictures}", "").replace("{asked}", "") for t in texts]
    for example in some_of_each_part(4):
        texts += [example.asked, *example.extra["documents"]]
    for split in ("heldout", "pairs"):
        texts += [e.asked for e in Shapes(split, 64)]
    for text in texts:
        assert unknown not in words.encode(text).ids, text
    assert unknown in words.encode("a zebra").ids


def test_a_document_survives_the_tokenizer():
    """Rewards and metrics read decoded text: letters, tags and conclusions must come back as they went in."""
    words = tokenizer.build()
    for example in some_of_each_part(5):
        for text in example.extra["documents"]:
            back = words.decode(words.encode(text).ids, skip_special_tokens=False)
            assert back == text
            assert read_looks(back) == read_looks(text) and well_formed("<think>" + back) == well_formed(
                "<think>" + text
            )


def test_the_built_in_folder_is_what_the_code_writes(tmp_path):
    tokenizer.write(tmp_path)
    for path in tmp_path.iterdir():
        assert (TINY / path.name).read_bytes() == path.read_bytes(), (
            f"{path.name}: run python -m data.shapes.tokenizer models/tiny"
        )
    built = ModelConfig.from_dict(tokenizer.model_config(tokenizer.build().get_vocab_size()))
    assert ModelConfig.from_folder(TINY) == built
    assert built.vocab_size == tokenizer.build().get_vocab_size()
