"""grpo/evaluation/answers.py: with a policy whose completions the test chooses, and with a random one for
what only a real forward pass can show."""

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from data.chat import Chat
from data.shapes import looking, tokenizer
from data.shapes.world import Shapes
from data.types import BadExample, Example
from grpo.evaluation import answers as asking
from grpo.evaluation.answers import Asking
from grpo.evaluation.protocols import paper
from grpo.evaluation.scores import Answers, flat_scores, read_completion, scores
from grpo.evaluation.statistics import maj_at_k, pass_at_k, wilson
from grpo.memory import WAVE, MemoryBudget
from grpo.rollout import generate
from models import weights
from models.config import ModelConfig

# <|endoftext|> of the built-in tokenizer
STOP = 0
CAP = 40


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(folder)
    return Chat(folder, template="shapes", max_prompt=100)


@pytest.fixture(scope="module")
def random_policy():
    return weights.init(
        ModelConfig.from_dict(tokenizer.model_config(tokenizer.build().get_vocab_size())), seed=0
    )


def answer_all(policy, chat, examples, wave=WAVE, share=(0, 1), progress=lambda count: None, **how):
    """`answer_all` with the settings of `Asking` as keywords."""
    return asking.answer_all(policy, chat, examples, Asking(**how), wave, share, progress=progress)


class Scripted(nn.Module):
    """Writes `script(question, g, blind)` under each prompt, token by token, then stops."""

    def __init__(self, chat, script):
        super().__init__()
        self.chat, self.script, self.waves = chat, script, []
        self.unused = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vision=SimpleNamespace(spatial_merge_size=2))

    def prefill(self, prompts, group, capacity, max_rows=None):
        rows, first = [], 0
        for tokens, length, grid in zip(prompts.tokens, prompts.length, prompts.grid):
            patches = prompts.patches[first : first + int(grid.prod())]
            first += len(patches)
            # one grey everywhere
            blind = float(patches.view(len(patches), 3, -1).std(dim=(0, 2)).max()) < 1e-6
            question = (
                self.chat.text(tokens[:length].tolist()).partition("User : ")[2].partition(" Select")[0]
            )
            for g in range(group):
                ids = [*self.chat.encode(self.script(question, g, blind)), STOP]
                rows.append((ids + [STOP] * capacity)[:capacity])
        self.waves.append(len(prompts.tokens))
        return Tape(torch.tensor(rows).view(len(prompts.tokens) * group, capacity))

    def decode(self, tokens, tape):
        tape.filled += 1
        return tape.tokens.gather(1, tape.filled[:, None] - 1)[:, 0]

    def logits(self, hidden):
        scores = nn.functional.one_hot(hidden, 200).float() * 100
        # the second choice, where the first is banned
        scores[..., self.chat.encode("it")[0]] += 50
        return scores


class Tape:
    """A cache of what will be said."""

    def __init__(self, tokens):
        self.tokens, self.filled, self.span = tokens, torch.zeros(len(tokens), dtype=torch.long), 0

    def reach(self, steps, multiple):
        return 1

    def keep(self, alive, most):
        slots = alive.int().argsort(descending=True, stable=True)[:most]
        self.tokens, self.filled = self.tokens[slots], self.filled[slots]
        return slots


def picture(color=(200, 30, 30)):
    image = Image.new("RGB", (56, 56), color)
    image.paste((0, 0, 0), (10, 10, 30, 30))
    return image


def example(number, answer="yes", **changes):
    """Questions are told apart by how often they say "it"."""
    return Example(
        **{
            "uid": f"q{number}",
            "question": "Is " + "it " * number + "?",
            "choices": ("yes", "no"),
            "answer": answer,
            "task": "T",
            "pictures": (picture,),
        }
        | changes
    )


RIGHT, WRONG = "look </think> <answer> (A) </answer>", "</think> <answer> (B) </answer>"


