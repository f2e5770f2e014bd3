"""Who is asked, and how: a model, and everything about its questions that changes its scores.

A checkpoint of a run is asked as its run asked it. Any other model is asked as the protocol says, an instruct
model (its name says so) in turns and a base model without, unless the command line says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.chat import Chat
from grpo.config import parse
from grpo.evaluation.protocols import Protocol, family
from grpo.evaluation.resume import weights_digest
from grpo.storage.model_folder import model_folder
from models import weights

# tokens; a picture as large as Qwen's processors leave it has 16,384
MAX_PROMPT = 20_000
# asked whole; of the other tasks a part is held out for it
BENCHMARKS = ("blink", "cvbench", "mathvista", "vsr")


@dataclass(frozen=True)
class Subject:
    """A model, and how it is asked. trained_on: the task of its run, "" for a model from elsewhere;
    digest: a hash of the weights."""

    # as on the command line
    name: str
    folder: Path
    template: str
    cap: int
    max_prompt: int
    min_pixels: int | None
    max_pixels: int | None
    dtype: str
    trained_on: str = ""
    digest: str = ""

    @property
    def direct(self) -> bool:
        """Whether it is asked for the answer alone."""
        return self.template.endswith("_direct")

    def open(self, device: str) -> tuple[torch.nn.Module, Chat]:
        """Load it. → (policy, chat). Raises ValueError naming the file."""
        chat = Chat(
            self.folder,
            template=self.template,
            max_prompt=self.max_prompt,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        return weights.load(self.folder, dtype=getattr(torch, self.dtype), device=device).requires_grad_(
            False
        ), chat


def subject(
    name: str,
    protocol: Protocol,
    *,
    built_in: bool,
    device: str,
    prompt: str | None = None,
    template: str | None = None,
    cap: int | None = None,
    max_prompt: int | None = None,
    max_pixels: int | None = None,
    dtype: str = "auto",
) -> Subject:
    """The model of that name, asked as the arguments say, where they do; else as its run did, if the
    protocol leaves that to the run; else as the protocol does. built_in: the questions are the built-in
    world's. Raises ValueError."""
    folder = model_folder(name)
    # or one of its checkpoints
    run = Path(name) if (Path(name) / "checkpoints").is_dir() else folder.resolve().parent.parent
    own = (run / "checkpoints").is_dir() and (run / "config.yaml").is_file()
    if own:
        cfg = parse.load_run(run)
    elif name == "tiny" or built_in:
        cfg = parse.load("shapes", ["max_prompt=1024"])
    else:
        kind = "instruct" if "instruct" in Path(name).name.lower() else "base"
        cfg = parse.Config(
            template=protocol.templates[kind]["reasoning"],
            cap=protocol.cap,
            max_prompt=MAX_PROMPT,
            max_pixels=protocol.max_pixels,
        )
    as_was = protocol.as_trained or family(cfg.template) is None
    if as_was:
        limits = cfg.eval.cap or cfg.cap, cfg.max_prompt, cfg.max_pixels
    else:
        limits = protocol.cap, MAX_PROMPT, protocol.max_pixels
    if dtype == "auto":
        dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    return Subject(
        name,
        folder,
        worded(template or cfg.template, protocol, prompt, keep=template is not None or as_was),
        cap or limits[0],
        max_prompt or limits[1],
        cfg.min_pixels if as_was else None,
        max_pixels or limits[2],
        dtype,
        cfg.task if own else "",
        weights_digest(folder),
    )


def worded(template: str, protocol: Protocol, prompt: str | None, keep: bool) -> str:
    """The template that asks the same kind of model with `prompt`, reasoning or direct (None: as
    `template` does). keep: leave one that does so already as it is, else take the protocol's. Raises
    ValueError for a template that has no such form."""
    prompt, kind, does = (
        prompt or None,
        family(template),
        "direct" if template.endswith("_direct") else "reasoning",
    )
    if keep and prompt in (None, does):
        return template
    if kind is None:
        if prompt in (None, does):
            return template
        raise ValueError(f"argument --prompt: the template {template} has no {prompt} form")
    return protocol.templates[kind][prompt or does]


def banned_ids(chat: Chat, words: Sequence[str]) -> list[int]:
    """The ids that may not be drawn: each word's first token, alone and after a space. Raises ValueError
    for an unknown word."""
    found = set()
    for word in words:
        for spelling in (word, f" {word}"):
            ids = chat.encode(spelling)
            if not word.strip() or "".join(chat.tokenizer.decode(ids).split()) != "".join(word.split()):
                raise ValueError(f"argument --ban: the tokenizer of {chat.folder} does not know {word!r}")
            # a space that is a token of its own begins other words too
            if chat.tokenizer.decode(ids[:1]).strip():
                found.add(ids[0])
    return sorted(found)
