"""From an example to a prompt, and from a completion back to text.

Only a template's own special tokens count. A question is encoded as ordinary text, so no example can open a
turn or add a picture. Token ids are the truth: text is made from them for rewards and people, and never
encoded back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tokenizers import Tokenizer

from data.images import MEAN, STD, open_picture, preprocess
from data.types import MARK, Example, Prompt, PromptTooLong

VISION_START, IMAGE, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
TURN_END = "<|im_end|>"
MID_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Template:
    """The text around a question. `{pictures}` and `{asked}` are filled in; `<|…|>` are special tokens.

    `opening`: the start of the answer that the prompt already holds; `Chat.text` puts it back in front.
    `bare`: a completion without reasoning. Imitation learns from it where a source has no documents.
    """

    text: str
    opening: str = ""
    bare: str = "{answer}"


_FILE = Path(__file__).with_name("templates.yaml")
TEMPLATES = {name: Template(**each) for name, each in yaml.safe_load(_FILE.read_text("utf-8")).items()}
_PIECE = re.compile(r"(<\|[a-z_]+\|>|\{pictures\}|\{asked\})")


class Chat:
    """Prompts and completions of one model folder under one template.

    Reads tokenizer.json and preprocessor_config.json; tokenizer_config.json and generation_config.json only
    for the stop tokens. `max_prompt` is in tokens. `min_pixels` and `max_pixels` override the folder's.
    Raises ValueError that names the file.
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
        self._pieces = list(filter(None, _PIECE.split(self.template.text)))
        named = [piece for piece in self._pieces if piece.startswith("<|")]
        self._special = {name: self._special_id(name) for name in (VISION_START, IMAGE, VISION_END, *named)}
        self.image_token: int = self._special[IMAGE]
        self.stop_ids: tuple[int, ...] = self._stop_ids()
        pictures = _picture_settings(self.folder, min_pixels, max_pixels)
        self._merged = pictures["merge"] ** 2
        self._patch_dim = 3 * pictures["temporal"] * pictures["patch"] ** 2
        self._preprocess = partial(preprocess, **pictures)

    def prompt(self, example: Example, *, blind: bool = False) -> Prompt:
        """The example as tokens and patches. blind: grey pictures of the same size in place of its own.

        Raises PromptTooLong, BadPicture.
        """
        name = f"example {example.uid!r}, picture "
        images = [open_picture(each, name=f"{name}{n}") for n, each in enumerate(example.pictures, 1)]
        if blind:
            images = [Image.new("RGB", image.size, MID_GREY) for image in images]
        seen = [self._preprocess(image) for image in images]
        grid = np.array([grid for _, grid in seen], np.int64).reshape(-1, 3)
        placeholders = grid.prod(axis=1) // self._merged
        pictures = [[VISION_START, *[IMAGE] * count, VISION_END] for count in placeholders]
        parts = example.asked.split(MARK)
        # as many marks as pictures: each picture goes to its mark
        parts = parts if images and len(parts) == len(images) + 1 else [example.asked]
        tokens = self._encoded(parts, pictures)
        if len(tokens) > self.max_prompt:
            has = f"has {len(tokens)} tokens ({placeholders.sum()} of them pictures), over the limit of"
            said = f"the prompt {has} {self.max_prompt}; raise max_prompt or lower max_pixels"
            raise PromptTooLong(f"example {example.uid!r}: {said}")
        shown = VISION_START + IMAGE + VISION_END
        ahead = shown * (len(images) + 1 - len(parts))
        template = self.template.text if ahead else self.template.text.replace("{pictures}" + MARK, "")
        text = template.replace("{pictures}", ahead).replace("{asked}", shown.join(parts))
        none = np.empty((0, self._patch_dim), np.float32)
        patches = np.concatenate([none, *(patches for patches, _ in seen)])  # (N, patch_dim)
        return Prompt(example.uid, text, np.array(tokens, np.int64), patches, grid)

    def encode(self, text: str) -> list[int]:
        """Ordinary text -> token ids. The names of special tokens in it stay text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def bare(self, answer: str) -> str:
        """A completion that is only an answer, in the template's form."""
        return self.template.bare.replace("{answer}", answer)

    def documents(self, example: Example) -> tuple[str, ...]:
        """What imitation learns behind the prompt: the example's documents, without the opening that the
        prompt already holds; else its answer in the template's form."""
        found = example.extra.get("documents") or (self.bare(example.answer),)
        return tuple(text.removeprefix(self.template.opening) for text in found)

    def text(self, tokens: Sequence[int]) -> str:
        """Token ids of a completion -> the template's opening and the text before the first stop token."""
        return self.template.opening + self._decode([self._before_stop(tokens)])[0]

    def texts(self, tokens: Any, length: Any) -> list[list[str]]:
        """Completions (P, G, C) of `length` (P, G), arrays or tensors -> P lists of G texts."""
        rows = [
            [self._before_stop(row[:n]) for row, n in zip(group, lengths)]
            for group, lengths in zip(tokens.tolist(), length.tolist())
        ]
        decoded = iter(self._decode([row for group in rows for row in group]))
        return [[self.template.opening + next(decoded) for _ in group] for group in rows]

    def piece(self, token: int) -> str:
        """One token as text, for people: a word, a part of one, or a byte of a longer character."""
        return self._decode([[int(token)]])[0]

    def _encoded(self, parts: list[str], pictures: list[list[str]]) -> list[int]:
        """Encode the text between two special tokens in one piece: at the border of template and question
        a word may span both. The question's parts have a picture between them; the others go ahead."""
        ahead = len(pictures) + 1 - len(parts)
        pieces: list[str | list[str]] = []
        for piece in self._pieces:
            if piece == "{pictures}":
                pieces += pictures[:ahead]
            elif piece == "{asked}":
                pieces.append(parts[0])
                for picture, part in zip(pictures[ahead:], parts[1:]):
                    pieces += [picture, part]
            elif piece in self._special:
                pieces.append([piece])
            else:
                # the paper's literal "<image>" goes with the pictures ahead
                pieces.append(piece if ahead else piece.removeprefix(MARK))
        tokens: list[int] = []
        text = ""
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                continue
            tokens += self.encode(text) + [self._special[name] for name in piece]
            text = ""
        return tokens + self.encode(text)

    def _before_stop(self, tokens: Sequence[int]) -> list[int]:
        return list(takewhile(lambda token: token not in self.stop_ids, map(int, tokens)))

    def _decode(self, rows: list[list[int]]) -> list[str]:
        # a special token inside an answer must be visible
        return self.tokenizer.decode_batch(rows, skip_special_tokens=False)

    def _special_id(self, name: str) -> int:
        file, number = self.folder / "tokenizer.json", self.tokenizer.token_to_id(name)
        if number is None:
            need = "this template needs" if "im_" in name else "pictures need"
            raise ValueError(f"{file}: no token {name}, which {need}; use the tokenizer of a Qwen-VL model")
        if number in self.encode(name):
            said = 'so a question could contain it; set "special": true in added_tokens'
            raise ValueError(f"{file}: {name} is not marked special, {said}")
        return number

    def _stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a turn. The sampling settings in generation_config.json are not read."""
        file = self.folder / "generation_config.json"
        numbers = _json(file).get("eos_token_id")
        numbers = numbers if isinstance(numbers, list) else [] if numbers is None else [numbers]
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"{file}: eos_token_id is {numbers}, not token ids")
        name = _json(self.folder / "tokenizer_config.json").get("eos_token")
        names = [name["content"] if isinstance(name, dict) else name, TURN_END]
        named = [self.tokenizer.token_to_id(name) for name in names if name]
        found = tuple(dict.fromkeys(number for number in [*numbers, *named] if number is not None))
        if not found:
            said = "no token ends a completion; give eos_token_id in generation_config.json"
            raise ValueError(f"{self.folder}: {said}")
        return found


def _tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file}: not found; a model folder needs the tokenizer in this format")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    # `tokenizers` raises a plain Exception
    except Exception as error:
        raise ValueError(f"{file}: not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # as ordinary text
    tokenizer.encode_special_tokens = True
    return tokenizer


# settings of a processor that only have this value here
_FIXED = dict(do_resize=True, do_rescale=True, do_normalize=True, rescale_factor=1 / 255, resample=3)


def _picture_settings(folder: Path, min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
    """Arguments of `preprocess`, from preprocessor_config.json or transformers 5's processor_config.json."""
    file = folder / "preprocessor_config.json"
    found = _json(file)
    if not found:
        file = folder / "processor_config.json"
        found = _json(file).get("image_processor", {})
    if not found:
        said = "no preprocessor_config.json (nor processor_config.json with an image_processor)"
        raise ValueError(f"{folder}: {said}; copy it from the model")
    for key, only in _FIXED.items():
        if found.get(key, only) != only:
            raise ValueError(f"{file}: {key} is {found[key]}, only {only} is supported")
    size = found.get("size") or {}
    low = min_pixels if min_pixels is not None else found.get("min_pixels") or size.get("shortest_edge")
    high = max_pixels if max_pixels is not None else found.get("max_pixels") or size.get("longest_edge")
    if not low or not high or low > high:
        said = f"min_pixels is {low} and max_pixels is {high}; both are needed, the smaller first"
        raise ValueError(f"{file}: {said}")
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
    """The object in a JSON file; {} if there is no file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__}, not an object")
    return found
