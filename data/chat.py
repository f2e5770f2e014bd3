"""From an example to a prompt, and from a completion back to text.

Only a template's own special tokens count. A question is encoded as ordinary text, so no example can open a
turn or add a picture. Token ids are the truth: text is made from them for rewards and people, and never
encoded back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from data.images import open_picture, preprocess, size_of, smart_resize
from data.processor import PictureSettings, json_object, picture_settings, shown
from data.templates import IMAGE, SHOWN, VISION_END, VISION_START, Template, open_template
from data.types import MARK, BadExample, Example, Prompt, PromptTooLong, short

TURN_END = "<|im_end|>"
GENERATION = "generation_config.json"
MID_GREY = (128, 128, 128)
_PIECE = re.compile(r"(<\|[a-z_]+\|>|\{pictures\}|\{asked\}|\{system\})")


class Chat:
    """Prompts and completions of one model folder under one template.

    Reads tokenizer.json and the processor's file; tokenizer_config.json, generation_config.json and
    config.json only for the stop tokens. `max_prompt` is in tokens. `min_pixels` and `max_pixels` override
    the folder's. `template`: opened, or a name, which `open_template` opens with `system`. Raises ValueError
    that names the file.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        template: str | Template,
        max_prompt: int = 1024,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        opened = isinstance(template, Template)
        self.template = template if opened else open_template(template, self.folder, system)
        self.max_prompt = max_prompt
        self.tokenizer = _tokenizer(self.folder)
        self._pieces = list(filter(None, _PIECE.split(self.template.text)))
        named = [piece for piece in self._pieces if piece.startswith("<|")]
        self._special = {name: self._special_id(name) for name in (VISION_START, IMAGE, VISION_END, *named)}
        self.image_token: int = self._special[IMAGE]
        self.stop_ids: tuple[int, ...] = self._stop_ids()
        self.pictures: PictureSettings = picture_settings(
            self.folder, min_pixels=min_pixels, max_pixels=max_pixels
        )
        self._patch_dim = 3 * self.pictures.temporal * self.pictures.patch**2

    def prompt(self, example: Example, *, blind: bool = False) -> Prompt:
        """The example as tokens and patches. blind: grey pictures of the same size in place of its own.

        Marks "<image>" put each picture in its place; without marks, the template does. Raises PromptTooLong,
        BadPicture, and BadExample for a wrong number of marks.
        """
        name = f"example {short(example.uid)}, picture "
        images = [open_picture(each, name=f"{name}{n}") for n, each in enumerate(example.pictures, 1)]
        if blind:
            images = [Image.new("RGB", image.size, MID_GREY) for image in images]
        seen = [preprocess(image, **asdict(self.pictures)) for image in images]
        grid = np.array([grid for _, grid in seen], np.int64).reshape(-1, 3)
        placeholders = grid.prod(axis=1) // self.pictures.merge**2
        parts, tokens = self._tokens(example, placeholders.tolist())
        if len(tokens) > self.max_prompt:
            has = f"has {len(tokens)} tokens ({placeholders.sum()} of them pictures), over the limit of"
            said = f"the prompt {has} {self.max_prompt}; raise max_prompt or lower max_pixels"
            raise PromptTooLong(f"example {short(example.uid)}: {said}")
        ahead = SHOWN * (len(images) + 1 - len(parts))
        filled = {"{pictures}": ahead, "{asked}": SHOWN.join(parts), "{system}": self.template.system}
        template = self.template.text if ahead else self.template.text.replace("{pictures}" + MARK, "")
        text = _PIECE.sub(lambda piece: filled.get(piece[0], piece[0]), template)
        none = np.empty((0, self._patch_dim), np.float32)
        patches = np.concatenate([none, *(patches for patches, _ in seen)])  # (N, patch_dim)
        return Prompt(example.uid, text, np.array(tokens, np.int64), patches, grid)

    def length(self, example: Example) -> tuple[int, list[int]]:
        """The number of a prompt's tokens, and of those that each of its pictures has. Only the headers of
        picture files are read. Raises BadPicture and BadExample."""
        seen = self.pictures
        limits = {"min_pixels": seen.min_pixels, "max_pixels": seen.max_pixels}
        counts = []
        for number, each in enumerate(example.pictures, 1):
            width, height = size_of(each, name=f"example {short(example.uid)}, picture {number}")
            height, width = smart_resize(height, width, factor=seen.patch * seen.merge, **limits)
            counts.append(height * width // (seen.patch * seen.merge) ** 2)
        return len(self._tokens(example, counts)[1]), counts

    def _tokens(self, example: Example, counts: Sequence[int]) -> tuple[list[str], list[int]]:
        """The parts of a question between its pictures, and the prompt's tokens.  counts: the tokens of each
        picture.  Raises BadExample for a wrong number of marks."""
        pictures = [[VISION_START, *[IMAGE] * count, VISION_END] for count in counts]
        # without pictures a mark is a text like any other
        parts = example.asked.split(MARK) if pictures else [example.asked]
        if len(parts) - 1 not in (0, len(pictures)):
            said = f"has {len(parts) - 1} marks {MARK}, and there are {len(pictures)} pictures"
            raise BadExample(f"example {short(example.uid)}: the question {said}")
        return parts, self._encoded(parts, pictures)

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
        opening = self.template.opening
        return tuple(text.removeprefix(opening).removeprefix(opening.rstrip()) for text in found)

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
            elif piece == "{system}":
                pieces.append(self.template.system)
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
        """Every token that ends a turn: those of generation_config.json (of config.json, where it names
        none), the tokenizer's own, and <|im_end|>. Sampling settings are not read."""
        values = json_object(self.folder / "config.json")
        text = values.get("text_config")
        places = {
            GENERATION: json_object(self.folder / GENERATION),
            "config.json": {**values, **text} if isinstance(text, dict) else values,
        }
        numbers: list[int] = []
        for name, found in places.items():
            given = found.get("eos_token_id")
            each = given if isinstance(given, list) else [] if given is None else [given]
            if not all(type(number) is int and number >= 0 for number in each):
                raise ValueError(f"{self.folder / name}: eos_token_id is {shown(given)}, not token ids")
            numbers = numbers or each
        file = self.folder / "tokenizer_config.json"
        given = json_object(file).get("eos_token")
        name = given.get("content") if isinstance(given, dict) else given
        known = self.tokenizer.token_to_id(name) if isinstance(name, str) else None
        if given is not None and known is None:
            raise ValueError(f"{file}: eos_token is {shown(given)}; it must be a token of tokenizer.json")
        found = [*numbers, known, self.tokenizer.token_to_id(TURN_END)]
        stops = tuple(dict.fromkeys(number for number in found if number is not None))
        if not stops:
            said = "no token ends a completion; give eos_token_id in generation_config.json"
            raise ValueError(f"{self.folder}: {said}")
        return stops


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
    # transformers would add a token that only these files have
    for file, name, number in _added_tokens(folder):
        known = tokenizer.token_to_id(name) if isinstance(name, str) else None
        if known is None or number not in (known, None):
            said = f"added token {shown(name)} is {shown(number)}, in tokenizer.json it is {known}"
            raise ValueError(f"{file}: {said}; save the tokenizer's files together")
    return tokenizer


def _added_tokens(folder: Path) -> list[tuple[Path, str, int | None]]:
    """The tokens that files beside tokenizer.json add: file, token, and its id where the file has one."""
    file, old = folder / "tokenizer_config.json", folder / "added_tokens.json"
    found, numbered = json_object(file), json_object(old)
    key = ""
    try:
        added: list[tuple[Path, str, int | None]] = []
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = found.get(key) or []
            for token in more.values() if isinstance(more, dict) else list(more):
                added.append((file, token if isinstance(token, str) else token["content"], None))
        key = "added_tokens_decoder"
        if found.get(key) is None:
            return added + [(old, name, number) for name, number in numbered.items()]
        return added + [(file, token["content"], int(number)) for number, token in found[key].items()]
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: {key} is {shown(found[key])}; it must name tokens") from error
