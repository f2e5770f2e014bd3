"""The forms of a user's function: one by one, async, all at once, TRL's; pictures and numbers of its own."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_server import message, serving
from PIL import Image

from data.types import Example
from grpo.rewards.rules import rule, score
from grpo.rewards.signatures import FailedAt, Signature
from grpo.rewards.user_code import RewardError, UserReward
from grpo.serving.messages import png


def one(text, example, length):
    return len(text) + 100 * length + 10 * (example.answer == "b")


async def waits(text, example, length):
    await asyncio.sleep(0.01)
    return one(text, example, length)


def batched(texts, examples, lengths):
    return [one(*each) for each in zip(texts, examples, lengths)]


async def batched_waits(texts, examples, lengths):
    return np.array(batched(texts, examples, lengths))


def trl(completions, answer, lengths, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    assert kwargs["prompts"][0] == [{"role": "user", "content": "Which?"}]
    return torch.tensor([len(t) + 100 * n + 10 * (a == "b") for t, a, n in zip(texts, answer, lengths)])


async def trl_waits(completions, solution, lengths):
    return trl(completions, solution, lengths, prompts=[[{"role": "user", "content": "Which?"}]])


class Called:
    async def __call__(self, text, example, length):
        return one(text, example, length)


FORMS = [one, waits, batched, batched_waits, trl, trl_waits, Called(), lambda a, b, c: one(a, b, c)]
EXAMPLES = [Example("t/1", "Which?", (), "a"), Example("t/2", "Which?", (), "b")]
CALL = (["x", "yy", "zzz"], [EXAMPLES[0], EXAMPLES[0], EXAMPLES[1]], [1, 2, 3])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: getattr(form, "__name__", "object"))
def test_every_form_gives_the_same_numbers(form):
    signature = Signature(form)
    for _ in range(2):
        assert signature.rows(*CALL) == [[101], [202], [313]]
    assert signature.together == (form not in (one, FORMS[-1]))


def test_trl_columns_are_those_of_the_example_and_its_extra():
    def reward(completions, need, may=None, choices=None, **others):
        return [float(a + (b or 0) + len(c)) for a, b, c in zip(need, others["often"], choices)]

    first = Example("t/1", "Q?", ("x", "y"), "x", extra={"need": 1, "often": 5})
    second = Example("t/2", "Q?", ("x", "y"), "x", extra={"need": 2})
    assert Signature(reward).rows(["", ""], [first, second], [1, 1]) == [[8], [4]]
    bare = Example("t/3", "Q?", ("x", "y"), "x")
    with pytest.raises(ValueError, match="TRL's 'need', which is not known here; known are answer, choices"):
        Signature(reward).rows(["", ""], [first, bare], [1, 1])


@pytest.mark.parametrize("name", ["completion_ids", "trainer_state"])
def test_what_trl_has_and_we_have_not_is_named(name):
    scope = {}
    exec(f"def reward(completions, {name}): return [0.0]", scope)
    with pytest.raises(ValueError, match=name):
        Signature(scope["reward"]).rows([""], [EXAMPLES[0]], [1])


def with_pictures(text, example, length, pictures):
    return sum(each.size[0] for each in pictures)


def all_pictures(texts, examples, lengths, pictures):
    return [sum(each.size[0] for each in group) for group in pictures]


def trl_pictures(completions, image):
    return [0 if each is None else each.size[0] for each in image]


@pytest.mark.parametrize("form", [with_pictures, all_pictures, trl_pictures])
def test_pictures_come_as_images_to_those_that_ask(form):
    picture = png(Image.new("L", (5, 2)))
    examples = [Example("a", "?", (), "1", pictures=(picture,)), Example("b", "?", (), "1")]
    assert Signature(form).pictures and not Signature(one).pictures
    assert Signature(form).rows(["", ""], examples, [1, 1]) == [[5], [0]]


def test_numbers_of_its_own_are_named_and_complete():
    def judged(text, example, length):
        return {"good": (1.0, {"sure": 0.5, "long": 2}), "few": (1.0, {"sure": 1}), "bare": 1.0}[text]

    judged.metrics = ["sure", "long"]
    signature = Signature(judged)
    assert signature.rows(["good"], EXAMPLES[:1], [1]) == [[1.0, 0.5, 2.0]]
    for text, words in {"few": "returned the metrics", "bare": "return (number"}.items():
        with pytest.raises(FailedAt, match="'t/1'") as failed:
            signature.rows([text], EXAMPLES[:1], [1])
        assert words in str(failed.value.__cause__)
    judged.metrics = "sure"
    with pytest.raises(ValueError, match="give a list of names"):
        Signature(judged)


@pytest.mark.parametrize("result", [None, 1.0, [1.0], [1.0] * 4, "abc", {0: 1.0}])
def test_all_at_once_is_one_number_for_each(result):
    def wrong(texts, examples, lengths):
        return result

    with pytest.raises(ValueError, match="for 3 completions; return a list, one for each"):
        Signature(wrong).rows(*CALL)


@pytest.mark.parametrize("bad", [None, float("nan"), "1", [1.0]])
@pytest.mark.parametrize("form", ["batched", "async"])
def test_the_completion_at_fault_is_named(form, bad):
    async def wait(text, example, length):
        return bad if example.uid == "t/2" else 1.0

    def all_of_them(texts, examples, lengths):
        return [bad if example.uid == "t/2" else 1.0 for example in examples]

    with pytest.raises(FailedAt, match="the question 't/2'"):
        Signature(all_of_them if form == "batched" else wait).rows(*CALL)


# ---- in the function's own process

FILE = """\
import asyncio, time

