"""Laws that hold for whatever hypothesis thinks of: configuration, packing, micro-batches, positions, picture
sizes, rows, answers.

Numbers, JSON lines and reflection have theirs in tests/data/answers/test_numbers.py,
tests/data/sources/test_jsonl_source.py and tests/grpo/evaluation/test_reflection.py.
"""

import json
import math
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from zoo import IMAGE, TWINS, tiny_config

from data.answers.parser import TAGS, extract, read, well_formed
from data.images import smart_resize
from data.sources.table import SOURCES
from data.types import LETTERS, MARK, BadPicture, Example
from grpo import config
from grpo.batch import Batch
from grpo.config import Config, ConfigError, Stage, load, parse_args, value_of
from grpo.config.parse import FORMAT
from grpo.config.typed import convert, leaves, read_yaml, unwrapped
from grpo.objective import token_weights
from grpo.variants import WEIGHTINGS
from models.mrope import mrope_positions
from models.packing import Packing

LAW = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# ---- configuration

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
KINDS = {bool: st.booleans(), int: st.integers(0, 10**6), float: st.floats(0, 1e6), str: TEXT}


def values_of(kind):
    """Values of a setting's type."""
    kind, optional = unwrapped(kind)
    if get_origin(kind) is Literal:
        found = st.sampled_from(get_args(kind))
    elif get_origin(kind) is list:
        found = st.lists(values_of(get_args(kind)[0]), max_size=3)
    elif get_origin(kind) is dict:
        found = st.dictionaries(TEXT, values_of(get_args(kind)[1]), max_size=3)
    elif kind is Stage:
        found = st.builds(Stage, st.integers(0, 99), st.integers(2, 9), st.integers(1, 99))
    else:
        found = KINDS[kind]
    return found | st.none() if optional else found


# the folder, the name and the recipe of a run fill each other in
VALUES = {
    key: values_of(kind)
    for key, (kind, _, _) in leaves(Config).items()
    if key not in ("name", "out", "recipe")
}
SETTINGS = st.lists(st.sampled_from(list(VALUES)), unique=True, max_size=4).flatmap(
    lambda keys: st.fixed_dictionaries({key: VALUES[key] for key in keys})
)


