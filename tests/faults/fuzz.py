"""Do the answer checker and the picture loader stand every input?

    python tests/faults/fuzz.py --answers 100000 --pictures 10000 [--math 500] [--seed 0]

Answers are built from pieces of what policies write and of what breaks parsers: tags, LaTeX, numbers of all
spellings, brackets without end, half characters, code. Every rule reads each of them as an answer to a
choice, to a question for a number, and to one for free text. No rule may raise, return anything but a finite
number, or take a second.

Pictures are files of many formats, modes and orientations: whole, cut, flipped, spliced, with other sizes in
their headers, or no pictures at all. Each is opened and made into patches as a run would do it. The only
error may be BadPicture, within a second (and one more for every further 25 million pixels) and MEMORY.

--math: this number of the answers is read by math-verify, too (extra: math), in a process of its own. What it
cannot finish counts as wrong, and no file may appear.

Items run in forked processes, so one that dies is a finding and not the end. Prints each finding with its
number and seed, and ends with a line of JSON. Exit status 1 if there are findings. Times are processor
times.
"""

import argparse
import io
import json
import math
import os
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import numpy as np
from PIL import Image

from data.answers import numbers as answers
from data.answers.parser import read
from data.images import open_picture, preprocess
from data.types import BadPicture, Example
from grpo.rewards.rules import REWARDS, rule
from tests.data.answers.adversarial import CASES

# of one answer under all rules, or of one picture, and of each PIXELS that it has
SECONDS = 1.0
# Pillow refuses from 89 million on
PIXELS = 25_000_000
# MB of a whole process, the libraries included
MEMORY = 1500
# items of a process
BATCH = 500


# ---- answers

PIECES = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<answer>",
    "</answer>",
    "Final Answer:",
    "final answer is ",
    "answer: ",
    "<think",
    "</answer",
    "<ANSWER>",
    "A",
    "B",
    "(C)",
    "[A]",
    "yes",
    "no",
    "dog",
    "A.",
    "（Ａ）",
    "\\boxed{",
    "}",
    "{",
    "\\frac",
    "\\frac{",
    "}{",
    "\\sqrt",
    "\\sqrt[3]{",
    "(",
    ")",
    "[",
    "]",
    "\\left(",
    "\\right)",
    "$",
    "$$",
    "\\(",
    "\\[",
    "\\text{",
    "\\pi",
    "π",
    "√",
    "½",
    "²",
    "⁻",
    "×",
    "÷",
    "^",
    "**",
    "*",
    "/",
    "+",
    "-",
    "−",
    "=",
    "x=",
    "\\angle ",
    "%",
    "\\%",
    "°",
    "^\\circ",
    " cm",
    " m/s",
    "€",
    "1e",
    "e9",
    "E+",
    "9^9^9^9",
    "1e999999999",
    "0x10",
    "1_000",
    "1,000",
    "{,}",
    ".",
    "..",
    ",",
    ":",
    ";",
    " ",
    "\n",
    "\t",
    "\r",
    "\x00",
    "\x1b[31m",
    "\u2028",
    "\u202e",
    "\ud800",
    "\udfff",
    "\ufeff",
    "é",
    "e\u0301",
    "ﬁ",
    "İ",
    "ß",
    "٣",
    "三",
    "𝟛",
    "㎝",
    "\U0001f600",
    "NaN",
    "inf",
    "\\infty",
    "None",
    "__import__('os').system('touch PLANTED')",
    "().__class__.__mro__",
    "open('PLANTED','w')",
    "eval(\"open('PLANTED','w')\")",
    "lambda: 0",
    "{0.__class__}",
    "%s%n",
    "<script>",
    "I hope",
    "not ",
    " or ",
    "3",
    "7",
    "12",
    "0",
    "3.14",
    "1/3",
    "-2",
)
EXAMPLES = (
    Example("fuzz/choice", "Which?", ("yes", "no", "can't tell"), "no"),
    Example("fuzz/letters", "Which?", ("A", "B", "dog"), "A"),
    Example("fuzz/number", "How many?", (), "\\frac{3}{2}", extra={"kind": "number"}),
    Example("fuzz/unit", "How long?", (), "3 cm", extra={"kind": "number"}),
    Example("fuzz/text", "What?", (), "a dog"),
)
WRITTEN = [case.completion for cases in CASES.values() for case in cases if len(case.completion) < 10_000]


