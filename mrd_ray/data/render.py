"""Renders a row as text, and finds where the response is in it."""

from collections.abc import Mapping
from typing import NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from mrd_ray.config import DataSettings
from mrd_ray.config import template as templates
from mrd_ray.config.template import Template
from mrd_ray.data import conversations
from mrd_ray.data.cells import Unscorable, as_text, cell, lookup, response_text
from mrd_ray.data.columns import SYSTEM, Columns
from mrd_ray.data.conversations import Message, Span

# Put around a response while Jinja renders a sample, to find it again. From Unicode's private-use planes.
_BEGIN, _END = "\U000f5c0e", "\U000f7d01"


class Rendered(NamedTuple):
    """A sample as text, the (start, stop) of its responses (a plain text is one), and whether to add special tokens."""

    text: str
    spans: tuple[Span, ...]
    add_special_tokens: bool


def render(
    values: Mapping[str, object], columns: Columns, data: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> Rendered:
    """Render a row as text. Raises Unscorable."""
    if columns.text is not None:
        text = cell(values, columns.text)
        return Rendered(text, ((0, len(text)),), True)
    if (turns := conversation(values, columns, data)) is not None:
        chat = conversations.render(turns.messages, turns.first, data.score_on == "response", tokenizer, turns.tools)
        return Rendered(chat.text, chat.spans, False)  # a chat template writes the special tokens itself
    text, span = _from_template(templates.parse(data.template), values, columns, data)
    return Rendered(text, () if span is None else (span,), True)


def prompt_text(values: Mapping[str, object], columns: Columns, data: DataSettings) -> str:
    """The prompt of a row with prompt and response. Raises Unscorable."""
    assert columns.prompt is not None
    if lookup(values, columns.prompt) is None and "{" in columns.prompt:
        text, _ = _from_template(templates.parse(columns.prompt), values, columns, data)
        return as_text(text, columns.prompt)
    return cell(values, columns.prompt, data.numbers_as_text)


def with_response(values: Mapping[str, object], columns: Columns, response: str) -> dict[str, object]:
    """The row with its response replaced; in a conversation, the last assistant turn. Raises Unscorable."""
    if columns.messages is None:
        assert columns.response is not None
        in_chat = columns.response in columns.chats
        return {**values, columns.response: [{"role": "assistant", "content": response}] if in_chat else response}
    turns = conversations.messages(lookup(values, columns.messages), columns.messages)
    asked = turns[: conversations.last_answer(turns)]
    return {**values, columns.messages: [*asked, {"role": "assistant", "content": response}]}


class Turns(NamedTuple):
    """A conversation, the index from which assistant turns count, and the tools that it may use."""

    messages: list[Message]
    first: int
    tools: object


def conversation(values: Mapping[str, object], columns: Columns, data: DataSettings) -> Turns | None:
    """The turns of a row if it is chat data, or data.template is chat; else None. Raises Unscorable."""
    if columns.messages is not None:
        turns, first = conversations.messages(lookup(values, columns.messages), columns.messages), 0
    elif columns.prompt is None or columns.response is None or (not columns.chats and data.template != "chat"):
        return None
    else:
        if columns.prompt in columns.chats:
            turns = conversations.messages(lookup(values, columns.prompt), columns.prompt)
        else:
            turns = [{"role": "user", "content": prompt_text(values, columns, data)}]
        first = len(turns)
        if columns.response in columns.chats:
            response = conversations.messages(lookup(values, columns.response), columns.response)
            turns, first = conversations.joined(turns, response, columns.response)
        else:
            turns = [*turns, {"role": "assistant", "content": response_text(values, columns.response, data)}]
    system = next((values.get(name) for name in columns.used if name.casefold() in SYSTEM), None)
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        turns, first = [{"role": "system", "content": system}, *turns], first + 1
    return Turns(turns, first, conversations.tools(values.get("tools")) if "tools" in columns.used else None)


def _from_template(
    template: Template, values: Mapping[str, object], columns: Columns, data: DataSettings
) -> tuple[str, Span | None]:
    """The text, and where the response is in it, or None if the template has none. Raises Unscorable."""
    if template.jinja:
        return _from_jinja(template, values, columns, data)
    text, span = "", None
    for literal, field in template.pieces():
        text += literal
        if field is None:
            continue
        part = _field(field, values, columns, data)
        if field in ("response", columns.response):  # not found by searching: the prompt may hold the same words
            span = (len(text), len(text) + len(part))
        text += part
    return text, span


def _field(field: str, values: Mapping[str, object], columns: Columns, data: DataSettings) -> str:
    if columns.response is not None and field in ("response", columns.response):
        return response_text(values, columns.response, data)
    if field == "prompt" and columns.prompt is not None:
        return prompt_text(values, columns, data)
    if lookup(values, field) in (None, "") and field != columns.prompt:
        raise Unscorable(f"column {field!r} is empty; where it may be, write '{{% if {field} %}}...{{% endif %}}'")
    return cell(values, field, data.numbers_as_text)


def _from_jinja(
    template: Template, values: Mapping[str, object], columns: Columns, data: DataSettings
) -> tuple[str, Span | None]:
    # blank text becomes empty, so that a template can test it with {% if %}
    given = {
        name: "" if isinstance(one, str) and not one.strip() else one for name, one in values.items() if one is not None
    }
    if data.template == "alpaca":
        cell(values, "instruction")
    if "prompt" in template.columns and columns.prompt is not None:
        given["prompt"] = prompt_text(values, columns, data)
    try:
        if columns.response is None:
            return template.rendered(given), None
        response = response_text(values, columns.response, data)
        core = response.strip()
        before, _, after = response.partition(core)

        def with_it(written: str) -> str:
            return template.rendered(_replaced(given, str(columns.response), written) | {"response": written})

        text = with_it(response)
        marked = with_it(f"{_BEGIN}{response}{_END}")
        if _unmarked(marked) != text:  # the template trims the response
            marked = with_it(f"{before}{_BEGIN}{core}{_END}{after}")
    except (jinja2.TemplateError, TypeError, ValueError) as problem:
        raise Unscorable(f"data.template refuses it: {problem}") from problem
    start, stop = marked.find(_BEGIN), marked.find(_END) - len(_BEGIN)
    if _unmarked(marked) != text or marked.count(_BEGIN) != 1:
        if not {columns.response.split(".")[0], "response"} & set(template.columns):
            return text, None
        raise Unscorable("data.template changes the response, repeats it or leaves it out: its place is not known")
    return text, (start, stop)


def _unmarked(text: str) -> str:
    return text.replace(_BEGIN, "").replace(_END, "")


def _replaced(values: Mapping[str, object], column: str, text: str) -> dict[str, object]:
    """The cells with the text of one column replaced. The column may be nested, for example answers.text."""
    if column in values or "." not in column:
        return {**values, column: text}
    name, _, rest = column.partition(".")
    inner = values.get(name)
    return {**values, name: _replaced(inner if isinstance(inner, dict) else {}, rest, text)}
