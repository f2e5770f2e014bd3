"""The model that is evaluated, and how it is asked: everything about its prompts that changes its scores.

A checkpoint of a run, or its export, is asked as its run asked it. Any other model is asked as the protocol
says: an instruct model, whose chat template writes turns, in turns; a base model without. The command line
overrides both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import templates
from data.chat import Chat
from data.sources import vlmeval
from grpo.config import parse, typed
from grpo.evaluation.protocols import Protocol, family
from grpo.evaluation.resume import weights_digest
from grpo.storage.model_folder import base_folder, check_agreement, load_model, model_folder
from models.config import ModelConfig

# tokens; a picture as large as Qwen's processors leave it has 16,384
MAX_PROMPT = 20_000
# tasks that ask all their questions; the others hold a part of them out
BENCHMARKS = ("blink", "cvbench", "vsr", *vlmeval.LAYOUTS)


@dataclass(frozen=True)
class Overrides:
    """What the command line says about prompts and precision; None leaves it to the run or the protocol."""

    prompt: str | None = None
    template: str | None = None
    system: str | None = None
    cap: int | None = None
    max_prompt: int | None = None
    max_pixels: int | None = None
    dtype: str = "auto"


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, and how it is asked. name: as on the command line. trained_on, data, heldout: settings of its
    run (task, data, heldout), "" and None without one. digest: a hash of the weights."""

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
    data: str | None = None
    heldout: float | None = None
    system: str | None = None

    @property
    def direct(self) -> bool:
        """Whether it is asked for the answer alone, without reasoning."""
        return self.template.endswith("_direct")

    def open(self, device: str) -> tuple[torch.nn.Module, Chat]:
        """Load policy and chat. Raises ValueError naming the file."""
        pixels = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        base = base_folder(self.folder)
        # an adapter has its own record
        of = self.folder if self.template == templates.TRAINED else base
        template = templates.open_template(self.template, of, self.system)
        chat = Chat(base, template=template, max_prompt=self.max_prompt, **pixels)
        check_agreement(chat, ModelConfig.from_folder(base))
        policy = load_model(self.folder, dtype=getattr(torch, self.dtype), device=device)
        return policy.requires_grad_(False), chat


def evaluated_model(
    name: str, protocol: Protocol, overrides: Overrides, device: str, built_in: bool
) -> EvaluatedModel:
    """The model of that name: asked as `overrides` says, else as its run was (if the protocol leaves that to
    the run), else as the protocol says. built_in: the questions are built in. Raises ValueError."""
    folder = model_folder(name)
    # `name` is a run folder, or one of its checkpoints
    run = Path(name) if (Path(name) / "checkpoints").is_dir() else folder.resolve().parent.parent
    own = (run / "config.yaml").is_file() and any(
        (run / name).is_dir() for name in ("checkpoints", "weights")
    )
    record = templates.record(folder)
    cap, max_prompt, max_pixels = protocol.cap, MAX_PROMPT, protocol.max_pixels
    if own:
        cfg = parse.load(run / "config.yaml")
    elif record:
        # an exported policy
        cfg = recorded(record, folder)
    elif name == "tiny" or built_in:
        cfg = parse.load("shapes", ["max_prompt=1024"])
    else:
        template = protocol.templates["instruct" if templates.renders_turns(folder) else "base"][
            protocol.form
        ]
        cfg = parse.Config(template=template, cap=cap, max_prompt=max_prompt, max_pixels=max_pixels)
    as_run = protocol.as_trained or family(cfg.template) is None
    if as_run:
        cap, max_prompt, max_pixels = cfg.eval.cap or cfg.cap, cfg.max_prompt, cfg.max_pixels
    dtype = overrides.dtype if overrides.dtype != "auto" else cfg.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if record and cfg.template not in templates.TEMPLATES:
        # a file that may be gone
        cfg = dataclasses.replace(cfg, template=templates.TRAINED, system=None)
    keep = overrides.template is not None or as_run
    template = template_for(overrides.template or cfg.template, protocol, overrides.prompt, keep)
    system = cfg.system if overrides.system is None and template == cfg.template else overrides.system
    cap, max_prompt = overrides.cap or cap, overrides.max_prompt or max_prompt
    pixels = (cfg.min_pixels if as_run else None, overrides.max_pixels or max_pixels)
    trained = (cfg.task if own or record else "", weights_digest(folder), cfg.data, cfg.heldout, system)
    return EvaluatedModel(name, folder, template, cap, max_prompt, *pixels, dtype, *trained)


def recorded(record: dict[str, Any], folder: Path) -> parse.Config:
    """The settings in a policy's record. Raises ConfigError naming the file."""
    settings = record.get("settings")
    if not isinstance(settings, dict):
        raise parse.ConfigError(f"{folder / templates.RECORD}: there are no settings")
    flat = typed.flatten(parse.Config, settings, str(folder / templates.RECORD))
    return typed.build(parse.Config, flat)


def template_for(template: str, protocol: Protocol, prompt: str | None, keep: bool) -> str:
    """The protocol's template for such a model in the form `prompt`: "reasoning", "direct" or None (as
    `template`). keep: leave `template` if it has that form. Raises ValueError if there is none."""
    kind = family(template)
    form = "direct" if template.endswith("_direct") else "reasoning"
    if prompt in (None, form) and (keep or kind is None):
        return template
    if kind is None:
        raise ValueError(f"argument --prompt: the template {template} has no {prompt} form")
    return protocol.templates[kind][prompt or form]


def banned_ids(chat: Chat, words: Sequence[str]) -> list[int]:
    """The token ids that --ban forbids: each word's first token, alone and after a space. Raises as
    `known_ids`."""
    found = set()
    for word in words:
        for spelling in (word, f" {word}"):
            ids = known_ids(chat, spelling, "--ban")
            # a space that is a token of its own also begins other words
            if chat.tokenizer.decode(ids[:1]).strip():
                found.add(ids[0])
    return sorted(found)


def known_ids(chat: Chat, text: str, option: str) -> list[int]:
    """A text as token ids. Raises ValueError, naming the option, if the tokenizer does not know the text."""
    ids = chat.encode(text)
    if not text.strip() or "".join(chat.tokenizer.decode(ids).split()) != "".join(text.split()):
        raise ValueError(f"argument {option}: the tokenizer of {chat.folder} does not know {text.strip()!r}")
    return ids