def test_an_answer_is_read_as_it_was_written(chat):
    said = {1: RIGHT, 2: WRONG, 3: "</think> (A)", 4: "look " * 100}
    policy = Scripted(chat, lambda question, g, blind: said[question.count("it")])
    answers = answer_all(policy, chat, [example(n) for n in said], cap=CAP)
    assert [len(group) for group in answers] == [1] * 4 and answers.skipped == []
    a, b, c, d = (group[0] for group in answers)
    assert (a.uid, a.answer, a.letter, a.gold, a.correct) == ("q1", "yes", "A", "yes", True)
    assert (a.well_formed, a.length, a.stopped) == (True, 6, True)
    assert a.text == "<think>look </think> <answer> (A) </answer>" and a.tokens == (*chat.encode(RIGHT), STOP)
    assert (b.answer, b.correct, b.well_formed, b.length) == ("no", False, True, 5)
    assert (c.answer, c.letter, c.correct, c.well_formed, c.why) == (
        None,
        None,
        False,
        False,
        "no answer tag",
    )
    assert (d.length, d.stopped) == (CAP, False)
    # not a question of the built-in world
    assert a.measured == {}
    plain = a.to_dict()
    assert plain["completion"] == a.text and "tokens" not in plain and "text" not in plain


def test_waves_keep_the_order_and_the_budget(chat):
    policy = Scripted(chat, lambda question, g, blind: RIGHT if question.count("it") % 2 else WRONG)
    examples, done = [example(n % 9 + 1, uid=f"q{n}") for n in range(20)], []
    whole = answer_all(policy, chat, examples, cap=CAP)
    assert policy.waves == [20]
    policy.waves.clear()
    # a question over the budget goes alone
    assert answer_all(policy, chat, examples, cap=CAP, wave=1, progress=done.append) == whole
    assert policy.waves == [1] * 20 and sum(done) == 20

    # each further "it" is one token more
    size = len(chat.prompt(example(1)).tokens) + CAP
    for repeats, wave, expected in (
        ([1] * 7, 3 * size, [3, 3, 1]),
        ([1] * 7, 3 * size - 1, [2, 2, 2, 1]),
        ([1, 1, 2, 1], 3 * size, [2, 2]),
        ([2, 1, 1], 3 * size, [2, 1]),
        ([9, 1, 1, 1], 3 * size, [2, 2]),
        ([9, 9, 1, 1, 1], 3 * size, [2, 3]),
    ):
        policy.waves.clear()
        asked = answer_all(
            policy, chat, [example(n, uid=f"q{i}") for i, n in enumerate(repeats)], cap=CAP, wave=wave
        )
        assert policy.waves == expected and [group[0].uid for group in asked] == [
            f"q{i}" for i in range(len(repeats))
        ]


class Damaged(list):
    """A lazy source one of whose rows can't be made."""

    def __getitem__(self, index):
        if index == 1:
            raise BadExample("row 1 is damaged")
        return super().__getitem__(index)


def test_what_cannot_be_asked_is_skipped_and_named(chat):
    policy, done = Scripted(chat, lambda question, g, blind: RIGHT), []
    broken = example(3, uid="no picture", pictures=(b"GIF89a broken",))
    examples = Damaged([example(1), example(2), example(200, uid="long one"), broken, example(4)])
    answers = answer_all(policy, chat, examples, cap=CAP, progress=done.append)
    assert [group[0].uid for group in answers] == ["q1", "q4"] and sum(done) == 5
    assert len(answers.skipped) == 3
    assert all(name in why for name, why in zip(("row 1", "long one", "no picture"), answers.skipped))
    found = scores(answers)
    assert (found["questions"], found["skipped"]) == (2, 3)
    with pytest.raises(ValueError, match="long one"):
        scores(answer_all(policy, chat, examples[2:3], cap=CAP))
    with pytest.raises(ValueError, match="there are none"):
        scores([])


def test_blind_withholds_the_picture(chat):
    policy = Scripted(chat, lambda question, g, blind: WRONG if blind else RIGHT)
    assert answer_all(policy, chat, [example(1)], cap=CAP)[0][0].correct
    assert not answer_all(policy, chat, [example(1)], cap=CAP, blind=True)[0][0].correct


