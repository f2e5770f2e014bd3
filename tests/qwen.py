"""Tiny random checkpoints in the layout of the hub's Qwen-VL models, with a byte-level tokenizer that has
their special tokens; and questions with photographs, as files."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from models import weights
from models.config import ModelConfig, VisionConfig

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# bytes that end a completion, so that a random policy stops after a few tokens
STOPS = tuple(range(30, 60))

TOWERS = {
    "qwen2_vl": dict(intermediate_size=32),
    "qwen2_5_vl": dict(intermediate_size=24, gated=True, window_size=56, fullatt_block_indexes=(1,)),
    "qwen3_vl": dict(
        intermediate_size=24, patch_size=16, num_position_embeddings=36, deepstack_visual_indexes=(0,)
    ),
}


def qwen_folder(folder: Path, architecture: str = "qwen2_vl", seed: int = 0) -> Path:
    """A model folder: D = 32, two blocks, a vision tower of two. Every parameter matters, and the next
    token depends on what was seen."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    vision = dict(depth=2, width=16, num_heads=1, hidden_size=32, **TOWERS[architecture])
    config = ModelConfig(
        architecture,
        len(vocabulary) + len(SPECIAL),
        32,
        48,
        2,
        2,
        1,
        VisionConfig(**vision),
        mrope_section=(2, 3, 3),
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        head_dim=16 if architecture == "qwen3_vl" else None,
    )
    policy, random = weights.init(config, seed), torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
    weights.save(policy, folder)
    for name, value in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        (
            "preprocessor_config.json",
            {
                "min_pixels": 56 * 56,
                "max_pixels": 112 * 112,
                "patch_size": config.vision.patch_size,
                "merge_size": 2,
                "temporal_patch_size": 2,
            },
        ),
        (
            "generation_config.json",
            {
                "eos_token_id": [ids["<|im_end|>"], *STOPS],
                "do_sample": True,
                "temperature": 0.01,
                "top_k": 1,
                "top_p": 0.001,
                "repetition_penalty": 1.05,
            },
        ),
    ):
        (folder / name).write_text(json.dumps(value))
    return folder


def photograph(number: int, side: int = 80) -> bytes:
    """A JPEG file of noise."""
    buffer = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(number).integers(0, 256, (side, side + 10 * (number % 3), 3), dtype=np.uint8)
    ).save(buffer, "JPEG")
    return buffer.getvalue()


def sat_file(path: Path, rows: int = 40) -> Path:
    """A parquet file as the hub's array/SAT lays it out."""
    import pyarrow
    import pyarrow.parquet

    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    answers = [["left", "right"] if i % 2 else ["the red box", "the desk", "the lamp"] for i in range(rows)]
    table = pyarrow.table(
        {
            "image_bytes": pyarrow.array(
                [[{"bytes": photograph(i), "path": None}] * (1 + (i % 5 == 4)) for i in range(rows)],
                pyarrow.list_(picture),
            ),
            "question": [
                f"Is box {i} to the left or right of the desk?"
                if i % 2
                else f"Which object is closer to the camera, {i}?"
                for i in range(rows)
            ],
            "answers": answers,
            "question_type": ["other"] * rows,
            "correct_answer": [options[0] for options in answers],
        }
    )
    pyarrow.parquet.write_table(table, path)
    return path


def jsonl_folder(folder: Path, rows: int = 24, documents: bool = False) -> Path:
    """A folder with questions.jsonl and its pictures; with documents, each line brings what imitation
    should write."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(rows):
        (folder / "images" / f"{i}.jpg").write_bytes(photograph(i))
        line = {
            "uid": f"mine/{i}",
            "question": f"What stands at {i}?",
            "choices": ["a cup", "a jug"],
            "answer": "a jug" if i % 3 else "a cup",
            "picture": f"images/{i}.jpg",
        }
        lines.append(
            json.dumps(
                line
                | (
                    {"extra": {"documents": ["<think> I see it. </think><answer> a jug </answer>"]}}
                    if documents
                    else {}
                )
            )
        )
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def chains_folder(folder: Path, rows: int = 24) -> Path:
    """A folder with a JSON array of Vision-R1-cold, and its pictures."""
    (folder / "mulberry_images").mkdir(parents=True)
    chain = "<think> I see it. </think><answer> Final Answer:B </answer>"
    array = []
    for i in range(rows):
        (folder / "mulberry_images" / f"{i}.jpg").write_bytes(photograph(i))
        asked = {"from": "user", "value": f"<image>What stands at {i}? A. a cup B. a jug"}
        turns = [asked, {"from": "assistant", "value": chain}]
        array.append({"images": f"mulberry_images/{i}.jpg", "conversations": turns})
    (folder / "vision_r1_mulberry_sft_full.json").write_text(json.dumps(array))
    return folder


def problems_file(path: Path, rows: int = 24) -> Path:
    """A parquet file as the hub's Osilly/Vision-R1-rl and hiyouga/geometry3k lay it out."""
    import pyarrow
    import pyarrow.parquet

    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pyarrow.parquet.write_table(
        pyarrow.table(
            {
                "images": pyarrow.array(
                    [[{"bytes": photograph(i), "path": None}] for i in range(rows)], pyarrow.list_(picture)
                ),
                "problem": [f"<image>What is the angle at {i}?" for i in range(rows)],
                "answer": [f"{i}^\\circ" for i in range(rows)],
            }
        ),
        path,
    )
    return path


def blink_file(path: Path, rows: int = 24) -> Path:
    """A parquet file as the hub's BLINK-Benchmark/BLINK lays a subtask out."""
    import pyarrow
    import pyarrow.parquet

    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    listed = "Select from the following choices.\n(A) yes\n(B) no"
    columns = {
        "idx": [f"val_Spatial_Relation_{i}" for i in range(rows)],
        "question": [f"Is the car beneath the cat at {i}?" for i in range(rows)],
        "sub_task": ["Spatial_Relation"] * rows,
        "image_1": pyarrow.array([{"bytes": photograph(i), "path": None} for i in range(rows)], picture),
        **{f"image_{n}": pyarrow.array([None] * rows, picture) for n in (2, 3, 4)},
        "choices": [["yes", "no"]] * rows,
        "answer": ["(A)" if i % 2 else "(B)" for i in range(rows)],
        "prompt": [f"Is the car beneath the cat at {i}?\n{listed}" for i in range(rows)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path
