"""Which words does an update make likelier?  python tests/bench/pushes.py --model DIR [--questions 64]
[--top 12] [SETTING ...]

A step of GRPO is taken up to its gradient: the policy answers training questions, rules score the answers,
each answer is compared with its group. At every place c of a completion, the policy gradient pushes the
logit of each word v of the vocabulary by

    weight_c · A · (1[v is the word at c] - p_c(v)),

which is minus the derivative of the loss. The push of a word is the sum of this over all places. It is above
0 for a word that the update makes likelier, on the whole. Over all words the pushes add up to 0. The KL
penalty and the optimizer are left out: this is what the rewards alone ask for.

DIR is a model's folder or a run's. Settings are those of train.py, over the recipe --recipe. Prints the
strongest pushes up and down; the last line is one JSON object with all of them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo.parallel.openmp

import torch
from torch import Tensor

import train
from data.chat import Chat
from data.types import Example
from grpo.batch import Batch
from grpo.config import Config, parse
from grpo.gradient import TokenBudget, passes
from grpo.objective import group_advantages, token_weights
from grpo.parallel.ranks import Ranks
from grpo.run.held_out import open_questions
from grpo.sampling import log_distribution
from grpo.schedule import stage_at
from grpo.storage.model_folder import base_folder, load_model, model_folder
from grpo.variants import ADVANTAGE_SCALES, WEIGHTINGS


def compared(policy, chat: Chat, questions: Sequence[Example], cfg: Config, step: int) -> Batch:
    """The batch that a step, numbered from 0, learns from: every question once, `cfg.group` completions of
    each, with their advantages (B,) and token weights (B, C)."""
    cpu = torch.device("cpu")
    budget = TokenBudget(cfg.loss.micro_tokens, 1, cpu)
    run = SimpleNamespace(policy=policy, chat=chat, examples=questions, budget=budget)
    cfg = replace(cfg, prompts=len(questions))
    stage = stage_at(step, cfg.stages, cfg)
    groups = train.sample_and_score(cfg, run, Ranks(0, 1, cpu), step, stage)
    batch = groups.batch(dynamic=False, sections=1)
    batch.advantage = group_advantages(batch.reward, scale=ADVANTAGE_SCALES[cfg.advantage]).flatten()
    tokens, completions = batch.counts.clamp(min=1)
    weighting = WEIGHTINGS[cfg.loss.weighting]
    batch.weight = token_weights(batch.mask, weighting, tokens=tokens, completions=completions, cap=stage.cap)
    return batch


@torch.no_grad()
def pushes(policy, chat: Chat, questions: Sequence[Example], cfg: Config, step: int = 0) -> dict[str, float]:
    """The push of the policy gradient on the logit of every word of the vocabulary: {word: push}.

    policy: on the CPU. questions: training questions; each is asked once, in place of the `cfg.prompts`
    that a step asks. cfg: settings of a run, for example of `parse.load("shapes")`. step: from 0, of the
    random numbers. Raises ValueError if cfg.group is 1, and what a reward raises.
    """
    batch = compared(policy, chat, questions, cfg, step)
    found = torch.zeros(len(policy.head_weight), dtype=torch.float64)
    budget = TokenBudget(cfg.loss.micro_tokens, 1, torch.device("cpu"))
    for part, _ in passes(policy, batch, budget, batch.teaching):
        hidden = policy(part.prompts, part.tokens, part.length).flatten(0, 1)[part.mask]  # (T, D)
        pull = (part.weight * part.advantage[:, None])[part.mask]  # (T,)
        found += logit_pushes(policy.logits(hidden), part.tokens.flatten(0, 1)[part.mask], pull, cfg)
    words = [chat.tokenizer.id_to_token(word) or f"<{word}>" for word in range(len(found))]
    return dict(zip(words, found.tolist()))


def logit_pushes(logits: Tensor, tokens: Tensor, pull: Tensor, cfg: Config) -> Tensor:
    """The sum over T places of pull · (1[v is the chosen word] - p(v)) / temperature, for every word v.
    logits (T, V), tokens (T,), pull (T,): weight · advantage -> (V,) float64."""
    probability = log_distribution(logits, cfg.temperature, train.loss_truncation(cfg)).exp()
    found = -(pull[:, None] * probability).sum(0, dtype=torch.float64)
    return found.index_add_(0, tokens, pull.double()) / cfg.temperature


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Measure and print. -> {word: push}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", metavar="DIR")
    parser.add_argument("--recipe", default="shapes")
    parser.add_argument("--questions", type=int, default=64, help="the first of the training questions")
    parser.add_argument("--top", type=int, default=12, help="words to print of each direction")
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="such as group=16")
    args = parser.parse_args(argv)
    cfg = parse.load(args.recipe, args.settings)
    folder = model_folder(args.model)
    limits = {"max_prompt": cfg.max_prompt, "min_pixels": cfg.min_pixels, "max_pixels": cfg.max_pixels}
    chat = Chat(base_folder(folder), template=cfg.template, system=cfg.system, **limits)
    examples = open_questions(replace(cfg, eval=replace(cfg.eval, items=0)))[0]
    asked = [examples[i] for i in range(min(args.questions, len(examples)))]
    found = pushes(load_model(folder), chat, asked, cfg)
    ranked = sorted(found.items(), key=lambda pair: -pair[1])
    print(f"{len(asked)} questions, {cfg.group} completions of each\n{'up':<30} down")
    for (up, most), (down, least) in zip(ranked[: args.top], ranked[::-1]):
        print(f"{up:<16} {most:+.4f}      {down:<16} {least:+.4f}")
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
