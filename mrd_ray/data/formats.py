"""Reads the rows of any file, each with its number from 1: the line of a JSON-lines file, else the record."""

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Literal, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from mrd_ray.config import DataSettings
from mrd_ray.data.containers import Numbered, refuse_split, row_of, rows_of
from mrd_ray.data.files import COMPRESSED, OF_WINDOWS, Say, open_bytes, open_text, reading
from mrd_ray.errors import UserError

JSON = (".jsonl", ".json", ".ndjson")
SEPARATED = (".csv", ".tsv")
TEXT = ".txt"
ENDINGS = (*JSON, *SEPARATED, TEXT, ".parquet", ".arrow")
_SEPARATORS = ",;\t|"
_LOOKED_AT = 100  # records from which a CSV file's separator is detected


def ending(path: str) -> str | None:
    """The format that a file's name shows, ignoring compression: one of ENDINGS, or None."""
    name = PurePosixPath(path.lower())
    if name.suffix in COMPRESSED:
        name = name.with_suffix("")
    return name.suffix if name.suffix in ENDINGS else None


def rows(path: str, data: DataSettings, split: str, say: Say) -> Numbered:
    """The rows of any file but .txt (see `text`). Raises UserError, which names file, row and cause.

    Args:
        split: which list to take from a JSON object of lists.
        say: receives notices about how the file is read.
    """
    kind = ending(path)
    if kind in JSON:
        with open_text(path, data.encoding, False, say) as file:
            yield from _json(path, file, split, say)
        return
    refuse_split(path, split)
    if kind in SEPARATED:
        with open_text(path, data.encoding, True, say) as file:
            yield from _separated(path, file, data.separator or ("\t" if kind == ".tsv" else None), data.quotes)
    elif kind == ".parquet":
        yield from _parquet(path)
    else:
        yield from _arrow(path)


def text(path: str, data: DataSettings, say: Say) -> str:
    """The whole text of a plain text file. Raises UserError."""
    with open_text(path, data.encoding, True, say) as file:
        return "".join(line for _, line in _numbered(path, file))


def _numbered(path: str, file: TextIO) -> Iterator[tuple[int, str]]:
    """Lines, numbered from 1. Raises UserError, which names the line, if one cannot be decoded."""
    number = 0
    try:
        with reading(path):
            for number, line in enumerate(file, 1):
                yield (
                    number,
                    line if number > 1 else line.removeprefix("\ufeff"),
                )  # the encoding may keep it
    except UserError as problem:
        if not isinstance(problem.__cause__, UnicodeError):
            raise
        name = file.encoding.removesuffix("-sig").upper()
        found, other = (
            (f"neither UTF-8 nor {name}", "shift_jis") if name == OF_WINDOWS.upper() else (f"not {name}", OF_WINDOWS)
        )
        raise UserError(
            f"{path}, at or after line {number + 1}: {found} text; set data.encoding to the file's encoding, for "
            f"example {other}"
        ) from problem


# --- JSON


def _json(path: str, file: TextIO, split: str, say: Say) -> Numbered:
    """JSON lines or one JSON document, whatever the file's name."""
    lines = ((number, line) for number, line in _numbered(path, file) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    number, line = first
    second = next(lines, None)
    if second is None:
        yield from rows_of(path, _parsed(path, line, number), split, say)
    elif _is_whole(line):
        refuse_split(path, split)
        for at, each in itertools.chain([first, second], lines):
            yield at, row_of(path, at, _parsed(path, each.rstrip(), at))
    else:
        rest = "".join(each for _, each in itertools.chain([second], lines))
        yield from rows_of(path, _parsed(path, line + rest, number), split, say)


def _is_whole(line: str) -> bool:
    """Whether a first line is a row, even a broken one, and not the beginning of a longer document."""
    stripped = line.strip()
    return stripped[0] not in "[{" or (stripped[0], stripped[-1]) in (("{", "}"), ("[", "]"))


def _parsed(path: str, content: str, line: int) -> object:
    """The value of JSON text that begins on this line of the file."""
    try:
        return _DECODER.decode(content)
    except json.JSONDecodeError as problem:
        raise UserError(
            f"{path}, line {line + problem.lineno - 1}: broken JSON: {problem.msg} at column {problem.colno} "
            "(expected an object per line, or one document: a list of objects or texts, or an object of lists)"
        ) from problem
    except (ValueError, RecursionError) as problem:  # a repeated name, a number with thousands of digits, deep nesting
        raise UserError(f"{path}, at or after line {line}: cannot read this JSON: {problem}") from problem


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):  # Python would keep the last one and drop the others
        raise ValueError(f"an object names {_repeated([name for name, _ in pairs])} more than once; rename one")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)


