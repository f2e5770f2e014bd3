"""The three stages, and what each one asks about a question. Pure but for the pictures, which are read.

    pseudo      picture, question (and answer) -> a caption with short reasoning
    describe    picture, question, the pseudo-chain -> a description that holds what the question needs
    reason      no picture: description, question -> a long chain, and an answer

Vision-R1 (arXiv 2503.06749), section 3.3.1. A stage's request is a function of the question, the last replies
of the stages before, and the number of the attempt. So a resumed run asks the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from PIL import Image

from data.images import open_picture, smart_resize
from data.types import MARK, Example, Picture
from grpo.config.typed import ConfigError, nearest
from grpo.serving.messages import Reply, Request, png, split_thinking

STAGES = ("pseudo", "describe", "reason")
# what a prompt may hold -> the stage that it comes from
PLACES = {"question": "", "answer": "", "thinking process": "pseudo", "description": "describe"}
PROMPTS = Path(__file__).with_name("prompts.yaml")
_PLACE = re.compile("{(" + "|".join(PLACES) + ")}")
SIDE = 28


@dataclass(frozen=True)
class Asking:
    """How a stage asks. prompt: its text, with places. model: a name that changes with everything about the
    writer that changes a reply. max_pixels: of a picture. shows: whether pictures are sent."""

    stage: str
    prompt: str
    model: str
    system: str = ""
    max_tokens: int = 4096
    temperature: float = 0.0
    top_p: float = 1.0
    max_pixels: int | None = None
    seed: int = 0
    shows: bool = True


@dataclass(frozen=True)
class Job(Request):
    """A request of a stage about the question `uid`, which is number `index`. name: under which its reply is
    stored."""

    uid: str = ""
    stage: str = ""
    attempt: int = 0
    index: int = 0
    name: str = ""

    def digest(self, model: str) -> str:
        """The name, which needs no pictures."""
        return self.name


def prompt_text(name: str, where: str) -> str:
    """A prompt by name, or from a file NAME.txt. Raises ConfigError that begins with `where`."""
    known = yaml.safe_load(PROMPTS.read_text("utf-8"))
    if name in known:
        return known[name]
    if not name.endswith(".txt"):
        choice = f"there are {', '.join(known)}, and FILE.txt"
        raise ConfigError(f"{where}: unknown prompt {name!r}{nearest(name, known)}; {choice}")
    try:
        return Path(name).read_text("utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {name} cannot be read: {error}") from None


def check_prompts(prompts: Mapping[str, str]) -> None:
    """prompts: {stage: text}, of the stages that are asked. Raises ConfigError if one needs the reply of a
    stage that is left out or comes later."""
    for stage, text in prompts.items():
        for place in _PLACE.findall(text):
            needed = PLACES[place]
            if needed and (needed not in prompts or STAGES.index(needed) >= STAGES.index(stage)):
                ways = f"set {needed}.prompt, or take another prompt for {stage}"
                raise ConfigError(f"{stage}.prompt holds {{{place}}}, and there is no such reply: {ways}")


def filled(prompt: str, example: Example, earlier: Mapping[str, Reply]) -> str:
    """A prompt with its places filled. What is filled in is never searched for places."""
    words = {
        "question": without_marks(example.asked),
        "answer": example.letter or example.answer,
        "thinking process": "",
        "description": "",
    }
    for place, stage in PLACES.items():
        if stage in earlier:
            words[place] = earlier[stage].text
    return _PLACE.sub(lambda match: words[match[1]], prompt)


def without_marks(asked: str) -> str:
    """A question without the marks of its pictures, which are sent ahead of the text."""
    return asked.replace(f"{MARK}\n", "").replace(f"\n{MARK}", "").replace(MARK, "").strip()


def job(
    asking: Asking, example: Example, earlier: Mapping[str, Reply], attempt: int = 0, index: int = 0
) -> Job:
    """The request of an attempt, without its pictures: see `pictures`. earlier: the replies of the stages
    before."""
    text = filled(asking.prompt, example, earlier)
    address = json.dumps([asking.seed, asking.stage, example.uid, attempt]).encode()
    seed = int.from_bytes(hashlib.sha256(address).digest()[:4], "big") >> 1
    told: dict[str, object] = {
        "model": asking.model,
        "text": text,
        "system": asking.system,
        "sampling": [asking.max_tokens, asking.temperature, asking.top_p, seed],
    }
    if asking.shows:
        told["pictures"] = [asking.max_pixels, *(identity(each, example.uid) for each in example.pictures)]
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    sampling = (asking.max_tokens, asking.temperature, asking.top_p, seed)
    return Job(text, (), asking.system, *sampling, example.uid, asking.stage, attempt, index, name)


def identity(picture: Picture, uid: str) -> list:
    """What tells a picture from another without decoding it: the name and size of a file, a hash of bytes.
    A drawn picture belongs to its question."""
    if isinstance(picture, Path):
        return [picture.name, picture.stat().st_size if picture.is_file() else None]
    return [hashlib.sha256(picture).hexdigest() if isinstance(picture, bytes) else uid]


def pictures(asking: Asking, example: Example) -> tuple[bytes, ...]:
    """The pictures that a request of the stage shows, as PNG files, shrunk to `max_pixels`. Raises
    BadPicture."""
    if not asking.shows:
        return ()
    names = (f"example {example.uid!r}, picture {n}" for n in range(1, len(example.pictures) + 1))
    opened = [open_picture(each, name=name) for each, name in zip(example.pictures, names)]
    return tuple(png(within(image, asking.max_pixels)) for image in opened)


def within(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """The image, shrunk if it has more pixels, its sides multiples of 28 then."""
    if max_pixels is None or image.width * image.height <= max_pixels:
        return image
    height, width = smart_resize(image.height, image.width, factor=SIDE, min_pixels=1, max_pixels=max_pixels)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def reply_of(job: Job, written: str, finish: str, tokens_in: int, tokens_out: int, seconds: float) -> Reply:
    """What a model or a function wrote, as a reply."""
    thinking, text = split_thinking(written)
    thinking = thinking.strip().removeprefix("<think>").strip()
    return Reply(job.name, text.strip(), thinking, finish, tokens_in, tokens_out, seconds)
