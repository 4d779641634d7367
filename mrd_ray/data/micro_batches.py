"""Samples in micro-batches: the shapes of all forwards."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_PADDING = 0.05  # of a micro-batch's positions at most, where it is cut for that
_LEAST_TOKENS = 512  # a micro-batch is not cut below that for its padding's sake: each forward has its own overhead


@dataclass(frozen=True)
class Layout:
    """Samples in micro-batches: the shapes of all forwards, fixed by the samples alone, whatever the cluster.

    order: int64 [n], indices of the samples (sorted by sample_id) by length, then id.
    bounds: int64 [m + 1]; micro-batch i is order[bounds[i]:bounds[i + 1]].
    padded_tokens: int64 [m], positions in each micro-batch's forward.
    """

    order: np.ndarray
    bounds: np.ndarray
    padded_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.padded_tokens)

    def samples(self, micro_batch: int) -> np.ndarray:
        """Indices of its samples."""
        return self.order[self.bounds[micro_batch] : self.bounds[micro_batch + 1]]

    def members(self, micro_batches: range) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the samples of consecutive micro-batches, and the micro-batch of each."""
        bounds = self.bounds[micro_batches.start : micro_batches.stop + 1]
        return self.order[bounds[0] : bounds[-1]], np.repeat(micro_batches, np.diff(bounds))

    def few(self, count: int) -> np.ndarray:
        """Indices of up to so many samples, of different lengths, none of the longer half."""
        return self.order[: -(-len(self.order) // 2) : max(1, len(self.order) // (2 * count))][:count]


def lay_out(lengths: np.ndarray, micro_batch_tokens: int, switch: int | None = None) -> Layout:
    """Cut samples, given their int [n] lengths in order of sample_id, into micro-batches of so many padded tokens.

    Of fewer, where they would hold more than 5% of padding. A sample longer than `micro_batch_tokens` has a micro-batch
    of its own. Length 0 marks a sample to leave out.

    Args:
        switch: see `models.load.rope_switch`; no micro-batch has samples on both sides of it.
    """
    order = np.argsort(lengths, kind="stable")
    order = order[np.searchsorted(lengths[order], 1) :]
    bounds, widths = [0], []
    held = 0  # tokens of the micro-batch so far
    for position, length in enumerate(lengths[order].tolist()):  # lengths rise, so the newest is the padded width
        members = position - bounds[-1]
        positions = (members + 1) * length
        wasteful = held >= _LEAST_TOKENS and held + length < (1 - _PADDING) * positions
        switched = switch is not None and length > switch and members and lengths[order[position - 1]] <= switch
        if members and (positions > micro_batch_tokens or wasteful or switched):
            widths.append(lengths[order[position - 1]])
            bounds.append(position)
            held = 0
        held += length
    if len(order):
        widths.append(lengths[order[-1]])
        bounds.append(len(order))
    edges = np.asarray(bounds, np.int64)
    return Layout(order, edges, np.diff(edges) * np.asarray(widths, np.int64))


def lengths(samples: pa.Table) -> np.ndarray:
    """Tokens of each sample, zero for those that cannot be scored: int64 [n]."""
    found: np.ndarray = pc.fill_null(pc.list_value_length(samples["token_ids"]), 0).to_numpy().astype(np.int64)
    return found