def _repeated(names: Sequence[str]) -> str:
    return ", ".join(sorted(name for name, count in Counter(names).items() if count > 1))


# --- separated values


def _separated(path: str, file: TextIO, separator: str | None, quotes: bool) -> Numbered:
    csv.field_size_limit(2**31 - 1)  # over the default of 128 KiB: data.max_tokens decides which samples are too long
    lines = (line for _, line in _numbered(path, file))
    peeked, skipped = list(itertools.islice(lines, _LOOKED_AT)), 0
    if peeked and (named := re.fullmatch(r'"?sep=(.)"?\r?\n?', peeked[0], re.IGNORECASE)):  # as Excel writes it
        separator, skipped = separator or named[1], 1
        peeked = peeked[1:]
    if separator is None:
        separator = _separator(peeked, _quoting(quotes))
    reader = csv.DictReader(itertools.chain(peeked, lines), strict=True, delimiter=separator, quoting=_quoting(quotes))
    try:
        header = list(reader.fieldnames or ())
        if reader.fieldnames == []:
            raise UserError(f"{path}, line {1 + skipped}: blank, where the header should be; delete the line")
        if repeated := _repeated(header):
            raise UserError(f"{path}, line {1 + skipped}: the header names {repeated} more than once; rename one")
        for number, values in enumerate(reader, 1):
            if None in values or None in values.values():
                raise UserError(
                    f"{path}, row {number} (line {reader.line_num + skipped}): expected {len(header)} fields, as in "
                    f"the header; quote fields that hold {_named(separator)}, or set data.separator if "
                    f"{_named(separator)} does not separate them"
                )
            if separator == "\t" and any("\t" in value and "\n" in value for value in values.values()):
                raise UserError(
                    f"{path}, row {number} (line {reader.line_num + skipped}): a quoted field holds tabs and line "
                    "breaks, so it may be several rows; if quotation marks are text here, set data.quotes: false"
                )
            yield number, values
    except csv.Error as problem:
        raise UserError(
            f"{path}, line {reader.line_num + skipped}: broken CSV, separated by {_named(separator)}: {problem}; "
            "double quotation marks within quoted fields, or set data.quotes: false if quotation marks are text here; "
            "data.separator sets another separator"
        ) from problem


def _quoting(quotes: bool) -> Literal[0, 3]:
    return csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE


def _separator(lines: list[str], quoting: Literal[0, 3]) -> str:
    """The separator that splits all records into the same, largest number of fields; a comma if none does."""

    def fields(separator: str) -> int:
        try:
            records = [
                record for record in csv.reader(lines, delimiter=separator, quoting=quoting, strict=True) if record
            ]
        except csv.Error:  # the last record may be cut off within a quoted field
            reader = csv.reader(lines, delimiter=separator, quoting=quoting)
            records = [record for record in reader if record][:-1]
        widths = {len(record) for record in records}
        return widths.pop() if len(widths) == 1 else 1

    best = max(_SEPARATORS, key=fields)  # the first of those with the most fields
    return best if fields(best) > 1 else ","


def _named(separator: str) -> str:
    return {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}.get(separator, repr(separator))


# --- Arrow


def _parquet(path: str) -> Numbered:
    with open_bytes(path) as file:
        with reading(path):
            table = pq.ParquetFile(file if file.seekable() else io.BytesIO(file.read()))
        yield from _batches(path, table.schema_arrow, table.iter_batches())


def _arrow(path: str) -> Numbered:
    """Rows of Arrow's file format, or of its stream format, which `datasets` writes."""
    with open_bytes(path) as file:
        with reading(path):
            whole = file if file.seekable() else io.BytesIO(file.read())
            is_file = whole.read(6) == b"ARROW1"
            whole.seek(0)
            if is_file:
                opened = pa.ipc.open_file(whole)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            else:
                opened = pa.ipc.open_stream(whole)
                batches = iter(opened)
        yield from _batches(path, opened.schema, batches)


def _batches(path: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Numbered:
    if repeated := _repeated(schema.names):
        raise UserError(f"{path}: the schema names {repeated} more than once; rename one")
    number = 0
    while True:
        try:
            if (batch := next(batches, None)) is None:
                return
            records = batch.to_pylist()
        except Exception as problem:  # damaged pages, bad UTF-8
            raise UserError(f"{path}, after row {number}: cannot read it: {problem}") from problem
        for values in records:
            number += 1
            yield number, values
