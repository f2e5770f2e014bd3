"""What the loop of train.py hands on: every setting reaches the function that it is for, and a step is the
step that the formulas give.

The policy is a unigram: log-probs depend on the token alone, so a step can be computed by hand. Sampling and
scoring are stubs; batch, gradient, objective and optimizer are the real ones. The tests take a copy of
train.py, because test_loop_mutants.py gives them copies with mistakes.
"""

import functools
import types
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from data.types import Example
from grpo.config import load
from grpo.gradient import TokenBudget
from grpo.objective import LossStats, group_advantages, policy_loss, token_weights
from grpo.optim import NonFinite, Optimizer, clip_gradient
from grpo.parallel.rows import Share
from grpo.rollout import Rollout
from grpo.sampling import uid_hash
from grpo.schedule import lr_at
from grpo.variants import ADVANTAGE_SCALES, KL_ESTIMATORS, SURROGATES, WEIGHTINGS

SOURCE = (Path(__file__).resolve().parents[2] / "train.py").read_text()
WORDS = 12
# each value is neither a default nor that of another setting
SETTINGS = [
    "steps=3",
    "seed=5",
    "prompts=3",
    "group=3",
    "cap=7",
    "stages=[{until: 1, group: 2, cap: 4}, {until: 2, group: 5, cap: 6}]",
    "temperature=0.7",
    "max_rows=11",
    "advantage=none",
    "rewards={length: 2}",
    "loss.weighting=constant",
    "loss.surrogate=cispo",
    "loss.kl=k2",
    "loss.kl_coef=0.13",
    "loss.clip_low=0.11",
    "loss.clip_high=0.37",
    "loss.sections=2",
    "optim.lr=0.02",
    "optim.warmup=1",
    "optim.decay=linear",
    "optim.lr_min=0.25",
    "optim.max_grad_norm=0.05",
]


def load_copy(source: str = SOURCE) -> types.ModuleType:
    """train.py, or a mutant of it, as a module of its own."""
    module = types.ModuleType("train_copy")
    exec(compile(source, "train_copy.py", "exec"), module.__dict__)
    return module


@pytest.fixture
def train():
    return load_copy()


class Unigram(nn.Module):
    """A policy whose next token depends on nothing: its logits are `head_weight`."""

    def __init__(self, seed: int):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.head_weight = nn.Parameter(torch.randn(WORDS, 1, generator=random))
        self.config = SimpleNamespace(
            vocab_size=WORDS,
            image_token_id=-1,
            placeholder_ids=(),
            vision=SimpleNamespace(spatial_merge_size=2),
        )

    def forward(self, prompts, tokens, length):
        return torch.ones(*tokens.shape, 1)

    def logits(self, hidden, head):
        return hidden @ head.T

    def scores(self, tokens, temperature):
        """The log-probs of tokens at a temperature."""
        return (self.head_weight[:, 0] / temperature).log_softmax(0)[tokens]


@functools.cache
def settings_of(*settings):
    """Read once: the mutants run these tests again and again."""
    return load("shapes", [*SETTINGS, *settings])