def test_a_banned_token_is_not_written(chat):
    policy = Scripted(chat, lambda question, g, blind: "look but wait </think> <answer> (A) </answer>")
    text = answer_all(policy, chat, [example(1)], cap=CAP, banned=chat.encode("but"))[0][0].text
    assert text == "<think>look it wait </think> <answer> (A) </answer>"


def test_a_prefix_is_given_and_not_written(chat):
    """Its tokens end the prompt and begin the text; tokens and length are what the policy wrote."""
    policy, given, ends = Scripted(chat, lambda question, g, blind: RIGHT), chat.encode("but wait"), []
    real = policy.prefill

    def prefill(prompts, *sizes, **options):
        ends.append([row[n - 3 : n].tolist() for row, n in zip(prompts.tokens, prompts.length)])
        return real(prompts, *sizes, **options)

    policy.prefill = prefill
    examples = [example(1), example(9)]
    plain, begun = (answer_all(policy, chat, examples, cap=CAP, prefix=prefix) for prefix in ([], given))
    for (a,), (b,), end in zip(plain, begun, ends[1], strict=True):
        assert end[-2:] == given and end[0] == ends[0][0][-1]
        assert a.text == f"<think>{RIGHT}" and b.text == f"<think>but wait {RIGHT}"
        assert a.tokens == b.tokens and a.length == b.length and b.correct and b.well_formed


def test_several_completions_a_question(chat):
    policy = Scripted(chat, lambda question, g, blind: RIGHT if g < question.count("it") else WRONG)
    answers = answer_all(policy, chat, [example(1), example(3)], cap=CAP, samples=4, temperature=1.0)
    assert [[a.correct for a in group] for group in answers] == [
        [True, False, False, False],
        [True, True, True, False],
    ]
    with pytest.raises(ValueError, match="temperature"):
        answer_all(policy, chat, [example(1)], cap=CAP, samples=2)


# ---- counting


def answered(e, text, length=5, stopped=True, **how):
    return read_completion(e, text, [7] * length, stopped, **how)


def test_scores_of_one_answer_a_question():
    three = ("red", "blue", "white")
    answers = [
        [answered(example(1), "<think>" + RIGHT, length=10)],
        [answered(example(2), "<think>" + WRONG, length=4)],
        [answered(example(3), "<think> so (A)", length=7, stopped=False)],
        [
            answered(
                example(4, "blue", choices=three, task="U"), "<think></think><answer>blue</answer>", length=3
            )
        ],
    ]
    found = scores(answers)
    assert (found["questions"], found["completions"], found["skipped"]) == (4, 1, 0)
    assert (found["accuracy"], found["interval"]) == (0.5, list(wilson(2, 4)))
    assert found["chance"] == pytest.approx((3 / 2 + 1 / 3) / 4)
    assert (found["format"], found["extraction_failure"], found["truncated"], found["mean_length"]) == (
        0.75,
        0.25,
        0.25,
        6.0,
    )
    assert found["failures"] == {"no answer tag": 1} and "pass@k" not in found and found["measured"] == {}
    assert list(found["tasks"]) == ["T", "U"]
    assert (found["tasks"]["T"]["accuracy"], found["tasks"]["T"]["interval"]) == (
        pytest.approx(1 / 3),
        list(wilson(1, 3)),
    )
    assert (found["tasks"]["U"]["accuracy"], found["tasks"]["U"]["chance"]) == (1.0, pytest.approx(1 / 3))
    assert flat_scores(found) == {
        "accuracy": 0.5,
        "accuracy/T": pytest.approx(1 / 3),
        **{"questions": 4, "questions/T": 3, "questions/U": 1},
        "accuracy/U": 1.0,
        "format": 0.75,
        "mean_length": 6.0,
        "extraction_failure": 0.25,
        "truncated": 0.25,
        "skipped": 0,
        "repetition": pytest.approx((5 / 6 + 3 / 4) / 4),
        "loop_ratio": 0,
        "aha/visualthinker": 0,
        "aha/vlaa": 0,
        "aha/visualthinker/accuracy_without": 0.5,
        "aha/vlaa/accuracy_without": 0.5,
    }