def some_number(chance: random.Random) -> str:
    """A number in an odd spelling."""
    digits = "".join(chance.choices("0123456789", k=chance.choice((1, 2, 3, 8, 40, 320, 5000))))
    return chance.choice(
        (
            digits,
            f"{digits}.{digits}",
            f"{digits}e{chance.randrange(-999, 999)}",
            f"\\frac{{{digits}}}{{{digits[::-1]}}}",
            f"{digits}^{{{digits[:3]}}}",
            f"√{digits}",
        )
    )


def some_answer(chance: random.Random) -> str:
    """A completion. One in a hundred is long."""
    kind = chance.randrange(100)
    # one piece, again and again
    if kind == 0:
        text = chance.choice(PIECES) * chance.choice((1_000, 20_000))
    elif kind < 40:
        text = "".join(
            some_number(chance) if chance.random() < 0.1 else chance.choice(PIECES)
            for _ in range(chance.randrange(1, 40))
        )
    elif kind < 60:
        text = "".join(
            chr(chance.choice((chance.randrange(128), chance.randrange(0x3000), chance.randrange(0x110000))))
            for _ in range(chance.randrange(200))
        )
    else:
        # what was thought of before, changed
        letters = list(chance.choice(WRITTEN))
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(letters) + 1)
            letters[at : at + chance.choice((0, 0, 1, 3))] = chance.choice(PIECES)
        text = "".join(letters)
    return f"<think>look</think> <answer>{text}</answer>" if chance.random() < 0.4 else text


def answer(chance: random.Random) -> tuple[str, str, float]:
    """Read one. -> ("read", or "unread"; what is wrong, "" for nothing; the seconds that it may take)."""
    text, example = some_answer(chance), chance.choice(EXAMPLES)
    for name in REWARDS:
        if name.endswith("math_verify"):
            continue
        value = rule(name, 100)(text, example, 60)
        if not (isinstance(value, float) and math.isfinite(value)):
            return "", f"{name} gave {value!r} for {text[:200]!r}", SECONDS
    number = answers.parse(text)
    if number is not None and not (math.isfinite(number.value) and answers.same(number, number)):
        return "", f"the number {number!r} in {text[:200]!r}", SECONDS
    return "unread" if read(text, example).answer is None else "read", "", SECONDS


def by_math_verify(chance: random.Random) -> tuple[str, str, float]:
    """The same by math-verify's two rules, which have timeouts of their own."""
    text, example = some_answer(chance).replace("PLANTED", f"{os.getcwd()}/PLANTED"), chance.choice(EXAMPLES)
    paid = [rule(name)(text, example, 60) for name in ("accuracy_math_verify", "accuracy_paper_math_verify")]
    wrong = (
        "a file appeared"
        if os.path.exists("PLANTED")
        else ""
        if set(paid) <= {0.0, 1.0}
        else f"it gave {paid}"
    )
    return "right" if any(paid) else "wrong", wrong and f"{wrong} for {text[:300]!r}", math.inf


# ---- pictures


