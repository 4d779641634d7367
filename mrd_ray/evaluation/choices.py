"""Multiple choice in the shapes that benchmarks use: the choices of a row, and which of them is right."""

import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mrd_ray.config import EvaluatedSet
from mrd_ray.data.cells import Unscorable, as_text, cell, list_of_texts, lookup
from mrd_ray.data.files import Say
from mrd_ray.data.read import Row
from mrd_ray.errors import UserError

_LETTERS = string.ascii_uppercase
_FRAMED = re.compile(r"[(\[]?\s*(\w+)\s*[)\].:]{0,2}")  # (B), B., [2], b)
_INDEX, _LABEL, _LETTER, _TEXT, _MARKED = "index", "label", "letter", "text", "marked"
_Readings = dict[str, set[int]]  # each kind that an answer may be, with the choices it then names


class Choices(NamedTuple):
    """The choices of a row, and their labels in the row, if any."""

    texts: list[str]
    labels: list[str]


class Scheme(NamedTuple):
    """How the answers of a set name its choices.

    first: the numbers that the first choice may have; none if numbers are no indices. settled: if a setting says so.
    kinds: kinds of answer that are the only possible one in some row.
    """

    first: tuple[int, ...]
    settled: bool
    kinds: frozenset[str]


def choices_of(values: Mapping[str, object], evaluated: EvaluatedSet) -> Choices:
    """The choices of a row: from a list, {text, label} (one or a list), {label: text}, or a column for each.

    Raises Unscorable.
    """
    column = evaluated.choices
    assert column is not None
    if not isinstance(column, str):
        choices = Choices([cell(values, one, evaluated.numbers_as_text) for one in column], _without_stem(column))
    elif isinstance(named := lookup(values, column), dict) and "text" not in named:
        choices = _by_label(named, column, evaluated)
    else:
        of_objects = isinstance(named, list) and bool(named) and all(isinstance(one, dict) for one in named)
        if of_objects or isinstance(named, dict):
            column += ".text"
        choices = Choices(list_of_texts(values, column, evaluated), _labels_beside(values, column))
    if len(choices.texts) > len(_LETTERS):
        raise Unscorable(f"column {column!r} has {len(choices.texts)} choices; expected at most {len(_LETTERS)}")
    if choices.labels and len(choices.labels) != len(choices.texts):
        raise Unscorable(f"column {column!r} has {len(choices.texts)} choices, but {len(choices.labels)} labels")
    return choices


def scheme(records: Iterable[Row], column: str, evaluated: EvaluatedSet, say: Say) -> Scheme:
    """How a set's answers, in `column`, name its choices. One row may leave it open; all rows together should not.

    Args:
        say: called if all leave open whether numbers count from 0 or from 1; they are then taken to count from 0.

    Raises:
        UserError: answers are numbers, and some count from 0, others from 1.
    """
    asked = list(_readable(records, column, evaluated))
    if evaluated.answers_count_from == "auto":
        first, settled = _first(asked, column, say), False
    else:
        first, settled = () if (one := evaluated.answers_count_from) is None else (one,), True
    of_set = Scheme(first, settled, frozenset())
    readings = [_readings(right, choices, of_set) for _, right, choices in asked]
    return of_set._replace(kinds=frozenset(kind for of_row in readings if len(of_row) == 1 for kind in of_row))


def right_one(values: Mapping[str, object], column: str, choices: Choices, of_set: Scheme) -> int:
    """The index of the right choice, if its row and set allow one reading. Raises Unscorable."""
    right = lookup(values, column)
    readings = _readings(right, choices, of_set)
    if len(named := _named(readings)) != 1:  # then read it like the rows that can be read in one way
        named = _named({kind: at for kind, at in readings.items() if kind in of_set.kinds})
    if len(named) == 1:
        return named.pop()
    if not readings:
        raise Unscorable(
            f"column {column!r} is {right!r:.40}; expected the index of one of its choices, its letter, label or text"
        )
    ways = [f"the {kind} of {' or '.join(_LETTERS[i] for i in sorted(at))}" for kind, at in readings.items()]
    hint = "; answers_count_from says what numbers are" if _INDEX in readings else ""
    raise Unscorable(f"column {column!r} is {right!r:.40}, which may be {', or '.join(ways)}{hint}")


def _by_label(named: Mapping[str, object], column: str, evaluated: EvaluatedSet) -> Choices:
    """Choices of {"A": "Tom", "B": "Lily"}. In tables, rows with fewer choices have nulls at the end."""
    labels = list(named)
    while labels and named[labels[-1]] is None:
        labels.pop()
    if not labels:
        raise Unscorable(f"column {column!r} is {named!r:.60}; expected choices by their labels")
    return Choices([as_text(named[label], f"{column}.{label}", evaluated.numbers_as_text) for label in labels], labels)


