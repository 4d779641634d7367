"""Chat data: reads conversations of several shapes, and renders them with the tokenizer's chat template.

The positions of assistant turns in the text are kept.
"""

import datetime
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mrd_ray.data.cells import Unscorable

Message = dict[str, Any]
Span = tuple[int, int]
_ASSISTANTS = ("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai", "function_call")
_SHAREGPT = {"human": "user", "observation": "tool", "function_response": "tool"}
_SHAREGPT |= dict.fromkeys(_ASSISTANTS, "assistant")
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACEHOLDER = "The response 5c0e7d stands here."  # shows whether templates change case
# Put before every chat template: some write today's date, and a run started today must be resumable tomorrow.
# The date is the one that Llama's template uses when it has no clock.
_CLOCK = "".join(
    ["{% macro strftime_now(form) %}{{ form"]
    + [f" | replace('%{code}', '{datetime.datetime(2024, 7, 26).strftime(f'%{code}')}')" for code in "aAbBdjmyYHIMpS"]
    + [" }}{% endmacro %}\n"]
)


class Chat(NamedTuple):
    """A conversation as text, and the spans (start, stop) of the assistant turns that count."""

    text: str
    spans: tuple[Span, ...]


def is_conversation(value: object) -> bool:
    """Whether a cell holds a conversation: a list of turns, an object of lists, or either as JSON text."""
    turns = _turns(value)
    return bool(turns) and all(_is_turn(turn) for turn in turns)


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and (
        (isinstance(turn.get("role"), str) and ("content" in turn or "tool_calls" in turn))
        or (isinstance(turn.get("from"), str) and "value" in turn)
    )


def _turns(value: object) -> list[Any]:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):  # as in CSV files and some others
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    if isinstance(value, dict) and all(isinstance(cell, list) for cell in value.values()):
        if len({len(cell) for cell in value.values()}) != 1:
            return []
        return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]  # of `datasets`
    return value if isinstance(value, list) else []


def messages(value: object, column: str) -> list[Message]:
    """A cell's conversation as {role, content} messages. Raises Unscorable, whose message names the turn."""
    if not is_conversation(value):
        raise Unscorable(f"column {column!r} holds no conversation, a list of role and content: {value!r:.40}")
    found = []
    for number, turn in enumerate(_turns(value), 1):
        message = _without_nulls({name: cell for name, cell in turn.items() if name not in ("from", "value")})
        given = str(turn["role"] if "role" in turn else turn["from"])
        message["role"] = role = _SHAREGPT.get(given.casefold(), given.casefold())
        if role not in _ROLES:
            known = ", ".join([*_ROLES, *_SHAREGPT])
            raise Unscorable(f"turn {number} is by {given!r}; expected one of {known}")
        message["content"] = _content(turn.get("content") if "role" in turn else turn["value"], number)
        found.append(message)
    return found


def _without_nulls(value: Any) -> Any:
    """Removes null fields at any depth: Parquet and Arrow give every object the fields of all others."""
    if isinstance(value, dict):
        return {name: _without_nulls(cell) for name, cell in value.items() if cell is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def joined(prompt: Sequence[Message], response: Sequence[Message], column: str) -> tuple[list[Message], int]:
    """The whole conversation, and the index of the response's first turn. The response may repeat the prompt.

    Raises Unscorable if the response begins with turns that are neither the prompt nor an answer.
    """

    def said(turns: Sequence[Message]) -> list[tuple[str, str]]:
        return [(turn["role"], turn["content"].strip()) for turn in turns]

    lead = next((i for i, turn in enumerate(response) if turn["role"] not in ("system", "developer")), len(response))
    lead = 0 if prompt[0]["role"] in ("system", "developer") else lead
    if said(response[lead : lead + len(prompt)]) == said(prompt):
        return list(response), lead + len(prompt)
    if response[0]["role"] not in ("assistant", "tool", "function"):
        raise Unscorable(
            f"column {column!r} begins with a turn of {response[0]['role']} that is not the prompt's; if it holds "
            f"whole conversations, set data.messages: {column}"
        )
    return [*prompt, *response], len(prompt)


def tools(value: object) -> list[Any] | None:
    """The tools for the template: a list, which may be given as JSON text, or None. Raises Unscorable."""
    try:
        found = json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError):
        found = value
    if not found:
        return None
    if not isinstance(found, list):
        raise Unscorable(f"column 'tools' is no list of tools: {value!r:.40}")
    return list(_without_nulls(found))


