"""Reads the rows of a data source, sliced, filtered and sampled as configured, each with its position there."""

import contextlib
import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
from datasets.features.features import require_decoding
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from mrd_ray.config import DataSettings
from mrd_ray.data import formats, sources
from mrd_ray.data.cells import lookup
from mrd_ray.data.containers import refuse_split
from mrd_ray.data.files import Say
from mrd_ray.data.sources import CARDS, File, Hub, Saved, refuse_wild_cards
from mrd_ray.errors import UserError
from mrd_ray.models import foreign

R = TypeVar("R")
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """A row as read.

    index: its position in the whole source, from 0, as in `load_dataset(...)[index]`. file: the file it is from, or
    None if there is only one. number: its line in a JSON-lines file, else its record, from 1.
    """

    index: int
    file: str | None
    number: int
    values: dict[str, object]

    @property
    def place(self) -> str:
        """File and row, for messages."""
        return f"row {self.number}" if self.file is None else f"{self.file}, row {self.number}"


def quiet(_: str) -> None:
    """Say nothing."""


def rows(data: DataSettings, say: Say = quiet) -> Iterator[Row]:
    """The rows that `data` selects, in the order of the source. For .txt files see `texts`.

    Args:
        say: receives notices about how the source is read.

    Raises:
        UserError: names the file, row and cause.
    """
    found = _all(data, say)
    first = next(found, None)
    if first is None:
        raise UserError(f"data.path: {described(data)} holds no rows")
    return drawn(data, _where(data, itertools.chain([first], found)), lambda row: row.index)


def texts(data: DataSettings, say: Say = quiet) -> list[tuple[str | None, str]] | None:
    """Plain texts, each with its file's name (None if there is only one file), or None if the source is a table."""
    sliced = "[" in data.split or "+" in data.split
    found, settled = sources.find(data, _names(data.split)[0], quiet)
    if not isinstance(found, list) or not found[0].is_text:
        return None
    if sliced or not (settled or data.split == "train"):
        raise UserError(
            f"data.split: {data.split}, but {found[0].path} is plain text, which has no rows to slice and no splits; "
            "leave it out (data.max_samples reads only a part)"
        )
    _refuse_columns(data, found[0].path)
    read = [(_called(file, found), formats.text(file.path, data, say)) for file in found]
    if not (filled := [(name, text) for name, text in read if text.strip()]):
        raise UserError(f"data.path: {described(data)} is empty")
    if blank := [name for name, text in read if not text.strip()]:
        say(f"Skipped empty files: {', '.join(map(str, blank))}")
    return filled


def _refuse_columns(data: DataSettings, path: str) -> None:
    named = ("text", "prompt", "response", "messages", "where")
    if given := [f"data.{name}" for name in named if getattr(data, name)]:
        raise UserError(f"{' and '.join(given)}: {path} is plain text, which has no columns; leave it out")


def described(data: DataSettings) -> str:
    """How messages name the source."""
    return data.path if isinstance(data.path, str) else ", ".join(data.path)


def _called(file: File, files: list[File]) -> str | None:
    return file.name if len(files) > 1 else None


def _all(data: DataSettings, say: Say) -> Iterator[Row]:
    """All rows of the split, or of the slices of splits."""
    spec = data.split
    if "[" not in spec and "+" not in spec:
        numbered = _of_split(data, spec, say)
    elif isinstance(sources.find(data, _names(spec)[0], quiet)[0], Hub):
        numbered = _of_hub(data, spec, say)
    else:
        of = {name: list(_of_split(data, name, say)) for name in dict.fromkeys(_names(spec))}
        try:
            slices = datasets.ReadInstruction.from_spec(spec).to_absolute(
                {name: len(rows) for name, rows in of.items()}
            )
        except (ValueError, AssertionError) as problem:
            raise UserError(f"data.split: {spec} is not a valid slice of {described(data)}: {problem}") from problem
        numbered = itertools.chain.from_iterable(of[part.splitname][part.from_ : part.to] for part in slices)
    for index, (file, number, values) in enumerate(numbered):
        yield Row(index, file, number, values)


