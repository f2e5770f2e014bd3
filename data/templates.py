"""Prompt templates: built in, from a file of one's own, or the model's own chat template.

A Template is plain text with places for the pictures and the question. A chat template is a program (jinja).
It is rendered once, in a sandbox, for one question with one picture; its text with both taken out is the
Template. So every question is encoded as ordinary text, whatever the program would do with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from data.processor import json_object

VISION_START, IMAGE, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
VIDEO = "<|video_pad|>"
SHOWN = VISION_START + IMAGE + VISION_END
# begins a turn in the prompts of instruct models
TURN_START = "<|im_start|>"
# names of no built-in template: the model's own chat template; what a folder's policy was trained with
OWN, TRAINED = "chat", "trained"
# in a policy's folder: what it was trained with
RECORD = "trained_with.json"
# where a model folder may have its chat template
FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
# where the question, the picture's place and the system prompt stand in a rendered chat template
_ASKED, _SYSTEM = "\ue000asked\ue001", "\ue000system\ue001"


@dataclass(frozen=True)
class Template:
    """The text around a question. `{pictures}`, `{asked}` and `{system}` are filled in; `<|…|>` are special
    tokens.

    `opening`: the start of the answer that the prompt already holds; `Chat.text` puts it back in front.
    `bare`: a completion without reasoning. Imitation learns from it where a source has no documents.
    `system`: the system prompt, ordinary text.
    """

    text: str
    opening: str = ""
    bare: str = "{answer}"
    system: str = ""


def from_values(values: Any, where: str) -> Template:
    """A Template from the values of a file. Raises ValueError that begins with `where`."""
    known = [field.name for field in fields(Template)]
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f"{where}: a template has texts under {', '.join(known)}")
    if odd := sorted(set(values) - set(known)):
        raise ValueError(f"{where}: unknown key {odd[0]!r}; a template has {', '.join(known)}")
    text = values.get("text", "")
    for place, most in (("{asked}", 1), ("{pictures}", 1), ("{system}", None)):
        count = text.count(place)
        if count > 1 or (most and not count):
            raise ValueError(f"{where}: text has {place} {count} times; write it once")
    for token in (VISION_START, IMAGE, VISION_END, VIDEO):
        if token in text:
            raise ValueError(f"{where}: text holds {token}; {{pictures}} stands for all tokens of pictures")
    if values.get("system") and "{system}" not in text:
        raise ValueError(f"{where}: there is a system prompt and no {{system}} in the text")
    if not text.endswith(values.get("opening", "")):
        raise ValueError(f"{where}: the text does not end with the opening {values['opening']!r}")
    return Template(**values)


_BUILT_IN = Path(__file__).with_name("templates.yaml")
TEMPLATES: Mapping[str, Template] = {
    name: from_values(values, f"{_BUILT_IN.name}, {name}")
    for name, values in yaml.safe_load(_BUILT_IN.read_text("utf-8")).items()
}


def open_template(name: str, folder: Path, system: str | None = None) -> Template:
    """The template of that name, for the model in `folder`.

    name: of a built-in one; FILE.yaml with the fields of Template; FILE.jinja; "chat", the model's own chat
    template; "trained", what the folder's policy was trained with.  system: in place of the template's own
    system prompt (None: leave that).  Raises ValueError naming file or setting.
    """
    path = Path(name)
    if name in TEMPLATES:
        found = TEMPLATES[name]
    elif name == OWN:
        found = _rendered(*chat_template(folder), folder, system)
    elif name == TRAINED:
        found = from_values(record(folder).get("template"), f"{folder / RECORD}: template")
    elif path.suffix in (".yaml", ".yml"):
        try:
            found = from_values(yaml.safe_load(_text(path)), name)
        except yaml.YAMLError as error:
            raise ValueError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    elif path.suffix == ".jinja":
        found = _rendered(_text(path), path, folder, system)
    else:
        known = f"there are {', '.join(TEMPLATES)}; {OWN} (the model's own), FILE.yaml and FILE.jinja"
        raise ValueError(f"no template {name!r}; {known}")
    if system is None:
        return found
    if "{system}" not in found.text:
        raise ValueError(f"system: the template {name} has no place for a system prompt")
    return replace(found, system=system)


def is_file(name: str) -> bool:
    """Whether a template's name is that of a file."""
    return name not in TEMPLATES and Path(name).suffix in (".yaml", ".yml", ".jinja")


def record(folder: Path) -> dict[str, Any]:
    """What a folder's policy was trained with; {} if it does not say. Raises ValueError."""
    return json_object(folder / RECORD)


