"""A bridge whose model runs here: the built-in one, which describes its pictures."""

import random
import re

import pytest
from small_bridge import replies

from grpo.bridge import __main__ as program
from grpo.bridge import local, stages, writers
from grpo.bridge.settings import Writer
from grpo.run.signals import Interrupts


def think(text, rng):
    return f"<think> {rng.choice(['Hm.', 'Well.'])} {text} Let me look at it once more. </think> (A)"


def recipe(folder):
    file = folder / "local.yaml"
    file.write_text(
        "task: shapes\nlimit: 7\n"
        "vision: {kind: local, model: tiny, template: shapes_caption, at_once: 3, device: cpu}\n"
        "reasoner: {kind: function, model: think}\n"
        "describe: {prompt: describe_picture, max_tokens: 60, temperature: 1.0}\n"
        "reason: {prompt: shapes_reason}\n"
    )
    return str(file)


@pytest.fixture(autouse=True)
def thinking(monkeypatch):
    monkeypatch.setitem(writers.FUNCTIONS, "think", think)


class Killed(Exception):
    pass


def test_a_stopped_local_run_ends_as_an_undisturbed_one_bit_for_bit(tmp_path, monkeypatch):
    """Stopped in other places, questions stand beside other ones in their waves."""
    wanted = [recipe(tmp_path), f"out={tmp_path / 'straight'}"]
    status = program.main(wanted)
    straight = replies(tmp_path / "straight")
    described = [told["text"] for (stage, *_), told in straight.items() if stage == "describe"]
    assert len({*described}) == 7, "the model sees the pictures"
    assert sum(bool(re.search(r"\bx \d y \d size \d", text)) for text in described) >= 6
    for seed in range(2):
        chance = random.Random(seed)
        out = tmp_path / f"stopped{seed}"
        argv = [recipe(tmp_path), f"out={out}"]
        for _ in range(2):
            with monkeypatch.context() as patch:
                kill_after(patch, chance.randrange(1, 4))
                with pytest.raises(Killed):
                    program.main(argv)
        assert program.main([*argv, f"vision.at_once={chance.choice([2, 4])}"]) == status
        assert replies(out) == straight


def kill_after(patch, count):
    """End the program in place of storing a reply, after this many."""
    add = program.Store.add
    left = [count]

    def counted(store, stored):
        if not left[0]:
            raise Killed
        left[0] -= 1
        add(store, stored)

    patch.setattr(program.Store, "add", counted)


def test_a_prompt_that_is_too_long_fails_alone():
    settings = Writer(kind="local", model="tiny", template="shapes", device="cpu", max_prompt=60)
    jobs = [stages.Job(text=text, max_tokens=4, name=text) for text in ("red circle", "red " * 200)]
    with writers.opened(settings, "vision") as writer:
        found = {job.name: reply for job, reply in writer.write(jobs, Interrupts())}
    assert not found["red circle"].error and found["red circle"].tokens_out
    assert "over the limit of 60" in found["red " * 200].error


def test_a_mark_in_a_text_is_no_picture():
    settings = Writer(kind="local", model="tiny", template="shapes", device="cpu", max_prompt=99)
    with writers.opened(settings, "vision") as writer:
        assert isinstance(writer, local.LocalWriter)
        marked, plain = (writer.prompt(stages.Job(text=text, name="a")) for text in ("<image>red", "red"))
    assert marked.tokens.tolist() == plain.tokens.tolist()
