"""The config: what is typed is checked, an error says where and what was probably meant, and what is
written is what was run."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from grpo import config
from grpo.config import Config, ConfigError, load, parse_args
from grpo.config.parse import FORMAT, markdown_table
from grpo.config.renamed import REMOVED, RENAMED
from grpo.config.typed import leaves, names

ROOT = Path(__file__).resolve().parents[3]
RATE = "ends there now, so the learning rate is larger from here on"


def test_no_arguments_is_the_main_job():
    cfg, flags = parse_args([])
    assert cfg.recipe == "shapes" and cfg.out == "runs/shapes"
    assert not any(dataclasses.astuple(flags))


def test_command_line_beats_recipe_beats_base_beats_defaults(tmp_path):
    (tmp_path / "base.yaml").write_text("base: shapes\ngroup: 6\ncap: 33\noptim: {lr: 0.5, warmup: 7}\n")
    (tmp_path / "mine.yaml").write_text("about: mine\nbase: ./base.yaml\ncap: 44\noptim:\n  lr: 0.25\n")
    cfg, _ = parse_args([str(tmp_path / "mine.yaml"), "optim.lr=0.125", "--dry-run"])
    assert (cfg.optim.lr, cfg.cap, cfg.group, cfg.optim.warmup) == (0.125, 44, 6, 7)
    assert cfg.task == load("shapes").task and cfg.recipe == "mine" and cfg.out == "runs/mine"
    assert cfg.optim.beta2 == Config().optim.beta2


def test_bases_may_not_go_round_in_a_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("base: ./b.yaml")
    (tmp_path / "b.yaml").write_text("base: ./a.yaml")
    with pytest.raises(ConfigError, match="circle: a -> b -> a"):
        load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["shape"], "unknown recipe 'shape' (did you mean 'shapes'?)"),
        (["nowhere.yaml"], "there is no such file"),
        (["shapes", "blink"], "the recipe is already 'shapes'"),
        (["lr=1"], "argument 'lr=1': unknown key 'lr' (did you mean 'optim.lr'?)"),
        (["loss.kl_coeff=1"], "did you mean 'loss.kl_coef'?"),
        (["los.kl_coef=1"], "did you mean 'loss.kl_coef'?"),
        (["optim=3"], "'optim' is a group of settings; set one of optim."),
        (["loss.kl=k3_iss"], "expected one of k1, k2, k3, k3_is, got 'k3_iss' (did you mean 'k3_is'?)"),
        (["method=gpro"], "did you mean 'grpo'?"),
        (["steps=1.5"], "steps: expected a whole number, got 1.5"),
        (["steps=true"], "expected a whole number, got true"),
        (["steps=null"], "expected a whole number, got null"),
        (["blind=1"], "blind: expected true or false, got 1"),
        (["optim.lr=fast"], "expected a number, got 'fast'"),
        (["optim.lr=.nan"], "expected a number"),
        (["optim.lr=1e999"], "expected a number"),
        (["rewards.format=much"], "rewards.format: expected a number"),
        (["rewards.a.b=1"], "unknown key 'rewards.a.b'"),
        (["limit=[1"], "is not valid YAML"),
        (["freeze=[vision, llm]"], "nothing is left to train"),
        (["freeze=[eyes]"], "freeze[0]: expected one of vision, llm, got 'eyes'"),
        (["max_rounds=2"], "set loss.kl_coef=0"),
        (["max_rounds=2", "loss.kl_coef=0", "loss.entropy_coef=0.1"], "set loss.entropy_coef=0"),
        (["loss.entropy_coef=-0.1"], "loss.entropy_coef: must be at least 0"),
        (["worker.actor.entropy_coeff=1e-3"], "loss.entropy_coef"),
        (["sampling=dynamic"], "max_rounds above 1 is dynamic sampling"),
        (["enough=0"], "enough: must be above 0 and at most 1"),
        (["max_rounds=0"], "max_rounds: must be at least 1"),
        (["sft.loss_on=prompt"], "expected one of answer, prompt_and_answer"),
        (["stages=[{until: 2}]"], "stages[0]: 'group' is missing"),
        (["stages=[{until: 2, group: 4, capp: 3}]"], "unknown key 'capp' (did you mean 'cap'?)"),
        (["stages=[{until: 9, group: 4, cap: 3}, {until: 3, group: 4, cap: 3}]"], "`until` must grow"),
        (["--steps=3"], "settings are written without dashes: steps=3"),
        (["--learning_rate", "1e-6"], "argument '--learning_rate': its name here is 'optim.lr'"),
        (["--report-to=wandb"], "its name here is 'log'"),
        (["worker.rollout.n=5"], "unknown key 'worker.rollout.n'; its name here is 'group'"),
        (["worker.actor.optim.lr=1e-6"], "did you mean 'optim.lr'?"),
        (["trainer.save_freq=5"], "its name here is 'save.every'"),
        (["change=capp"], "argument 'change=capp': unknown key 'capp' (did you mean 'cap'?)"),
        (["change=beta"], "its name here is 'loss.kl_coef'"),
        (["--pla"], "did you mean '--plan'?"),
        (["temperature=0"], "temperature: must be above 0"),
        (["group=1"], "at least 2, because a group compares completions; got 1"),
        (["loss.clip_low=1"], "loss.clip_low: must be in [0, 1)"),
        (["init=x/config.json"], "random weights never earn a reward"),
        (["min_pixels=9", "max_pixels=4"], "min_pixels: 9 is more than max_pixels, 4"),
    ],
)
def test_an_error_says_where_and_what_was_meant(argv, message):
    with pytest.raises(ConfigError) as error:
        parse_args(argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepz: 3", "my.yaml: unknown key 'stepz' (did you mean 'steps'?)"),
        ("optim: {lrr: 3}", "my.yaml: unknown key 'optim.lrr' (did you mean 'optim.lr'?)"),
        ("optim: 3", "my.yaml: expected `key: value` lines under optim, got 3"),
        ("template: 5", "my.yaml: template: expected text, got 5"),
        ("- steps", "expected `key: value` lines, got list"),
        ("steps: [", "not valid YAML"),
        ("steps: 3\nsteps: 4", "my.yaml: line 2: the key 'steps' is given twice"),
        ("base: shape", "unknown recipe 'shape'"),
    ],
)
def test_an_error_in_a_recipe_names_the_file(tmp_path, text, message):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "my.yaml")
    assert message in str(error.value)


def test_yaml_traps():
    """YAML reads 1e-6 as a string and `no` as false; a whole number is a float where one is wanted, a
    string is taken to the letter."""
    assert load("shapes", ["optim.lr=1e-6"]).optim.lr == 1e-6
    assert load("shapes", ["temperature=2"]).temperature == 2.0 and isinstance(
        load("shapes", ["temperature=2"]).temperature, float
    )
    assert load("shapes", ["out=123"]).out == "123"
    assert load("shapes", ["data=no"]).data == "no"
    assert load("shapes", ["data=null"]).data is None
    assert load("shapes", ["advantage=none"]).advantage == "none"
    assert load("shapes", ["data=a=b"]).data == "a=b"


def test_1e_6_in_a_file_is_a_number(tmp_path):
    (tmp_path / "my.yaml").write_text("optim:\n  lr: 1e-6\n")
    assert load(tmp_path / "my.yaml").optim.lr == 1e-6


def test_rewards_are_replaced_by_a_file_and_changed_by_an_argument(tmp_path):
    (tmp_path / "my.yaml").write_text("base: shapes\nrewards: {accuracy: 2}\n")
    assert load(tmp_path / "my.yaml").rewards == {"accuracy": 2.0}
    assert load("shapes", ["rewards.format=0.5"]).rewards == {"accuracy": 1.0, "format": 0.5}
    # and nothing leaked into the defaults
    assert load("shapes").rewards == {"accuracy": 1.0, "format": 1.0}


def test_stages_become_stages():
    cfg = load("shapes", ["stages=[{until: 20, group: 16, cap: 64}]"])
    assert cfg.stages == [config.Stage(until=20, group=16, cap=64)]


@pytest.mark.parametrize("recipe", list(config.recipes()))
def test_what_is_written_is_what_was_run(tmp_path, recipe):
    cfg = load(recipe, ["seed=3", "optim.lr=1e-6", "stages=[{until: 2, group: 4, cap: 8}]", "data=x y: #z"])
    assert load(config.save(cfg, tmp_path)) == cfg == config.load_run(tmp_path)


def test_a_run_goes_on_only_with_its_own_settings(tmp_path):
    cfg = load("shapes", [f"out={tmp_path}"])
    # nothing there yet
    config.check_same_run(cfg, tmp_path)
    config.save(cfg, tmp_path)
    free = "save.keep=3 report.every=1 eval.every=3 loss.micro_tokens=5 loss.logits_mib=1 max_rows=3"
    other = load("shapes", [f"out={tmp_path}/.", *free.split()])
    assert config.check_same_run(other, tmp_path) == []
    for change, shown in (("optim.lr=1e-9", "optim.lr: 0.0"), ("seed=1", "seed: 0 -> 1")):
        with pytest.raises(ConfigError, match=re.escape(shown)):
            config.check_same_run(load("shapes", [change]), tmp_path)
    with pytest.raises(ConfigError, match="recipe: shapes -> blink"):
        config.check_same_run(load("blink"), tmp_path)


@pytest.mark.parametrize(
    "changes, accepted, lines",
    [
        (["cap=97"], ["cap"], ["cap: 96 -> 97"]),
        (["cap=97", "seed=1"], ["seed", "cap"], ["seed: 0 -> 1", "cap: 96 -> 97"]),
        (["optim.lr=1", "optim.warmup=4"], ["optim"], ["optim.lr: 0.0001 -> 1.0", "optim.warmup: 5 -> 4"]),
        (["cap=97", "seed=1"], ["cap"], "(seed: 0 -> 1): name another folder with out=DIR"),
        (["cap=97", "seed=1"], ["cap"], "accept it with change=cap,seed"),
        (["steps=101"], [], [f"steps: 100 -> 101 (optim.decay=linear {RATE})"]),
        (["steps=99"], [], "steps: 100 -> 99"),
        (["steps=99"], ["steps"], ["steps: 100 -> 99"]),
        (["eval.items=3", "eval.every=9"], [], ["eval.items: 200 -> 3"]),
        ([], ["cap"], []),
    ],
)  # fmt: skip
def test_a_change_is_accepted_by_name_and_a_run_may_grow(tmp_path, changes, accepted, lines):
    config.save(load("shapes", [f"out={tmp_path}"]), tmp_path)
    check = lambda: config.check_same_run(load("shapes", changes), tmp_path, accepted)
    if isinstance(lines, list):
        assert check() == lines
        return
    with pytest.raises(ConfigError, match=re.escape(lines)):
        check()


def test_a_run_with_a_constant_rate_grows_and_nothing_else_changes(tmp_path):
    config.save(load("shapes", ["optim.decay=constant"]), tmp_path)
    assert config.check_same_run(load("shapes", ["optim.decay=constant", "steps=500"]), tmp_path) == []


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_a_renamed_setting_is_refused_with_its_new_name(tmp_path, old, new):
    """Old names, and those of TRL and EasyR1: `beta` looked like `optim.beta2`."""
    assert new in names(Config) and old not in names(Config)
    (tmp_path / "my.yaml").write_text(f"{old}: 1\n")
    for refused in (lambda: load("shapes", [f"{old}=1"]), lambda: load(tmp_path / "my.yaml")):
        with pytest.raises(ConfigError, match=f"unknown key {old!r}; its name here is {new!r}"):
            refused()


@pytest.mark.parametrize("old", REMOVED)
def test_a_removed_setting_is_refused_with_the_reason(old):
    assert old not in names(Config) and old not in RENAMED
    with pytest.raises(
        ConfigError, match=f"unknown key {old!r}; there is no such setting: {re.escape(REMOVED[old])}"
    ):
        load("shapes", [f"{old}=1"])


@pytest.mark.parametrize("first_line", ["", "format: 1\n", f"format: {FORMAT + 1}\n", "format: new\n"])
def test_a_run_of_another_version_is_refused_in_one_sentence(tmp_path, first_line):
    cfg = load("shapes", [f"out={tmp_path}"])
    written = config.save(cfg, tmp_path)
    rest = written.read_text().removeprefix(f"format: {FORMAT}\n")
    written.write_text(first_line + rest + "stretched: 3\n")
    for refused in (lambda: config.check_same_run(cfg, tmp_path), lambda: config.load_run(tmp_path)):
        with pytest.raises(
            ConfigError, match=r"holds a run of another version of Glimpse \(format \w+, here"
        ):
            refused()


def test_another_model_does_not_inherit_a_revision(tmp_path):
    """The revision of the recipe's model was asked of the other model, whose hub page has no such commit."""
    own = load("sat_instruct").revision
    assert own and load("sat_instruct", ["model=Qwen/Qwen2-VL-2B-Instruct"]).revision == own
    assert load("sat_instruct", ["model=Qwen/Qwen2-VL-7B-Instruct"]).revision is None
    assert load("sat_instruct", ["revision=abc", "model=x/y"]).revision == "abc"
    assert load("visualthinker_sat").revision != own
    (tmp_path / "my.yaml").write_text("base: sat_instruct\nmodel: x/y\n")
    assert load(tmp_path / "my.yaml").revision is None
    (tmp_path / "my.yaml").write_text("base: sat_instruct\nmodel: x/y\nrevision: abc\n")
    assert load(tmp_path / "my.yaml").revision == "abc"


