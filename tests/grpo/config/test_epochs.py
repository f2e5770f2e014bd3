"""The length of a run in passes over the questions: `epochs` and `steps` replace each other."""

import pytest

from grpo.config import ConfigError, load
from grpo.config.parse import load_run, save
from grpo.run.setup import with_steps


def test_steps_and_epochs_clear_each_other(tmp_path):
    (tmp_path / "base.yaml").write_text("base: shapes\nepochs: 2\n")
    (tmp_path / "above.yaml").write_text("base: base.yaml\nsteps: 7\n")
    two = load(tmp_path / "base.yaml")
    assert (two.epochs, two.steps) == (2.0, 0)
    assert load("shapes", ["epochs=0.5"]).epochs == 0.5
    for seven in (load(tmp_path / "above.yaml"), load(tmp_path / "base.yaml", ["steps=7"])):
        assert (seven.epochs, seven.steps) == (None, 7)


@pytest.mark.parametrize("where", ["file", "arguments"])
def test_both_together_are_an_error(tmp_path, where):
    (tmp_path / "both.yaml").write_text("steps: 3\nepochs: 2\n" if where == "file" else "")
    given = ["steps=3", "epochs=2"] if where == "arguments" else []
    with pytest.raises(ConfigError, match=r"^both.yaml.*: steps and epochs both say how long the run is"):
        load(tmp_path / "both.yaml", given)


@pytest.mark.parametrize("wrong", ["0", "-1", "many"])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ConfigError, match="epochs"):
        load("shapes", [f"epochs={wrong}"])


@pytest.mark.parametrize("epochs, steps", [("1", 14), ("2", 27), ("0.01", 1)])
def test_the_steps_that_come_out_are_recorded(tmp_path, epochs, steps):
    """40 questions, 3 a step."""
    config = with_steps(load("shapes", [f"epochs={epochs}", "limit=40", "prompts=3", f"out={tmp_path}"]))
    assert config.steps == steps
    save(config, tmp_path)
    assert load_run(tmp_path) == config and with_steps(load_run(tmp_path)) == config
