"""The processor files of a model folder: how pictures become patches.

transformers 5 writes processor_config.json with an `image_processor`, older versions
preprocessor_config.json. Where a folder has both, the first one counts, as in transformers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.images import MEAN, STD

NESTED, PLAIN = "processor_config.json", "preprocessor_config.json"
# settings that only have this value here
_FIXED = dict(do_resize=True, do_rescale=True, do_normalize=True, rescale_factor=1 / 255, resample=3)
# Qwen2.5-VL's and Qwen3-VL's folders name Qwen2-VL's class; a suffix is transformers' backend
_CLASS = re.compile(r"Qwen(2|2_5_|3)VLImageProcessor(Fast|Pil)?")
_ABSENT = dict(patch_size=14, merge_size=2, temporal_patch_size=2, image_mean=MEAN, image_std=STD)
_PIXELS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


@dataclass(frozen=True)
class PictureSettings:
    """The keyword arguments of `data.images.preprocess`."""

    patch: int
    merge: int
    temporal: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def picture_settings(folder: Path, **pixels: int | None) -> PictureSettings:
    """The picture settings of a folder. As in transformers, an absent key means the default.

    pixels: min_pixels and max_pixels, which replace the folder's. Raises ValueError with file and key.
    """
    file, found = _image_processor(folder)
    kind = found.get("image_processor_type")
    if kind is not None and not (isinstance(kind, str) and _CLASS.fullmatch(kind)):
        raise ValueError(f"{file}: image_processor_type is {shown(kind)}; only Qwen-VL's is supported")
    for key, only in _FIXED.items():
        value = found.get(key, only)
        if value != only or isinstance(value, bool) != isinstance(only, bool):
            raise ValueError(f"{file}: {key} is {shown(value)}, only {only} is supported")
    limits = []
    for key, edge in _PIXELS.items():
        size = found.get("size")
        if size is not None and type(size) is not dict:
            raise ValueError(f"{file}: size is {shown(size)}; it must be an object with {edge}")
        # transformers' order; its first versions wrote `size` with the names of `_PIXELS`
        places = ((found, key), (size or {}, edge), (size or {}, key))
        own = next(
            (_count(file, each, name, 10**9) for each, name in places if each.get(name) is not None), None
        )
        limits.append(own if pixels.get(key) is None else pixels[key])
    low, high = limits
    if not low or not high or low > high:
        said = f"min_pixels is {low} and max_pixels is {high}; both are needed, the smaller first"
        raise ValueError(f"{file}: {said}")
    found = _ABSENT | found
    return PictureSettings(
        patch=_count(file, found, "patch_size", 1000),
        merge=_count(file, found, "merge_size", 1000),
        temporal=_count(file, found, "temporal_patch_size", 1000),
        min_pixels=low,
        max_pixels=high,
        mean=_channels(file, found, "image_mean"),
        std=_channels(file, found, "image_std"),
    )


def with_pixels(folder: Path, min_pixels: int, max_pixels: int) -> dict[str, str]:
    """The folder's processor files, {name: text}, with these limits in each place where transformers or a
    server looks for them."""
    files = {}
    for name in (NESTED, PLAIN):
        values = json_object(folder / name)
        inner = values.get("image_processor") if name == NESTED else values
        if inner:
            inner |= {"min_pixels": min_pixels, "max_pixels": max_pixels}
            inner["size"] = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
            files[name] = json.dumps(values, indent=2) + "\n"
    return files


def json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no file. Raises ValueError."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__}, not an object")
    return found


def shown(value: Any) -> str:
    """A value as an error shows it: its first 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _image_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that holds the picture settings, and the settings."""
    nested = json_object(folder / NESTED).get("image_processor")
    if nested is not None:
        if type(nested) is not dict:
            raise ValueError(f"{folder / NESTED}: image_processor is {shown(nested)}; it must be an object")
        return folder / NESTED, nested
    if plain := json_object(folder / PLAIN):
        return folder / PLAIN, plain
    said = f"no {PLAIN} (nor {NESTED} with an image_processor); copy it from the model"
    raise ValueError(f"{folder}: {said}")


def _count(file: Path, found: dict[str, Any], key: str, most: int) -> int:
    value = found[key]
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{file}: {key} is {shown(value)}; it must be a whole number from 1 to {most}")
    return value


def _channels(file: Path, found: dict[str, Any], key: str) -> tuple[float, ...]:
    """image_mean or image_std: three numbers, or one for all channels."""
    value = found[key]
    numbers = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    least = 0 if key == "image_mean" else 1e-6
    if len(numbers) != 3 or not all(type(each) in (int, float) and least <= each <= 1e6 for each in numbers):
        said = "it must be three numbers" + (" above 0" if least else " from 0 up")
        raise ValueError(f"{file}: {key} is {shown(value)}; {said}, one for each of red, green and blue")
    return tuple(map(float, numbers))