def test_the_last_of_two_arguments_counts_and_two_values_are_said():
    argv = ["steps=1", "optim.lr=1", "steps= 2", "cap=3", "cap=3", "rewards.format=1", "rewards.length=2"]
    cfg, flags = parse_args([*argv, "change=cap, data", "change=optim"])
    assert cfg.steps == 2 and flags.change == ("cap", "data", "optim")
    assert flags.repeated == ("steps: given 2 times, as 1 and 2; the last one counts",)
    assert load("shapes", ["steps=1", "rewards.format=1", "steps=2", "rewards.format=3"]).steps == 2


def test_entries_of_rewards_add_up():
    cfg = load("shapes", ["rewards.format=2", "rewards.length=3"])
    assert cfg.rewards == {"accuracy": 1.0, "format": 2.0, "length": 3.0}
    assert load("shapes", ["rewards={length: 1}", "rewards.format=2"]).rewards == {
        "length": 1.0,
        "format": 2.0,
    }


@pytest.mark.parametrize(
    "argv, questions, line",
    [
        (["steps=5"], 100, "optim.warmup: 5 steps of warm-up in a run of 5: "),
        (["steps=3", "optim.warmup=9"], 100, "optim.warmup: 9 steps of warm-up in a run of 3: "),
        (["prompts=18"], 17, "prompts: 18 per step, but there are 17 questions"),
        (["revision=main"], 18, "revision: 'main' has no effect on tiny, which is no hub model"),
        (["revision=main", "model=."], 18, "revision: 'main' has no effect on ., which"),
        (["revision=main", "model=Qwen/Qwen2-VL-2B"], 18, None),
        (["stages=[{until: 101, group: 4, cap: 9}]"], 18, "stages: until 101, but the run ends at step 100"),
        (["enough=0.5"], 18, "enough: has no effect without dynamic sampling"),
        ([], 18, None),
        (["steps=6"], 18, None),
        (["steps=0"], 18, None),
        (["stages=[{until: 100, group: 4, cap: 9}]"], 18, None),
        (["enough=0.5", "max_rounds=2", "loss.kl_coef=0"], 18, None),
    ],
)
def test_settings_that_contradict_each_other_are_named(argv, questions, line):
    lines = config.contradictions(load("shapes", argv), questions)
    assert (not lines) if line is None else (len(lines) == 1 and lines[0].startswith(line))


