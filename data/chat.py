"""From an example to a prompt, and from a completion back to text.

A tokenizer folder in Hugging Face layout is read with `tokenizers` alone. Templates are strings; only *their*
special tokens count: what stands in a question is encoded as ordinary text, so that no example can open a
turn or smuggle in a picture. Token ids are the truth, text is derived from them for rewards and people and
never encoded back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from data.images import MEAN, STD, open_picture, preprocess
from data.types import Example, Prompt, PromptTooLong

VISION_START, IMAGE, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
TURN_END = "<|im_end|>"
MID_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Template:
    """The text around a question. `{pictures}` and `{asked}` are filled in; `<|…|>` are special tokens.

    `opening` is what the prompt's end has already written of the answer; it is put back in front of each
    completion's text. `bare` is an answer without any reasoning, as a completion: what imitation learns from
    where a source has no documents.
    """

    text: str
    opening: str = ""
    bare: str = "{answer}"


# VisualThinker-R1-Zero's prompts to the letter (arXiv 2503.05132, src/open_r1/grpo.py and src/eval): the
# space before a line's end, the two after a question, and the base model's literal "<image>", which is
# ordinary text beside the real picture.
_PAPER = (
    "{pictures}<image>A conversation between User and Assistant. The user asks a question about the image, "
    "and the Assistant "
    "solves it."
)
_CHATML = (
    "<|im_start|>system\nYou are a helpful assistant%s.<|im_end|>\n<|im_start|>user\n{pictures}%s<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_TAGS = (
    "{asked}  Output the thinking process in <think> </think> and final answer (option) in <answer> "
    "</answer> tags."
)
# What its authors tried before (their development repository): another system prompt, and this behind the
# question.
_REFLECTION = (
    " If you detect that you made a mistake in your reasoning at any point, correct yourself inside "
    "<reflection></reflection> tags."
)
_CLOSED, _WHOLE = "</think> <answer> {answer} </answer>", "<think> </think> <answer> {answer} </answer>"

TEMPLATES: dict[str, Template] = {
    "visualthinker": Template(
        _PAPER
        + " The assistant first thinks about the reasoning process in the mind and then provides the user "
        "with the answer.\n"
        "User: {asked} \nAssistant: Let me solve this step by step.\n<think>",
        opening="<think>",
        bare=_CLOSED,
    ),
    "visualthinker_direct": Template(_PAPER + "\nUser: {asked} \nAssistant: "),
    "chatml": Template(_CHATML % ("", _TAGS), bare=_WHOLE),
    "chatml_eval": Template(
        _CHATML
        % (
            "",
            (
                "{asked}\nOutput the thinking process in <think> </think> and final answer in <answer> "
                "</answer> tags."
            ),
        ),
        bare=_WHOLE,
    ),
    "chatml_reflection": Template(
        _CHATML % (" capable of complex reasoning and reflection", _TAGS + _REFLECTION), bare=_WHOLE
    ),
    "chatml_direct": Template(_CHATML % ("", "{asked}")),
    "shapes": Template("{pictures}User: {asked}\nAssistant: <think>", opening="<think>", bare=_CLOSED),
}


class Chat:
    """Prompts and completions of one model folder under one template.

    Reads tokenizer.json, preprocessor_config.json and, for the tokens that end a completion only,
    tokenizer_config.json and generation_config.json. `max_prompt` is in tokens; `min_pixels` and `max_pixels`
    override the folder's. Raises ValueError naming the file.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        template: str,
        max_prompt: int = 1024,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        if template not in TEMPLATES:
            raise ValueError(f"no template {template!r}; there are {', '.join(TEMPLATES)}")
        self.template = TEMPLATES[template]
        self.max_prompt = max_prompt
        self.tokenizer = _tokenizer(self.folder)
        self._pieces = [
            piece
            for piece in re.split(r"(<\|[a-z_]+\|>|\{pictures\}|\{asked\})", self.template.text)
            if piece
        ]
        self._special = {
            piece: self._special_id(piece)
            for piece in [VISION_START, IMAGE, VISION_END, *self._pieces]
            if piece.startswith("<|")
        }
        self.image_token: int = self._special[IMAGE]
        self.stop_ids: tuple[int, ...] = self._stop_ids()
        pictures = _picture_settings(self.folder, min_pixels, max_pixels)
        self._merged = pictures["merge"] ** 2
        self._patch_dim = 3 * pictures["temporal"] * pictures["patch"] ** 2
        self._preprocess = partial(preprocess, **pictures)

    def prompt(self, example: Example, *, blind: bool = False) -> Prompt:
        """The example as tokens and patches; `blind` shows mid-grey pictures of the same size instead.

        Raises PromptTooLong, BadPicture.
        """
        images = [
            open_picture(picture, name=f"example {example.uid!r}, picture {number}")
            for number, picture in enumerate(example.pictures, 1)
        ]
        if blind:
            images = [Image.new("RGB", image.size, MID_GREY) for image in images]
        seen = [self._preprocess(image) for image in images]
        grid = np.array([grid for _, grid in seen], np.int64).reshape(-1, 3)
        placeholders = grid.prod(axis=1) // self._merged
        pictures = [part for count in placeholders for part in (VISION_START, *[IMAGE] * count, VISION_END)]
        tokens = self._encoded(example.asked, pictures)
        if len(tokens) > self.max_prompt:
            raise PromptTooLong(
                f"example {example.uid!r}: the prompt has {len(tokens)} tokens ({placeholders.sum()} of them "
                "pictures), "
                f"over the limit of {self.max_prompt}; raise max_prompt or lower max_pixels"
            )
        text = self.template.text.replace(
            "{pictures}", (VISION_START + IMAGE + VISION_END) * len(images)
        ).replace("{asked}", example.asked)
        patches = np.concatenate(
            [np.empty((0, self._patch_dim), np.float32), *[patches for patches, _ in seen]]
        )
        return Prompt(example.uid, text, np.array(tokens, np.int64), patches, grid)

    def encode(self, text: str) -> list[int]:
        """Ordinary text → token ids. The names of special tokens in it stay text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def bare(self, answer: str) -> str:
        """A completion that is an answer and nothing else, in the template's form."""
        return self.template.bare.replace("{answer}", answer)

    def text(self, tokens: Sequence[int]) -> str:
        """A completion's token ids → the template's opening and the text before the first stop token."""
        return self.template.opening + self._decode([self._before_stop(tokens)])[0]

    def texts(self, tokens: Any, length: Any) -> list[list[str]]:
        """Completions (P, G, C) of `length` (P, G), arrays or tensors → P lists of G texts."""
        rows = [
            [self._before_stop(row[:n]) for row, n in zip(group, lengths)]
            for group, lengths in zip(tokens.tolist(), length.tolist())
        ]
        decoded = iter(self._decode([row for group in rows for row in group]))
        return [[self.template.opening + next(decoded) for _ in group] for group in rows]

    def piece(self, token: int) -> str:
        """One token as text, for people: it may be a word, part of one, or a byte that is no letter by
        itself."""
        return self._decode([[int(token)]])[0]

    def _encoded(self, asked: str, pictures: list[str]) -> list[int]:
        """Text between two special tokens is encoded in one piece: where the template ends and the
        question begins, words may join."""
        tokens: list[int] = []
        text = ""
        for piece in self._pieces:
            if piece == "{asked}":
                text += asked
            elif piece == "{pictures}" or piece in self._special:
                specials = pictures if piece == "{pictures}" else [piece]
                if specials:
                    tokens += self.encode(text)
                    text = ""
                tokens += [self._special[name] for name in specials]
            else:
                text += piece
        return tokens + self.encode(text)

    def _before_stop(self, tokens: Sequence[int]) -> list[int]:
        tokens = [int(token) for token in tokens]
        return tokens[
            : next((place for place, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        ]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        # an odd special token inside an answer must be seen
        return self.tokenizer.decode_batch(rows, skip_special_tokens=False)

    def _special_id(self, name: str) -> int:
        number = self.tokenizer.token_to_id(name)
        if number is None:
            raise ValueError(
                f"{self.folder / 'tokenizer.json'}: no token {name}, which "
                f"{'pictures need' if 'im_' not in name else 'this template needs'}; use the tokenizer of a "
                "Qwen-VL model"
            )
        if number in self.encode(name):
            raise ValueError(
                f"{self.folder / 'tokenizer.json'}: {name} is not marked special, so a question could "
                "contain it; "
                'set "special": true in added_tokens'
            )
        return number

    def _stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a turn. The sampling settings beside them in generation_config.json are no
        part of the policy: not read."""
        numbers = _json(self.folder / "generation_config.json").get("eos_token_id")
        numbers = numbers if isinstance(numbers, list) else [] if numbers is None else [numbers]
        if not all(type(number) is int for number in numbers):
            raise ValueError(
                f"{self.folder / 'generation_config.json'}: eos_token_id is {numbers}, not token ids"
            )
        name = _json(self.folder / "tokenizer_config.json").get("eos_token")
        names = [name["content"] if isinstance(name, dict) else name, TURN_END]
        named = [self.tokenizer.token_to_id(name) for name in names if name]
        found = tuple(dict.fromkeys(number for number in [*numbers, *named] if number is not None))
        if not found:
            raise ValueError(
                f"{self.folder}: no token ends a completion; give eos_token_id in generation_config.json"
            )
        return found


def _tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file}: not found; a model folder needs the tokenizer in this format")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        # `tokenizers` raises plain Exception
        raise ValueError(f"{file}: not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # that is: as the ordinary text they are spelt with
    tokenizer.encode_special_tokens = True
    return tokenizer


def _picture_settings(folder: Path, min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
    """Arguments of `preprocess`, from preprocessor_config.json or the processor_config.json that
    transformers 5 writes instead."""
    file = folder / "preprocessor_config.json"
    found = _json(file)
    if not found:
        file = folder / "processor_config.json"
        found = _json(file).get("image_processor", {})
    if not found:
        raise ValueError(
            f"{folder}: no preprocessor_config.json (nor processor_config.json with an image_processor); "
            "copy it from the model"
        )
    for key, only in {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
    }.items():
        if found.get(key, only) != only:
            raise ValueError(f"{file}: {key} is {found[key]}, only {only} is supported")
    size = found.get("size") or {}
    low, high = (
        found.get("min_pixels") or size.get("shortest_edge"),
        found.get("max_pixels") or size.get("longest_edge"),
    )
    low, high = low if min_pixels is None else min_pixels, high if max_pixels is None else max_pixels
    if not low or not high or low > high:
        raise ValueError(
            f"{file}: min_pixels is {low} and max_pixels is {high}; both are needed, the smaller first"
        )
    return {
        "patch": found.get("patch_size", 14),
        "merge": found.get("merge_size", 2),
        "temporal": found.get("temporal_patch_size", 2),
        "min_pixels": low,
        "max_pixels": high,
        "mean": tuple(found.get("image_mean") or MEAN),
        "std": tuple(found.get("image_std") or STD),
    }


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__}, not an object")
    return found
