"""Every setting of the bridge, as one tree of dataclasses, and how a recipe is read.

    defaults  <  base recipe  <  recipe  <  key=value

The string below a field is its help. Each mistake raises a ConfigError that names file, argument or key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grpo.bridge.filters import Rules
from grpo.bridge.output import Output
from grpo.bridge.stages import STAGES, check_prompts, prompt_text
from grpo.config import parse
from grpo.config.typed import ConfigError, Typed, assign, build, convert, flatten

FOLDER = parse.RECIPES / "bridge"
# tokens to which a price belongs
MILLION = 1_000_000


@dataclass(frozen=True)
class Writer:
    """What writes the replies of a stage."""

    kind: Literal["server", "local", "function"] = "server"
    """server: an OpenAI-compatible one; local: a Qwen-VL folder and our own rollout; function: a text-only
    writer of Glimpse"""
    model: str = ""
    """server: the model's name there; local: a folder, a run folder, `tiny` or a hub model; function: its
    name, such as `shapes`"""
    url: str = ""
    """server: its address, up to and with /v1"""
    key_env: str | None = None
    """server: the environment variable that holds the key; the key itself is never written or printed"""
    timeout: float = 600.0
    """server: seconds of one try"""
    retries: int = 5
    """server: further tries after a timeout, a lost connection, a reply that is no JSON, 408, 409, 429 or
    5xx"""
    at_once: int = 16
    """server: most requests in flight, halved by a 429; local: questions that are written together"""
    price: dict[str, float] = field(default_factory=lambda: {"in": 0.0, "out": 0.0})
    """money for a million tokens: {in: read, out: written}"""
    template: str = "chat"
    """local: the template around the prompt; `chat` is the model's own"""
    max_prompt: int = 16384
    """local: longest prompt with its pictures, tokens"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """local: where the model is; auto: a GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """local: of the weights; auto: bfloat16 on a GPU, and on a CPU float32, which can be repeated exactly"""

    @property
    def name(self) -> str:
        """What a reply depends on beside its request."""
        return f"{self.model}, template {self.template}" if self.kind == "local" else self.model

    def money(self, tokens_in: int, tokens_out: int) -> float:
        """What tokens cost."""
        return (tokens_in * self.price["in"] + tokens_out * self.price["out"]) / MILLION


@dataclass(frozen=True)
class Stage:
    """How a stage asks."""

    prompt: str | None = None
    """name of a prompt (grpo/bridge/prompts.yaml) or FILE.txt; null leaves the stage out"""
    system: str = ""
    """system prompt; empty sends none"""
    max_tokens: int = 4096
    """longest reply, with its thinking"""
    temperature: float = 0.7
    """0 is greedy: a further attempt then gives the same reply"""
    top_p: float = 1.0
    """draw from the likeliest words that together have this probability"""


@dataclass(frozen=True)
class Budget:
    """What may be spent in this folder, all commands together."""

    tokens: int | None = None
    """most tokens, read and written"""
    money: float | None = None
    """most money, by the prices"""