def some_pictures() -> list[bytes]:
    """Files of every kind that we know to write; small, so that many can be tried."""
    noise, found = np.random.default_rng(0), []

    def wrote(image: Image.Image, kind: str, **how) -> None:
        file = io.BytesIO()
        image.save(file, kind, **how)
        found.append(file.getvalue())

    for width, height in ((61, 43), (5, 230), (1, 1), (300, 200)):
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8))
        modes = {
            mode: image.convert(mode)
            for mode in ("RGB", "L", "CMYK", "RGBA", "LA", "P", "1", "YCbCr", "LAB", "HSV", "I", "F")
        }
        modes["I;16"] = Image.fromarray(noise.integers(0, 65536, (height, width), np.uint16))
        for kind, names in {
            "PNG": ("RGB", "L", "RGBA", "LA", "P", "1", "I;16"),
            "JPEG": ("RGB", "L", "CMYK", "YCbCr"),
            "WEBP": ("RGB", "RGBA"),
            "GIF": ("P", "L", "RGBA"),
            "TIFF": ("RGB", "CMYK", "LAB", "I;16", "F", "1", "YCbCr"),
            "BMP": ("RGB", "L", "1"),
            "PPM": ("RGB", "L"),
            "ICO": ("RGBA",),
            "JPEG2000": ("RGB", "RGBA"),
        }.items():
            for name in names:
                wrote(modes[name], kind)
        exif = Image.Exif()
        for orientation in range(1, 10):
            exif[0x0112] = orientation
            wrote(image, "JPEG", exif=exif)
        wrote(image, "JPEG", progressive=True)
        wrote(image, "WEBP", lossless=True)
        wrote(modes["P"], "PNG", transparency=7)
        wrote(modes["P"], "PNG", transparency=bytes(range(256)))
        wrote(modes["RGB"], "PNG", transparency=(1, 2, 3))
        wrote(modes["P"], "GIF", transparency=3, save_all=True, append_images=[modes["P"]] * 3)
        wrote(image, "WEBP", save_all=True, append_images=[image] * 2)
        wrote(image, "TIFF", compression="tiff_lzw", save_all=True, append_images=[image])
    return found


