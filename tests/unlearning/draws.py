"""What the tests of streams and of the sampler share."""

import numpy as np
import pytest
from scipy import stats

MRD = np.array([0.5, 2.0, 1.0, 4.0, 0.25])
IDS = ["e", "b", "d", "a", "c"]
EXPECTED = {"mrd": MRD / MRD.sum(), "inverse_mrd": (1 / MRD) / (1 / MRD).sum(), "uniform": np.full(5, 0.2)}
WEIGHTINGS = pytest.mark.parametrize("weighting", ["mrd", "inverse_mrd", "uniform"])


def agrees(drawn, probabilities):
    counts = np.bincount(drawn, minlength=len(probabilities))
    return stats.chisquare(counts, probabilities * len(drawn)).pvalue > 1e-3
