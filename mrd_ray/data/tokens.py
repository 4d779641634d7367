"""One row -> its tokens and which of them count."""

import datetime
import string
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from mrd_ray.config import DataConfig
from mrd_ray.errors import UserError


class Unscorable(Exception):
    """This sample has no score; the message is the reason that its row carries."""


class Tokens(NamedTuple):
    """token_ids[t] is scored, given those before it, where scored[t]; the first never is."""

    token_ids: list[int]
    scored: list[bool]


class Columns(NamedTuple):
    """Which columns hold what; see DataConfig."""

    text: str | None
    prompt: str | None
    response: str | None
    id: str | None


_KNOWN_PAIRS = (("prompt", "response"), ("question", "answer"))


def choose_columns(data: DataConfig, present: list[str], where: str) -> Columns:
    """The configured columns, or the well-known ones if exactly one choice is present. Raises UserError."""

    def require(setting: str, name: str) -> str:
        if name not in present:
            raise UserError(f"{where}: no column {name!r} (data.{setting}); its columns are {', '.join(present)}")
        return name

    id_column = require("id", data.id) if data.id else next((c for c in ("sample_id", "id") if c in present), None)
    if data.text is not None:
        return Columns(require("text", data.text), None, None, id_column)
    if data.prompt is not None and data.response is not None:
        return Columns(None, require("prompt", data.prompt), require("response", data.response), id_column)
    found = [Columns(None, p, r, id_column) for p, r in _KNOWN_PAIRS if p in present and r in present]
    if "text" in present and data.score_on == "all":
        found.append(Columns("text", None, None, id_column))
    if len(found) != 1:
        raise UserError(
            f"{where}: cannot tell which columns to score; set data.text, or data.prompt and data.response. "
            f"Its columns are {', '.join(present)}"
        )
    return found[0]


def is_id(value: Any) -> bool:
    """Whether a cell can be a sample's id."""
    return type(value) in (str, int) and value != "" and _is_unicode(str(value))


def _is_unicode(value: str) -> bool:
    """Whether UTF-8 can write it; JSON escapes can also say half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def cell(values: dict[str, Any], column: str) -> str:
    """The text in a row's column. Raises Unscorable."""
    value = values.get(column)
    if value is None:
        raise Unscorable(f"column {column!r} is missing or null")
    if not isinstance(value, str):
        raise Unscorable(f"column {column!r} is not text but {type(value).__name__}: {value!r:.40}")
    if not value.strip():
        raise Unscorable(f"column {column!r} is empty")
    if not _is_unicode(value):
        raise Unscorable(f"column {column!r} is not text: it holds half of a surrogate pair")
    return value


class Rendered(NamedTuple):
    """A sample as text, start..stop of its response (of all, if it has none), and whether to add special tokens."""

    text: str
    start: int
    stop: int
    add_special_tokens: bool


def render(values: dict[str, Any], columns: Columns, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """A row's columns put together. Raises Unscorable."""
    if columns.text is not None:
        text = cell(values, columns.text)
        return Rendered(text, 0, len(text), True)
    assert columns.prompt is not None
    assert columns.response is not None
    prompt, response = cell(values, columns.prompt), cell(values, columns.response)
    if data.template == "chat":
        text, start, stop = _render_chat(prompt, response, tokenizer)
    else:
        text, start, stop = _render_template(data.template, prompt, response)
    return Rendered(text, start, stop, data.template != "chat")  # a chat template writes its special tokens itself


def _render_template(template: str, prompt: str, response: str) -> tuple[str, int, int]:
    text, start = "", 0
    for literal, field, _, _ in string.Formatter().parse(template):
        text += literal
        if field == "prompt":
            text += prompt
        elif field == "response":  # its place is known from here alone: its words may occur in the prompt too
            start = len(text)
            text += response
    return text, start, start + len(response)


_PLACEHOLDER = "The response 5c0e7d stands here."  # mixed case and bare ends, to notice templates that change them
# Goes before every chat template, since some write today's date, and a run begun today must be resumable tomorrow.
# The day is the one that Llama's template takes where it has no clock.
_CLOCK = "".join(
    ["{% macro strftime_now(form) %}{{ form"]
    + [f" | replace('%{code}', '{datetime.datetime(2024, 7, 26).strftime(f'%{code}')}')" for code in "aAbBdjmyYHIMpS"]
    + [" }}{% endmacro %}\n"]
)


def _render_chat(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int, int]:
    def chat(answer: str) -> str:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        template = _CLOCK + tokenizer.get_chat_template()
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))

    try:
        text, marked = chat(response), chat(_PLACEHOLDER)
    except (jinja2.TemplateError, TypeError, ValueError) as problem:  # a template is a program, and can fail as one
        raise Unscorable(f"the chat template refuses it: {problem}") from None
    # What follows the response is the same for any response, so the response ends where that begins. What goes before
    # is not: templates write thoughts of their own there, or leave those that the response brings.
    _, *endings = marked.split(_PLACEHOLDER)
    response = response.strip()  # templates may trim it
    before_ending = text.removesuffix(endings[0]).rstrip() if len(endings) == 1 and text.endswith(endings[0]) else ""
    if not before_ending.endswith(response):
        raise Unscorable("the chat template changes the response, repeats it or leaves it out: its place is not known")
    return text, len(before_ending) - len(response), len(before_ending)


def tokenize(
    rendered: Rendered, data: DataConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> Tokens:
    """Tokens of a sample; all are scored, or those that overlap the response. Raises Unscorable."""
    everything = data.score_on == "all"
    encoded = tokenizer(
        rendered.text,
        add_special_tokens=rendered.add_special_tokens,
        return_offsets_mapping=not everything,
        verbose=False,
    )
    token_ids = list(encoded["input_ids"])
    if everything:
        scored = [True] * len(token_ids)
    else:
        scored = [
            first < rendered.stop and last > rendered.start and last > first  # special tokens are empty
            for first, last in encoded["offset_mapping"]
        ]
    if max_tokens is not None and len(token_ids) > max_tokens:
        if not data.truncate:
            raise Unscorable(
                f"{len(token_ids)} tokens, over the limit of {max_tokens}; shorten it or set data.truncate"
            )
        token_ids, scored = token_ids[:max_tokens], scored[:max_tokens]
    if token_ids:
        scored[0] = False
    if not any(scored):
        if len(token_ids) < len(encoded["input_ids"]):
            raise Unscorable(f"nothing to score in its first {max_tokens} tokens, all that data.truncate leaves")
        raise Unscorable(f"{len(token_ids)} token(s), none of which can be scored: each needs at least one before it")
    return Tokens(token_ids, scored)
