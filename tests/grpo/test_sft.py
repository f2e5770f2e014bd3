"""Imitation: the loss is the mean negative log-likelihood of the tokens that count, as transformers
computes it for the prompt and its document in one piece."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from zoo import completions_for, pictures_of, prompt_batch, tiny_policy, twin_inputs, twin_of

from data.types import BadExample, Example
from grpo.batch import Batch
from grpo.gradient import TokenBudget, accumulate_gradient
from grpo.objective import token_weights
from grpo.parallel.ranks import sum_gradients
from grpo.sft import LOSS_ON, count_tokens, fit_documents, pad_documents
from grpo.variants import WEIGHTINGS
from models import weights


def batch_of(prompts, tokens, length):
    sources = [
        SimpleNamespace(
            uid=str(p), tokens=prompts.tokens[p, :n].numpy(), patches=patches.numpy(), grid=grid.numpy()
        )
        for p, (n, (patches, grid)) in enumerate(zip(prompts.length.tolist(), pictures_of(prompts)))
    ]
    return Batch.of_documents([], sources, tokens, length)


def learn(policy, batch, loss_on, weighting="token", micro=10**6, chunk=1000):
    """The gradient of imitation on one rank. -> (loss, weight, logp, {name: gradient})."""
    tokens, documents = count_tokens(batch, loss_on, policy.config.placeholder_ids)
    weigh = partial(
        token_weights, weighting=WEIGHTINGS[weighting], tokens=tokens, completions=documents, cap=9
    )
    loss_of = partial(LOSS_ON[loss_on], policy, weigh=weigh, chunk=chunk)
    batch.stats = {}
    stats = accumulate_gradient(loss_of, policy, batch, TokenBudget(micro, chunk, torch.device("cpu")))
    # which rounds them
    sum_gradients(policy)
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    return float(stats.loss.loss), float(stats.loss.weight), batch.logp, gradients


@pytest.fixture(scope="module")
def case():
    prompts = prompt_batch([[(1, 4, 6)], [(1, 4, 4), (1, 2, 4)]])
    tokens, length = completions_for(prompts, 2, 5)
    return tiny_policy(), prompts, tokens, length


def by_transformers(twin, config, prompts, tokens, length, loss_on):
    """The same from transformers: every document behind its own copy of the prompt, one mean over all
    tokens that count."""
    twin.zero_grad()
    total, count = 0.0, 0
    for p in range(len(tokens)):
        for g in range(tokens.shape[1]):
            given = twin_inputs(prompts, p, tokens[p, g, : length[p, g]])
            ids, logits = given["input_ids"][0], twin(**given).logits[0]
            logits = logits.index_fill(
                -1, torch.tensor(config.placeholder_ids), torch.finfo(torch.float32).min
            )
            counts = ~torch.isin(ids[1:], torch.tensor(config.placeholder_ids))
            if loss_on == "answer":
                counts &= torch.arange(1, len(ids)) >= prompts.length[p]
            total = total - logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0][counts].sum()
            count += int(counts.sum())
    loss = total / count
    loss.backward()
    return (
        float(loss),
        {weights.hub_name(name): p.grad for name, p in twin.named_parameters() if p.grad is not None},
        count,
    )


@pytest.mark.parametrize("loss_on", ["answer", "prompt_and_answer"])
def test_value_and_gradient_are_those_of_transformers(case, tmp_path, loss_on):
    policy, prompts, tokens, length = case
    twin = twin_of(policy, tmp_path)
    expected, gradient, count = by_transformers(twin, policy.config, prompts, tokens, length, loss_on)
    batch = batch_of(prompts, tokens, length)
    assert count_tokens(batch, loss_on, policy.config.placeholder_ids).tolist() == [count, 4]
    loss, weight, _, found = learn(policy, batch, loss_on)
    assert loss == pytest.approx(expected, rel=1e-5) and weight == pytest.approx(1)
    assert found.keys() == gradient.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(
            found[name],
            value,
            atol=2e-5 * max(1.0, float(value.abs().max())),
            rtol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("weighting", ["token", "completion", "constant"])
def test_how_it_is_cut_changes_nothing(case, weighting):
    """A group split by rows shares its prompt's words among them; chunks of the head cut across prompts
    and documents."""
    policy, prompts, tokens, length = case
    batch = batch_of(prompts, tokens, length)
    whole, parts = (
        learn(policy, batch, "prompt_and_answer", weighting),
        learn(policy, batch, "prompt_and_answer", weighting, micro=30, chunk=3),
    )
    assert parts[0] == pytest.approx(whole[0], rel=1e-5) and parts[1] == pytest.approx(whole[1], rel=1e-5)
    torch.testing.assert_close(parts[2], whole[2], atol=1e-5, rtol=1e-5)
    for name, value in whole[3].items():
        torch.testing.assert_close(
            parts[3][name], value, atol=1e-5 * max(1.0, float(value.abs().max())), rtol=1e-4
        )


def test_the_log_probs_reported_are_those_of_the_answers(case):
    policy, prompts, tokens, length = case
    batch = batch_of(prompts, tokens, length)
    a, b = learn(policy, batch, "answer"), learn(policy, batch, "prompt_and_answer")
    torch.testing.assert_close(a[2], b[2], atol=1e-5, rtol=1e-5)
    assert a[0] == pytest.approx(-float(a[2].sum()) / float(length.sum()), rel=1e-5)
    assert abs(a[0] - b[0]) > 1e-3


# ---- documents over the cap

# one token a letter; 1 stops
CHAT = SimpleNamespace(
    encode=lambda text: [ord(letter) for letter in text],
    stop_ids=(1,),
    documents=lambda example: example.extra.get("documents") or (f"<{example.answer}>",),
)


def fitted(too_long, *documents, cap=3):
    """The lengths of the kept documents, whether each ends in the stop token, and what is named."""
    example = Example("q/7", "Which?", (), "b", extra={"documents": documents} if documents else {})
    fit, left_out = fit_documents(CHAT, example, cap=cap, too_long=too_long)
    assert fit.uid == "q/7" and example.extra.get("documents", ()) == documents
    kept = fit.extra["documents"]
    return [len(ids) for ids in kept], [ids[-1] == 1 for ids in kept], [str(error) for error in left_out]


NAMED = "document {} of 'q/7' has {} tokens and cap is 3 ({!r})"


@pytest.mark.parametrize(
    "too_long, documents, lengths, stops, left_out",
    [
        ("skip", ["ab", "abcd", "a"], [3, 2], [True, True], [NAMED.format(2, 5, "abcd")]),
        ("skip", ["ab"], [3], [True], []),
        # without documents: its answer
        ("skip", [], [3], [True], "cap is 3"),
        ("cut", ["ab", "abcd"], [3, 3], [True, False], []),
        ("cut", ["abc"], [3], [False], []),
        ("error", ["ab"], [3], [True], []),
    ],
)
def test_a_document_over_the_cap(too_long, documents, lengths, stops, left_out, capsys):
    if left_out == "cap is 3":
        assert fitted(too_long, *documents, cap=4) == ([4], [True], [])
        with pytest.raises(BadExample, match="document 1 of 'q/7' has 4 tokens and cap is 3"):
            fitted(too_long, *documents)
        return
    assert fitted(too_long, *documents) == (lengths, stops, left_out)
    # what is cut is named, too
    assert ("cut: document" in capsys.readouterr().err) == (False in stops)


def test_a_question_without_a_fitting_document_is_skipped_and_error_ends_the_run():
    with pytest.raises(BadExample, match="document 1 of 'q/7' has 6 tokens"):
        fitted("skip", "abcde", "abcd")
    with pytest.raises(
        ValueError, match=r"has 5 tokens and cap is 3 .*; raise cap, or set sft.too_long"
    ) as error:
        fitted("error", "a", "abcd")
    assert not isinstance(error.value, BadExample)


@pytest.mark.parametrize("documents", ["a text", [1], {"a": 1}, [["a"]]])
def test_documents_of_another_form_are_named(documents):
    example = Example("q/7", "Which?", (), "b", extra={"documents": documents})
    with pytest.raises(BadExample, match="'q/7': extra.documents is not a list of texts"):
        fit_documents(CHAT, example, cap=9, too_long="skip")


def test_groups_of_unequal_size_get_empty_documents():
    tokens, length = pad_documents([[[5, 6, 1]], [[7, 1], [8, 9, 8, 1]]])
    assert length.tolist() == [[3, 0], [2, 4]]
    assert tokens.tolist() == [[[5, 6, 1, 0], [0] * 4], [[7, 1, 0, 0], [8, 9, 8, 1]]]
    tokens, length = pad_documents([])
    assert tokens.shape == (0, 1, 1) and length.shape == (0, 1)


@pytest.mark.parametrize("loss_on, weighting", [("answer", "completion"), ("prompt_and_answer", "token")])
def test_an_empty_document_teaches_nothing(case, loss_on, weighting):
    """A group of two documents, one of them left out, learns as a group of the other alone."""
    policy, prompts, tokens, length = case
    first = slice(0, 1)
    one = batch_of(prompts, tokens[:, first].clone(), length[:, first].clone())
    two = batch_of(
        prompts, tokens.clone(), torch.cat([length[:, first], torch.zeros_like(length[:, first])], 1)
    )
    assert torch.equal(*(count_tokens(b, loss_on, policy.config.placeholder_ids) for b in (one, two)))
    a, b = learn(policy, one, loss_on, weighting), learn(policy, two, loss_on, weighting)
    assert a[0] == pytest.approx(b[0], rel=1e-6) and a[1] == pytest.approx(b[1], rel=1e-6)
    for name, gradient in a[3].items():
        torch.testing.assert_close(
            b[3][name], gradient, atol=1e-6 * float(gradient.abs().max() + 1), rtol=1e-4
        )
