"""The pushes of tests/bench/pushes.py are minus the gradient of the loss in the logits, by autograd."""

import json

import pytest
import torch
from small import micro_batch, small_folder

from data.chat import Chat
from data.shapes.world import Shapes
from grpo.config import parse
from grpo.objective import policy_loss
from grpo.sampling import log_distribution
from grpo.storage.model_folder import load_model
from tests.bench import pushes

# a random policy is never right, so it is paid for its length
SETTINGS = ["group=4", "cap=12", "rewards={length: 1}"]
QUESTIONS = [Shapes("train", 100, seed=5)[i] for i in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("weighting", ["token", "completion", "constant"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_they_are_minus_the_gradient_of_the_loss(folder, weighting, temperature):
    cfg = parse.load("shapes", [*SETTINGS, f"loss.weighting={weighting}", f"temperature={temperature}"])
    policy, chat = load_model(folder), Chat(folder, template="shapes")
    found = pushes.pushes(policy, chat, QUESTIONS, cfg, step=3)

    batch = pushes.compared(policy, chat, QUESTIONS, cfg, step=3)
    assert len(batch.teaching) == 3, "groups that differ, or nothing is tested"
    micro = micro_batch(batch, policy.config.image_token_id)
    # one number a word, added to its logit at every place: its gradient is the sum over the places
    shift = torch.zeros(len(policy.head_weight), requires_grad=True)
    hidden = policy(micro.prompts, micro.tokens, micro.length).flatten(0, 1).detach()
    every = log_distribution(policy.logits(hidden) + shift, temperature)
    logp = every.gather(-1, micro.tokens.flatten(0, 1)[..., None]).squeeze(-1)
    loss, _ = policy_loss(logp, None, None, micro.advantage, micro.weight)
    loss.backward()
    torch.testing.assert_close(torch.tensor([*found.values()]), -shift.grad, rtol=1e-4, atol=1e-6)
    assert max(found.values()) > 1e-3 and abs(sum(found.values())) < 1e-6


def test_it_does_not_depend_on_the_cut_into_micro_batches(folder):
    policy, chat = load_model(folder), Chat(folder, template="shapes")
    whole, cut = (
        pushes.pushes(
            policy, chat, QUESTIONS, parse.load("shapes", [*SETTINGS, f"loss.micro_tokens={tokens}"])
        )
        for tokens in (32768, 256)
    )
    assert whole == pytest.approx(cut, abs=1e-6)


def test_a_word_of_the_better_answer_is_pushed_up():
    """Two places, three words, p = (1/2, 1/4, 1/4): by hand."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(2, 3)
    cfg = parse.load("shapes")
    found = pushes.logit_pushes(logits, torch.tensor([1, 2]), torch.tensor([1.0, -0.5]), cfg)
    # word 1: 1 · 3/4 + 0.5 · 1/4;  word 2: -1 · 1/4 - 0.5 · 3/4
    assert found.tolist() == pytest.approx([-0.25, 0.875, -0.625])


def test_the_command_prints_the_strongest_and_all_of_them(folder, capsys):
    found = pushes.main(["--model", str(folder), "--questions", "3", "--top", "2", *SETTINGS])
    lines = capsys.readouterr().out.splitlines()
    assert (
        json.loads(lines[-1]) == found
        and len(found) == Chat(folder, template="shapes").tokenizer.get_vocab_size()
    )
    best = max(found, key=found.get)
    assert lines[2].startswith(best) and len(lines) == 5