def _without_stem(columns: Sequence[str]) -> list[str]:
    """The labels in columns' names: 1 and 2 of option1 and option2, else the whole names."""
    numbered = [re.fullmatch(r"(\D*)(\d+)", name) for name in columns]
    if None in numbered or len({one[1] for one in numbered if one}) > 1:
        return list(columns)
    return [one[2] for one in numbered if one]


def _labels_beside(values: Mapping[str, object], column: str) -> list[str]:
    """The labels beside texts: in choices.label for choices.text."""
    before, dot, name = column.rpartition(".")
    labels = lookup(values, f"{before}.label") if dot and name == "text" else None
    return [str(label).strip() for label in labels if type(label) in (str, int)] if isinstance(labels, list) else []


def _readable(records: Iterable[Row], column: str, evaluated: EvaluatedSet) -> Iterator[tuple[Row, object, Choices]]:
    """The rows whose choices can be read, each with its answer and its choices."""
    for record in records:
        try:
            choices = choices_of(record.values, evaluated)
        except Unscorable:
            continue
        yield record, lookup(record.values, column), choices


def _first(asked: Iterable[tuple[Row, object, Choices]], column: str, say: Say) -> tuple[int, ...]:
    """Whether the first choice is 0 or 1, by answers that can only be indices; both if there are none. Raises."""
    seen: dict[int | None, str] = {}
    for record, right, choices in asked:
        readings = _readings(right, choices, Scheme((0, 1), False, frozenset()))
        if list(readings) == [_INDEX]:
            number = _number(right)
            base = 0 if number == 0 else 1 if number == len(choices.texts) else None
            seen.setdefault(base, f"{record.place} has {number}")
    if 0 in seen and 1 in seen:
        raise UserError(
            f"column {column!r}: answers count both from 0 ({seen[0]}) and from 1 ({seen[1]}, the number of its "
            "choices); expected one of them. With answers_count_from: 0 or answers_count_from: 1, the others are errors"
        )
    if seen.keys() == {None}:
        say(
            f"Answers in {column!r} are assumed to count from 0, so that 1 is the second choice ({seen[None]}; no row "
            "has 0, or the number of its choices); set answers_count_from: 1 if it is the first"
        )
    return (0,) if 0 in seen or seen.keys() == {None} else (1,) if 1 in seen else (0, 1)


def _readings(right: object, choices: Choices, of_set: Scheme) -> _Readings:
    """All that an answer may be, judged by its row only."""
    count = len(choices.texts)
    if (marked := _marked(right, count)) is not None:
        return {_MARKED: {marked}}
    right = _only(right)
    if type(right) not in (int, float, str):
        return {}
    number, text = _number(right), str(right).strip()
    index = {number - first for first in of_set.first if 0 <= number - first < count} if number is not None else set()
    if of_set.settled and of_set.first and number is not None:
        return {_INDEX: index} if index else {}
    label = _called(text, choices.labels)
    readings = {
        _LABEL: label,
        _LETTER: set() if label else _called(text, _LETTERS[:count]),
        _TEXT: {i for i, choice in enumerate(choices.texts) if choice.strip() == text},
        _INDEX: set() if label and len(of_set.first) > 1 else index,  # labels need no index
    }
    return {kind: at for kind, at in readings.items() if at}


def _named(readings: _Readings) -> set[int]:
    return set().union(*readings.values())


def _only(right: object) -> object:
    """What a list of one holds."""
    return right[0] if isinstance(right, list) and len(right) == 1 else right


def _marked(right: Any, count: int) -> int | None:
    """The index of the 1 in [0, 1, 0, 0], a mark for each choice."""
    marks = isinstance(right, list) and len(right) == count and all(type(one) in (int, float, bool) for one in right)
    return right.index(1) if marks and sorted(right) == [0] * (count - 1) + [1] else None


def _number(right: object) -> int | None:
    """The answer as a whole number; it may be digits in a text, or in a list of one."""
    right = _only(right)
    if type(right) is int:
        return right
    bare = _bare(right) if isinstance(right, str) else ""
    return int(bare) if bare.isdecimal() and len(bare) < 4 else None


def _called(text: str, names: Iterable[str]) -> set[int]:
    """Places of the names that equal a text: exactly, or else without case, brackets and full stops."""
    exact = {i for i, name in enumerate(names) if name == text}
    return exact or {i for i, name in enumerate(names) if _bare(name) == _bare(text)}


def _bare(text: str) -> str:
    framed = _FRAMED.fullmatch(text.strip())
    return (framed[1] if framed else text.strip()).casefold()
