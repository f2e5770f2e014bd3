"""GRPO for a vision-language model: the smallest program that is complete.    python docs/minimal.py [seed]

Thirty times: show the model 8 pictures with questions. Let it answer each question 8 times. Score the answers
by a rule. Compare each answer with the other answers to its question. Make the better ones more likely.
`train.py` is this program with what a long run needs, and `tests/test_minimal.py` proves it: with the same
settings both give the same completions, rewards, losses and weights, bit for bit.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# so that the program runs without an installation
sys.path.insert(0, str(ROOT))

import grpo.parallel.openmp

import torch

from data.chat import Chat
from data.order import indices_at
from data.shapes.world import Shapes
from grpo.batch import Groups, collate_prompts
from grpo.logprobs import completion_logprobs
from grpo.objective import group_advantages, policy_loss, token_weights
from grpo.optim import clip_gradient
from grpo.parallel.rows import Share
from grpo.rewards.rules import score
from grpo.rollout import generate
from grpo.sampling import uid_hash
from grpo.variants import token_mean
from models import weights

STEPS = 30
# questions in a step, completions of each question, and the most tokens of a completion
P = 8
G = 8
CAP = 96
LR = 1e-4
WARMUP = 5
SEED = int(sys.argv[1]) if len(sys.argv) > 1 else 0
# one point for the right answer, one for the right format
REWARDS = {"accuracy": 1.0, "format": 1.0}

# a model of 1.5 million parameters, with the architecture of Qwen2-VL
policy = weights.load(ROOT / "models" / "tiny")
chat = Chat(ROOT / "models" / "tiny", template="shapes")
optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
# 20,000 pictures with questions, each drawn when it is needed
world = Shapes("train", seed=SEED)


def show(question, texts, reward, advantage):
    """Print one group: the question, and each completion with its reward and its advantage."""
    print(f"\n{question.asked}\nright answer: ({question.letter}) {question.answer}")
    for text, r, a in zip(texts, reward.tolist(), advantage.tolist()):
        print(f"  reward {r:.0f}  advantage {a:+.2f}  {text}")
    print()


for step in range(STEPS):
    start = time.perf_counter()
    for parameters in optimizer.param_groups:
        parameters["lr"] = LR * (step + 1) / WARMUP if step < WARMUP else LR

    # 1  Sample: the policy answers each of P questions G times.
    questions = [world[i] for i in indices_at(step, len(world), P, SEED)]
    prompts = [chat.prompt(question) for question in questions]
    rollout = generate(
        policy,
        collate_prompts(prompts, image_token=chat.image_token),
        group=G,
        cap=CAP,
        temperature=1.0,
        stop_ids=chat.stop_ids,
        address=(SEED, step, [uid_hash(prompt.uid) for prompt in prompts]),
    )

    # 2  Score: a rule turns each completion into a number.
    texts = chat.texts(rollout.tokens, rollout.length)  # P lists of G
    reward, parts = score(texts, questions, REWARDS, rollout.length, CAP)  # (P, G)

    # 3  Compare: each completion with its own group. Every token gets a weight in the loss.
    advantage = group_advantages(reward)  # (P, G)
    groups = Groups(questions, prompts, rollout, texts, reward, parts, 0, Share.whole(P, G))
    batch = groups.batch(dynamic=False, sections=1)
    batch.advantage = advantage.flatten()  # (B,), B = P * G
    batch.weight = token_weights(
        batch.mask, token_mean, tokens=batch.mask.sum(), completions=P * G, cap=CAP
    )  # (B, C)
    if step in (0, STEPS - 1):
        show(questions[0], texts[0], reward[0], advantage[0])

    # 4  Learn: raise the log-probs of what did better than its group, lower those of what did worse.
    #    A group whose completions all earned the same has advantage 0, so it is left out.
    loss = 0.0
    for cut in batch.cuts(1_000_000, batch.teaching):
        part = batch.micro_batch(cut, image_token=chat.image_token, merge=2, device="cpu")
        logp, _ = completion_logprobs(policy, part, temperature=1.0, chunk=100_000)  # (b, C)
        part_loss, _ = policy_loss(logp, None, None, part.advantage, part.weight)
        part_loss.backward()
        loss += part_loss.item()
    norm = clip_gradient(policy, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)

    # 5  Keep: here, a line on the terminal.
    print(
        f"step {step + 1:2}  reward {reward.mean():.2f}  right {parts['accuracy'].mean():4.0%}  "
        f"readable {parts['format'].mean():4.0%}  tokens {rollout.length.float().mean():3.0f}  "
        f"loss {loss:+.3f}  gradient {norm:.2f}  {time.perf_counter() - start:.1f} s"
    )