class World:
    """A run of a copy of train.py, with what it called. calls: (name, arguments, keywords), in order.

    equal: for each attempt, the prompts whose completions all earn the same.
    """

    def __init__(self, train, *settings, equal=(), reference=True, prompts=3):
        self.train = train
        self.cfg = settings_of(*settings)
        self.equal = dict(enumerate(equal))
        self.prompts = prompts
        self.calls: list[tuple[str, tuple, dict]] = []
        self.logged: list[SimpleNamespace] = []
        policy = Unigram(1)
        optim = self.cfg.optim
        self.run = SimpleNamespace(
            step=0,
            policy=policy,
            reference=Unigram(2) if reference else None,
            optimizer=Optimizer(policy, name="adamw", lr=optim.lr, beta2=optim.beta2, weight_decay=0.0),
            budget=TokenBudget(64, 7, torch.device("cpu")),
            chat=SimpleNamespace(
                stop_ids=(1,),
                texts=lambda tokens, length: [["text"] * tokens.shape[1] for _ in tokens],
                documents=lambda example: (example.answer,),
                encode=lambda text: [2 + ord(letter) % 9 for letter in text],
            ),
        )
        self.ranks = SimpleNamespace(sum=lambda tensor: tensor)
        # all groups of all ranks are here
        self.share = Share.whole
        for name in (
            "policy_loss",
            "token_weights",
            "group_advantages",
            "completion_logprobs",
            "entropy_bonus",
        ):
            self.spy(name, getattr(train, name))
        self.spy("chosen_prompts", self.choose)
        self.spy("generate", self.write)
        self.spy("score", self.pay)
        self.spy("rows_that_fit", lambda *args: 9)
        train.whole_weights = nullcontext

    def spy(self, name, function):
        def spied(*args, **how):
            self.calls.append((name, args, how))
            return function(*args, **how)

        setattr(self.train, name, spied)

    def called(self, name):
        """The arguments and keywords of every call of a function."""
        return [(args, how) for each, args, how in self.calls if each == name]

    def choose(self, run, cfg, ranks, step, stage, attempt=0, fit=None):
        uids = [f"{step}/{attempt}/{p}" for p in range(self.prompts)]
        nothing = {"patches": np.zeros((0, 4), np.float32), "grid": np.zeros((0, 3), int)}
        prompts = [SimpleNamespace(uid=uid, tokens=np.array([3, 4, 5]), **nothing) for uid in uids]
        questions = [Example(uid, "Which?", (), "answer") for uid in uids]
        questions = [fit(question)[0] for question in questions] if fit else questions
        return questions, prompts, self.share(self.prompts, stage.group), 2

    def write(self, policy, prompts, *, group, cap, temperature, stop_ids, address, options):
        random = torch.Generator().manual_seed(address[1])
        shape = (len(address[2]), group)
        length = torch.randint(1, cap + 1, shape, generator=random)
        length[0, 0] = cap
        mask = torch.arange(cap) < length[..., None]
        tokens = torch.randint(2, WORDS, (*shape, cap), generator=random) * mask
        logp = self.run.policy.scores(tokens, temperature).detach() * mask
        return Rollout(tokens, length, length < cap, logp)

    def pay(self, texts, questions, parts, length, cap):
        reward = length.float() + torch.arange(length.shape[1]) * 0.3
        for p, question in enumerate(questions):
            if p in self.equal.get(int(question.uid.split("/")[1]), ()):
                reward[p] = 1.0
        return reward, {"length": reward / 2}

    def step(self, step, batch, stats, grad_norm):
        """The loop's `log`."""
        weights = self.run.policy.head_weight.detach().clone()
        lr = self.run.optimizer.lr
        self.logged.append(
            SimpleNamespace(step=step, batch=batch, stats=stats, grad_norm=grad_norm, lr=lr, weights=weights)
        )

    sft_step = step

    def go(self):
        loop = self.train.train_grpo if self.cfg.method == "grpo" else self.train.train_sft
        loop(self.cfg, self.run, self.ranks, self)
        return self


def stages(world):
    """(group, cap) of each step."""
    return [(2, 4), (5, 6), (3, 7)][world.run.step :]


def test_the_loss_gets_its_settings(train):
    world = World(train).go()
    assert len(world.called("policy_loss")) >= 3
    for (logp, old, ref, advantage, weight), how in world.called("policy_loss"):
        assert how == {
            "surrogate": SURROGATES["cispo"],
            "kl": KL_ESTIMATORS["k2"],
            "kl_coef": 0.13,
            "clip_low": 0.11,
            "clip_high": 0.37,
        }
        assert old is None and ref.shape == weight.shape == logp.shape and len(advantage) == len(logp)
    for _, how in world.called("completion_logprobs"):
        assert how == {"temperature": 0.7, "chunk": 7, "truncation": None, "entropy_grad": False}
    assert not world.called("entropy_bonus") and not world.logged[0].batch.all_teach


def test_weights_and_advantages_get_their_settings(train):
    world = World(train).go()
    for ((group, cap), (args, how)), logged in zip(
        zip(stages(world), world.called("token_weights"), strict=True), world.logged, strict=True
    ):
        batch = logged.batch
        assert torch.equal(args[0], batch.mask) and how.pop("weighting") is WEIGHTINGS["constant"]
        assert how == {"tokens": batch.length.sum(), "completions": 3 * group, "cap": cap}
        assert (
            torch.equal(batch.weight, token_weights(*args, WEIGHTINGS["constant"], **how))
            and batch.weight.max() > 0
        )
    for args, how in world.called("group_advantages"):
        assert how == {"scale": ADVANTAGE_SCALES["none"]} and args[0].shape[0] == 3


