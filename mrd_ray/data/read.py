"""Forget sets as rows, each with the place it came from: files through fsspec, hub ids through datasets."""

import csv
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet as pq

from mrd_ray import storage
from mrd_ray.config import DataConfig
from mrd_ray.errors import UserError

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


class Row(NamedTuple):
    """One sample as read. `number` counts from 1: the line of a JSON-lines file, else the record."""

    number: int
    values: dict[str, Any]


def rows(data: DataConfig) -> Iterator[Row]:
    """The rows of a table-like source (not of .txt, see `text`). Raises UserError naming file, row and cause."""
    suffix = PurePosixPath(data.path).suffix.lower()
    match suffix:
        case ".jsonl":
            records = _json_lines(data.path)
        case ".json":
            records = _json(data.path)
        case ".csv":
            records = _csv(data.path)
        case ".parquet":
            records = _parquet(data.path)
        case _:
            records = _dataset(data)
    first = next(records, None)
    if first is None:
        raise UserError(f"data.path: {data.path} holds no rows")
    yield from itertools.islice(_where(data, itertools.chain([first], records)), data.max_samples)


def _where(data: DataConfig, records: Iterator[Row]) -> Iterator[Row]:
    """Those rows whose columns have the values of data.where, at least one."""
    found = False
    for row in records:
        for column in data.where:
            if column not in row.values:
                raise UserError(
                    f"{data.path}, row {row.number}: no column {column!r} (data.where); its columns are "
                    f"{', '.join(row.values)}"
                )
        if all(row.values[column] == value for column, value in data.where.items()):
            found = True
            yield row
    if not found:
        raise UserError(f"data.where: no row of {data.path} has {data.where}")


def text(path: str) -> str:
    """The whole of a plain text file."""
    with _open(path) as file:
        try:
            content = file.read()
        except UnicodeDecodeError as problem:
            raise UserError(f"{path}: not UTF-8 text ({problem.reason})") from None
    if not content.strip():
        raise UserError(f"data.path: {path} is empty")
    return content


def _open(path: str, mode: str = "rt") -> Any:
    """An open file. Bad UTF-8 surfaces where it is read, as UserError (see `_decoded`)."""
    try:
        return storage.open_file(path, mode, **({} if "b" in mode else {"encoding": "utf-8-sig", "newline": ""}))
    except OSError as problem:
        raise UserError(f"data.path: cannot read {path}: {problem.strerror or problem}") from None
    except (ImportError, ValueError) as problem:  # unknown protocol, or its package is not installed
        raise UserError(f"data.path: cannot open {path}: {problem}") from None


def _decoded(path: str, lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Number lines from 1; an undecodable one is an error that names it."""
    number = 0
    while True:
        number += 1
        try:
            line = next(lines)
        except StopIteration:
            return
        except UnicodeDecodeError as problem:
            raise UserError(f"{path}, at or after line {number}: not UTF-8 text ({problem.reason})") from None
        yield number, line


def _parsed(path: str, content: str, line: int) -> Any:
    """The value of JSON that begins on `line` of the file."""
    try:
        return json.loads(content, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as problem:
        raise UserError(
            f"{path}, line {line + problem.lineno - 1}: broken JSON: {problem.msg} at column {problem.colno} "
            "(expected one object per line, or in a .json file a list of them)"
        ) from None
    except (ValueError, RecursionError) as problem:  # a repeated name, a number of thousands of digits, deep nesting
        raise UserError(f"{path}, at or after line {line}: cannot read this JSON: {problem}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):  # Python keeps the last and drops the others
        raise ValueError(f"an object names {_repeated([name for name, _ in pairs])} more than once; rename one")
    return values


def _repeated(names: Sequence[str]) -> str:
    return ", ".join(sorted(name for name, count in Counter(names).items() if count > 1))


def _object(path: str, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{path}, row {number}: expected a JSON object with named columns, found {value!r:.60}")
    return Row(number, value)


def _json_lines(path: str) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in _decoded(path, file):
            if line.strip():
                yield _object(path, number, _parsed(path, line.rstrip(), number))


def _json(path: str) -> Iterator[Row]:
    """A list of objects; many published .json files are in truth JSON lines and are read as such."""
    with _open(path) as file:
        try:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
        except UnicodeDecodeError as problem:
            raise UserError(f"{path}: not UTF-8 text ({problem.reason})") from None
    if first != "[":
        yield from _json_lines(path)
        return
    for number, value in enumerate(_parsed(path, text(path), 1), 1):
        yield _object(path, number, value)


def _csv(path: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a sample over the default of 128 KiB is for data.max_tokens to judge
    with _open(path) as file:
        reader = csv.DictReader((line for _, line in _decoded(path, file)), strict=True)
        try:
            header = list(reader.fieldnames or ())
            if reader.fieldnames == []:
                raise UserError(f"{path}, line 1: blank, where the header should stand; delete the line")
            if repeated := _repeated(header):
                raise UserError(f"{path}, line 1: the header names {repeated} more than once; rename one")
            for number, values in enumerate(reader, 1):
                if None in values or None in values.values():
                    raise UserError(
                        f"{path}, row {number} (line {reader.line_num}): expected {len(header)} "
                        "fields as in the header; quote fields that hold commas"
                    )
                yield Row(number, values)
        except csv.Error as problem:
            raise UserError(f"{path}, line {reader.line_num}: broken CSV: {problem}") from None


def _parquet(path: str) -> Iterator[Row]:
    with _open(path, "rb") as file:
        try:
            number = 0
            table = pq.ParquetFile(file)
            if repeated := _repeated(table.schema_arrow.names):
                raise UserError(f"{path}: the schema names {repeated} more than once; rename one")
            for batch in table.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, values)
        except (OSError, ValueError) as problem:  # pyarrow.ArrowInvalid and bad UTF-8 are ValueErrors
            raise UserError(f"{path}: cannot read as Parquet, after row {number}: {problem}") from None


def _dataset(data: DataConfig) -> Iterator[Row]:
    try:
        table = datasets.load_dataset(os.path.expanduser(data.path), data.name, split=data.split, streaming=True)
        for number, values in enumerate(table, 1):
            yield Row(number, values)
    except Exception as problem:  # loading scripts and formats fail in ways of their own
        raise UserError(
            f"data.path: {data.path} is not a file ending in {', '.join(FILE_SUFFIXES)}, and it could not be loaded "
            f"as a Hugging Face dataset (data.name={data.name}, data.split={data.split}): {problem}"
        ) from None