def last_answer(turns: Sequence[Message]) -> int:
    """The index of the last assistant turn. Raises Unscorable if there is none."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise Unscorable("it has no assistant turn")
    return answers[-1]


def _content(value: object, number: int) -> str:
    if isinstance(value, list):  # a list of parts, as in OpenAI's format
        parts: list[Any] = [part["text"] if isinstance(part, dict) and "text" in part else part for part in value]
        value = "".join(parts) if all(isinstance(part, str) for part in parts) else value
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unscorable(f"turn {number} is not text: {value!r:.40}")
    return value


def render(
    turns: Sequence[Message], first: int, marked: bool, tokenizer: PreTrainedTokenizerBase, tools: Any = None
) -> Chat:
    """Renders a conversation with the tokenizer's chat template.

    Args:
        first: index of the first turn from which assistant turns count.
        marked: whether to find the spans of assistant turns; if not, there are none.
        tools: the tools for the template, see `tools`.

    Raises:
        Unscorable: the template refuses the conversation, or the spans of assistant turns cannot be found.
    """
    if not marked:
        return Chat(_text(turns, tokenizer, tools), ())
    counted = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= first]
    scored = [i for i in counted if turns[i].get("weight") != 0 and _says_something(turns[i])]
    if not scored:
        raise Unscorable("it has no assistant turn to score, or none that says anything")
    if _GENERATION.search(_template(tokenizer, tools)):
        text, spans = _generated(turns, tokenizer, tools)
        before = sum(turn["role"] == "assistant" for turn in turns[:first])
        if not spans or (before and len(spans) != before + len(counted)):
            raise Unscorable(
                f"the chat template marks {len(spans)} parts as generated in {before + len(counted)} turns"
            )
        if len(spans) == before + len(counted):
            return Chat(text, tuple(span for i, span in zip(counted, spans[before:], strict=True) if i in scored))
        if any(turns[i].get("weight") == 0 for i in counted):
            raise Unscorable("turns have weight 0, but which parts the chat template marks are theirs is not known")
        return Chat(text, tuple(spans[before:]))
    text = _text(turns, tokenizer, tools)
    return Chat(text, tuple(_span(text, turns, i, tokenizer, tools) for i in scored))


def _says_something(turn: Message) -> bool:
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def _span(text: str, turns: Sequence[Message], i: int, tokenizer: PreTrainedTokenizerBase, tools: Any) -> Span:
    """Where turn i is in the whole text: at the end of the rendered turns up to it, with which `text` must begin."""
    which = f"assistant turn {i + 1}" if len(turns) > 2 else "the response"
    calls = turns[i].get("tool_calls")
    until = text if i + 1 == len(turns) else _text(turns[: i + 1], tokenizer, tools)
    other = {"role": "assistant"} if calls else turns[i]  # calls are written after the content and count as part of it
    marked = _text([*turns[:i], other | {"content": _PLACEHOLDER}], tokenizer, tools)
    # What follows a turn is the same for any content, so the turn ends where that begins. What comes before is not:
    # templates add thinking sections there, or drop those in the content.
    beginning, *endings = marked.split(_PLACEHOLDER)
    if len(endings) != 1 or not until.endswith(endings[0]):
        raise Unscorable(f"the chat template changes {which}, repeats it or leaves it out: its place is not known")
    until = until.removesuffix(endings[0])
    start, stop = _place(until, turns[i]["content"], beginning)
    if calls:
        asked = _text(turns[:i], tokenizer, tools, asks=True)
        start, stop = len(asked) if until.startswith(asked) else -1, len(until)
    if start < 0:
        raise Unscorable(f"the chat template changes {which}, repeats it or leaves it out: its place is not known")
    if not text.startswith(until[:stop]):
        raise Unscorable(
            f"the chat template writes what is before {which} otherwise once more turns follow: its place is not known"
        )
    return start, stop


def _place(until: str, content: str, beginning: str) -> Span:
    """Where a turn's content is at the end of `until`, unchanged or trimmed; (-1, -1) if it is not there.

    beginning: what comes before a different content. It tells the content's white space from the template's.
    """
    core = content.strip()
    if until.endswith(content.lstrip()):
        tail = content[len(content.rstrip()) :]
    else:
        until, tail = until.rstrip(), ""
    start = len(until) - len(core + tail)
    if not core or start < 0 or not until.startswith(core + tail, start):
        return -1, -1
    lead = content[: len(content) - len(content.lstrip())]
    if lead and until[:start].endswith(lead) and until[:start] != beginning:
        start -= len(lead)
    return start, len(until)


def _text(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Any, asks: bool = False) -> str:
    """asks: whether to add the beginning of an answer."""
    template = _CLOCK + _template(tokenizer, tools)
    try:
        return str(
            tokenizer.apply_chat_template(
                list(turns), tools=tools, chat_template=template, tokenize=False, add_generation_prompt=asks
            )
        )
    except (jinja2.TemplateError, TypeError, ValueError) as problem:  # a template is a program and can fail like one
        raise Unscorable(f"the chat template refuses it: {problem}") from problem


def _generated(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Any) -> tuple[str, list[Span]]:
    """The text, and the spans that the template itself marks as generated."""
    special: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        rendered: Any = render_jinja_template(
            [list(turns)],
            tools=tools,
            chat_template=_CLOCK + _template(tokenizer, tools),
            return_assistant_tokens_mask=True,
            **special,
        )
        (text,), (spans,) = rendered
    except (jinja2.TemplateError, TypeError, ValueError) as problem:
        raise Unscorable(f"the chat template refuses it: {problem}") from problem
    return str(text), [(start, stop) for start, stop in spans if stop > start]


def _template(tokenizer: PreTrainedTokenizerBase, tools: Any) -> str:
    return str(tokenizer.get_chat_template(tools=tools))
