"""Questions about several pictures, all the way: from a file to the prompt, the batch and the forward, and
through steps of training."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import small_folder

import train
from data.chat import Chat
from data.sources.table import SOURCES
from grpo.batch import collate_prompts
from grpo.monitor import report
from grpo.storage.checkpoint import complete
from grpo.storage.model_folder import BUILT_IN
from models import weights

SIZES = [(60, 60), (84, 56), (40, 100), (90, 30)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Forty questions, in turn about one, two, three and four pictures of different shapes."""
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for number in range(40):
        names = [f"{number}-{i}.png" for i in range(number % 4 + 1)]
        for i, name in enumerate(names):
            width, height = SIZES[(number + i) % 4]
            pixels = np.random.default_rng(10 * number + i).integers(
                0, 255, (height, width, 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(folder / name)
        lines.append(
            json.dumps(
                {
                    "uid": f"several/{number}",
                    "question": "Is the star left of the circle?",
                    "choices": ["yes", "no"],
                    "answer": "yes",
                    "pictures": names,
                    "task": f"{len(names)} pictures",
                }
            )
        )
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return folder / "mine.jsonl"


@torch.no_grad()
def test_from_a_file_to_the_forward(file):
    """With the built-in model: what is said of one prompt does not depend on its company, and it depends
    on every picture and on their order."""
    if not (BUILT_IN / "model.safetensors").is_file():
        pytest.skip("no built-in model")
    policy, chat = weights.load(BUILT_IN), Chat(BUILT_IN, template="shapes", max_prompt=512)
    examples = SOURCES["jsonl"](file, "all", 4, 0)
    prompts = [chat.prompt(example) for example in examples]
    assert [len(prompt.grid) for prompt in prompts] == [1, 2, 3, 4]
    for prompt in prompts:
        assert (prompt.tokens == chat.image_token).sum() == prompt.grid.prod(
            axis=1
        ).sum() // 4 and prompt.text.count("<|image_pad|>") == len(prompt.grid)
    completion = torch.tensor([[chat.encode("the star is left of the circle")]])  # (1, 1, C)

    def hidden(*prompts):
        batch = collate_prompts(
            prompts, image_token=chat.image_token, merge=policy.config.vision.spatial_merge_size
        )
        return policy(batch, completion.expand(len(prompts), -1, -1))

    together = hidden(*prompts)
    for number, prompt in enumerate(prompts):
        torch.testing.assert_close(hidden(prompt)[0], together[number], atol=2e-5, rtol=1e-5)
    whole = examples[3]
    seen = [
        whole.pictures,
        whole.pictures[::-1],
        *(whole.pictures[:i] + whole.pictures[i + 1 :] for i in range(4)),
    ]
    seen += [
        (*whole.pictures[:i], Image.new("RGB", SIZES[(3 + i) % 4]).copy, *whole.pictures[i + 1 :])
        for i in range(4)
    ]
    for other in seen[1:]:
        changed = hidden(
            chat.prompt(type(whole)(whole.uid, whole.question, whole.choices, whole.answer, pictures=other))
        )
        assert (changed[0] - together[3]).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [[], ["method=sft"]], ids=["grpo", "sft"])
def test_training_on_several_pictures(file, tmp_path, monkeypatch, settings):
    before = torch.get_num_threads()
    monkeypatch.setattr(report, "write_curves", lambda folder, say=print: [])
    base = small_folder(tmp_path / "base")
    status = train.main(
        [
            "shapes",
            "task=jsonl",
            f"data={file}",
            f"model={base}",
            f"out={tmp_path / 'run'}",
            "steps=2",
            "prompts=4",
            "group=2",
            "cap=8",
            "rewards={length: 1000}",
            "max_prompt=512",
            "eval.items=4",
            "eval.every=2",
            "save.every=0",
            "report.every=1",
            "report.prompts=1",
            "optim.lr=1e-3",
            "optim.warmup=0",
            "device=cpu",
            *settings,
        ]
    )
    torch.set_num_threads(before)
    assert status == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows][-2:] == [1, 2] and all(
        row["grad_norm"] > 0 and not row.get("frac_skipped") for row in rows[-2:]
    )
    old, new = (
        load_file(base / "model.safetensors"),
        load_file(complete(tmp_path / "run")[-1] / "model.safetensors"),
    )
    assert [name for name in old if torch.equal(old[name], new[name])] == []
