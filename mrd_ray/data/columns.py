"""Which columns of a source hold what: as configured, or well-known names if only one choice is possible."""

import re
from collections.abc import Iterable, Mapping, Sequence
from shlex import quote
from typing import NamedTuple

from mrd_ray.config import DataSettings
from mrd_ray.config import template as templates
from mrd_ray.config.template import Template
from mrd_ray.data.conversations import is_conversation
from mrd_ray.errors import UserError

_PAIRS = (
    ("prompt", "response"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
)
_PROMPTS = ("prompt", "question", "instruction", "query", "input", "context", "passage", "problem")
_RESPONSES = (
    "response", "answer", "completion", "output", "answers", "labels", "label", "target", "targets", "gt",
    "ground_truth", "solution", "reply", "chosen", "rejected",
)  # fmt: skip
_MESSAGES = ("messages", "conversations", "conversation", "dialogue")
# Columns with these names are usually part of a sample, so a guess must not leave one out.
ROLES = {"text", *_PROMPTS, *_RESPONSES, *_MESSAGES}
_CLASSES = {"label", "labels", "target", "targets"}  # class labels of a text, unless they hold text
SYSTEM = ("system", "system_prompt")
_SHOWN = 4  # choices that a message offers


class Columns(NamedTuple):
    """Which columns hold what; see DataSettings.

    prompt: may be a template. used: all columns that a sample is made of. chats: prompt or response, or both, where
    they hold conversations. This is decided for all rows together, so that no text is mistaken for a conversation.
    """

    text: str | None
    prompt: str | None
    response: str | None
    messages: str | None
    id: str | None
    used: tuple[str, ...]
    chats: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = {"text": self.text, "prompt": self.prompt, "response": self.response, "messages": self.messages}
        named = [f"{role} {column}" for role, column in parts.items() if column is not None]
        others = [column for column in self.used if column not in parts.values()]
        return ", ".join([*named, *others, *([f"id {self.id}"] if self.id is not None else [])])


def kinds(rows: Iterable[Mapping[str, object]]) -> dict[str, str]:
    """What the columns of these rows hold, in the order of the columns.

    One of messages, text, texts, nested text, nested texts, number, other, nothing.
    """
    found: dict[str, str] = {}
    for values in rows:
        for name, value in values.items():
            if found.setdefault(name, "nothing") == "nothing":
                found[name] = kind(value)
    return found


def kind(value: object) -> str:
    """What one cell holds, in the terms of `kinds`."""
    if value in (None, "", [], {}):
        return "nothing"
    if is_conversation(value):
        return "messages"
    if isinstance(value, str):
        return "text" if value.strip() else "nothing"
    if type(value) in (int, float):
        return "number"
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "texts"
    if isinstance(value, dict) and kind(value.get("text")) in ("text", "texts"):
        return f"nested {kind(value['text'])}"
    return "other"


def choose(data: DataSettings, present: Mapping[str, str], where: str) -> Columns:
    """The configured columns, or the well-known ones if exactly one choice of them is present.

    Args:
        present: from `kinds`.
        where: how messages begin.

    Raises:
        UserError: a configured column is missing, or more than one choice is possible; the message shows the flags.
    """

    def require(setting: str, name: str) -> str:
        if name not in present and not ("." in name and name.split(".")[0] in present):
            raise UserError(f"{where}: no column {name!r} ({setting}); its columns are {', '.join(present)}")
        return name

    id_column = data.id
    if data.id == "auto" and "auto" not in present:
        id_column = next((name for name in ("sample_id", "id") if name in present), None)
    elif data.id is not None:
        require("data.id", data.id)

    def columns(text: str | None = None, prompt: str | None = None, response: str | None = None,
                messages: str | None = None, others: Sequence[str] = ()) -> Columns:  # fmt: skip
        plain: list[str | None] = [text, prompt, response, messages, *others]
        if prompt is not None and prompt not in present and "{" in prompt:
            parts = [require("data.prompt", name) for name in templates.parse(prompt).columns]
            plain = [*parts, response, *others]
        chats = tuple(name for name in (prompt, response) if name is not None and present.get(name) == "messages")
        if messages is not None or chats or (data.template == "chat" and text is None):
            plain += [name for name in present if name.casefold() in SYSTEM][:1]
            plain += ["tools"] if "tools" in present else []
        used = tuple(dict.fromkeys(name for name in plain if name is not None))
        return Columns(text, prompt, response, messages, id_column, used, chats)

    if data.text is not None:
        return columns(text=require("data.text", data.text))
    if data.messages is not None:
        return columns(messages=require("data.messages", data.messages))
    if data.template != "chat" and (template := templates.parse(data.template)).own_columns:
        names = [require("data.template", name) for name in template.own_columns if not _may_lack(data, name, present)]
        _refuse_literal_columns(template, present, where)
        prompt, response = _of_template(data, template, present, where)
        response = None if response is None else require("data.response", response)
        return columns(prompt=prompt, response=response, others=names)
    if data.prompt is not None:
        prompt = data.prompt if "{" in data.prompt else require("data.prompt", data.prompt)
        return columns(prompt=prompt, response=require("data.response", str(data.response)))
    return columns(**_guess(data, present, where))


def _refuse_literal_columns(template: Template, present: Mapping[str, str], where: str) -> None:
    """Raises UserError if a format string has a column as {{ name }}: doubled braces are literal there."""
    doubled = [] if template.jinja else re.findall(r"(?<!\{)\{\{\s*(\w+)\s*\}\}(?!\})", template.text)
    if named := [name for name in doubled if name in present]:
        raise UserError(
            f"{where}: data.template holds {{{{{named[0]}}}}}, which a format string turns into {{{named[0]}}}, not "
            f"into the column's text; write all columns as {{{named[0]}}}, or all as {{{{ {named[0]} }}}}"
        )


def _may_lack(data: DataSettings, name: str, present: Mapping[str, str]) -> bool:
    return data.template == "alpaca" and name == "input" and name not in present


def _of_template(
    data: DataSettings, template: Template, present: Mapping[str, str], where: str
) -> tuple[str | None, str | None]:
    """The prompt and response columns of a template that names other columns too.

    Unless configured, {prompt} and {response} are the columns with these names. Raises UserError if those are missing.
    """
    set_to = {"prompt": data.prompt, "response": data.response or ("output" if data.template == "alpaca" else None)}
    for role in set_to:
        if role in template.columns and set_to[role] is None:
            if role not in present:
                raise UserError(f"{where}: data.template holds {{{role}}}; set data.{role} to the column for it")
            set_to[role] = role
    if set_to["response"] is None and data.score_on == "response":
        raise UserError(
            f"{where}: data.score_on: response, but data.template does not show which of "
            f"{', '.join(template.own_columns)} is the response; name that column with data.response"
        )
    return set_to["prompt"], set_to["response"]


def _guess(data: DataSettings, present: Mapping[str, str], where: str) -> dict[str, str]:
    """The only possible choice of well-known columns. Raises UserError if there is none, or another may be meant."""
    named = {name.casefold(): name for name in present}
    readable = {name for name, kind in present.items() if kind in ("text", "messages") or kind == "nothing"}

    def there(role: str) -> str | None:
        return role if role in present else named.get(role)

    found: list[dict[str, str]] = []
    for roles in _PAIRS:
        prompt, response = map(there, roles)
        if prompt is not None and response is not None:
            found.append({"prompt": prompt, "response": response})
    if (text := there("text")) is not None and data.score_on == "all":
        found.append({"text": text})
    for role in _MESSAGES:
        if (name := there(role)) is not None and present[name] == "messages":
            found.append({"messages": name})
    left = [
        name for name in present
        if name.casefold() in ROLES and not (found and name in found[0].values()) and _may_be_part(name, present[name])
    ]  # fmt: skip
    if len(found) == 1 and not left:
        return found[0]
    readings = _readings(present, readable)
    flags = "".join(f"\n  {reading}" for reading in readings[:_SHOWN])
    if len(found) == 1:
        taken = " and ".join(found[0].values())
        raise UserError(
            f"{where}: {taken} would be scored, and {', '.join(left)}, which may be part of the sample, left out; "
            f"say which columns to use:{flags}"
        )
    raise UserError(
        f"{where}: cannot tell which columns to score; set data.text, data.messages, or data.prompt and data.response. "
        f"Its columns are {', '.join(present)}{flags and '. For example:'}{flags}"
    )


def _may_be_part(name: str, kind: str) -> bool:
    """Whether a column with a well-known name may be part of a sample, rather than the class label of a text."""
    return kind in ("text", "messages") or (kind != "nothing" and name.casefold() not in _CLASSES)


def _readings(present: Mapping[str, str], readable: set[str]) -> list[str]:
    """The flags for each possible choice of columns."""
    names = {name.casefold(): name for name in present if name in readable and present[name] != "nothing"}
    roles = {role: quote(name) for role, name in names.items()}
    prompts = [roles[role] for role in (*_PROMPTS, "text") if role in roles]
    responses = [roles[role] for role in _RESPONSES if role in roles]
    more = {"texts": " --data.response_index 0", "nested texts": ".text --data.response_index 0"}
    more |= {"nested text": ".text", "number": " --data.numbers_as_text true"}
    responses += [
        quote(name) + more[kind] for name, kind in present.items() if kind in more and name.casefold() in _RESPONSES
    ]
    readings = []
    if {"instruction", "input", "output"} <= roles.keys():
        readings.append("--data.template alpaca")
    readings += [
        f"--data.messages {quote(name)}" for name, kind in present.items() if kind == "messages" and not prompts
    ]
    readings += [f"--data.messages {roles[role]}" for role in _MESSAGES if role in roles and prompts]
    readings += [f"--data.prompt {prompt} --data.response {response}" for prompt in prompts for response in responses]
    readings += [f"--data.text {roles['text']}"] if "text" in roles else []
    if len(prompts) > 1 and responses and not readings[0].endswith("alpaca"):
        parts = "\\n".join(f"{{{names[role]}}}" for role in (*_PROMPTS, "text") if role in names)  # see `unescaped`
        readings.insert(1, f"--data.template '{parts}\\n{{response}}' --data.response {responses[0]}")
    pairs, rest = readings[: _SHOWN - 1], readings[_SHOWN - 1 :]
    return pairs + rest[-1:]


def unused(columns: Columns, present: Mapping[str, str]) -> list[str]:
    """Columns that are not used for samples, except the id."""
    used = {name if name in present else name.split(".")[0] for name in columns.used}
    return [name for name in present if name not in used and name != columns.id]
