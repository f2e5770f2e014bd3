"""Write the word-level tokenizer of the built-in model: `python -m data.shapes.tokenizer models/tiny`."""

import json
import sys
from copy import deepcopy
from pathlib import Path

import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from data.shapes.documents import words

BUILT_IN = yaml.safe_load(Path(__file__).with_name("tokenizer.yaml").read_text("utf-8"))
SPECIAL, TAGS = BUILT_IN["special"], BUILT_IN["tags"]


def build() -> Tokenizer:
    """A tokenizer of whole words; "(A)" and "</div>" are one word each. Unknown words are <unk>, and so are
    the letters of other scripts."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *TAGS, *words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces = Regex(r"\([A-H]\)|</div>|[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer


def write(folder: str | Path, *, min_pixels: int = 56 * 56, max_pixels: int = 84 * 84) -> None:
    """Write tokenizer.json and the settings beside it. Pictures get `min_pixels` to `max_pixels`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    _write_json(folder / "tokenizer_config.json", BUILT_IN["tokenizer_config"])
    _write_json(folder / "generation_config.json", BUILT_IN["generation_config"])
    _write_json(folder / "preprocessor_config.json", BUILT_IN["preprocessor_config"] | pixels)


def model_config(vocabulary: int) -> dict:
    """config.json of the built-in model: Qwen2-VL's architecture at 1.5 M parameters."""
    return deepcopy(BUILT_IN["config"]) | {"vocab_size": vocabulary}


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "models/tiny")
    write(target)
    _write_json(target / "config.json", model_config(build().get_vocab_size()))
    print(f"wrote the tokenizer and config of the built-in model to {target}")