def spelt(value):
    """A value as somebody would type it: YAML; text goes to the letter."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        value = [vars(item) if isinstance(item, Stage) else item for item in value]
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
        .removesuffix("\n")
        .removesuffix("\n...")
    )


@LAW
@given(chosen=SETTINGS)
def test_settings_come_back_from_the_command_line_and_from_the_file(tmp_path, chosen):
    """Each is what was typed, or the whole is refused by a ConfigError that names a setting; and the file
    that a run keeps is that configuration."""
    assume(
        all(
            text == text.strip() and text not in ("~", "null")
            for text in chosen.values()
            if isinstance(text, str)
        )
    )
    try:
        made = load("shapes", [f"{key}={spelt(value)}" for key, value in chosen.items()])
    except ConfigError as error:
        # what does not go together; each by itself is of its type
        assert str(error).startswith("shapes.yaml with ")
        return
    assert {key: value_of(made, key) for key in chosen} == chosen
    path = config.save(made, tmp_path)
    assert load(path) == made and yaml.safe_load(path.read_text("utf-8")) == json.loads(
        json.dumps({"format": FORMAT} | made.to_dict())
    )


@LAW
@given(
    arguments=st.lists(
        st.text(max_size=20)
        | st.builds(
            "{}={}".format,
            st.sampled_from([*leaves(Config), "rewards.x", "optim", "--cap"]),
            st.text(max_size=12),
        ),
        max_size=3,
    )
)
def test_any_command_line_is_a_configuration_or_a_config_error(arguments):
    try:
        made, _ = parse_args(arguments)
        assert isinstance(made, Config)
    except ConfigError as error:
        assert str(error)


ODD = st.sampled_from([math.inf, -math.inf, math.nan, "inf", "nan", "1e-6", "1e999", True, 10**400])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@LAW
@given(value=ODD | PLAIN, key=st.sampled_from(list(leaves(Config))))
def test_any_value_of_a_file_is_of_the_settings_type_or_refused(value, key):
    kind = leaves(Config)[key][0]
    try:
        made = convert(value, kind, "mine.yaml: x")
    except ConfigError as error:
        assert str(error).startswith("mine.yaml: x")
        return
    plain, optional = unwrapped(kind)
    if made is None:
        assert optional
    elif plain in KINDS:
        assert type(made) is plain and (
            math.isfinite(made) and float(value) == made if plain is float else made == value
        )
    elif get_origin(plain) is Literal:
        assert made in get_args(plain)
    else:
        assert isinstance(made, get_origin(plain))


@LAW
@example(text="2026-13-01")
@example(text="[" * 5000)
@example(text="1" * 5000)
@given(text=st.text(max_size=60) | st.text("{}[]:,-?&*!|>'\"%@` \n\t#ab1", max_size=40))
def test_any_text_is_yaml_or_a_yaml_error(text):
    try:
        read_yaml(text)
    except yaml.YAMLError as error:
        assert str(error)


# ---- packing and micro-batches


@LAW
@given(
    lengths=st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=4),
    wider=st.integers(0, 2),
    inner=st.sampled_from([(), (2,)]),
)
def test_packing_keeps_every_token_once_and_in_order(lengths, wider, inner):
    length = torch.tensor(lengths)
    longest = max(int(length.max()) + wider, 1)
    packing = Packing.of(length, longest)
    x = (
        torch.arange(1.0, length.numel() * longest + 1)
        .view(*length.shape, longest)
        .reshape(*length.shape, longest, *[1] * len(inner))
        .expand(*length.shape, longest, *inner)
    )
    packed = packing.pack(x)
    assert packed.shape == (int(length.sum()), *inner)
    mask = (torch.arange(longest) < length[..., None]).view(*length.shape, longest, *[1] * len(inner))
    assert torch.equal(packed, x[mask.expand_as(x)].view(-1, *inner))
    assert torch.equal(packing.pad(packed), x * mask) and torch.equal(
        packing.pack(packing.pad(packed)), packed
    )


@LAW
@given(
    data=st.data(),
    groups=st.integers(1, 5),
    group=st.integers(1, 4),
    budget=st.integers(1, 120),
    how=st.sampled_from(["token", "completion", "constant"]),
)
def test_micro_batches_hold_every_token_once_and_their_weights_add_up(data, groups, group, budget, how):
    """Whatever the lengths, the budget, and the prompts that are left out."""
    length = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(1, 9), min_size=group, max_size=group), min_size=groups, max_size=groups
            )
        )
    )
    among = data.draw(st.none() | st.lists(st.integers(0, groups - 1), unique=True))
    prompts = data.draw(st.lists(st.integers(1, 20), min_size=groups, max_size=groups))
    tokens = torch.arange(groups * group * 10).view(groups, group, 10)
    sources = [
        SimpleNamespace(
            uid=str(p), tokens=[0] * size, patches=torch.zeros(0, 4), grid=torch.zeros(0, 3).long()
        )
        for p, size in enumerate(prompts)
    ]
    batch = Batch.of_documents([], sources, tokens, length)
    batch.advantage = torch.arange(1.0, groups * group + 1)
    batch.weight = token_weights(
        batch.mask, WEIGHTINGS[how], tokens=float(length.sum()), completions=float(length.numel()), cap=10
    ).double()
    seen, weight, gradient = [], 0.0, torch.zeros(batch.mask.shape).double()
    for cut in batch.cuts(budget, list(range(groups)) if among is None else among):
        part = batch.micro_batch(cut, image_token=-1, merge=2, device="cpu")
        cost = len(cut.groups) * max(prompts[p] for p in cut.groups) + part.tokens.numel()
        assert cost <= budget or part.length.numel() == 1
        seen += part.tokens.flatten(0, 1)[part.mask].tolist()
        weight += float(part.weight.sum())
        batch.write_back(gradient, part.weight * part.advantage[:, None], cut)
    kept = torch.zeros(groups, dtype=torch.bool)
    kept[range(groups) if among is None else among] = True
    wanted = batch.mask & kept.repeat_interleave(group)[:, None]
    assert sorted(seen) == tokens.flatten(0, 1)[wanted].tolist()
    assert weight == pytest.approx(float((batch.weight * wanted).sum()))
    # of sum(weight * advantage * logp): as of one whole pass
    assert torch.equal(gradient, batch.weight * batch.advantage[:, None] * wanted)


# ---- positions and picture sizes


@pytest.fixture(scope="module")
def twins():
    with torch.device("meta"):
        return {
            name: twin(twin.config_class.from_dict(tiny_config(name).to_dict())).model
            for name, twin in TWINS.items()
        }


@settings(LAW, max_examples=60)
@given(
    name=st.sampled_from(list(TWINS)),
    layout=st.lists(
        st.integers(0, 5) | st.tuples(st.just(1), st.integers(1, 9), st.integers(1, 9)), max_size=6
    ),
    text=st.integers(1, 4),
)
def test_positions_are_those_of_transformers_for_any_layout(twins, name, layout, text):
    """Words and pictures in any order; between two pictures there is a word at least, as every template
    writes."""
    tokens, grids = [5] * text, []
    for part in layout:
        if isinstance(part, int):
            tokens += [7] * part
        else:
            tokens += [5] + [IMAGE] * (part[1] * part[2]) + [6]
            grids.append((1, 2 * part[1], 2 * part[2]))
    tokens, grid = torch.tensor(tokens), torch.tensor(grids, dtype=torch.long).view(-1, 3)
    theirs, delta = twins[name].get_rope_index(
        tokens[None], (tokens[None] == IMAGE).int(), image_grid_thw=grid
    )
    ours, following = mrope_positions(tokens, grid, IMAGE, 2)
    assert torch.equal(ours, theirs[:, 0]) and following == len(tokens) + int(delta) == int(ours.max()) + 1


@settings(LAW, max_examples=400)
@given(
    height=st.integers(-1, 20_000),
    width=st.integers(-1, 20_000),
    low=st.integers(1, 2_000_000),
    more=st.integers(0, 2_000_000),
    factor=st.sampled_from([28, 4, 32]),
)
def test_sizes_are_those_of_transformers(height, width, low, more, factor):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as expected

    try:
        found = smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=low + more)
    except BadPicture:
        assert min(height, width) < 1 or max(height, width) > 200 * min(height, width)
        return
    assert found == expected(height, width, factor=factor, min_pixels=low, max_pixels=low + more)
    assert all(side > 0 and side % factor == 0 for side in found)


# ---- rows and answers

# Without the mark of a picture: a row that has marks and no pictures is refused (tests/data/sources).
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() and MARK not in text
)


@LAW
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"question": WORDS, "answer": WORDS},
            optional={
                "uid": WORDS,
                "task": WORDS,
                "wording": WORDS,
                "extra": st.dictionaries(WORDS, st.integers(), max_size=2),
            },
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda row: row.get("uid", id(row)),
    ),
    choices=st.booleans(),
    ascii=st.booleans(),
)
def test_what_a_line_says_is_what_is_asked(tmp_path, rows, choices, ascii):
    """In any script, with any line breaks inside, escaped or not."""
    if choices:
        rows = [row | {"choices": [row["answer"], row["answer"] + "?"]} for row in rows]
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows), encoding="utf-8", newline=""
    )
    found = SOURCES["jsonl"](tmp_path / "mine.jsonl", "all", None, 0)
    for row, asked in zip(rows, found, strict=True):
        assert (asked.question, asked.answer, asked.choices) == (
            row["question"],
            row["answer"],
            tuple(row.get("choices", ())),
        )
        assert (
            asked.task == row.get("task", "")
            and asked.uid == row.get("uid", asked.uid)
            and {**row.get("extra", {}), "kind": "text"} == asked.extra
        )


CHOICES = st.lists(
    st.text("abc dé", min_size=2, max_size=6).map(str.strip).filter(lambda text: len(text) > 1),
    min_size=2,
    max_size=5,
    unique_by=str.casefold,
).map(tuple)


@LAW
@given(
    choices=CHOICES,
    data=st.data(),
    thought=st.text(max_size=30),
    space=st.sampled_from(["", " ", "\n", " \n "]),
)
def test_a_plain_answer_is_read_whatever_was_thought(choices, data, thought, space):
    """By letter, in brackets, by text, by both; and after thoughts without tags."""
    assume(
        not any(tag in thought for tag in TAGS)
        and len({" ".join(choice.split()) for choice in choices}) == len(choices)
    )
    index = data.draw(st.integers(0, len(choices) - 1))
    letter, choice = LETTERS[index], choices[index]
    said = data.draw(
        st.sampled_from(
            [
                letter,
                letter.lower(),
                f"({letter})",
                f"[{letter}]",
                f"{letter}.",
                choice,
                choice.upper(),
                f"{choice}.",
                f"({letter}) {choice}",
                f"{letter}: {choice}",
            ]
        )
    )
    text = f"<think>{thought}</think>{space}<answer>{space}{said}{space}</answer>"
    assert extract(text, choices) == (choice, letter, "") and well_formed(text)
    assert extract(f"<answer>({letter}) {choices[index - 1]}</answer>", choices).answer is None
    assert (
        extract(f"{text}<answer>{said}</answer>", choices).answer is None
        and extract(f"<think>{text}", choices).answer is None
    )


@LAW
@given(
    text=st.text(max_size=80)
    | st.lists(st.sampled_from([*TAGS, "A", "(B)", "c", " ", "3"]) | st.text(max_size=3), max_size=14).map(
        "".join
    ),
    choices=st.just(()) | CHOICES,
)
def test_what_is_read_is_a_choice_or_stands_in_the_text(text, choices):
    example = Example(
        "u", "Q?", choices, choices[0] if choices else "3", extra={} if choices else {"kind": "number"}
    )
    found = read(text, example)
    assert (found.answer is None) == bool(found.why)
    if found.answer is not None:
        assert text.count("<answer>") == text.count("</answer>") == 1
        assert (
            found.answer in choices and found.letter == LETTERS[choices.index(found.answer)]
            if choices
            else found.answer in text and found.letter is None
        )