def bomb(chance: random.Random) -> bytes:
    """A small file that promises, or holds, a great many pixels, or a text that unpacks to a great many
    bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    width, height = (chance.choice((1, 50, 3_000, 5_000, 9_400, 20_000, 65_535, 2**31 - 1)) for _ in range(2))
    depth, color = chance.choice(((8, 2), (8, 6), (1, 0), (16, 2), (8, 3)))
    body = zlib.compress(bytes(min(width * height * 3, 30_000_000)), 1) if chance.random() < 0.5 else b""
    extra = (
        chunk(chance.choice((b"zTXt", b"iCCP")), b"x\0\0" + zlib.compress(bytes(20_000_000), 1))
        if chance.random() < 0.2
        else b""
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, chance.choice((0, 1))))
        + extra
        + (chunk(b"PLTE", bytes(768)) if color == 3 else b"")
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


def changed(data: bytes, chance: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """-> (what was done to a file, the file)."""
    found, at = bytearray(data), chance.randrange(len(data))
    way = chance.choice(
        ("whole", "cut", "flipped", "header", "spliced", "repeated", "zeroed", "random", "bomb")
    )
    if way == "cut":
        del found[at:]
    elif way == "flipped":
        for _ in range(chance.choice((1, 1, 3, 30))):
            found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
    elif way == "header":
        # numbers near the front are sizes and counts
        at = chance.randrange(min(len(found), 120))
        found[at : at + 4] = struct.pack(
            chance.choice("<>") + "I", chance.choice((0, 1, 255, 65_535, 70_000, 2**31 - 1, 2**32 - 1))
        )
    elif way == "spliced":
        found[at:] = (other := chance.choice(others))[chance.randrange(len(other)) :]
    elif way == "repeated":
        found[at:at] = found[: chance.randrange(len(found))] * chance.choice((1, 5))
    elif way == "zeroed":
        found[at : at + chance.randrange(200)] = bytes(chance.randrange(200))
    elif way == "random":
        found[chance.choice((0, 2, 8, 12)) :] = chance.randbytes(chance.randrange(3000))
    return way, bomb(chance) if way == "bomb" else bytes(found)


def picture(chance: random.Random, files: list[bytes]) -> tuple[str, str, float]:
    """Open one. -> ("opened" or "refused", and how it was made; what is wrong, "" for nothing; the seconds
    that it may take)."""
    way, data = changed(chance.choice(files), chance, files)
    try:
        image = open_picture(data, name="mine.jsonl, line 7")
        most = chance.choice((56 * 56, 401_408, 1_003_520))
        patches, grid = preprocess(image, min_pixels=28 * 28, max_pixels=most)
    except BadPicture as error:
        said = str(error)
        fine = (
            said.startswith("mine.jsonl, line 7: ")
            and "object at 0x" not in said
            and "\n" not in said
            and len(said) < 500
        )
        return f"refused, {way}", "" if fine else f"{way}: it says {said!r}", SECONDS
    fine = (
        image.mode == "RGB"
        and patches.dtype == np.float32
        and np.isfinite(patches).all()
        and len(patches) == grid.prod()
    )
    seconds = SECONDS * (1 + image.width * image.height / PIXELS)
    return (
        f"opened, {way}",
        "" if fine else f"{way}: {image.mode}, patches {patches.shape}, grid {grid}",
        seconds,
    )


# ---- in processes of their own


def batches(
    what: str, one: Callable[[random.Random], tuple[str, str, float]], count: int, seed: int
) -> Iterator[dict]:
    """Forked processes of BATCH items. -> for each {counts, findings, seconds: of the slowest, died}."""
    for first in range(0, count, BATCH):
        reader, writer = os.pipe()
        if not (process := os.fork()):
            with os.fdopen(writer, "wb") as out:
                pickle.dump(several(what, one, range(first, min(first + BATCH, count)), seed), out)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as said:
            found = said.read()
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        yield (
            pickle.loads(found)
            if found and not status
            else {
                "counts": Counter(),
                "findings": [f"{what} {first}…: the process ended with {status}"],
                "seconds": 0.0,
            }
        )


def several(
    what: str, one: Callable[[random.Random], tuple[str, str, float]], numbers: range, seed: int
) -> dict:
    """What came of these items; the n-th is a function of seed and n alone."""
    warnings.simplefilter("ignore")
    counts, findings, longest = Counter(), [], 0.0
    for number in numbers:
        started = time.process_time()
        try:
            kind, wrong, may = one(random.Random(f"{what} {seed} {number}"))
        except Exception as error:
            kind, wrong, may = "", f"{type(error).__name__}: {error}", 0.0
        took = time.process_time() - started
        if not wrong and took > may:
            wrong = f"took {took:.2f} s ({kind})"
        if wrong:
            findings.append(f"{what} {number} of seed {seed}: {wrong}")
        counts[kind], longest = counts[kind] + 1, max(longest, took)
    return {"counts": counts, "findings": findings, "seconds": longest}


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--math", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    asked, total = parser.parse_args(arguments), {}
    files, findings = some_pictures(), []
    work = {"answers": answer, "pictures": lambda chance: picture(chance, files), "math": by_math_verify}
    with tempfile.TemporaryDirectory(prefix="glimpse-fuzz-") as folder:
        os.chdir(folder)
        for what, one in work.items():
            counts, slowest = Counter(), 0.0
            for found in batches(what, one, getattr(asked, what), asked.seed):
                counts, slowest = counts + found["counts"], max(slowest, found["seconds"])
                for line in found["findings"]:
                    print(line, flush=True)
                findings += found["findings"]
            if counts:
                total[what] = {
                    "tried": getattr(asked, what),
                    **dict(sorted(counts.items())),
                    "slowest_seconds": round(slowest, 2),
                }
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1000
    if memory > MEMORY:
        findings.append(f"a process took {memory} MB")
        print(findings[-1])
    print(json.dumps({**total, "findings": len(findings), "most_memory_mb": memory, "seed": asked.seed}))
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
