"""The protocol vision_r1, step by step, on completions made by hand; and what evaluate.py prints of it."""

import io
import json
import random

import pytest
from PIL import Image

import evaluate
from data.images import open_picture
from data.types import BadPicture, Example
from grpo.evaluation import passes
from grpo.evaluation.passes import Questions, ladder, places_of, tried_again
from grpo.evaluation.protocols import PLAIN, PROTOCOLS
from grpo.evaluation.scores import Answers, read_completion
from grpo.evaluation.vision_r1 import SIDE, by_rule, closed, extracted, prepared, shrunk, vision_r1

PROTOCOL = PROTOCOLS["vision_r1"]


def asked(answer, choices=(), uid="u", **extra):
    return Example(uid, "What?", choices, answer, extra={"benchmark": "mathvista"} | extra)


# ---- the question


def noise(size, mode="RGB"):
    picture = Image.new(mode, size)
    draw = random.Random(0)
    for place in range(0, size[0] * size[1], 7):
        picture.putpixel((place % size[0], place // size[0]), tuple(draw.choices(range(256), k=len(mode))))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_what_the_published_numbers_were_made_with():
    sampling = PROTOCOL.sampling
    assert (sampling.temperature, sampling.top_p, sampling.tries, PROTOCOL.cap) == (0.6, 0.95, 5, 16_000)
    assert sampling.changes()["truncation"] == (None, 0.95)
    assert PLAIN["instruct"] == {"reasoning": "chatml_direct", "direct": "chatml_direct"}


@pytest.mark.parametrize(
    "size, shown",
    [((1024, 512), (512, 256)), ((300, 900), (171, 512)), ((512, 512), (512, 512)), ((80, 40), (80, 40))],
)
def test_a_picture_is_shrunk_and_saved_as_jpeg(size, shown):
    picture = noise(size)
    found = shrunk(picture, "x")
    assert found.size == shown and max(found.size) <= SIDE and found.mode == "RGB"
    # the same by Pillow alone
    image = open_picture(picture, name="x")
    image.thumbnail((512, 512))
    file = io.BytesIO()
    image.save(file, "JPEG")
    assert found.tobytes() == Image.open(file).convert("RGB").tobytes() != image.tobytes()


def test_the_question_is_the_benchmark_s_own():
    example = Example(
        "u", "How many?", (), "3", pictures=(noise((900, 90)), b"broken"), extra={"query": "Hint: …"}
    )
    found = prepared(example)
    assert found.asked == "Hint: …" and found.uid == "u" and found.answer == "3"
    assert open_picture(found.pictures[0], name="x").size == (512, 51)
    with pytest.raises(BadPicture, match="u: picture 2"):
        open_picture(found.pictures[1], name="x")
    # own questions have no query
    assert prepared(Example("u", "How many?", (), "3")).asked == "How many?"


def test_questions_are_made_on_demand():
    source = [Example(str(n), "What?", (), "3", extra={"query": f"{n}?"}) for n in range(5)]
    found = Questions(source, range(5), prepared)
    assert len(found) == 5 and found[3].asked == "3?" and [each.asked for each in found[1:3]] == ["1?", "2?"]
    assert [each.uid for each in Questions(found, [4, 0])] == ["4", "0"]


# ---- the tries


def written(example, text):
    return [read_completion(example, text, [1], True, vision_r1)]


def test_asked_again_until_a_tag_is_closed_and_the_last_one_counts():
    """Five tries in all; questions with a closed tag are left alone; others keep their last completion."""
    examples = [Example(name, "What?", (), "1") for name in ("at once", "third", "never", "skipped")]
    asked_for = []

    def ask(questions, attempt):
        answers = Answers()
        asked_for.append([example.uid for example in questions])
        for example in questions:
            if example.uid == "skipped":
                answers.skipped.append("example 'skipped': damaged")
                continue
            done = example.uid == "at once" or (example.uid == "third" and attempt == 2)
            answers.append(written(example, f"try {attempt}" + ("</answer>" if done else "")))
        return answers

    final, first = tried_again(ask, examples, 5)
    assert asked_for == [
        ["at once", "third", "never", "skipped"],
        ["third", "never"],
        ["third", "never"],
        ["never"],
        ["never"],
    ]
    assert [group[0].text for group in final] == ["try 0</answer>", "try 2</answer>", "try 4"]
    assert [group[0].text for group in first] == ["try 0</answer>", "try 0", "try 0"]
    assert final.skipped == first.skipped == ["example 'skipped': damaged"]
    assert closed("</answer>") and not closed("<answer>")
    asked_for.clear()
    assert tried_again(ask, examples, 1)[0] is not None and len(asked_for) == 1


def test_questions_that_cannot_be_made_have_no_place():
    class Broken(list):
        def __getitem__(self, index):
            if index == 1:
                raise BadPicture("broken")
            return super().__getitem__(index)

    examples = Broken(Example(str(n), "What?", (), "1") for n in range(3))
    assert places_of(examples) == {"0": 0, "2": 2}


# ---- the answer


@pytest.mark.parametrize(
    "text, found",
    [
        ("<think>t</think><answer> Final Answer:B </answer>", "B"),
        ("<answer> Final Answer:14\n15 </answer>", "14\n15"),
        # the spaces are a part of the pattern
        ("<answer>Final Answer:B</answer>", "<answer>Final Answer:B</answer>"),
        ("<answer> Final Answer: B </answer>", " B"),
        ("<answer> Final Answer:B</answer>", "<answer> Final Answer:B</answer>"),
        ("no tag", "no tag"),
        # the first one
        ("<answer> Final Answer:A </answer><answer> Final Answer:B </answer>", "A"),
    ],
)
def test_extraction(text, found):
    assert extracted(text) == found


CHOICES = ("red", "green", "blue", "a red and green one")
# said, letter, why there is none
LETTERED = [
    ("B", "B", ""),
    ("(B) green", "B", ""),
    ("The answer is B.", "B", ""),
    ("B or C", None, "ambiguous"),
    ("b", None, "not a choice"),
    ("green", "B", ""),
    ("It is BLUE", "C", ""),
    # red is contained in it, too
    ("red and green", None, "not a choice"),
    ("A car", "A", ""),
    ("Z", None, "refused"),
    ("I can't process this file.", None, "refused"),
    # longer than twice the choices together
    ("it is as " * 12 + "blue", None, "not a choice"),
    ("", None, "not a choice"),
]


@pytest.mark.parametrize("said, letter, why", LETTERED)
def test_choices(said, letter, why):
    found = by_rule(said, asked("green", CHOICES))
    assert (found.letter, found.why, found.correct) == (letter, why, letter == "B")


# kind, right answer, said, right?
NUMBERS = [
    ("integer", "14", "14", True),
    ("integer", "14", " 14\n", True),
    ("integer", "14", "14.0", None),
    ("integer", "14", "14 cm", None),
    ("integer", "14", "15", False),
    ("float", "1.2", "1.2", True),
    ("float", "1.2", "1.20", True),
    # not rounded to the question's precision
    ("float", "1.2", "1.24", False),
    ("float", "1.2", "6/5", None),
    # its script compares a list with the word None
    ("list", "[1, 2]", "[1, 2]", False),
]


@pytest.mark.parametrize("kind, gold, said, right", NUMBERS)
def test_numbers_of_mathvista(kind, gold, said, right):
    found = by_rule(said, asked(gold, answer_type=kind, precision=1))
    assert found.correct == bool(right) and (found.answer is None) == (right is None)


def test_mathverse_wants_the_same_string():
    choice = asked("60°", ("40°", "60°"), benchmark="mathverse")
    assert by_rule(" B ", choice).correct and not by_rule("(B)", choice).correct
    assert not by_rule("60°", choice).correct
    assert by_rule("4.4 m", asked("4.4 m", benchmark="mathverse")).correct


@pytest.mark.parametrize(
    "said, right", [("B", True), ("option b", None), ("(b)", True), ("A or B", None), ("E", None), ("", None)]
)
def test_choices_of_dynamath(said, right):
    """The one of the letters A to E that is in the text: "option b" has none, and "(b)" has one."""
    found = by_rule(said, asked("no", ("yes", "no"), benchmark="dynamath"))
    if said == "option b":
        assert found.correct
        return
    assert found.correct == bool(right) and (found.answer is None) == (right is None)


def test_numbers_of_dynamath():
    question = asked("2.0944", benchmark="dynamath", answer_type="float")
    assert by_rule("2.094 m", question).correct and not by_rule("2.1", question).correct
    assert by_rule("about 2", question).why == "not a number"


def test_the_whole_completion_is_compared_where_no_tag_is_found():
    assert vision_r1(
        "<think>red or blue</think><answer> Final Answer:B </answer>", asked("green", CHOICES)
    ).correct
    assert vision_r1("The answer is (B)", asked("green", CHOICES)).correct
    assert vision_r1("14", asked("14", answer_type="integer")).correct


# ---- the command


def test_what_each_step_adds():
    examples = [Example(str(n), "What?", (), "1") for n in range(4)]

    def answers(*rights):
        found = Answers()
        found.extend(written(example, f"{right}") for example, right in zip(examples, rights))
        return found

    found = ladder(
        [("greedy", answers(1, 0, 0, 0)), ("first", answers(1, 1, 0, 0)), ("tries", answers(1, 1, 1, 0))]
    )
    assert [(each["step"], each["accuracy"], each["adds"]) for each in found] == [
        ("greedy", 0.25, 0.0),
        ("first", 0.5, 0.25),
        ("tries", 0.75, 0.25),
    ]


def test_the_command_prints_what_tries_add(tmp_path, capsys, monkeypatch):
    """Invented completions: greedy ones are right once in four, the first sample half, the retries all."""

    def invented(policy, chat, examples, how, *rest, **options):
        found = Answers()
        for number in range(len(examples)):
            example = examples[number]
            place = int(example.uid.rpartition("/")[2])
            greedy = how.temperature == 0
            assert greedy or (how.temperature, how.truncation.top_p) == (0.6, 0.95)
            right = place % 4 == 0 if greedy else place % 2 == 0 or how.attempt == 2
            text = f"<answer> Final Answer:{example.letter} </answer>" if right else "<think> hm"
            found.append([read_completion(example, text, [1], True, how.read)])
        return found

    monkeypatch.setattr(passes, "answer_all", invented)
    file = tmp_path / "out.json"
    assert evaluate.main(["--protocol", "vision_r1", "--items", "16", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    told = json.loads(file.read_text())
    assert [(each["accuracy"], each["adds"]) for each in told["steps"]] == [
        (0.25, 0.0),
        (0.5, 0.25),
        (1.0, 0.5),
    ]
    assert told["scores"]["accuracy"] == 1.0 and told["more"]["greedy_strict"]["scores"]["accuracy"] == 0.25
    assert "what each step adds" in out and "up to 5 tries" in out and "+50.0" in out
    assert "one greedy answer, read by strict" in (tmp_path / "out.json.md").read_text()


def test_the_command_runs(tmp_path, capsys):
    """The real program on two questions: the built-in model closes no tag so soon, and is asked again."""
    file = tmp_path / "out.json"
    argv = ["--protocol", "vision_r1", "--items", "2", "--cap", "3", "--device", "cpu", "--json", str(file)]
    assert evaluate.main(argv) == 0
    told = json.loads(file.read_text())
    assert len(told["answers"]) == 2 and len(told["steps"]) == 3
    assert evaluate.main([*argv, "--samples", "2"]) == 2
    assert "the protocol vision_r1 samples by itself" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [2, 8])
def test_interrupted_within_the_tries_it_goes_on(tmp_path, capsys, lines):
    """The file of kept completions cut after a few lines: the result is that of an undisturbed command."""
    argv = "--protocol vision_r1 --items 3 --cap 4 --device cpu --wave 1 --json".split()
    assert evaluate.main([*argv, str(tmp_path / "a.json")]) == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate, "ladder", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate.main([*argv, str(tmp_path / "b.json")])
    part = tmp_path / "b.json.part"
    kept = part.read_bytes().splitlines(keepends=True)
    # the first line, three questions once and greedily, and some of them up to four times more
    assert 1 + 3 + 3 + 3 < len(kept) < 1 + 5 * 3 + 3
    part.write_bytes(b"".join(kept[: lines + 1]))
    assert evaluate.main([*argv, str(tmp_path / "b.json")]) == 0
    assert f"going on: {lines} answers" in capsys.readouterr().out
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a.pop("config") and b.pop("config") and a == b
