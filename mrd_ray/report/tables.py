"""Tables: small ones that are part of the page, and one of all samples that its script shows page by page."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from markupsafe import Markup

_TEXT_BUDGET = 30_000_000  # total characters of a table's texts: with more, a page takes seconds to open
_SHORT = 280  # characters of a text that are shown at first
# control characters, which are invisible or dropped, are shown as Unicode's pictures of them
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


@dataclass(frozen=True)
class Text:
    """Text of a sample or a model, which the page marks as quoted."""

    whole: str | None

    @property
    def shown(self) -> str:
        """The part that is shown at first."""
        return self._visible(_SHORT) + (" ..." if self.long else "")

    @property
    def all(self) -> str:
        """What is shown on request."""
        return self._visible(_TEXT_BUDGET)

    @property
    def wide(self) -> bool:
        """Whether it needs a wide column, as texts do and ids do not."""
        return len(self.whole or "") > 40

    @property
    def long(self) -> bool:
        """Whether there is more than is shown at first."""
        return len(self.whole or "") > _SHORT

    def _visible(self, characters: int) -> str:
        return (self.whole or "")[:characters].translate(_PICTURES)


Cell = float | str | Text | None


@dataclass(frozen=True)
class Table:
    """A table in the page itself: numbers are right-aligned, and the first cell of a row is its name.

    even: columns of equal width, for texts side by side.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    even: bool = False

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers."""
        return any(isinstance(row[column], int | float) for row in self.rows)


@dataclass(frozen=True)
class Column:
    """A column of a DataTable. name, text: can be searched; text: gets more room, and long texts are folded."""

    label: str
    values: Sequence[Any]
    kind: Literal["number", "name", "text"] = "number"


class DataTable:
    """All samples, as JSON for the page's script: it sorts, searches and shows a page of them at a time.

    note: tells readers if texts were cut because of the page's size.
    """

    def __init__(self, name: str, caption: str, columns: Sequence[Column]) -> None:
        self.name, self.caption, self.columns = name, caption, columns
        self.rows = len(columns[0].values)
        self.limit = _limit([len(v) for c in columns if c.kind != "number" for v in c.values if v is not None])
        self.note = (
            ""
            if self.limit is None
            else f"Texts of more than {self.limit:,} characters are cut there, since together they are too long for a "
            "page; the run directory has the complete texts."
        )

    @property
    def json(self) -> Markup:
        """JSON for a script element. It has no `<`, so that no text can end the element or open a comment in it."""
        values = [[self._value(column, value) for value in column.values] for column in self.columns]
        content = {"kinds": [column.kind for column in self.columns], "short": _SHORT, "columns": values}
        dumped = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return Markup(dumped.replace("<", "\\u003c"))

    def _value(self, column: Column, value: Any) -> Any:
        if column.kind != "number":
            return None if value is None else str(value)[: self.limit].translate(_PICTURES)
        if value is None or not math.isfinite(value):
            return None
        return value if isinstance(value, int) else float(f"{value:.6g}")


def _limit(lengths: Sequence[int]) -> int | None:
    """The length to which texts must be cut so that all fit the budget; None if they fit uncut."""
    if sum(lengths) <= _TEXT_BUDGET:
        return None
    ascending = np.sort(np.array(lengths, np.int64))
    before = np.concatenate([[0], np.cumsum(ascending)[:-1]])
    left = len(ascending) - np.arange(len(ascending))
    # shorter texts stay uncut; the others share the rest of the budget equally
    first = int(np.argmax(before + ascending * left > _TEXT_BUDGET))
    return int((_TEXT_BUDGET - before[first]) // left[first])
