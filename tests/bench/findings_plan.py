"""The arms of findings.yaml: the runs that each needs, and a hash of all that decides its record."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from grpo.config import parse
from grpo.config.settings import Config, differences
from grpo.names import choose
from grpo.storage.model_folder import model_folder
from tests.bench.about import weights_hash
from tests.bench.ask import SET

ROOT = Path(__file__).resolve().parents[2]
# for --list: of one core, for a completion of the main job with its part of the step, and for a document
SECONDS_PER_COMPLETION, SECONDS_PER_DOCUMENT = 0.011, 0.006
# keys of `asking` in findings.yaml that only some arms need -> the field of an arm that needs them
ALSO = {"passes": "passes", "prefixes": "prefix", "pushes": "pushes"}


@dataclass(frozen=True)
class Entry:
    """An arm in findings.yaml, with what its finding says for all arms.

    stages: [recipe, setting, ...] each, those of the arm named by `after` first. measure: sets to ask; the
    first is sampled too. passes: a set for pass@k. pushes: steps at which the gradient is asked for, from 0.
    cap: longest answer, tokens. best: ask the step with the best evaluation. prefix: ask with the prefix that
    is best on training questions of the first set.
    """

    stages: Sequence[Sequence[str]] = ()
    seeds: Sequence[int] = (0, 1, 2)
    measure: Sequence[str] = ("heldout",)
    passes: str | None = None
    pushes: Sequence[int] = ()
    cap: int = 96
    best: bool = False
    prefix: bool = False


@dataclass(frozen=True)
class Stage:
    """One run. settings: arguments of train.py. digest: of all that decides its numbers."""

    settings: tuple[str, ...]
    folder: Path
    digest: str
    cfg: Config

    @property
    def minutes(self) -> float:
        """An estimate, on one core."""
        rows = self.cfg.steps * self.cfg.prompts
        if self.cfg.method == "sft":
            return rows * (2 if self.cfg.task == "documents" else 1) * SECONDS_PER_DOCUMENT / 60
        return rows * self.cfg.group * SECONDS_PER_COMPLETION / 60


@dataclass(frozen=True)
class Arm:
    """An arm with one seed. start: hash of the model from which it begins. asked: sets and how to ask
    them."""

    finding: str
    name: str
    seed: int
    entry: Entry
    stages: tuple[Stage, ...]
    start: str
    asked: Mapping[str, Any]

    @property
    def identity(self) -> tuple[str, str, int]:
        """What a record is replaced by."""
        return self.finding, self.name, self.seed

    @property
    def digest(self) -> str:
        """Of everything that decides the record."""
        entry = {name: value for name, value in vars(self.entry).items() if name not in ("stages", "seeds")}
        return hashed([self.start, [stage.digest for stage in self.stages], entry, self.asked])

    @property
    def title(self) -> str:
        """For a line of progress."""
        return f"{self.finding} {self.name} seed {self.seed}"


@dataclass(frozen=True)
class Spec:
    """findings.yaml. sets, asking: see the file. findings: {finding: {arm: its entry}}; about: {finding:
    title}."""

    sets: Mapping[str, Any]
    asking: Mapping[str, Any]
    findings: Mapping[str, Mapping[str, Entry]]
    about: Mapping[str, str] = field(default_factory=dict)


def hashed(values: Any) -> str:
    """16 hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()[:16]


def read_spec(path: Path) -> Spec:
    """findings.yaml, checked. Raises ValueError that names the file, the finding and the arm."""
    tree = yaml.safe_load(path.read_text("utf-8"))
    keys = Entry.__dataclass_fields__.keys()
    for name, questions in tree["sets"].items():
        _refuse(questions, SET, f"{path}: set {name}")
    findings: dict[str, dict[str, Entry]] = {}
    for finding, values in tree["findings"].items():
        _refuse(values, ("title", "paper", "arms", *keys), f"{path}: finding {finding}")
        shared = {key: value for key, value in values.items() if key in keys}
        arms = findings[finding] = {}
        for name, own in values["arms"].items():
            where = f"{path}: finding {finding}, arm {name}"
            _refuse(own, ("after", *keys), where)
            first = choose(f"arm above {name}", own["after"], arms).stages if "after" in own else ()
            rest = {key: value for key, value in own.items() if key != "after"}
            arms[name] = entry = Entry(**shared | rest | {"stages": [*first, *rest.get("stages", ())]})
            _refuse([*entry.measure, *filter(None, [entry.passes])], tree["sets"], where)
    about = {finding: values["title"] for finding, values in tree["findings"].items()}
    return Spec(tree["sets"], tree["asking"], findings, about)


