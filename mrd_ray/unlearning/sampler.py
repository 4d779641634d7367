"""MRDSampler: draws a forget set's samples by their scores, for the DataLoader of any unlearning code."""

import itertools
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch.utils.data

from mrd_ray.config import Weighting
from mrd_ray.config.credentials import refuse_credentials
from mrd_ray.errors import UserError
from mrd_ray.runs import storage
from mrd_ray.unlearning.sampling import ForgetStream, sampling_probabilities

_NAMED = 5  # samples that a message names
_CHUNK = 1 << 18  # draws of one step; changing it changes the draws


class MRDSampler(torch.utils.data.Sampler[int]):
    """Draws the indices of a forget set with replacement, weighted by MRD: for the DataLoader of any unlearning code.

        sampler = MRDSampler("run/scores.parquet", length=len(forget_set))
        loader = DataLoader(forget_set, batch_size=8, sampler=sampler)

    As with torch's DistributedSampler, every epoch has other draws if you call `set_epoch` before it. Unlike there, all
    ranks get the same draws. Epoch e of a seed always has the same draws; a larger `num_samples` only adds to them.
    """

    def __init__(
        self,
        scores: pa.Table | str | os.PathLike[str],
        sample_ids: Sequence[str] | pa.Array | pa.ChunkedArray | None = None,
        weighting: Weighting = "mrd",
        num_samples: int | None = None,
        seed: int = 0,
        *,
        length: int | None = None,
    ) -> None:
        """Match the scores with the data set, using only numpy and Arrow: ten million samples take seconds.

        Args:
            scores: a scores.parquet (local path or fsspec URI), or its table. It uses the columns sample_id and mrd,
                and without sample_ids also index (or row).
            sample_ids: the sample at each index of the data set; scores of others are ignored. Whole numbers
                count as text, as in scoring. An Arrow column is faster than a list. None: the data set is the
                whole source that was scored, in its order. Index i gets the score whose column `index` is i.
            weighting: see `sampling_probabilities`.
            num_samples: draws per epoch; None for the length of the data set.
            seed: 0 <= seed < 2**64.
            length: the length of the data set, which must fit. With it and without sample_ids, a table with scores of
                a part of the source is taken to match a data set that was cut to the same samples, in source order.

        Raises:
            UserError: the scores cannot be read, ids occur twice or have no row there, the data set has another length,
                the scores do not say where their samples are or cover only a part of the source (and neither
                sample_ids nor length is given), scores cannot be weights, or a number is out of its range.
        """
        super().__init__()
        if not 0 <= seed < 2**64:
            raise UserError(f"seed: {seed}; expected 0 <= seed < 2**64")
        if num_samples is not None and num_samples < 1:
            raise UserError(f"num_samples: {num_samples}; expected at least 1, or None")
        name, table = _table(scores)
        known, mrd = _scores(name, table)
        if sample_ids is None:
            order = _source_order(name, table, length)
            ids = known.take(pa.array(order))
        else:
            ids = _strings(sample_ids, "sample_ids")
            if length is not None and length != len(ids):
                raise UserError(f"length: {length}, but sample_ids holds {len(ids)} ids; expected one for each sample")
            order = _rows(ids, known)
        probabilities = sampling_probabilities(ids, mrd[order], weighting)
        self._stream = ForgetStream(probabilities, seed)
        self._num_samples = len(ids) if num_samples is None else num_samples
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of the next iteration, 0 <= epoch < 2**32. Raises ValueError."""
        if not 0 <= epoch < 2**32:
            raise ValueError(f"epoch: {epoch}; expected a number from 0 to 2**32 - 1")
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_samples

    def __iter__(self) -> Iterator[int]:
        first, n = self._epoch << 32, self._num_samples
        return itertools.chain.from_iterable(
            self._stream.at(first + chunk, min(_CHUNK, n - chunk * _CHUNK)).tolist() for chunk in range(-(-n // _CHUNK))
        )


_OF_IDENTITY, _OF_PLACE = ("sample_id", "mrd"), ("index", "row", "file")  # columns of scores.parquet


def _table(scores: pa.Table | str | os.PathLike[str]) -> tuple[str, pa.Table]:
    """The name of the table in messages, and its columns that are used. Raises UserError."""
    if isinstance(scores, pa.Table):
        name, table = "scores", scores
    else:
        name = os.fspath(scores)
        refuse_credentials("scores", name)
        try:
            with storage.open_file(name) as opened:
                file = pq.ParquetFile(opened)
                columns = [column for column in (*_OF_IDENTITY, *_OF_PLACE) if column in file.schema_arrow.names]
                table = file.read(columns)
        except (OSError, ValueError, ImportError, pa.ArrowException) as problem:  # ImportError: no such file system
            raise UserError(f"{name}: cannot read it ({problem}); expected a scores.parquet") from None
    if absent := set(_OF_IDENTITY) - set(table.column_names):
        raise UserError(f"{name}: not a table of scores; it has no column {', '.join(sorted(absent))}")
    if len(table.column_names) > len(set(table.column_names)):
        raise UserError(f"{name}: not a table of scores; some of its columns occur twice")
    return name, table


def _scores(name: str, table: pa.Table) -> tuple[pa.Array, np.ndarray]:
    """Ids, none of them twice, and their MRD: float64 [n], nan where there is none. Raises UserError."""
    ids = _strings(table["sample_id"], f"{name}, column sample_id")
    try:
        mrd = table["mrd"].cast(pa.float64()).to_numpy()
    except pa.ArrowException as problem:
        raise UserError(f"{name}, column mrd: expected numbers ({problem})") from None
    if not pc.all(pc.less(ids[:-1], ids[1:])).as_py():  # scores.parquet is sorted; sorting takes long
        ordered = ids.take(pc.sort_indices(ids))
        twice = pc.unique(ordered[1:].filter(pc.equal(ordered[:-1], ordered[1:])))
        if len(twice):
            raise UserError(f"{name}: {len(twice)} sample ids occur more than once: {_named(twice)}; keep one row each")
    return ids, mrd


def _source_order(name: str, table: pa.Table, length: int | None) -> np.ndarray:
    """The table's row of each sample of a data set without ids, which is in the source's order: int64 [n].

    Raises:
        UserError: the table does not say, or does not have all samples of the data set.
    """
    if length is not None and length != len(table):
        raise UserError(
            f"length: {length}, but {name} has scores of {len(table)} samples. Score the whole data set, cut it to the "
            "samples that were scored, or give sample_ids"
        )
    column, first = _place_column(name, table)
    try:
        places = table[column].cast(pa.int64())
    except pa.ArrowException as problem:
        raise UserError(f"{name}, column {column}: expected whole numbers ({problem}); give sample_ids") from None
    if places.null_count:
        raise UserError(
            f"{name}, column {column}: {places.null_count} of {len(places)} are null; give sample_ids to match by"
        )
    spots = places.to_numpy()
    order = np.argsort(spots, kind="stable")
    spots = spots[order]
    if len(twice := np.unique(spots[1:][spots[1:] == spots[:-1]])):
        shown = ", ".join(map(str, twice[:_NAMED].tolist())) + (", ..." if len(twice) > _NAMED else "")
        raise UserError(
            f"{name}, column {column}: {len(twice)} place(s) occur more than once: {shown}. Were tables of several "
            "runs joined? Keep one row for each sample, or give sample_ids to match by"
        )
    if length is None and len(spots) and (spots[0], spots[-1]) != (first, first + len(spots) - 1):
        raise UserError(
            f"{name}: its {len(spots)} scores are of a part of the source: column {column} goes from {spots[0]} to "
            f"{spots[-1]}, expected {first} to {first + len(spots) - 1}. Give sample_ids; or length=len(dataset), if "
            "the data set holds exactly these samples, in the source's order"
        )
    return order


def _place_column(name: str, table: pa.Table) -> tuple[str, int]:
    """The column with each sample's place in the source, and its value for the first one. Raises UserError."""
    if "index" in table.column_names:
        return "index", 0
    if "row" not in table.column_names:
        raise UserError(
            f"{name}: no column index or row, which say where each sample is in the data set. An earlier version "
            "may have written it: run its score command again on the same directory, which adds them and computes no "
            "score twice; or give sample_ids"
        )
    if "file" in table.column_names and table["file"].null_count < len(table):
        raise UserError(
            f"{name}: its rows are numbered in each of several files, and it has no column index, their place in the "
            "whole source; add it, or give sample_ids"
        )
    return "row", 1