def chat_template(folder: Path) -> tuple[str, Path]:
    """The source of a model's own chat template, and its file; ("", folder) if it has none. Raises
    ValueError naming a file that is no JSON."""
    for name in FILES:
        file = folder / name
        if not file.is_file():
            continue
        text = file.read_text("utf-8", "replace")
        try:
            found = json.loads(text) if name.endswith("json") else {"chat_template": text}
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}") from error
        source = found.get("chat_template") if isinstance(found, dict) else None
        if isinstance(source, list):
            # several, with names
            named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
            source = named.get("default") or next(iter(named.values()), None)
        if source and isinstance(source, str):
            return source, file
    return "", folder


def renders_turns(folder: Path) -> bool:
    """Whether the model's chat template writes turns, as an instruct model's does; a base model's writes the
    question alone. The template is searched, never run. Raises ValueError naming a file that is no JSON."""
    source, _ = chat_template(folder)
    # what stands in {# #} and {% %} is not written
    return TURN_START in re.sub(r"\{#.*?#\}|\{%.*?%\}", "", source, flags=re.DOTALL)


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error


def _rendered(source: str, file: Path, folder: Path, system: str | None) -> Template:
    """A chat template as a Template.  folder: of the model, for the names of its special tokens.  system:
    whether it has to have a place for a system prompt."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not source:
        raise ValueError(f"{folder}: the model has no chat template; name a template of another kind")

    def refuse(message: str) -> None:
        raise TemplateError(message)

    # transformers' settings, without `strftime_now`: a prompt must not depend on the day
    loops = ["jinja2.ext.loopcontrols"]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    sandbox.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    messages: list[dict[str, Any]] = [{"role": "system", "content": _SYSTEM}] if system is not None else []
    messages.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _ASKED}]})
    try:
        names = {"messages": messages, "add_generation_prompt": True, "raise_exception": refuse}
        text = sandbox.from_string(source).render(_special_tokens(folder) | names)
    except Exception as error:
        # whatever the program raises
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: the chat template fails: {type(error).__name__}: {words}") from error
    places = {SHOWN: "{pictures}", _ASKED: "{asked}"} | ({_SYSTEM: "{system}"} if system is not None else {})
    if any(place in text for place in ("{pictures}", "{asked}", "{system}")):
        raise ValueError(f"{file}: the chat template writes braces that stand for something here")
    words = {SHOWN: "the picture", _ASKED: "the question", _SYSTEM: "the system prompt"}
    for mark, place in places.items():
        if (count := text.count(mark)) != 1:
            raise ValueError(f"{file}: the chat template writes {words[mark]} {count} times, not once")
        text = text.replace(mark, place)
    opening = re.search(r"<think>\s*\Z", text)
    return from_values({"text": text, "opening": opening[0] if opening else ""}, str(file))


def _special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token and others, as a chat template may write them."""
    found = {}
    for key, value in json_object(folder / "tokenizer_config.json").items():
        value = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(value, str):
            found[key] = value
    return found


# ---- a Template for others


def as_record(template: Template, **others: Any) -> str:
    """The text of the record: the template, and what else the policy was trained with."""
    return json.dumps({"template": asdict(template)} | others, indent=1, ensure_ascii=False) + "\n"


# The last question counts, because training asks one. Pictures ahead of its text stand where the template
# has its pictures, others where they are.
_JINJA = """\
{%- set said = namespace(system=SYSTEM, pictures='', asked='') -%}
{%- for message in messages -%}
{%- set parts = message.content -%}
{%- if parts is string -%}
{%- set parts = [{'type': 'text', 'text': parts}] -%}
{%- endif -%}
{%- if message.role == 'system' -%}
{%- set said.system = parts | map(attribute='text') | join -%}
{%- elif message.role == 'user' -%}
{%- set said.pictures = '' -%}
{%- set said.asked = '' -%}
{%- for part in parts -%}
{%- if part.type == 'text' -%}
{%- set said.asked = said.asked + part.text -%}
{%- elif said.asked -%}
{%- set said.asked = said.asked + SHOWN -%}
{%- else -%}
{%- set said.pictures = said.pictures + SHOWN -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{{- TEXT -}}
"""


def as_jinja(template: Template) -> str:
    """A Template as a chat template of transformers and of servers, which asks the same."""
    pieces = re.split(r"(\{pictures\}<image>|\{pictures\}|\{asked\}|\{system\})", template.text)
    filled = {
        "{pictures}<image>": f"(said.pictures + {_literal('<image>')} if said.pictures else '')",
        "{pictures}": "said.pictures",
        "{asked}": "said.asked",
        "{system}": "said.system",
    }
    text = " + ".join(filled.get(piece) or _literal(piece) for piece in pieces if piece)
    words = {"SYSTEM": _literal(template.system), "SHOWN": _literal(SHOWN), "TEXT": text}
    return re.sub("SYSTEM|SHOWN|TEXT", lambda match: words[match[0]], _JINJA)


def _literal(text: str) -> str:
    """A text as a string of jinja, which reads escapes as Python does."""
    return json.dumps(text)