def test_the_rollout_gets_its_settings(train):
    world = World(train).go()
    for step, ((group, cap), (_, how)) in enumerate(
        zip(stages(world), world.called("generate"), strict=True)
    ):
        options = how.pop("options")
        uids = [uid_hash(f"{step}/0/{p}") for p in range(3)]
        address = (5, step, uids)
        assert how == {"group": group, "cap": cap, "temperature": 0.7, "stop_ids": (1,), "address": address}
        assert options.max_rows == 9 and options.recorded is False
    assert [args[2:] for args, _ in world.called("rows_that_fit")] == [(2, 4, 11), (5, 6, 11), (3, 7, 11)]


def test_the_rules_get_their_settings(train):
    world = World(train).go()
    for (group, cap), (args, how), logged in zip(
        stages(world), world.called("score"), world.logged, strict=True
    ):
        texts, questions, parts, length, most = args
        assert parts == {"length": 2} and most == cap and length.shape == (3, group) and not how
        assert questions == logged.batch.questions and [len(group_of) for group_of in texts] == [group] * 3
        assert logged.batch.parts["length"].shape == logged.batch.reward.shape == (3, group)


def test_the_learning_rate_is_that_of_the_step(train):
    world = World(train).go()
    wanted = [lr_at(s, steps=3, lr=0.02, warmup=1, decay="linear", lr_min=0.25) for s in range(3)]
    assert [logged.lr for logged in world.logged] == wanted and len(set(wanted)) == 2


def test_a_run_goes_on_after_its_last_step(train):
    world = World(train)
    world.run.step = 1
    world.go()
    assert [logged.step for logged in world.logged] == [2, 3]
    assert [args[3] for args, _ in world.called("chosen_prompts")] == [1, 2]
    assert [logged.batch.length.shape[1] for logged in world.logged] == [5, 3]


def test_one_update_is_that_of_the_formulas(train):
    check_step(train, 1)


def test_three_updates_are_those_of_the_formulas(train):
    check_step(train, 3)


def test_mini_batches_are_those_of_the_formulas(train):
    check_step(train, 1, minibatches=3)


def test_two_updates_repeat_all_mini_batches(train):
    """Of three prompts the first part has two, the second has one."""
    check_step(train, 2, minibatches=2)


def test_an_entropy_bonus_is_that_of_the_formula(train):
    """Also where no completion of a group did better than another."""
    check_step(train, 1, entropy_coef=0.3)
    check_step(train, 1, minibatches=3, entropy_coef=0.3)


def test_an_entropy_bonus_alone_moves_the_policy(train):
    """Without a penalty and with equal rewards."""
    world = World(train, "loss.kl_coef=0", "loss.entropy_coef=0.3", reference=False, equal=[{0, 1, 2}]).go()
    assert all(logged.grad_norm > 0 and logged.batch.teaching == [0, 1, 2] for logged in world.logged)