@dataclass(frozen=True)
class Settings:
    """Every setting. Raises ConfigError for values that cannot be right."""

    task: str = "jsonl"
    """where questions come from, as in train.py"""
    data: str | None = None
    """file, folder or hub data set of the questions"""
    columns: dict[str, str] = field(default_factory=dict)
    """{our name of a column: the file's}"""
    heldout: float = 0.0
    """share of a file's rows that is left for evaluation, as in train.py"""
    limit: int | None = None
    """the first questions only"""
    out: str = ""
    """folder of the replies and results; default: runs/bridge_RECIPE"""
    seed: int = 0
    """of every random number; a further attempt has another one"""
    attempts: int = 3
    """replies that are asked for, at most, while a form filter finds them bad"""
    again: bool = False
    """ask again where the stored reply belongs to another prompt, model or sampling"""
    max_pixels: int | None = 1003520
    """larger pictures are shrunk before they are sent; null sends them whole"""
    vision: Writer = field(default_factory=Writer)
    reasoner: Writer = field(default_factory=Writer)
    pseudo: Stage = field(default_factory=Stage)
    describe: Stage = field(default_factory=Stage)
    reason: Stage = field(default_factory=Stage)
    budget: Budget = field(default_factory=Budget)
    filters: Rules = field(default_factory=Rules)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        if self.reason.prompt is None:
            raise ConfigError("reason.prompt: it is needed; take vision_r1_reason, or another prompt")
        check_prompts(self.prompts())
        for stage in self.active:
            _check_stage(stage, getattr(self, stage))
            _check_writer("reasoner" if stage == "reason" else "vision", self.writer(stage))
        if self.attempts < 1:
            raise ConfigError(f"attempts: must be at least 1, got {self.attempts}")
        for name, most in dataclasses.asdict(self.budget).items():
            if most is not None and most <= 0:
                ways = "give what may be spent, or null for no limit"
                raise ConfigError(f"budget.{name}: {most:g} lets nothing be asked; {ways}")
        if self.budget.money is not None and not any(
            sum(self.writer(stage).price.values()) for stage in self.active
        ):
            raise ConfigError("budget.money: no price is known; set vision.price and reasoner.price")

    @property
    def active(self) -> tuple[str, ...]:
        """The stages that are asked, in their order."""
        return tuple(stage for stage in STAGES if getattr(self, stage).prompt is not None)

    def prompts(self) -> dict[str, str]:
        """{active stage: the text of its prompt}."""
        return {stage: prompt_text(getattr(self, stage).prompt, f"{stage}.prompt") for stage in self.active}

    def prices(self) -> dict[str, dict[str, float]]:
        """{active stage: money for a million tokens, in and out}."""
        return {stage: self.writer(stage).price for stage in self.active}

    def writer(self, stage: str) -> Writer:
        """Which writer a stage asks."""
        return self.reasoner if stage == "reason" else self.vision


def _check_stage(name: str, stage: Stage) -> None:
    for key, good in {
        "max_tokens": stage.max_tokens >= 1,
        "temperature": stage.temperature >= 0,
        "top_p": 0 < stage.top_p <= 1,
    }.items():
        if not good:
            raise ConfigError(f"{name}.{key}: {getattr(stage, key):g} cannot be right")


def _check_writer(name: str, writer: Writer) -> None:
    if not writer.model:
        raise ConfigError(f"{name}.model: it is needed: what writes the replies")
    if writer.kind == "server" and not writer.url:
        raise ConfigError(f"{name}.url: a server needs one, such as http://localhost:8000/v1")
    if writer.at_once < 1:
        raise ConfigError(f"{name}.at_once: must be at least 1, got {writer.at_once}")
    if {*writer.price} != {"in", "out"} or any(value < 0 for value in writer.price.values()):
        raise ConfigError(f"{name}.price: write {{in: MONEY, out: MONEY}}, for a million tokens each")


def load(recipe: str, arguments: Iterable[str] = ()) -> Settings:
    """A recipe (a name or a YAML file) with `key=value` over it. Raises ConfigError."""
    path = parse.recipe_path(recipe, folder=FOLDER)
    flat = _layers(path)
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"argument {text!r}: settings are written key=value")
        flat |= assign(Settings, key.strip(), Typed(value.strip()), f"argument {text!r}", flat)
    flat.setdefault("out", "")
    flat["out"] = flat["out"] or str(Path("runs") / f"bridge_{path.stem}")
    try:
        return build(Settings, flat)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def recipes() -> dict[str, str]:
    """{name: its `about:` line} of the recipes of the bridge."""
    return parse.recipes(FOLDER)


def _layers(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe over its base, and so on, as one checked flat dict. above: the recipes that led here."""
    if path.resolve() in above:
        raise ConfigError(f"{path.name}: `base:` goes round in a circle")
    tree = {key: value for key, value in parse.read_recipe(path).items() if key != "about"}
    base = tree.pop("base", None)
    below: dict[str, Any] = {}
    if base is not None:
        name = convert(base, str, f"{path.name}: base")
        below = _layers(parse.recipe_path(name, path.parent, FOLDER), (*above, path.resolve()))
    return below | flatten(Settings, tree, path.name)
