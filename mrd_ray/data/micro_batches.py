"""Groups samples into micro-batches, which fixes the shapes of all forward passes."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_PADDING = 0.05  # largest share of padding in a micro-batch; it is cut before it has more
_LEAST_TOKENS = 512  # a smaller micro-batch is not cut because of padding: every forward has an overhead


@dataclass(frozen=True)
class Layout:
    """Samples in micro-batches. The samples determine all shapes of forwards; the cluster has no influence.

    order: int64 [n], indices of samples (in a table sorted by sample_id), ordered by length, then id.
    bounds: int64 [m + 1]; micro-batch i is order[bounds[i]:bounds[i + 1]].
    padded_tokens: int64 [m], positions in each micro-batch's forward.
    """

    order: np.ndarray
    bounds: np.ndarray
    padded_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.padded_tokens)

    def samples(self, micro_batch: int) -> np.ndarray:
        """Indices of the samples in a micro-batch."""
        return self.order[self.bounds[micro_batch] : self.bounds[micro_batch + 1]]

    def members(self, micro_batches: range) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the samples of consecutive micro-batches, and the micro-batch of each."""
        bounds = self.bounds[micro_batches.start : micro_batches.stop + 1]
        return self.order[bounds[0] : bounds[-1]], np.repeat(micro_batches, np.diff(bounds))

    def few(self, count: int) -> np.ndarray:
        """Indices of up to `count` samples of different lengths, none from the longer half."""
        return self.order[: -(-len(self.order) // 2) : max(1, len(self.order) // (2 * count))][:count]


def lay_out(lengths: np.ndarray, micro_batch_tokens: int, switch: int | None = None) -> Layout:
    """Group samples, given their int [n] lengths in order of sample_id, into micro-batches.

    A micro-batch has at most `micro_batch_tokens` tokens, padding included, and fewer if more than 5% of them would be
    padding. A sample longer than `micro_batch_tokens` has a micro-batch of its own. Length 0 marks a sample to leave
    out.

    Args:
        switch: see `models.load.rope_switch`; no micro-batch has samples on both sides of it.
    """
    order = np.argsort(lengths, kind="stable")
    order = order[np.searchsorted(lengths[order], 1) :]
    bounds, widths = [0], []
    held = 0  # tokens in the micro-batch so far, without padding
    for position, length in enumerate(lengths[order].tolist()):  # lengths increase, so the latest is the padded width
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
    """The number of tokens of each sample, zero if it cannot be scored: int64 [n]."""
    found: np.ndarray = pc.fill_null(pc.list_value_length(samples["token_ids"]), 0).to_numpy().astype(np.int64)
    return found
