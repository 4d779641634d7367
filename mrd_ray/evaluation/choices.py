"""Multiple choice in the shapes that benchmarks have it: the choices of a row, and which of them is right."""

import string
from collections.abc import Mapping
from typing import Any

from mrd_ray.config import EvaluatedSet
from mrd_ray.data.cells import Unscorable, cell, list_of_texts, lookup


def texts_of(values: Mapping[str, Any], evaluated: EvaluatedSet) -> list[str]:
    """The choices: of a column with a list, of ARC's {text, label}, or of a column for each. Raises Unscorable."""
    assert evaluated.choices is not None
    if not isinstance(evaluated.choices, str):
        return [cell(values, column, evaluated.numbers_as_text) for column in evaluated.choices]
    nested = isinstance(found := lookup(values, evaluated.choices), dict) and "text" in found
    return list_of_texts(values, f"{evaluated.choices}.text" if nested else evaluated.choices, evaluated)


def right_one(values: Mapping[str, Any], column: str, choices: list[str], evaluated: EvaluatedSet) -> int:
    """The index of the right choice: given as that, as its label or letter, or as its text. Raises Unscorable."""
    right = lookup(values, column)
    readings = set()
    if type(right) is int:
        readings = {right} & set(range(len(choices)))
    elif isinstance(right, str):
        text = right.strip()
        for names in (_labels(values, evaluated), string.ascii_uppercase[: len(choices)]):
            readings = readings or {i for i, name in enumerate(names) if name == text}
        if not readings:  # a number may be an index or a choice: not where these differ
            readings = {i for i, choice in enumerate(choices) if choice.strip() == text}
            readings |= {int(text)} if text.isdecimal() and int(text) < len(choices) else set()
    if len(readings) != 1 or len(choices) > len(string.ascii_uppercase):
        raise Unscorable(
            f"column {column!r} is {right!r:.40}; expected the index of one of its choices, its letter, label or text"
        )
    return int(readings.pop())


def _labels(values: Mapping[str, Any], evaluated: EvaluatedSet) -> list[str]:
    """What a row itself calls its choices."""
    if not isinstance(evaluated.choices, str):
        return list(evaluated.choices or ())
    found = lookup(values, f"{evaluated.choices}.label")
    return [str(label) for label in found] if isinstance(found, list) else []
