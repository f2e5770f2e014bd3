"""A writer on this machine: a Qwen-VL folder, or the built-in model, with our own rollout.

The random numbers of a reply follow from its job's name, so from (seed, stage, question, attempt). In float32
on a CPU a reply does not depend on what is written beside it (grpo/rollout.py), so a resumed run writes what
an undisturbed one would have written, bit for bit.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator

import torch

from data import templates
from data.chat import Chat
from data.types import MARK, BadExample, Example, Prompt
from grpo.batch import collate_prompts
from grpo.bridge.settings import Writer as WriterSettings
from grpo.bridge.stages import Job, reply_of
from grpo.rollout import DecodeOptions, generate, least_rows
from grpo.sampling import Truncation, uid_hash
from grpo.serving.client import Stop
from grpo.serving.messages import Reply
from grpo.storage.model_folder import base_folder, check_agreement, load_model, model_folder
from models.config import ModelConfig

# the "step" in the address of the bridge's random numbers; training has 0, 1, … and evaluation -1
BRIDGE_STEP = -2
# stands for the right answer, which a prompt does not show by itself
UNKNOWN = "?"


class LocalWriter:
    """A model on this machine. Raises ValueError naming the file that is wrong."""

    def __init__(self, settings: WriterSettings) -> None:
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = settings.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        folder = model_folder(settings.model)
        base = base_folder(folder)
        template = templates.open_template(settings.template, folder)
        self.chat = Chat(base, template=template, max_prompt=settings.max_prompt)
        check_agreement(self.chat, ModelConfig.from_folder(base))
        policy = load_model(folder, dtype=getattr(torch, dtype), device=device)
        self.policy = policy.requires_grad_(False)
        self.at_once = settings.at_once

    def write(self, jobs: Iterable[Job], stop: Stop) -> Iterator[tuple[Job, Reply]]:
        """`at_once` jobs together."""
        source = iter(jobs)
        while wave := list(itertools.islice(source, self.at_once)):
            asked: list[tuple[Job, Prompt]] = []
            for job in wave:
                try:
                    asked.append((job, self.prompt(job)))
                except BadExample as error:
                    yield job, Reply(job.name, error=str(error))
            yield from self._written(asked)
            if stop.is_set():
                return

    def prompt(self, job: Job) -> Prompt:
        """Raises BadExample for a prompt that is too long."""
        # a mark in a text would stand for a picture
        text = job.text.replace(MARK, "")
        return self.chat.prompt(Example(job.name, text, (), UNKNOWN, pictures=job.pictures))

    def _written(self, asked: list[tuple[Job, Prompt]]) -> list[tuple[Job, Reply]]:
        """The replies of jobs; after a CUDA out-of-memory error, in two halves."""
        if not asked:
            return []
        try:
            return self._write(asked)
        except torch.OutOfMemoryError:
            if len(asked) == 1:
                raise
        # here, not in the handler: the exception keeps the tensors of the failed try alive
        torch.cuda.empty_cache()
        middle = len(asked) // 2
        return self._written(asked[:middle]) + self._written(asked[middle:])

    def _write(self, asked: list[tuple[Job, Prompt]]) -> list[tuple[Job, Reply]]:
        start = time.monotonic()
        device = next(self.policy.parameters()).device
        first = asked[0][0]
        # with fewer rows matrix products add up in another order, so a small wave repeats its last prompt
        prompts = [prompt for _, prompt in asked]
        prompts += [prompts[-1]] * (least_rows(device.type) - len(prompts))
        merge = self.policy.config.vision.spatial_merge_size
        rollout = generate(
            self.policy,
            collate_prompts(prompts, image_token=self.chat.image_token, merge=merge).to(device),
            group=1,
            cap=first.max_tokens,
            temperature=first.temperature,
            stop_ids=self.chat.stop_ids,
            options=DecodeOptions(truncation=Truncation(top_p=first.top_p) if first.top_p < 1 else None),
            address=(0, BRIDGE_STEP, [uid_hash(prompt.uid) for prompt in prompts]),
        )
        texts = self.chat.texts(rollout.tokens, rollout.length)
        seconds = (time.monotonic() - start) / len(asked)
        found = []
        for (job, prompt), text, length, stopped in zip(
            asked, texts, rollout.length[:, 0].tolist(), rollout.stopped[:, 0].tolist()
        ):
            finish = "stop" if stopped else "length"
            found.append((job, reply_of(job, text[0], finish, len(prompt.tokens), length, seconds)))
        return found

    def close(self) -> None:
        """Give the model's memory back."""
        del self.policy