async def sleeps(text, example, length):
    await asyncio.sleep(0.1)
    return float(text)

async def moody(text, example, length):
    if text == "late": await asyncio.sleep(60)
    if text == "raise": raise KeyError("no such thing")
    if text == "block": time.sleep(60)
    return 1.0

moody.timeout = 0.5

def judged(texts, examples, lengths, pictures):
    time.sleep(0.1)
    return [(float(t), {"sure": n, "width": p[0].size[0]}) for t, n, p in zip(texts, lengths, pictures)]

judged.metrics = ["sure", "width"]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("forms") / "forms.py"
    path.write_text(FILE)
    return path


def examples(count: int) -> list[Example]:
    draw = lambda: Image.new("RGB", (3, 4))
    return [Example(f"t/{i}", "?", (), "1", pictures=(draw,)) for i in range(count)]


@pytest.mark.parametrize("function", ["sleeps", "judged"])
def test_64_rewards_that_wait_take_no_longer_than_one(file, function):
    """64 x 0.1 s one after the other are 6.4 s. The target is 0.5 s; the rest is for a busy machine."""
    texts = [[f"{8 * p + g}" for g in range(8)] for p in range(8)]
    name = f"{file}:{function}"
    rule(name)
    start = time.monotonic()
    reward, parts = score(texts, examples(8), {name: 2.0}, torch.full((8, 8), 7))
    seconds = time.monotonic() - start
    print(f"{seconds:.2f} s")
    assert seconds < 2.5
    assert torch.equal(reward, 2.0 * torch.arange(64.0).view(8, 8))
    if function == "judged":
        assert list(parts) == [name, f"{name}/sure", f"{name}/width"]
        assert parts[f"{name}/sure"].eq(7).all() and parts[f"{name}/width"].eq(3).all()
        # a rank without a prompt has the same parts
        _, none = score([], [], {name: 2.0}, torch.zeros(0, 8))
        assert list(none) == list(parts) and all(part.shape == (0, 8) for part in none.values())
    rule(name).close()


def test_one_that_fails_among_many_is_named(file):
    reward = UserReward(f"{Path(file)}:moody")
    asked = examples(3)
    with pytest.raises(RewardError, match=r"KeyError: 'no such thing' \(line 9\), at the question 't/1'"):
        reward.rows(["", "raise", ""], asked, [1, 1, 1])
    with pytest.raises(RewardError, match=r"no result after 0.5 seconds, at the question 't/2'"):
        reward.rows(["", "", "late"], asked, [1, 1, 1])
    reward.timeout = 1.0
    with pytest.raises(RewardError, match=r"no result after 1 seconds, at the 3 completions of 3 questions"):
        reward.rows(["", "", "block"], asked, [1, 1, 1])
    assert reward.rows([], [], []) == []
    reward.close()


def test_the_example_of_a_judge(monkeypatch):
    """docs/judge.py against a server that judges: right, wrong, no verdict; unread answers are not asked."""
    pytest.importorskip("openai")

    def verdict(body):
        asked = body["messages"][0]["content"]
        return message("Perhaps." if "7" in asked else "**Yes**" if "Given answer: a pair" in asked else "no")

    with serving((429, {"retry-after": "0"}), answer=verdict) as fake:
        monkeypatch.setenv("JUDGE_URL", fake.url)
        monkeypatch.setenv("JUDGE_MODEL", "m")
        asked = [Example("t/1", "How many?", (), "two")]
        said = [
            "<answer>a pair</answer>",
            "<answer>3</answer>",
            "<answer>7</answer>",
            "two",
            "<answer></answer>",
        ]
        texts = [[f"<think>t</think> {each}" for each in said]]
        name = f"{Path(__file__).parents[3] / 'docs' / 'judge.py'}:judge"
        reward, parts = score(texts, asked, {name: 1.0})
        assert reward.tolist() == [[1, 0, 0, 0, 0]] and parts[f"{name}/unread"].tolist() == [[0, 0, 1, 0, 0]]
        assert len(fake.seen) == 4
    rule(name).close()
