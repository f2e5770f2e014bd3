"""The recipes that are to the letter, against the authors' values (authors.yaml), one by one."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from grpo.config import parse, value_of
from grpo.schedule import lr_at

AUTHORS = yaml.safe_load(Path(__file__).with_name("authors.yaml").read_text("utf-8"))
VALUES = [(recipe, key) for recipe, table in AUTHORS.items() for key in table]


@pytest.mark.parametrize("recipe, key", VALUES)
def test_a_value_is_the_authors(recipe, key):
    value, source = AUTHORS[recipe][key]
    assert source
    assert value_of(parse.load(recipe), key) == value


def test_a_changed_value_would_be_noticed():
    cfg = parse.load("visualthinker_sat_paper")
    for key in ("prompts", "top_k", "cap"):
        assert value_of(replace(cfg, **{key: getattr(cfg, key) + 1}), key) != AUTHORS[cfg.recipe][key][0]


def test_everything_that_trains_is_in_the_table():
    """Beside the values that are no choice of the authors'."""
    ours = {
        "recipe",
        "name",
        "steps",
        "seed",
        "out",
        "device",
        "shard",
        "timeout",
        "by_model",
        "revision",
        "init",
    }
    ours |= {
        "columns",
        "heldout",
        "limit",
        "system",
        "blind",
        "max_rows",
        "exact",
        "cuda_graphs",
        "enough",
        "stages",
        "log",
    }
    # of a clip that is never reached with one update; of what is 0 or off; of memory
    ours |= {"loss.clip_low", "loss.clip_high", "loss.entropy_coef", "loss.reference_on", "loss.micro_tokens"}
    ours |= {"loss.sections", "loss.logits_mib", "optim.states_on", "lora.alpha", "lora.targets", "epochs"}
    groups = ("sft.", "eval.", "save.", "report.")
    wanted = {key for key in parse.leaves(parse.Config) if key not in ours and not key.startswith(groups)}
    assert not wanted - {*AUTHORS["visualthinker_sat_paper"]}


def test_the_unfinished_decay_is_that_of_two_epochs():
    """A line to 0 after two epochs, and ours to lr_min at step 1,500, are one line."""
    cfg = parse.load("visualthinker_sat_paper")
    planned = cfg.steps / (1 - cfg.optim.lr_min)
    # two epochs of the rows with one picture: 127 K of the 175 K in array/SAT
    assert planned == pytest.approx(2 * 15_000 * 127 / 175 / cfg.prompts, rel=0.01)
    for step in (0, 500, 1499):
        ours = lr_at(step, steps=1500, lr=1e-6, warmup=0, decay="linear", lr_min=cfg.optim.lr_min)
        theirs = lr_at(step, steps=round(planned), lr=1e-6, warmup=0, decay="linear", lr_min=0.0)
        assert ours == pytest.approx(theirs, rel=1e-3)
