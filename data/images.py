"""From a picture to the patches that a Qwen vision tower reads.

Equal to the Hugging Face Qwen2-VL image processor (its Pillow class): bicubic resize to multiples of patch *
merge, scale to 0 … 1, normalise by CLIP's mean and deviation, cut into patches in merge order. Departures:
pictures are turned upright by their EXIF tag; 16-bit depth and decompression bombs are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.types import BadPicture, Picture

# of CLIP's training pictures, red green blue, in 0 … 1
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Qwen-VL's own limit: longer side over shorter
MAX_ASPECT = 200
# the start of the small file that git has in place of a large one
LFS = b"version https://git-lfs"
_NARROW = f"its sides differ more than {MAX_ASPECT} times"


def open_picture(picture: Picture, *, name: str) -> Image.Image:
    """The picture as an upright RGB image, transparency on white as in Hugging Face's processor.

    `name` is the example's, for errors. Raises BadPicture; errors of a drawing function pass through.
    """
    if isinstance(picture, (bytes, bytearray, Path)):
        image = _decoded(picture, name)
    elif callable(picture):
        image = picture()
    else:
        said = "a picture is bytes, a Path or a function that draws one"
        raise TypeError(f"{name}: {said}, not {type(picture).__name__}")
    _check_size(image, name)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        said = "(more than 8 bits a channel), which would clip to white; convert it to 8 bits first"
        raise BadPicture(f"{name}: the picture has mode {image.mode} {said}")
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def size_of(picture: Picture, *, name: str) -> tuple[int, int]:
    """(width, height) of a picture, not turned upright. Of a file only the header is read. Raises as
    `open_picture`."""
    if not isinstance(picture, (bytes, bytearray, Path)):
        return open_picture(picture, name=name).size
    with _opened(picture, name) as image:
        return image.size


def _decoded(picture: bytes | Path, name: str) -> Image.Image:
    with _opened(picture, name) as image:
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
    return image


@contextmanager
def _opened(picture: bytes | Path, name: str) -> Iterator[Image.Image]:
    """A picture file. Only its header has been read, and its size is checked. Raises BadPicture, with the
    name, for whatever Pillow raises."""
    where = picture if isinstance(picture, Path) else f"{len(picture)} bytes"
    try:
        with Image.open(picture if isinstance(picture, Path) else BytesIO(picture)) as image:
            # the header has the size: nothing is unpacked yet
            _check_size(image, name)
            yield image
    except BadPicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPicture(f"{name}: the picture ({where}) would unpack to too many pixels: {error}") from error
    except Exception as error:
        # Pillow's decoders raise many types: OSError, SyntaxError, struct.error …
        head = picture[: len(LFS)] if isinstance(picture, bytes) else _head(picture)
        if head == LFS:
            said = "is a git-lfs pointer, no picture; fetch the files with `git lfs pull`"
            raise BadPicture(f"{name}: the picture ({where}) {said}") from error
        said = re.sub(r" ?<_io\.\w+ object at 0x[0-9a-f]+>", "", str(error))
        kind = type(error).__name__
        raise BadPicture(f"{name}: the picture ({where}) cannot be read: {kind}: {said}") from error


def _head(file: Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read(len(LFS))
    except OSError:
        return b""


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise BadPicture(f"{name}: the picture is empty ({width} x {height} pixels)")
    # between its limit and twice its limit Pillow only warns
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        said = f"over the limit of {Image.MAX_IMAGE_PIXELS} (PIL.Image.MAX_IMAGE_PIXELS); scale it down first"
        raise BadPicture(f"{name}: the picture has {width} x {height} pixels, {said}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadPicture(f"{name}: the picture has {width} x {height} pixels, {_NARROW}")


def smart_resize(
    height: int, width: int, *, factor: int = 28, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The nearest (height, width) with sides that are multiples of `factor` and an area within the limits.

    Rounding is Qwen-VL's, so a very narrow picture may still exceed `max_pixels`. Raises ValueError.
    """
    if not 1 <= min_pixels <= max_pixels:
        need = "need 1 <= min_pixels <= max_pixels"
        raise ValueError(f"min_pixels {min_pixels} and max_pixels {max_pixels}: {need}")
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise BadPicture(f"a picture of {width} x {height} pixels is empty, or {_NARROW}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def preprocess(
    image: Image.Image,
    *,
    patch: int = 14,
    merge: int = 2,
    temporal: int = 2,
    min_pixels: int,
    max_pixels: int,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> tuple[np.ndarray, np.ndarray]:
    """RGB image -> patches (N, 3 * temporal * patch * patch) float32, grid (3,) int64 = (1, rows, columns).

    A patch's order is (channel, time, row, column); a picture is the same at each time. Raises ValueError.
    """
    if image.mode != "RGB":
        raise ValueError(f"preprocess takes an RGB image, not {image.mode}; open it with open_picture")
    height, width = smart_resize(
        image.height, image.width, factor=patch * merge, min_pixels=min_pixels, max_pixels=max_pixels
    )
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = height // patch, width // patch
    pixels = np.asarray(image).reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    # transposing bytes is cheaper than transposing floats
    pixels = pixels.transpose(6, 0, 3, 1, 4, 2, 5).reshape(3, rows * columns, patch, patch)
    patches = np.empty((rows * columns, 3, temporal, patch, patch), np.float32)
    for channel, value in enumerate(_values(tuple(mean), tuple(std))):
        patches[:, channel] = value[pixels[channel]][:, None]
    return patches.reshape(rows * columns, -1), np.array([1, rows, columns], np.int64)


@lru_cache(maxsize=8)
def _values(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """(3, 256): each byte's normalised value, rounded as by Hugging Face: scaled in float64, then float32."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