def check_step(train, updates, minibatches=1, entropy_coef=0.0):
    """The weights after each step, against the objective on the whole batch at once, and PyTorch's AdamW.

    A mini-batch is every n-th prompt. Weights, advantages and old log-probs are those of the whole batch.
    """
    settings = [f"loss.updates={updates}", f"loss.minibatches={minibatches}"]
    settings += [f"loss.entropy_coef={entropy_coef}"]
    several = updates * minibatches > 1
    world = World(train, *settings, "optim.warmup=0", "optim.decay=constant").go()
    policy, reference = Unigram(1), world.run.reference
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.02, betas=(0.9, 0.999), weight_decay=0.0)
    for (_, cap), logged in zip(stages(world), world.logged, strict=True):
        batch = logged.batch
        advantage = group_advantages(batch.reward, scale=ADVANTAGE_SCALES["none"]).flatten()
        total = {"tokens": int(batch.length.sum()), "completions": batch.length.numel()}
        weight = token_weights(batch.mask, WEIGHTINGS["constant"], cap=cap, **total)
        tokens = batch.tokens.flatten(0, 1)
        score = lambda policy, tokens=tokens, mask=batch.mask: policy.scores(tokens, 0.7) * mask
        with torch.no_grad():
            old, ref = score(policy), score(reference)
        torch.testing.assert_close(batch.logp_ref, ref)
        torch.testing.assert_close(batch.logp, old)
        assert (batch.logp_old is None) != several
        prompt = torch.arange(3).repeat_interleave(batch.length.shape[1])[:, None]
        stats = LossStats.zero()
        for update in range(updates * minibatches):
            of_part = prompt % minibatches == update % minibatches
            logp = score(policy)
            how = {"surrogate": SURROGATES["cispo"], "kl": KL_ESTIMATORS["k2"], "kl_coef": 0.13}
            clip = {"clip_low": 0.11, "clip_high": 0.37}
            pulled = weight * of_part
            loss, found = policy_loss(logp, old if several else None, ref, advantage, pulled, **how, **clip)
            # every token's distribution is the same one
            p = (policy.head_weight[:, 0] / 0.7).softmax(0)
            bonus = entropy_coef * pulled.sum() * -(p * p.log()).sum()
            loss = loss - bonus
            found.loss = found.loss - bonus.detach()
            # the metrics are those of the last pass over all parts
            stats = found if update % minibatches == 0 else stats + found
            policy.zero_grad()
            loss.backward()
            norm = clip_gradient(policy, 0.05)
            optimizer.step()
        assert logged.grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert minibatches > 1 or norm > 0.05
        torch.testing.assert_close(logged.stats.loss.vector(), stats.vector(), rtol=1e-4, atol=1e-6)
        assert not several or abs(stats.averages()["ratio"] - 1) > 1e-4
        torch.testing.assert_close(logged.weights, policy.head_weight.detach(), atol=1e-5, rtol=1e-4)


def test_without_a_penalty_there_is_no_reference(train):
    world = World(train, "loss.kl_coef=0", reference=False, equal=[{1}]).go()
    assert all(logged.batch.logp_ref is None for logged in world.logged)
    # a group whose completions all earned the same is not in any micro-batch
    rows = sum(len(args[0]) for args, _ in world.called("policy_loss"))
    assert rows == 2 * (2 + 5 + 3)


def test_other_ranks_count(train):
    """Advantages compare with the rewards of all ranks, and weights divide by the tokens of all ranks."""
    world = World(train, "advantage=batch", "steps=1")
    # of five groups this rank has the middle ones, but not the first row of the first one
    section = torch.tensor([[-1, 0], [0, 0], [0, 0]])
    world.share = lambda count, group: Share([1, 2, 3], section, [5])
    others = torch.tensor([[0.0, 90.0], [7.0, 0.0], [0.0, 0.0], [0.0, 0.0], [-50.0, 3.0]])
    world.ranks = SimpleNamespace(
        sum=lambda tensor: tensor + others if tensor.shape == others.shape else 3 * tensor
    )
    world.go()
    batch = world.logged[0].batch
    assert batch.reward[[0, 4]].equal(others[[0, 4]]) and batch.reward[1, 0] == 7 and batch.reward[1, 1] > 0
    everyone = group_advantages(batch.reward, scale=ADVANTAGE_SCALES["batch"])
    assert torch.equal(batch.advantage, everyone[1:4].flatten())
    [(_, how)] = world.called("token_weights")
    assert how["tokens"] == 3 * batch.length[section == 0].sum() and how["completions"] == 3 * 5
    [(_, how)] = world.called("generate")
    assert how["options"].rows == range(1, 6)


DYNAMIC = ["loss.kl_coef=0", "steps=1", "max_rounds=3", "enough=0.6"]


def test_dynamic_sampling_asks_until_enough_groups_differ(train):
    for equal, attempts, kept in (
        ([{0}], [0], ["0/0/1", "0/0/2", "0/0/0"]),
        ([{0, 1}, {2}], [0, 1], ["0/0/2", "0/1/0", "0/1/1"]),
        ([{0, 1, 2}, {0, 1, 2}, {0}, set()], [0, 1, 2], ["0/2/1", "0/2/2", "0/0/0"]),
    ):
        world = World(load_again(train), *DYNAMIC, reference=False, equal=equal).go()
        assert [(args[3], *args[5:]) for args, _ in world.called("chosen_prompts")] == [
            (0, attempt) for attempt in attempts
        ]
        batch = world.logged[0].batch
        assert [question.uid for question in batch.questions] == kept
        assert batch.share.drawn == [3] * len(attempts) and batch.skipped == 2 * len(attempts)
        # loss.sections is not 0
        assert batch.share.section.eq(0).all()


