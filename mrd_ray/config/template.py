"""Templates of columns: format strings, and Jinja where a part depends on a column."""

import functools
import math
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALIASES = ("prompt", "response")  # of the columns that data.prompt and data.response name
_ALPACA = (
    "Below is an instruction that describes a task{% if input %}, paired with an input that provides further context"
    "{% endif %}. Write a response that appropriately completes the request.\n\n### Instruction:\n{{ instruction }}"
    "{% if input %}\n\n### Input:\n{{ input }}{% endif %}\n\n### Response:\n{{ response }}"
)
PRESETS = {"alpaca": _ALPACA}


@dataclass(frozen=True)
class Template:
    """A parsed template: its text and whether it is Jinja, and the columns that it names, in their order."""

    text: str
    jinja: bool
    columns: tuple[str, ...]

    @property
    def own_columns(self) -> tuple[str, ...]:
        """Columns beside those that data.prompt and data.response name."""
        return tuple(name for name in self.columns if name not in ALIASES)

    def pieces(self) -> list[tuple[str, str | None]]:
        """Of a format string: each literal with the column that follows it, None at the end."""
        return [(literal, field) for literal, field, _, _ in string.Formatter().parse(self.text)]

    def rendered(self, values: Mapping[str, Any]) -> str:
        """Of Jinja, with these columns. Raises jinja2.TemplateError, TypeError or ValueError."""
        return str(_compiled(self.text).render(values))


def unescaped(text: str) -> str:
    r"""\n and \t as a line break and a tab, since a shell hands on what is typed; within Jinja's braces they stay.

    >>> unescaped(r"Q: {prompt}\nA: {response}")
    'Q: {prompt}\nA: {response}'
    """
    parts = re.split(r"(\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\})", text, flags=re.DOTALL)
    return "".join(part if at % 2 else part.replace("\\n", "\n").replace("\\t", "\t") for at, part in enumerate(parts))


@functools.lru_cache
def parse(text: str) -> Template:
    """A template from a setting. Raises ValueError, which says what is wrong with it."""
    text = PRESETS.get(text, text)
    if "{%" in text:
        return _parse_jinja(text)
    try:
        pieces = [piece for piece in string.Formatter().parse(text) if piece[1] is not None]
    except ValueError as problem:
        raise ValueError(f"it is not a format string: {problem} (write {{{{ and }}}} for literal braces)") from None
    if not pieces and "{{" in text:  # of a format string these would be literal braces, and all of it fixed text
        return _parse_jinja(text)
    if odd := [name for _, name, spec, conversion in pieces if conversion or spec or not name]:
        raise ValueError(f"its field {odd[0]!r} must be the name of a column in braces, and nothing else")
    return Template(text, False, tuple(name for _, name, _, _ in pieces if name))


def _parse_jinja(text: str) -> Template:
    import jinja2
    from jinja2 import meta

    try:
        names = meta.find_undeclared_variables(_environment().parse(text))
    except jinja2.TemplateError as problem:
        raise ValueError(f"it is not a Jinja template: {problem}") from None
    first = {name: found.start() if (found := re.search(rf"\b{name}\b", text)) else 0 for name in names}
    return Template(text, True, tuple(sorted(names, key=lambda name: (first[name], name))))


@functools.lru_cache
def _environment() -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(keep_trailing_newline=True, finalize=_printable)


def _printable(value: Any) -> Any:
    """What a template may print: text and numbers, and not Python's way to write other things."""
    import jinja2

    if isinstance(value, jinja2.Undefined):
        raise jinja2.UndefinedError(
            f"column {value._undefined_name!r} is missing or empty; where it may be, write "
            f"'{{% if {value._undefined_name} %}}...{{% endif %}}'"
        )
    if isinstance(value, str) or (type(value) in (int, float) and math.isfinite(value)):
        return value
    raise TypeError(f"it prints {value!r:.40}, which is not text but {type(value).__name__}")


@functools.lru_cache
def _compiled(text: str) -> Any:
    return _environment().from_string(text)


def check(text: str) -> Template:
    """A template of whole samples. Raises ValueError unless it can hold all of one."""
    template = parse(text)
    if (times := template.columns.count("response")) > 1:
        raise ValueError(f"it holds {{response}} {times} times; expected once")
    if not template.own_columns and sorted(template.columns) != ["prompt", "response"]:
        raise ValueError(
            f"it must hold {{prompt}} and {{response}} once each, or name other columns in braces; its fields are "
            f"{list(template.columns)}"
        )
    return template
