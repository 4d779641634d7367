"""Chat data: the shapes that conversations come in -> text by the tokenizer's own template, assistant turns marked."""

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
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACEHOLDER = "The response 5c0e7d stands here."  # mixed case and bare ends, to notice templates that change them
# Goes before every chat template, since some write today's date, and a run begun today must be resumable tomorrow.
# The day is the one that Llama's template takes where it has no clock.
_CLOCK = "".join(
    ["{% macro strftime_now(form) %}{{ form"]
    + [f" | replace('%{code}', '{datetime.datetime(2024, 7, 26).strftime(f'%{code}')}')" for code in "aAbBdjmyYHIMpS"]
    + [" }}{% endmacro %}\n"]
)


class Chat(NamedTuple):
    """A conversation as text, and the places in it, start..stop, of the assistant turns that count."""

    text: str
    spans: tuple[Span, ...]


def is_conversation(value: Any) -> bool:
    """Whether a cell holds a conversation: a list of turns, an object of lists, or either as JSON text."""
    turns = _turns(value)
    return bool(turns) and all(_is_turn(turn) for turn in turns)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and (
        (isinstance(turn.get("role"), str) and ("content" in turn or "tool_calls" in turn))
        or (isinstance(turn.get("from"), str) and "value" in turn)
    )


def _turns(value: Any) -> list[Any]:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):  # how CSV files, and some others, hold them
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    if isinstance(value, dict) and all(isinstance(cell, list) for cell in value.values()):
        if len({len(cell) for cell in value.values()}) != 1:
            return []
        return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]  # of `datasets`
    return value if isinstance(value, list) else []


def messages(value: Any, column: str) -> list[Message]:
    """A cell's conversation as {role, content} messages. Raises Unscorable, which names the turn."""
    if not is_conversation(value):
        raise Unscorable(f"column {column!r} holds no conversation, a list of role and content: {value!r:.40}")
    found = []
    for number, turn in enumerate(_turns(value), 1):
        message = {name: cell for name, cell in turn.items() if cell is not None and name not in ("from", "value")}
        given = str(turn["role"] if "role" in turn else turn["from"])
        message["role"] = role = _SHAREGPT.get(given, given)
        if role not in _ROLES:
            raise Unscorable(f"turn {number} is by {given!r}; expected one of {', '.join(_ROLES)}")
        message["content"] = _content(turn.get("content") if "role" in turn else turn["value"], number)
        found.append(message)
    return found


def tools(value: Any) -> list[Any] | None:
    """What a template is told of tools: a list, also as JSON text. None without any. Raises Unscorable."""
    try:
        found = json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError):
        found = value
    if not found:
        return None
    if not isinstance(found, list):
        raise Unscorable(f"column 'tools' is no list of tools: {value!r:.40}")
    return found


def last_answer(turns: Sequence[Message]) -> int:
    """The index of the last assistant turn. Raises Unscorable if there is none."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise Unscorable("it has no assistant turn")
    return answers[-1]


def _content(value: Any, number: int) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)  # parts, as OpenAI has them
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unscorable(f"turn {number} is not text: {value!r:.40}")
    return value


def render(
    turns: Sequence[Message], first: int, marked: bool, tokenizer: PreTrainedTokenizerBase, tools: Any = None
) -> Chat:
    """A conversation by the tokenizer's chat template.

    Args:
        first: assistant turns from this one on count.
        marked: whether their places are wanted; without, there are no spans.
        tools: what the template is told of tools.

    Raises:
        Unscorable: the template refuses the conversation, or the places of assistant turns in it are not known.
    """
    if not marked:
        return Chat(_text(turns, tokenizer, tools), ())
    counted = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= first]
    if not counted:
        raise Unscorable("it has no assistant turn to score")
    if _GENERATION.search(_template(tokenizer, tools)):
        text, spans = _generated(turns, tokenizer, tools)
        before = sum(turn["role"] == "assistant" for turn in turns[:first])
        if not spans or (before and len(spans) != before + len(counted)):
            raise Unscorable(
                f"the chat template marks {len(spans)} parts as generated in {before + len(counted)} turns"
            )
        return Chat(text, tuple(spans[before:]))
    text = _text(turns, tokenizer, tools)
    return Chat(text, tuple(_span(text, turns, i, tokenizer, tools) for i in counted))


def _span(text: str, turns: Sequence[Message], i: int, tokenizer: PreTrainedTokenizerBase, tools: Any) -> Span:
    """Where turn i is in the whole text: at the end of the conversation up to it, of which the text must be more."""
    which = f"assistant turn {i + 1}" if len(turns) > 2 else "the response"
    until = text if i + 1 == len(turns) else _text(turns[: i + 1], tokenizer, tools)
    marked = _text([*turns[:i], turns[i] | {"content": _PLACEHOLDER}], tokenizer, tools)
    # What follows a turn is the same for any turn, so the turn ends where that begins. What goes before is not:
    # templates write thoughts of their own there, or leave those that it brings.
    _, *endings = marked.split(_PLACEHOLDER)
    content = turns[i]["content"].strip()  # templates may trim it
    ended = len(endings) == 1 and until.endswith(endings[0])
    before_ending = until.removesuffix(endings[0]).rstrip() if ended else ""
    if not content or not before_ending.endswith(content):
        raise Unscorable(f"the chat template changes {which}, repeats it or leaves it out: its place is not known")
    if not text.startswith(before_ending):
        raise Unscorable(
            f"the chat template writes what is before {which} otherwise once more turns follow: its place is not known"
        )
    return len(before_ending) - len(content), len(before_ending)


def _text(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Any) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(turns), tools=tools, chat_template=_CLOCK + _template(tokenizer, tools), tokenize=False
            )
        )
    except (jinja2.TemplateError, TypeError, ValueError) as problem:  # a template is a program, and can fail as one
        raise Unscorable(f"the chat template refuses it: {problem}") from problem


def _generated(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Any) -> tuple[str, list[Span]]:
    """The text with the places that the template itself marks as generated."""
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
