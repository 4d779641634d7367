"""When to stop: the paper's rule (Feng et al., Appendix C.4), and a floor on utility."""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, TypedDict

from mrd_ray.config import StoppingSettings

_FLOOR_NATS = 0.1  # twice the loss of a memorised retain set may still be tiny
_MOST_NATS = 230.0  # a perplexity of 8e99: a number that every reader of the log can use
Measure = Literal[
    "forget_memorization_accuracy", "forget_extraction_likelihood", "forget_log_prob", "retain_perplexity"
]
# what is logged of a model, as people read it
TITLES: dict[Measure, str] = {
    "forget_memorization_accuracy": "forget MA: share of tokens that are the likeliest",
    "forget_extraction_likelihood": "forget EL: share of n-grams given away",
    "forget_log_prob": "forget log-likelihood, nats per sample",
    "retain_perplexity": "retain perplexity",
}


class Measures(TypedDict):
    """What is logged of a model: means over samples; None where it is not measured."""

    forget_log_prob: float | None
    forget_memorization_accuracy: float | None
    forget_extraction_likelihood: float | None
    retain_perplexity: float | None


def perplexity(loss: float) -> float:
    """Of a mean negative log-likelihood in nats."""
    return math.exp(min(loss, _MOST_NATS))


@dataclass(frozen=True)
class Knowledge:
    """What the model knows of the forget set, sample by sample, and of the watched retain samples.

    log_prob: nats, over the scored tokens. memorization_accuracy (MA), extraction_likelihood (EL_n): in [0, 1]; EL is
    nan for a sample of n tokens or fewer, and None if it was left out. retain_loss: mean negative log-likelihood of the
    retain samples' tokens, nats; None without a retain set.
    """

    log_prob: list[float]
    memorization_accuracy: list[float]
    extraction_likelihood: list[float] | None
    retain_loss: float | None

    def means(self) -> Measures:
        """What is logged."""
        extraction = [el for el in self.extraction_likelihood or [] if not math.isnan(el)]
        return {
            "forget_log_prob": fmean(self.log_prob),
            "forget_memorization_accuracy": fmean(self.memorization_accuracy),
            "forget_extraction_likelihood": fmean(extraction) if extraction else None,
            "retain_perplexity": None if self.retain_loss is None else perplexity(self.retain_loss),
        }

    def finite(self) -> bool:
        """Whether the model's probabilities are still finite."""
        return all(map(math.isfinite, [*self.log_prob, self.retain_loss or 0.0]))


def retain_loss_limit(stopping: StoppingSettings, initial: Knowledge) -> float:
    """The utility floor as a loss in nats; infinite where there is none."""
    if stopping.max_retain_loss_ratio is None or initial.retain_loss is None:
        return math.inf
    ratio, before = stopping.max_retain_loss_ratio, initial.retain_loss
    # N times the loss, or N times the perplexity: for an ordinary model, twice the loss is no limit at all
    return max(min(ratio * before, before + math.log(ratio)), before + _FLOOR_NATS)


def below_floor(stopping: StoppingSettings, initial: Knowledge, now: Knowledge) -> str | None:
    """Why this state must not become the result, or None."""
    if not now.finite():
        return "diverged: the model no longer gives finite probabilities"
    limit = retain_loss_limit(stopping, initial)
    if now.retain_loss is not None and now.retain_loss > limit:
        return (
            f"utility floor: the retain loss is {now.retain_loss:.3g}, over {limit:.3g} (it was "
            f"{initial.retain_loss:.3g}; stopping.max_retain_loss_ratio is {stopping.max_retain_loss_ratio:g})"
        )
    return None


def forgotten(stopping: StoppingSettings, initial: Knowledge, now: Knowledge) -> bool:
    """EL_n and MA of every forget sample, or their means, are below their averages on the initial model.

    Zero counts as below, since nothing is: there is no less memory than none.
    """
    if stopping.forgotten == "never":
        return False
    before, after = initial.means(), now.means()
    of_samples: dict[Measure, list[float]] = {
        "forget_memorization_accuracy": now.memorization_accuracy,
        "forget_extraction_likelihood": [el for el in now.extraction_likelihood or [] if not math.isnan(el)],
    }
    for name, values in of_samples.items():
        if (threshold := before[name]) is None:
            continue
        if stopping.forgotten == "mean":
            mean = after[name]
            values = [] if mean is None else [mean]
        if not all(value < threshold or value == 0 for value in values):
            return False
    return True