def test_no_recipe_contradicts_itself():
    assert not any(config.contradictions(load(recipe), 10_000) for recipe in config.recipes())


def test_help_is_always_given_and_says_everything():
    _, flags = parse_args(["--help", "nonsense=1", "--nonsense"])
    assert flags.help
    text = config.help_text()
    assert max(map(len, text.splitlines())) <= 110
    for key in leaves(Config):
        assert f"  {key}=" in text
    for heading in config.HEADINGS.values():
        assert text.count(f"\n{heading}\n") == 1


def test_every_field_explains_itself():
    for key, (_, _, help_text) in leaves(Config).items():
        assert len(help_text) > 10 and help_text.endswith((".", "]", "...].", ")")), key
    assert markdown_table("optim.").count("\n| `optim.") == len(
        [k for k in leaves(Config) if k.startswith("optim.")]
    )


def test_list_has_a_line_for_each_recipe():
    listed = config.list_text().splitlines()
    folder = ROOT / "grpo" / "recipes"
    assert len(listed) == len([*folder.glob("*.yaml"), *folder.glob("mini/*.yaml")]) > 30
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in listed)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("shapes").steps = 3


def test_the_written_file_is_plain_yaml(tmp_path):
    tree = yaml.safe_load(config.save(load("shapes"), tmp_path).read_text())
    assert list(tree) == ["format", *(f.name for f in dataclasses.fields(Config))]


def test_no_setting_is_dead():
    """Each is read somewhere that trains or evaluates: a key that does nothing is a promise broken in
    silence (ledger #16)."""
    files = [*ROOT.glob("*.py"), *(ROOT / "grpo").rglob("*.py")]
    source = "".join(p.read_text() for p in files if p.parent.name not in {"config", "plan"})
    dead = [
        key
        for key in leaves(Config)
        if key not in ("out", "by_model") and not re.search(rf"\.{key.rpartition('.')[2]}\b", source)
    ]
    assert not dead, f"read nowhere: {dead}"
