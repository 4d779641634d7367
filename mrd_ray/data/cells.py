"""Turns one cell of a row into text, or says why it has none."""

import decimal
import math
from collections.abc import Mapping
from typing import Any

from mrd_ray.config import DataSettings


class Unscorable(Exception):
    """This sample cannot be scored. The message is the reason, and is stored in the sample's row."""


def lookup(values: Mapping[str, object], column: str) -> object:
    """A row's cell, or None if there is none. `answers.text` is the field `text` of the objects in column answers."""
    if column in values or "." not in column:
        return values.get(column)
    found: object = values
    for name in column.split("."):
        if isinstance(found, list):
            found = [one.get(name) if isinstance(one, dict) else None for one in found]
        else:
            found = found.get(name) if isinstance(found, dict) else None
    return found


def is_id(value: object) -> bool:
    """Whether a cell can be a sample's id."""
    return type(value) in (str, int) and value != "" and _is_unicode(str(value))


def _is_unicode(value: str) -> bool:
    """Whether UTF-8 can encode it. A JSON escape can also be half of a surrogate pair, which it cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def cell(values: Mapping[str, object], column: str, numbers: bool = False) -> str:
    """The text in a row's column. Raises Unscorable.

    Args:
        numbers: whether a number counts as text.
    """
    return as_text(lookup(values, column), column, numbers)


def as_text(value: Any, column: str, numbers: bool = False) -> str:
    """A cell's value as text. Raises Unscorable, whose message names the column."""
    if value is None:
        raise Unscorable(f"column {column!r} is missing or null")
    if type(value) in (int, float, decimal.Decimal) and math.isfinite(value):
        if not numbers:
            raise Unscorable(
                f"column {column!r} is not text but a number: {value!r:.40} (data.numbers_as_text: true takes it)"
            )
        value = str(value)
    if not isinstance(value, str):
        raise Unscorable(f"column {column!r} is not text but {type(value).__name__}: {value!r:.40}")
    if not value.strip():
        raise Unscorable(f"column {column!r} is empty")
    if not _is_unicode(value):
        raise Unscorable(f"column {column!r} is not text: it holds half of a surrogate pair")
    return value


def response_text(values: Mapping[str, object], column: str, data: DataSettings) -> str:
    """The response in a row: its text, or what data.response_index or data.response_join takes from a list.

    Raises Unscorable.
    """
    value = lookup(values, column)
    if isinstance(value, str) and data.list_separator and (data.response_index, data.response_join) != (None, None):
        value = value.split(data.list_separator)
    if not isinstance(value, list):
        return as_text(value, column, data.numbers_as_text)
    if data.response_join is not None and value:
        return data.response_join.join(as_text(one, column, data.numbers_as_text) for one in value)
    if data.response_index is None:
        raise Unscorable(
            f"column {column!r} is not text but a list of {len(value)}: {value!r:.40}; data.response_index takes one, "
            "data.response_join all"
        )
    if data.response_index >= len(value):
        raise Unscorable(f"column {column!r} is a list of {len(value)}, without the index {data.response_index}")
    return as_text(value[data.response_index], column, data.numbers_as_text)


def list_of_texts(values: Mapping[str, object], column: str, data: DataSettings) -> list[str]:
    """A cell's list of texts, or its text split at data.list_separator. Raises Unscorable."""
    found = lookup(values, column)
    if isinstance(found, str) and data.list_separator:
        found = [part for part in found.split(data.list_separator) if part.strip()]
    if not isinstance(found, list) or not found:
        hint = "" if data.list_separator or not isinstance(found, str) else " (list_separator says where to cut a text)"
        raise Unscorable(f"column {column!r} is {found!r:.60}; expected a list of texts{hint}")
    return [as_text(text, column, data.numbers_as_text) for text in found]
