"""Files as they are after an accident, a bad tool or a bad intention: mutations of good ones."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrd_ray.errors import UserError

TIMES = pytest.mark.parametrize("times", [1, pytest.param(30, marks=pytest.mark.slow)])


def explore(check: Callable[..., None], examples: int, *strategies: st.SearchStrategy) -> None:
    """Try so many examples, the same ones each time; one that takes very long counts as a hang."""
    checked = settings(
        max_examples=examples,
        deadline=timedelta(seconds=20),
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(*strategies)(check))
    checked()


def attempt(do: Callable[[], Any]) -> tuple[Any, str]:
    """What `do` gives, or None and the message of its UserError."""
    try:
        return do(), ""
    except UserError as problem:
        return None, str(problem)


def of_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Cut short, bytes flipped, a part zeroed, doubled, or replaced."""
    place = st.integers(0, len(content))
    several = st.lists(st.tuples(st.integers(0, max(0, len(content) - 1)), st.integers(1, 255)), min_size=1, max_size=8)
    odd = st.binary(min_size=1, max_size=40) | st.sampled_from(
        [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b'"', b"{" * 3000]
    )

    def flipped(flips: list[tuple[int, int]]) -> bytes:
        mangled = bytearray(content)
        for where, by in flips:
            mangled[where] ^= by
        return bytes(mangled)

    return st.one_of(
        st.builds(lambda stop: content[:stop], place),
        st.builds(flipped, several),
        st.builds(
            lambda a, n: content[:a] + bytes(len(content[a : a + n])) + content[a + n :], place, st.integers(1, 64)
        ),
        st.builds(lambda a, b: content[: max(a, b)] + content[min(a, b) :], place, place),
        st.builds(lambda a, new: content[:a] + new + content[a:], place, odd),
    )


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 10**30, 1e308, -0.0, float("nan"), float("inf"), "", "text", "\0", "9" * 50, [], {}, [[]]]),
    st.text(max_size=8),
    st.recursive(
        st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
    ),
)


def of_json(value: Any) -> st.SearchStrategy[Any]:
    """A value somewhere in it replaced, or left out."""
    places = list(_places(value))

    def replaced(place: tuple[Any, ...], new: Any, drop: bool) -> Any:
        whole = json.loads(json.dumps({"": value}))
        inner = whole
        for key in ("", *place)[:-1]:
            inner = inner[key]
        if drop and place:
            del inner[place[-1]]
        else:
            inner[("", *place)[-1]] = new
        return whole[""]

    return st.builds(replaced, st.sampled_from(places), VALUES, st.booleans())


def _places(value: Any, so_far: tuple[Any, ...] = ()) -> Any:
    yield so_far
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _places(child, (*so_far, key))


def of_table(table: pa.Table) -> st.SearchStrategy[bytes]:
    """A column left out, renamed, doubled, of another type, with other values or nulls; rows left out or doubled."""

    def retyped(index: int, other: int) -> pa.Table:
        rows = range(len(table))
        values = [
            pa.array([str(value) for value in table.column(index).to_pylist()]),
            pa.array([0 for _ in rows]),
            pa.array([[1.5] for _ in rows]),
            pa.array([{"a": 1} for _ in rows]),
            pa.nulls(len(table)),
            pa.array([b"\xff" for _ in rows]),
            pa.array([None for _ in rows], table.schema.field(index).type),
        ][other]
        return table.set_column(index, table.column_names[index], values)

    def with_value(index: int, row: int, value: Any) -> pa.Table:
        values = table.column(index).to_pylist()
        values[row] = value
        kind = table.schema.field(index).type
        try:
            return table.set_column(index, table.column_names[index], pa.array(values, kind))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            return table

    def from_rows(rows: Any) -> pa.Table:
        try:
            return pa.Table.from_pylist(rows, table.schema)
        except (pa.ArrowException, TypeError, ValueError, AttributeError, OverflowError):
            return table

    column, row = st.integers(0, table.num_columns - 1), st.integers(0, len(table) - 1)
    rows = st.lists(row, max_size=2 * len(table))

    def written(mangled: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        loose = pa.Table.from_arrays(mangled.columns, names=mangled.column_names)  # any column may have nulls
        pq.write_table(loose, sink, write_page_checksum=True)
        return sink.getvalue().to_pybytes()

    return st.one_of(
        st.builds(lambda i: table.remove_column(i), column),
        st.builds(
            lambda i: table.rename_columns([n + "!" * (k == i) for k, n in enumerate(table.column_names)]), column
        ),
        st.builds(lambda i: table.append_column(table.column_names[i], table.column(i)), column),
        st.builds(retyped, column, st.integers(0, 6)),
        st.builds(with_value, column, row, VALUES),
        of_json(table.to_pylist()).map(from_rows),
        st.builds(lambda which: table.take(pa.array(which, pa.int64())), rows),
    ).map(written)


def of_parquet(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes or columns."""
    return of_bytes(content) | of_table(pq.read_table(pa.BufferReader(content)))


def of_json_file(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes or values, of a JSON file, or of a line of one that has several."""
    lines = content.splitlines()
    try:
        whole = [json.loads(content)]
    except ValueError:
        whole = list(map(json.loads, lines))

    def written(values: list[Any]) -> bytes:
        return b"\n".join(json.dumps(value).encode(errors="replace") for value in values)

    of_one = st.integers(0, len(whole) - 1).flatmap(
        lambda i: of_json(whole[i]).map(lambda value: written([*whole[:i], value, *whole[i + 1 :]]))
    )
    return of_bytes(content) | of_one