def _strings(ids: Sequence[str] | pa.Array | pa.ChunkedArray, name: str) -> pa.Array:
    """The ids as one array of large_string, since arrays of string end at 2 GiB. Raises UserError."""
    try:
        arrow = (ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids)).cast(pa.large_string())
    except pa.ArrowException as problem:
        raise UserError(f"{name}: expected ids that are text or whole numbers ({problem})") from None
    if arrow.null_count:
        raise UserError(f"{name}: {arrow.null_count} of {len(arrow)} ids are null; give every sample an id")
    return arrow.combine_chunks() if isinstance(arrow, pa.ChunkedArray) else arrow


def _rows(ids: pa.Array, known: pa.Array) -> np.ndarray:
    """The index of each of `ids` in `known`, which has no id twice: int32 [n]. Raises UserError."""
    indices = pc.index_in(ids, value_set=known)
    if indices.null_count:
        lacking = ids.filter(pc.is_null(indices))
        raise UserError(
            f"{len(lacking)} of {len(ids)} sample ids of the data set have no row in the scores: {_named(lacking)}; "
            "score them, or remove them from the forget set"
        )
    rows = indices.to_numpy()
    twice = np.flatnonzero(np.bincount(rows, minlength=1) > 1)
    if len(twice):
        raise UserError(
            f"{len(twice)} sample ids occur more than once in the data set: {_named(known.take(pa.array(twice)))}; "
            "remove the repetitions"
        )
    return rows


def _named(ids: pa.Array) -> str:
    return ", ".join(map(repr, ids[:_NAMED].to_pylist())) + (", ..." if len(ids) > _NAMED else "")