def test_reflection_and_repetition_of_any_task():
    """Inside each question: waiting goes with right answers in the first and with nothing in the second. A
    stop token breaks no loop."""
    wait = "<think> wait , "
    answers = [
        [answered(example(1), wait + RIGHT), answered(example(1), "<think>" + WRONG)],
        [answered(example(2), wait + WRONG, length=17), answered(example(2), "<think>" + WRONG)],
    ]
    found = scores(answers)
    assert (
        found["aha"]["vlaa"] == 0.5
        and found["aha"]["vlaa/gain"] == 0.5
        and found["aha"]["vlaa/gain_groups"] == 2
        and found["aha"]["word/wait"] == 0.5
    )
    assert (
        found["loop_ratio"] == 0.25
        and flat_scores(found)["aha/vlaa/accuracy_with"] == 0.5
        and "aha/word/wait" not in flat_scores(found)
    )


def test_scores_of_several_answers_a_question():
    """The question is the unit of every interval: twelve completions of three questions are no twelve
    questions."""
    letters = ["AAAB", "ABB-", "----"]
    answers = [
        [answered(example(n), f"<think></think><answer>{x}</answer>" if x != "-" else "<think>") for x in row]
        for n, row in enumerate(letters, 1)
    ]
    found = scores(answers)
    assert found["accuracy"] == pytest.approx((3 / 4 + 1 / 4) / 3) and found["completions"] == 4
    assert found["interval"] == pytest.approx(wilson(1, 3))
    assert list(found["pass@k"]) == list(found["maj@k"]) == [1, 2, 4]
    for k in (1, 2, 4):
        passed = sum(pass_at_k(4, c, k) for c in (3, 1, 0))
        majority = sum(maj_at_k([None if x == "-" else x for x in row], "A", k) for row in letters)
        assert found["pass@k"][k]["value"] == pytest.approx(passed / 3)
        assert found["pass@k"][k]["interval"] == pytest.approx(wilson(passed, 3))
        assert found["maj@k"][k]["value"] == pytest.approx(majority / 3)
    assert (
        found["pass@k"][1]["value"]
        == pytest.approx(found["maj@k"][1]["value"])
        == pytest.approx(found["accuracy"])
    )
    assert found["pass@k"][4]["value"] == pytest.approx(2 / 3) and found["maj@k"][4][
        "value"
    ] == pytest.approx(1 / 3)
    assert list(scores([group[:3] for group in answers])["pass@k"]) == [1, 2, 3]


def test_free_answers_vote_together_when_right():
    free = example(1, "60", choices=())
    group = [answered(free, f"<think></think><answer>{x}</answer>") for x in ("60", "60.", "61", "61")]
    assert [a.correct for a in group] == [True, True, False, False]
    found = scores([group])
    assert (found["maj@k"][4]["value"], found["chance"]) == (0.5, 0.0)


def test_the_work_of_the_second_look():
    def look(first, second=None):
        text = f"<think> look : red circle x 3 , so it is {first} ."
        if second:
            text += f" but wait , let me look again : red circle x 1 , so it is {second} ."
        return f"{text} </think> <answer> (A) </answer>"

    e = example(1, uid="shapes/heldout/0/1", choices=("left", "right"), answer="left")
    texts = [
        look("right", "left"),
        look("right", "left"),
        look("left", "right"),
        look("left", "left"),
        look("right"),
        "<think></think><answer>(A)</answer>",
    ]
    answers = [
        [answered(dataclasses.replace(e, uid=f"shapes/heldout/0/{n}"), text, measure=looking.measure)]
        for n, text in enumerate(texts)
    ]
    found = scores(answers)
    expected = {
        "looking": 5 / 6,
        "self_correction": 4 / 6,
        "first_look_right": 2 / 5,
        "wrong_to_right": 2 / 6,
        "right_to_wrong": 1 / 6,
    }
    assert found["measured"] == pytest.approx(expected)
    assert {name: flat_scores(found)[name] for name in expected} == found["measured"]
    # where no completion looks, a measurement that applies to no completion is 0
    assert scores(answers[-1:])["measured"] == dict.fromkeys(expected, 0.0)