def _names(spec: str) -> list[str]:
    return [re.split(r"[\[(]", part.strip())[0] for part in spec.split("+")]


_Numbered = Iterator[tuple[str | None, int, dict[str, object]]]


def _of_split(data: DataSettings, split: str, say: Say) -> _Numbered:
    found, settled = sources.find(data, split, say)
    if isinstance(found, Hub):
        yield from _of_hub(data, split, say)
    elif isinstance(found, Saved):
        if not settled:
            refuse_split(found.path, split)
        yield from _of_saved(found.path)
    else:
        for file in found:
            name = _called(file, found)
            for number, values in formats.rows(file.path, data, "train" if settled else split, say):
                yield name, number, {**file.columns, **values} if file.columns else values


def _of_saved(path: str) -> _Numbered:
    for key, name in foreign.values(foreign.read_json("data.path", f"{path}/state.json").get("_data_files")):
        if key == "filename" and not foreign.is_plain_name(name):
            raise UserError(f"data.path: {path}/state.json names {name!r:.200}; expected files in the same folder")
    try:
        saved = datasets.load_from_disk(path).with_format("arrow")
        number = 0
        for batch in saved.iter(_BATCH):
            for values in batch.to_pylist():
                number += 1
                yield None, number, values
    except Exception as problem:  # formats and versions all have their own exceptions
        raise UserError(f"data.path: cannot read {path} as saved by datasets: {problem}") from problem


def _of_hub(data: DataSettings, split: str, say: Say) -> _Numbered:
    try:
        _refuse_wild_cards(data)
        table = datasets.load_dataset(
            data.path, data.name, split=split, revision=data.revision, streaming="[" not in split and "+" not in split
        )
        media = [name for name, feature in (table.features or {}).items() if require_decoding(feature)]
        if media:  # decoding would download what the rows name
            say(f"Skipped columns with images or sound: {', '.join(media)}")
            table = table.remove_columns(media)
        for number, values in enumerate(table, 1):
            yield None, number, values
    except UserError:
        raise
    except Exception as problem:  # loading scripts and formats have their own exceptions
        raise UserError(
            f"data.path: no such file or folder: {data.path}, and it could not be loaded as a Hugging Face dataset "
            f"(data.name={data.name}, data.split={data.split}, data.revision={data.revision}): {problem}"
        ) from problem


def _refuse_wild_cards(data: DataSettings) -> None:
    cards = {}
    for card in CARDS:
        # offline, only cached files are read; the card may not be among them
        with contextlib.suppress(EntryNotFoundError, LocalEntryNotFoundError):
            found = hf_hub_download(str(data.path), card, repo_type="dataset", revision=data.revision)
            cards[card] = Path(found)
    refuse_wild_cards(f"data.path: {data.path}", cards)


def _where(data: DataSettings, records: Iterable[Row]) -> Iterator[Row]:
    """The rows whose columns have the values of data.where. Raises UserError if there are none."""
    found = False
    for row in records:
        for column in data.where:
            if column not in row.values and column.split(".")[0] not in row.values:
                raise UserError(
                    f"{described(data)}, {row.place}: no column {column!r} (data.where); its columns are "
                    f"{', '.join(row.values)}"
                )
        if all(lookup(row.values, column) == value for column, value in data.where.items()):
            found = True
            yield row
    if not found:
        raise UserError(f"data.where: no row of {described(data)} has {data.where}")


def drawn(data: DataSettings, records: Iterator[R], index: Callable[[R], int]) -> Iterator[R]:
    """The first data.max_samples records, or with data.sample_seed the ones with the smallest random numbers.

    index: returns a record's position in the source, which sets the order of the result.
    """
    if data.sample_seed is None or data.max_samples is None:
        return itertools.islice(records, data.max_samples)
    generator = np.random.Generator(np.random.Philox(key=data.sample_seed))
    numbered = ((generator.random(), index(record), record) for record in records)
    kept = heapq.nsmallest(data.max_samples, numbered, key=lambda one: one[:2])
    return iter([record for _, _, record in sorted(kept, key=lambda one: one[1])])
