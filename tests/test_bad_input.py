"""What is wrong with the input is said in one line that names it, with exit status 2 and no traceback; a
single bad example is skipped, counted and named."""

import io
import json
import re
import shutil
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small import small_policy

import evaluate
import train
from data.shapes.world import Shapes
from data.sources import table
from data.types import Example
from grpo import objective
from grpo.storage import checkpoint
from grpo.storage import jsonl as metrics_file
from grpo.storage.checkpoint import complete
from models import weights

QUICK = [
    "shapes",
    "steps=3",
    "prompts=3",
    "group=4",
    "cap=8",
    "rewards={length: 1000}",
    "eval.items=0",
    "save.every=1",
    "save.keep=0",
    "report.every=0",
    "limit=40",
    "device=cpu",
]


pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def broken(base, tmp_path):
    """A copy of the model folder, to be damaged."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def refused(capsys, argv, *words):
    """train.py ends with status 2 and one line that holds the words. -> the line."""
    capsys.readouterr()
    assert train.main([str(a) for a in argv]) == 2
    return one_line(capsys.readouterr().err, "train.py: ", words)


def one_line(err, program, words):
    # A step's line is no message.
    lines = [
        line.removeprefix("\x1b[A")
        for line in err.splitlines()
        if line.strip("\x1b[A ") and not re.match(r"step \d+/\d+ ", line)
    ]
    line = lines[-1]
    assert line.startswith(program) and "Traceback" not in err, err
    notes = [line for line in lines[:-1] if not line.startswith("warning: ")]
    assert all(line.startswith("step ") and "skipped" in line for line in notes), err
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"
    return line


def both_refuse(capsys, model, out, *words):
    """train.py and evaluate.py, for what is wrong with a model folder. Nothing is left behind."""
    refused(capsys, [*QUICK, f"model={model}", f"out={out}"], *words)
    assert not out.exists()
    assert evaluate.main(["--model", str(model), "--items", "2", "--cap", "2", "--device", "cpu"]) == 2
    one_line(capsys.readouterr().err, "evaluate.py: ", words)


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---- the model folder


def test_a_missing_shard(broken, tmp_path, capsys):
    (broken / "model.safetensors").unlink()
    weights.save(small_policy(), broken, max_shard_bytes=60_000)
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    shard.unlink()
    both_refuse(capsys, broken, tmp_path / "run", shard.name, "missing")


@pytest.mark.parametrize("size", [0, 100, 50_000])
def test_a_truncated_shard(broken, tmp_path, capsys, size):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    both_refuse(capsys, broken, tmp_path / "run", str(file), "damaged or truncated")


def test_a_tensor_too_few_too_many_or_of_another_shape(broken, tmp_path, capsys):
    file, name = broken / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    both_refuse(capsys, broken, tmp_path / "run", name, "missing")
    save_file(tensors | {"model.layers.7.mlp.up_proj.weight": tensors[name].clone()}, file)
    both_refuse(capsys, broken, tmp_path / "run", "model.layers.7.mlp.up_proj.weight", "unexpected")
    save_file(tensors | {name: tensors[name][:, :5].contiguous()}, file)
    both_refuse(capsys, broken, tmp_path / "run", name, "shape")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "llava"}, ("config.json", "llava", "qwen2_vl")),
        ({"hidden_size": None}, ("config.json", "hidden_size")),
        ({"hidden_act": "relu"}, ("config.json", "relu")),
        ({"num_attention_heads": 5}, ("config.json", "num_attention_heads")),
    ],
)
def test_a_config_of_another_architecture(broken, tmp_path, capsys, change, words):
    file = broken / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    both_refuse(capsys, broken, tmp_path / "run", *words)


def test_a_config_that_is_not_json(broken, tmp_path, capsys):
    (broken / "config.json").write_text("{")
    both_refuse(capsys, broken, tmp_path / "run", "config.json", "JSON")


def test_a_tokenizer_without_the_image_token(broken, tmp_path, capsys):
    file = broken / "tokenizer.json"
    file.write_text(file.read_text().replace("<|image_pad|>", "<|no_pad|>"))
    both_refuse(capsys, broken, tmp_path / "run", "tokenizer.json", "<|image_pad|>")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "preprocessor_config.json", "config.json", "model.safetensors"]
)
def test_a_file_that_is_not_there(broken, tmp_path, capsys, name):
    (broken / name).unlink()
    both_refuse(capsys, broken, tmp_path / "run", name, str(broken))


def test_a_model_that_is_not_there(tmp_path, capsys):
    both_refuse(capsys, tmp_path / "nowhere", tmp_path / "run", "nowhere", "Hugging Face")


def test_a_run_folder_without_a_checkpoint(tmp_path, capsys):
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    both_refuse(capsys, tmp_path / "mine", tmp_path / "run", "mine", "without a complete checkpoint")


# ---- single examples


def png(size=(60, 60), **how):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, "PNG", **how)
    return file.getvalue()


def bomb():
    """A file of a few hundred bytes that says it is 60,000 x 60,000 pixels."""
    data = bytearray(png())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "corrupt": (lambda e: replace(e, pictures=(b"this is no picture",)), "cannot be read"),
    "truncated": (lambda e: replace(e, pictures=(png()[:-30],)), "cannot be read"),
    "zero size": (lambda e: replace(e, pictures=(partial(Image.new, "RGB", (0, 10)),)), "empty"),
    "bomb": (lambda e: replace(e, pictures=(bomb(),)), "pixels"),
    "no file": (lambda e: replace(e, pictures=(Path("nowhere.png"),)), "nowhere.png"),
    "one choice": (lambda e: replace(e, choices=(e.answer,)), "1 choices"),
    "answer outside": (lambda e: replace(e, answer="purple"), "'purple' is not among the choices"),
    "no question": (lambda e: replace(e, question=" "), "question is empty"),
    "too long": (lambda e: replace(e, question="red star " * 400), "over the limit of 192"),
}


class Some(Shapes):
    """The built-in world, in which every third example is bad."""

    bad, every = staticmethod(lambda e: e), 3

    def __getitem__(self, index) -> Example:
        example = super().__getitem__(index)
        return self.bad(replace(example, uid=f"bad/{index}")) if index % self.every == 0 else example


def world_with(monkeypatch, change, every=3):
    """The task `shapes` with bad examples among the training ones, and (where it is not the making that
    fails) among the held-out ones."""
    monkeypatch.setattr(Some, "bad", staticmethod(change))
    monkeypatch.setattr(Some, "every", every)
    monkeypatch.setitem(
        table.SOURCES,
        "shapes",
        lambda path, split, limit, seed: (
            Some(split, limit, seed) if split == "train" else Shapes(split, limit, seed)
        ),
    )


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_example_is_skipped_counted_and_named(base, tmp_path, capsys, monkeypatch, kind):
    change, words = BAD[kind]
    world_with(monkeypatch, change)
    out = tmp_path / "run"
    assert train.main([*QUICK, f"model={base}", f"out={out}", "steps=4", "prompts=4"]) == 0
    named = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert named and all("bad/" in line and words in line and line.startswith("step ") for line in named), (
        named
    )
    skipped = [round(row["frac_skipped"] * 4) for row in rows_of(out)]
    assert sum(skipped) == len(named) and [row["step"] for row in rows_of(out)] == [1, 2, 3, 4]


def test_a_step_of_nothing_but_bad_examples_takes_the_next_ones(base, tmp_path, capsys, monkeypatch):
    """One prompt a step, a third of them bad: a rank is never left with nothing to do."""
    world_with(monkeypatch, BAD["corrupt"][0])
    assert train.main([*QUICK, f"model={base}", f"out={tmp_path / 'run'}", "steps=6", "prompts=1"]) == 0
    assert "skipped" in capsys.readouterr().err
    shares = {row["frac_skipped"] for row in rows_of(tmp_path / "run")}
    assert 0.0 in shares and len(shares) > 1 and max(shares) < 1


def test_when_nothing_can_be_asked(base, tmp_path, capsys, monkeypatch):
    world_with(monkeypatch, BAD["corrupt"][0], every=1)
    refused(
        capsys,
        [*QUICK, f"model={base}", f"out={tmp_path / 'run'}"],
        "step 1",
        "none of 12 questions",
        "cannot be read",
    )
    monkeypatch.undo()
    refused(
        capsys,
        [*QUICK, f"model={base}", f"out={tmp_path / 'other'}", "max_prompt=20"],
        "step 1",
        "none of",
        "max_prompt",
    )


def test_imitation_skips_too(base, tmp_path, capsys, monkeypatch):
    world_with(monkeypatch, BAD["corrupt"][0])
    assert train.main([*QUICK, f"model={base}", f"out={tmp_path / 'run'}", "method=sft", "cap=20"]) == 0
    assert (
        "skipped example 'bad/" in capsys.readouterr().err
        and sum(row["skipped"] for row in rows_of(tmp_path / "run")) > 0
    )


def test_a_document_over_the_cap(base, tmp_path, capsys):
    refused(
        capsys,
        [*QUICK, f"model={base}", f"out={tmp_path / 'run'}", "method=sft", "cap=3"],
        "cap is 3",
        "5 tokens",
        "<answer>",
    )
    assert (
        train.main(
            [
                *QUICK,
                f"model={base}",
                f"out={tmp_path / 'cut'}",
                "method=sft",
                "cap=3",
                "steps=1",
                "sft.too_long=cut",
            ]
        )
        == 0
    )
    assert "cut: document 1 of 'shapes/train/" in capsys.readouterr().err
    refused(
        capsys,
        [*QUICK, f"model={base}", f"out={tmp_path / 'error'}", "method=sft", "cap=5", "sft.too_long=error"],
        "tokens and cap is 5",
        "set sft.too_long",
    )


def test_documents_over_the_cap_are_skipped_counted_and_named(base, tmp_path, capsys, monkeypatch):
    """Of an answer of 5 tokens, one of 40, and both: imitation goes on with those that fit."""
    short, long = "look : it is red .", "look : it is red . " * 8
    cases = [{"documents": [short, long]}, {"documents": [long]}, {"documents": [short]}, {}]
    monkeypatch.setitem(
        table.SOURCES,
        "shapes",
        lambda path, split, limit, seed: [
            replace(example, extra=dict(example.extra) | cases[i % 4])
            for i, example in enumerate(Shapes(split, 8, seed))
        ],
    )
    out = tmp_path / "run"
    settings = ["method=sft", "cap=12", "steps=2", "prompts=4"]
    assert train.main([*QUICK, f"model={base}", f"out={out}", *settings]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped document" in line]
    assert len(said) == 4 == sum(row["skipped"] for row in rows_of(out))
    assert all(line.startswith("step ") and "has 49 tokens and cap is 12" in line for line in said), said
    # a larger cap takes them all
    assert (
        train.main([*QUICK, f"model={base}", f"out={out}", *settings, "cap=60", "change=cap", "steps=4"]) == 0
    )
    assert [row.get("skipped") for row in rows_of(out)[2:]] == [None, 0, 0]


# ---- the command line


@pytest.mark.parametrize(
    "argv, words",
    [
        (["shaeps"], ("'shaeps'", "shapes")),
        (["shapes", "grup=8"], ("grup", "group")),
        (["shapes", "loss.kl_coeff=0.1"], ("kl_coeff", "loss.kl_coef")),
        (["shapes", "group=many"], ("group", "many")),
        (["shapes", "group=1"], ("group", "at least 2")),
        (["shapes", "advantage=mean"], ("advantage", "mean", "none")),
        (["shapes", "rewards.acuracy=1"], ("acuracy", "accuracy")),
        (["shapes", "--grop"], ("--grop",)),
        (["shapes", "steps"], ("steps",)),
        (["nowhere.yaml"], ("nowhere.yaml",)),
        (["shapes", "task=blink"], ("data=FILE",)),
        (["shapes", "data=x.parquet"], ("x.parquet",)),
        (["shapes", "task=shape"], ("shapes",)),
        (["shapes", "template=shape"], ("shapes",)),
        *([] if torch.cuda.is_available() else [(["shapes", "device=cuda"], ("device", "GPU"))]),
    ],
)
def test_a_mistake_on_the_command_line(base, tmp_path, capsys, argv, words):
    quick = [
        a
        for a in QUICK[1:]
        if not a.startswith("device") and a.partition("=")[0] not in {b.partition("=")[0] for b in argv}
    ]
    refused(capsys, [argv[0], *quick, f"model={base}", f"out={tmp_path / 'run'}", *argv[1:]], *words)
    assert not (tmp_path / "run").exists()


def test_a_recipe_with_an_unknown_key(base, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: shapes\nloss:\n  kl_coeff: 0.1\n")
    refused(capsys, [recipe], "mine.yaml", "kl_coeff", "kl_coef")
    recipe.write_text("base: shapes\nloss: [\n")
    refused(capsys, [recipe, "--plan"], "mine.yaml", "YAML")


# ---- the run folder


@pytest.fixture(scope="module")
def done(base, run_once):
    """A run of two steps."""
    return run_once(*QUICK, f"model={base}", "steps=2")


@pytest.fixture
def stopped(done, tmp_path):
    """The same run, stopped after two of its three steps."""
    out = Path(shutil.copytree(done, tmp_path / "run"))
    file = out / "config.yaml"
    file.write_text(
        file.read_text().replace("steps: 2\n", "steps: 3\n").replace(f"out: {done}", f"out: {out}")
    )
    return out


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "settings, words",
    [
        (["optim.lr=1"], ("other settings", "optim.lr", "out=")),
        (["seed=7"], ("seed: 0 -> 7",)),
        (["rewards={format: 1}"], ("rewards",)),
        (["steps=2"], ("steps: 3 -> 2",)),
    ],
)
def test_a_run_folder_of_other_settings(base, stopped, capsys, settings, words):
    before = everything(stopped)
    refused(capsys, [*QUICK, f"model={base}", f"out={stopped}", *settings], *words)
    assert everything(stopped) == before


def test_a_run_folder_of_another_recipe(base, stopped, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("base: shapes\n")
    before = everything(stopped)
    refused(
        capsys,
        [tmp_path / "mine.yaml", *QUICK[1:], f"model={base}", f"out={stopped}"],
        "recipe: shapes -> mine",
    )
    assert everything(stopped) == before


def test_what_is_only_shown_may_differ(base, stopped):
    assert train.main([*QUICK, f"model={base}", f"out={stopped}", "report.every=1", "save.keep=1"]) == 0
    assert [path.name for path in complete(stopped)] == ["step_000003"]


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "model.safetensors"])
def test_a_damaged_checkpoint(base, stopped, capsys, name):
    """It is named, the one before is used, and if there is none left nothing is touched."""
    file = complete(stopped)[-1] / name
    file.write_bytes(file.read_bytes()[:3])
    assert train.main([*QUICK, f"model={base}", f"out={stopped}"]) == 0
    said = capsys.readouterr()
    assert (
        f"damaged: {file}" in said.err
        and "Going on from step_000001" in said.err
        and "going on after step 1" in said.out
    )
    assert [row["step"] for row in rows_of(stopped)] == [1, 2, 3] and checkpoint.newest(stopped)[
        0
    ].name == "step_000003"
    for folder in complete(stopped):
        (folder / name).unlink()
    before = everything(stopped)
    refused(
        capsys,
        [*QUICK, f"model={base}", f"out={stopped}"],
        *(f"step_00000{step}/{name} is missing" for step in (1, 2, 3)),
        "to start anew",
    )
    assert everything(stopped) == before


def test_logs_that_are_not_ours(base, stopped, capsys):
    (stopped / "metrics.jsonl").write_text("hello\nworld\n")
    refused(capsys, [*QUICK, f"model={base}", f"out={stopped}"], "metrics.jsonl", "line 1")


def test_out_is_a_file(base, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused(capsys, [*QUICK, f"model={base}", f"out={tmp_path / 'file'}"], "file")


# ---- trouble on the way

FULL = OSError(28, "No space left on device")


def test_a_full_disk_while_saving(base, stopped, capsys, monkeypatch):
    """One line; the last checkpoint stays as it is, and with space again the same command ends where it
    would have."""
    before = everything(stopped / "checkpoints")
    command = [*QUICK, f"model={base}", f"out={stopped}"]
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", lambda *args: (_ for _ in ()).throw(FULL))
        refused(capsys, command, "step 3", "No space left on device", "out=DIR")
    assert everything(stopped / "checkpoints") == before
    assert train.main(command) == 0
    assert [path.name for path in complete(stopped)] == ["step_000001", "step_000002", "step_000003"]
    assert [row["step"] for row in rows_of(stopped)] == [1, 2, 3]


def test_a_full_disk_while_writing_a_line(base, stopped, capsys, monkeypatch):
    before = everything(stopped / "checkpoints")
    with monkeypatch.context() as patched:
        patched.setattr(metrics_file.json, "dumps", lambda *args, **how: (_ for _ in ()).throw(FULL))
        refused(capsys, [*QUICK, f"model={base}", f"out={stopped}"], "No space left on device")
    assert everything(stopped / "checkpoints") == before


def with_one_skipped(run):
    """An update of the run was skipped before; a second one is too many (the first is in
    tests/grpo/monitor/test_warnings.py)."""
    file = run / "metrics.jsonl"
    *rows, last = rows_of(run)
    file.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [*rows, last | {"guard/nonfinite": 1, "guard/nonfinite_uids": ["shapes/train/0/0"]}]
        )
    )


def test_a_loss_that_is_not_finite_again(base, stopped, capsys, monkeypatch):
    """The run stops, names the prompts of that step, changes nothing: the same command goes on from the
    last good step."""
    with_one_skipped(stopped)
    before, real = everything(stopped / "checkpoints"), objective.policy_loss

    def poisoned(*args, **how):
        loss, stats = real(*args, **how)
        return loss * float("nan"), replace(stats, loss=stats.loss * float("nan"))

    command = [*QUICK, f"model={base}", f"out={stopped}"]
    with monkeypatch.context() as patched:
        patched.setattr(train, "policy_loss", poisoned)
        line = refused(capsys, command, "step 3", "nan", "Nothing was updated")
    assert line.count("shapes/train/0/") == 3
    assert everything(stopped / "checkpoints") == before and [row["step"] for row in rows_of(stopped)] == [
        1,
        2,
    ]
    assert train.main(command) == 0 and complete(stopped)[-1].name == "step_000003"


def test_a_gradient_that_is_not_finite(base, stopped, capsys, monkeypatch):
    """A finite loss may have an infinite gradient."""
    with_one_skipped(stopped)
    real = train.completion_logprobs

    def steep(*args, **how):
        logp, entropy = real(*args, **how)
        # the slope of a root at 0
        return logp + 0 * (logp - logp.detach()).sqrt(), entropy

    monkeypatch.setattr(train, "completion_logprobs", steep)
    refused(
        capsys,
        [*QUICK, f"model={base}", f"out={stopped}"],
        "step 3",
        "the gradient's norm nan",
        "shapes/train/0/",
    )
    assert [row["step"] for row in rows_of(stopped)] == [1, 2]


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_weights_that_are_not_finite(broken, tmp_path, capsys, method):
    """They are refused when they are loaded, before anything is asked."""
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    refused(
        capsys,
        [*QUICK, f"model={broken}", f"out={tmp_path / 'run'}", f"method={method}", "cap=20"],
        "model.safetensors",
        "'model.norm.weight' holds NaN or infinite values",
    )
    assert complete(tmp_path / "run") == []