def test_only_the_hook_of_a_task_measures():
    assert answered(example(1, uid="shapes/heldout/0/1"), "<think> look : so it is yes .").measured == {}


# ---- with a real forward


def test_neither_waves_nor_company_change_an_answer(chat, random_policy):
    examples = [Shapes("heldout", 12)[i] for i in range(12)]
    ask = partial(
        answer_all, random_policy, chat, cap=12, samples=3, temperature=1.0, measure=looking.measure
    )
    together, alone, turned = ask(examples), ask(examples, wave=1), ask(examples[::-1])
    assert isinstance(together, Answers) and together == alone == turned[::-1]
    # it does sample
    assert len({a.text for group in together for a in group}) > 12
    assert together != ask(examples, seed=1)
    assert all(a.measured for group in together for a in group)


# ---- ranks, memory, protocols


def test_shares_together_are_the_whole(chat, monkeypatch):
    """Two ranks ask every other question each; what both get is, in order and skipped ones too, what one
    rank gets alone."""
    policy = Scripted(chat, lambda question, g, blind: RIGHT if question.count("it") % 2 else WRONG)
    examples = [example(n % 9 + 1, uid=f"q{n}") for n in range(7)]
    examples[2] = example(200, uid="long one")
    examples[5] = example(1, uid="broken", pictures=(Path("nowhere.png"),))
    alone, parts = answer_all(policy, chat, examples, cap=CAP), []
    monkeypatch.setattr("grpo.evaluation.answers.gather_objects", lambda rows: parts.append(rows) or rows)
    mine = [answer_all(policy, chat, examples, cap=CAP, share=(rank, 2)) for rank in (0, 1)]
    assert [[group[0].uid for group in each] for each in mine] == [["q0", "q4", "q6"], ["q1", "q3"]]
    # as gather_objects joins them
    monkeypatch.setattr(
        "grpo.evaluation.answers.gather_objects", lambda rows: [row for part in parts for row in part]
    )
    both = answer_all(policy, chat, examples, cap=CAP, share=(1, 2))
    assert both == alone and both.skipped == alone.skipped and len(both.skipped) == 2


def test_memory_that_is_full_is_shared_by_fewer(chat, monkeypatch):
    """A GPU that holds three questions at a time: the same answers, the room is halved until they fit, and
    it is said."""
    policy = Scripted(chat, lambda question, g, blind: RIGHT if question.count("it") % 2 else WRONG)
    examples, said = [example(n % 9 + 1, uid=f"q{n}") for n in range(20)], []
    whole = answer_all(policy, chat, examples, cap=CAP)

    def small(policy, prompts, **how):
        if len(prompts.tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(policy, prompts, **how)

    monkeypatch.setattr("grpo.evaluation.answers.generate", small)
    room = MemoryBudget(20 * (CAP + 100), say=said.append)
    assert answer_all(policy, chat, examples, cap=CAP, wave=room) == whole
    assert said and "out of memory with 20 questions" in said[0] and room.size < 20 * (CAP + 100) / 2
    policy.waves.clear()
    # the next pass begins with what was learned
    assert answer_all(policy, chat, examples, cap=CAP, wave=room) == whole
    assert max(policy.waves) <= 3
    monkeypatch.setattr(
        "grpo.evaluation.answers.generate",
        lambda *args, **how: small(policy, SimpleNamespace(tokens=range(4))),
    )
    with pytest.raises(torch.OutOfMemoryError):
        answer_all(policy, chat, examples, cap=CAP, wave=1)


def test_another_reader_reads_the_same_completions(chat):
    policy = Scripted(chat, lambda question, g, blind: "look </think> so (A)")
    strictly, loosely = (
        answer_all(policy, chat, [example(1)], cap=CAP, **how)[0][0] for how in ({}, {"read": paper})
    )
    assert (strictly.answer, strictly.why, strictly.correct) == (None, "no answer tag", False)
    assert strictly.text == loosely.text and (loosely.answer, loosely.letter) == ("yes", "A")
    assert (
        loosely.picture == "q1#1"
        and answered(example(1, pictures=(Path("a/b.png"), picture)), RIGHT).picture == "b.png, q1#2"
    )