def _refuse(found: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError for a name that is not among the known ones."""
    for name in found:
        if name not in known:
            raise ValueError(f"{where}: unknown {name!r}; there are {', '.join(known)}")


class Plan:
    """The arms of a spec. base, trunk: models; out: the folder of all runs. Raises ValueError for a model
    that is not there, and ConfigError for a setting."""

    def __init__(self, spec: Spec, base: str, trunk: str, out: Path) -> None:
        self.spec = spec
        self.out = out
        self.models = {"{base}": base, "{trunk}": trunk}
        self.hashes = {model: weights_hash(model_folder(model)) for model in (base, trunk)}

    def arms(self, only: Sequence[str], names: Sequence[str], seeds: Sequence[int]) -> list[Arm]:
        """The chosen arms, the first seeds first; an empty choice is all. Raises ValueError for an unknown
        name, and where nothing is left."""
        spec = self.spec
        chosen = {finding: choose("finding", finding, spec.findings) for finding in only or spec.findings}
        every = {name: entry for entries in chosen.values() for name, entry in entries.items()}
        wanted = {name for name in names if choose("arm", name, every)} or set(every)
        found = [
            (turn, finding, name, seed)
            for finding, entries in chosen.items()
            for name, entry in entries.items()
            for turn, seed in enumerate(entry.seeds)
            if name in wanted and (not seeds or seed in seeds)
        ]
        if not found:
            raise ValueError(f"--seeds {' '.join(map(str, seeds))}: none of the chosen arms has such a seed")
        # a sort keeps the order of the file
        return [self.arm(*each) for _, *each in sorted(found, key=lambda each: each[0])]

    def arm(self, finding: str, name: str, seed: int) -> Arm:
        """One arm, with its runs."""
        entry = self.spec.findings[finding][name]
        before, digest, begun = self.models["{base}"], self.hashes[self.models["{base}"]], None
        stages = []
        for recipe, *settings in entry.stages:
            given = [setting for setting in settings if setting.startswith("model=")]
            model = given[0].removeprefix("model=") if given else before
            if model in self.models:
                model = self.models[model]
                digest = self.hashes[model]
            begun = begun or digest
            settings = [setting for setting in settings if setting not in given]
            stages.append(self.stage(recipe, [f"model={model}", f"seed={seed}", *settings], digest))
            before, digest = self.shown(stages[-1].folder), stages[-1].digest
        asking = self.spec.asking
        sets = {each: self.spec.sets[each] for each in {*entry.measure, entry.passes} - {None}}
        how = {"items": asking["items"], "sampled": asking["sampled"], "sets": sets}
        how |= {key: asking[key] for key in ("passes", "prefixes", "pushes") if getattr(entry, ALSO[key])}
        return Arm(finding, name, seed, entry, tuple(stages), begun or digest, how)

    def stage(self, recipe: str, settings: list[str], start: str) -> Stage:
        """A run from a model with the hash `start`. Settings at their default are not in its hash, so that a
        new setting leaves the records valid."""
        cfg = parse.load(recipe, settings)
        digest = hashed([start, differences(Config(), replace(cfg, name=None, out=None, model=Config.model))])
        folder = self.out / f"{recipe.replace('/', '-')}-{digest[:8]}"
        return Stage((recipe, *settings, f"out={self.shown(folder)}"), folder, digest, cfg)

    def shown(self, path: Path) -> str:
        """A path as a command names it: relative to the repository, if it is inside."""
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def listed(arms: list[Arm], records: Mapping, spec: Spec) -> str:
    """The arms with what is measured, and an estimate of the minutes on one core. Shared runs count once."""
    lines = []
    seen: set[str] = set()
    total = 0.0
    for finding in dict.fromkeys(arm.finding for arm in arms):
        lines.append(f"{finding}  {spec.about[finding]}")
        mine = [arm for arm in arms if arm.finding == finding]
        for name in dict.fromkeys(arm.name for arm in mine):
            same = [arm for arm in mine if arm.name == name]
            new = {stage.digest: stage.minutes for arm in same for stage in arm.stages}
            minutes = sum(value for digest, value in new.items() if digest not in seen)
            seen |= set(new)
            total += minutes
            measured = sum(is_measured(arm, records) for arm in same)
            lines.append(
                f"   {name:<24} {measured} of {len(same)} measured, {minutes:5.1f} minutes of one core"
            )
    return "\n".join([*lines, f"{total / 60:.1f} hours of one core in all"])


def is_measured(arm: Arm, records: Mapping) -> bool:
    """Whether a record is of this arm as it is now."""
    return records.get(arm.identity, {}).get("digest") == arm.digest
