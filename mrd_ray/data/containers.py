"""The rows of a JSON document: a list of rows or texts, columns as pandas writes them, or an object of such lists."""

from collections.abc import Iterator
from typing import Any

from mrd_ray.data.columns import ROLES
from mrd_ray.data.conversations import is_conversation
from mrd_ray.data.files import Say
from mrd_ray.errors import UserError

Numbered = Iterator[tuple[int, dict[str, object]]]


def rows_of(path: str, document: object, split: str, say: Say) -> Numbered:
    """The rows of a JSON document, numbered from 1.

    Args:
        split: which list to take from an object of lists.
        say: receives a notice about which list is taken.

    Raises:
        UserError: it holds no rows, or several lists of which none is named `split`.
    """
    if isinstance(document, list) and len(document) == 1 and _is_of_lists(document[0]):
        document = document[0]  # the hub stores such an object as one row whose cells are lists of rows
    if isinstance(document, list):
        refuse_split(path, split)
        rows = document
    else:
        rows = _of_object(path, document, split, say)
    for number, value in enumerate(rows, 1):
        yield number, row_of(path, number, value)


def row_of(path: str, number: int, value: object) -> dict[str, object]:
    """A JSON value as a row; a text becomes a row with one column. Raises UserError."""
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and is_conversation(value):
        return {"messages": value}
    if not isinstance(value, dict):
        quote = f", found {value!r:.60}"
        raise UserError(f"{path}, row {number}: expected a JSON object with named columns, or a text{quote}", quote)
    return value


def refuse_split(path: str, split: str) -> None:
    """Raises UserError if a split is requested of a file without splits."""
    if split != "train":
        raise UserError(
            f"data.split: {split}, but {path} has no splits; leave it out, or slice the rows, for example train[:100]"
        )


def _is_rows(value: object) -> bool:
    """Whether this is a list of rows. A conversation is not: it is one cell of a row."""
    of_objects = isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
    return of_objects and not is_conversation(value)


def _is_of_lists(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_rows, value.values()))


def _of_object(path: str, document: object, split: str, say: Say) -> list[object]:
    if not isinstance(document, dict) or not document:
        quote = f", found {document!r:.60}"
        raise UserError(f"{path}: expected a list of rows or texts, or an object of lists{quote}", quote)
    cells = list(document.values())
    if document.keys() >= {"columns", "data"} and isinstance(document["columns"], list):  # pandas' orient="split"
        return [_record(path, number, document["columns"], row) for number, row in enumerate(document["data"], 1)]
    if any(map(is_conversation, cells)):
        refuse_split(path, split)
        return [document]
    if all(isinstance(cell, list) for cell in cells):
        alike = len({len(cell) for cell in cells}) == 1
        if alike and split == "train" and split not in document and not _is_of_lists(document):
            if not any(name.casefold() in ROLES for name in document):
                say(
                    f"{', '.join(document)} of {path} are read as columns; set data.split to one of them to read it "
                    "as a list of texts"
                )
            return _records(document)
        return _picked(path, document, split, say)
    if split in document and all(map(_is_columns, cells)):
        return _records(document[split])
    lists = [name for name, cell in document.items() if _is_rows(cell)]
    if lists and not any(isinstance(cell, str) and name.casefold() in ROLES for name, cell in document.items()):
        return _picked(path, {name: cell for name, cell in document.items() if isinstance(cell, list)}, split, say)
    refuse_split(path, split)
    of_roles = any(name.casefold() in ROLES for name in document)
    if all(isinstance(cell, dict) for cell in cells):
        return _of_objects(path, document, of_roles)
    return [document]


def _records(columns: dict[str, list[object]]) -> list[object]:
    return [dict(zip(columns, record, strict=True)) for record in zip(*columns.values(), strict=True)]


def _is_columns(value: Any) -> bool:
    """Whether this is an object of lists of equal length."""
    of_lists = isinstance(value, dict) and bool(value) and all(isinstance(cell, list) for cell in value.values())
    return of_lists and len({len(cell) for cell in value.values()}) == 1 and not is_conversation(value)


def _record(path: str, number: int, columns: list[str], cells: object) -> dict[str, object]:
    if not isinstance(cells, list) or len(cells) != len(columns):
        raise UserError(f"{path}, row {number}: expected {len(columns)} cells, one for each of its columns")
    return dict(zip(columns, cells, strict=True))


def _of_objects(path: str, document: dict[str, dict[str, object]], one_row: bool) -> list[object]:
    """Columns by row label (the default of pandas), rows by label, or one row of nested cells.

    one_row: whether the object's names are names of columns.
    """
    labels = list(next(iter(document.values())))
    if labels and all(label.isdecimal() for label in labels):
        if any(cells.keys() != set(labels) for cells in document.values()):
            raise UserError(
                f"{path}: its columns have different rows; expected each of {', '.join(document)} to have all rows"
            )
        return [{name: cells[label] for name, cells in document.items()} for label in labels]
    if all(label.isdecimal() for label in document):
        return list(document.values())
    if len(document) > 1 and not one_row:
        return [{"id": label} | row for label, row in document.items()]
    return [document]


def _picked(path: str, lists: dict[str, list[object]], split: str, say: Say) -> list[object]:
    """The list named `split`. If there is none and no split was requested, the only list that is not empty."""
    if split in lists:
        if len(lists) > 1:
            say(f"Reading the rows under {split!r} in {path}")
        return lists[split]
    names = [name for name, rows in lists.items() if rows]
    each = ", ".join(f"{name} ({len(rows)} rows)" for name, rows in lists.items())
    if split != "train":
        raise UserError(f"data.split: {split}, but {path} holds {each}; choose one of these")
    if len(names) > 1:
        raise UserError(f"{path} holds several lists: {each}; choose one with data.split, e.g. data.split: {names[0]}")
    if not names:
        return []
    say(f"Reading the rows under {names[0]!r} in {path}")
    return lists[names[0]]