def load_again(train):
    """Another copy of the same source, without the spies of an earlier world."""
    return load_copy(train.__dict__.get("SOURCE_OF_COPY", SOURCE))


def test_without_dynamic_sampling_there_is_one_attempt(train):
    world = World(train, "loss.kl_coef=0", "steps=1", reference=False, equal=[{0, 1}]).go()
    assert len(world.called("chosen_prompts")) == 1
    batch = world.logged[0].batch
    # in the order asked, and idle groups count in the average
    assert [question.uid for question in batch.questions] == ["0/0/0", "0/0/1", "0/0/2"]
    assert batch.counts.tolist() == [int(batch.length.sum()), 6]


def test_nothing_to_learn_from_moves_nothing(train):
    world = World(train, "loss.kl_coef=0", "steps=1", "max_rounds=2", reference=False, equal=[{0, 1, 2}] * 2)
    world.go()
    assert torch.equal(world.logged[0].weights, Unigram(1).head_weight) and world.logged[0].grad_norm == 0
    [(_, how)] = world.called("token_weights")
    # no division by 0
    assert how["tokens"] == how["completions"] == 1


def test_a_rank_without_prompts_takes_part(train):
    world = World(train, "loss.kl_coef=0", "steps=1", reference=False, prompts=0)
    world.share = lambda count, group: Share([], torch.zeros(0, 2), [1])
    world.ranks = SimpleNamespace(sum=lambda tensor: tensor + 9)
    world.go()
    assert not world.called("generate") and len(world.logged) == 1
    assert world.logged[0].batch.tokens.shape == (0, 2, 1)


def test_a_log_prob_that_is_not_finite_stops_the_run(train):
    world = World(train)
    write = world.write

    def broken(*args, **how):
        rollout = write(*args, **how)
        rollout.logp[0, 0, 0] = float("nan")
        return rollout

    world.spy("generate", broken)
    with pytest.raises(NonFinite, match="step 1: a log-prob of the rollout is not finite"):
        world.go()


SFT = ["method=sft", "sft.loss_on=answer", "loss.weighting=completion", "steps=2", "cap=30"]


def test_imitation_is_the_mean_log_likelihood(train):
    world = World(train, *SFT, "optim.warmup=0", "optim.decay=constant").go()
    policy = Unigram(1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.02, betas=(0.9, 0.999), weight_decay=0.0)
    assert [logged.step for logged in world.logged] == [1, 2]
    for logged in world.logged:
        batch = logged.batch
        assert batch.length.tolist() == [[len("answer") + 1]] * 3 and (batch.tokens[..., -1] == 1).all()
        loss = -policy.scores(batch.tokens, 1.0).mean()
        policy.zero_grad()
        loss.backward()
        clip_gradient(policy, 0.05)
        optimizer.step()
        assert float(logged.stats.loss.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert float(logged.stats.loss.weight) == pytest.approx(1)
        torch.testing.assert_close(logged.weights, policy.head_weight.detach(), atol=1e-5, rtol=1e-4)


def test_imitation_gets_its_settings(train):
    world = World(train, *SFT, "loss.weighting=constant", "optim.warmup=2").go()
    for args, how in world.called("token_weights"):
        assert how["weighting"] is WEIGHTINGS["constant"] and how["cap"] == 30
        assert how["tokens"] == 3 * 7 and how["completions"] == 3
        assert args[0].dtype == torch.bool
    assert [logged.lr for logged in world.logged] == [0.01, 0.02]
    assert [logged.batch.skipped for logged in world.logged] == [2, 2]


def test_the_loss_is_truncated_as_the_rollout_was_unless_it_takes_full_log_probs(train):
    cut = lambda **settings: SimpleNamespace(**{"top_k": None, "top_p": 1.0, "logp_of": "sampled"} | settings)
    assert train.truncation_of(cut()) is None and train.loss_truncation(cut()) is None
    for settings in ({"top_k": 5}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9}):
        wanted = (settings.get("top_k"), settings.get("top_p", 1.0))
        assert train.truncation_of(cut(**settings)) == train.loss_truncation(cut(**settings)) == wanted
        assert train.truncation_of(cut(**settings, logp_of="full")) == wanted
        assert train.loss_truncation(cut(**settings, logp_of="full")) is None
