"""Checks the closed form against draws before its scores are returned, and decides which of them are in doubt."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from mrd_ray.config import ScoringSettings
from mrd_ray.errors import UserError
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.first_order import FirstOrders
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import noise_key
from mrd_ray.mrd.perturb import Replica
from mrd_ray.mrd.precision import MIN_COSINE, realised
from mrd_ray.mrd.self_check import SelfCheck, has_choices
from mrd_ray.scoring.control import ByAutograd, first_order_of
from mrd_ray.workers.memory import Sample, collate, out_of_memory, release

_SAMPLES = 2  # samples of the trial that are checked
_TOLERANCE = 1e-2  # relative to a gradient norm
_SMALLER = (1 / 64, 1 / 16, 1 / 4)  # fractions of sigma, to separate rounding from the model's own behaviour
_CHOICES_UNCHECKED = "it depends on choices inside the model, such as of experts, and these could not be checked"
_NO_MEMORY = "the device lacks memory to check it by draws"


class Scored(NamedTuple):
    """A micro-batch with what the closed form found. theta: log(-P_t). norms: |g|."""

    sample_ids: list[str]
    batch: MicroBatch
    theta: torch.Tensor
    norms: list[float]


@dataclass
class Checked:
    """What was checked, for the manifest.

    samples, draws: of the trial. worst: root mean square of Delta_k - L_k, divided by s, for the trial's worst sample;
    None if L is unknown, and then only draws far out count. choices: whether the model makes discrete choices.
    every_sample: whether the run checks every sample in this way. unchecked: why the check is incomplete, or None.
    """

    samples: int = 0
    draws: int = 0
    worst: float | None = None
    choices: bool = False
    every_sample: bool = False
    unchecked: str | None = None


class Verification:
    """The trial, and the check of each sample if the model or the trial requires one.

    The trial's gradient norms are also compared with autograd.

    Raises UserError if they disagree.

    Args:
        norms: of the model, which is at theta now.
        trial: the first of these samples are checked at once.
        replica: makes a replica of the model.
        sharded: whether weights are spread over processes; then all processes must call this in the same way.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        norms: GradientNorms,
        scoring: ScoringSettings,
        trial: Sequence[Sample],
        replica: Callable[[], Replica],
        sharded: bool,
    ) -> None:
        self._scoring, self._sharded = scoring, sharded
        self._check: SelfCheck | None = None
        self.checked = Checked()
        if not scoring.verify_draws:
            self.checked.unchecked = "scoring.verify_draws is 0"
            return
        try:
            self._try(model, norms, trial[:_SAMPLES], replica, sharded)
        except RuntimeError as problem:
            if sharded or not out_of_memory(problem):
                raise
            self._leave("the device has too little memory for a perturbed copy of the weights")
        release(model.device)

    def _try(
        self,
        model: PreTrainedModel,
        norms: GradientNorms,
        trial: Sequence[Sample],
        make_replica: Callable[[], Replica],
        sharded: bool,
    ) -> None:
        scoring, batch = self._scoring, collate(trial, model.device)
        self.checked.choices = has_choices(model, batch.token_ids)
        if model.dtype not in (torch.float32, torch.float64):
            self._leave(_rounds_away(model))
            return
        replica = make_replica()
        if not sharded and not _carried(replica, scoring.sigma, scoring.seed):
            self._leave(_rounds_away(model))
            return
        theta, squares = norms(batch)
        scored = Scored([sample["sample_id"] for sample in trial], batch, theta, squares.sqrt().tolist())
        by_autograd = None if sharded else ByAutograd(norms)

        def check(sigma: float, first_order: FirstOrders | None, choices: bool) -> SelfCheck:
            draws, likelihood = scoring.verify_draws, Likelihood(model)
            return SelfCheck(
                replica, likelihood, norms, first_order, sigma, scoring.seed, draws, choices, exact=not sharded
            )

        (findings,) = check(scoring.sigma, by_autograd, self.checked.choices)([batch], [theta], [scored.norms])
        self.checked.samples, self.checked.draws = len(trial), scoring.verify_draws
        doubtful = any(finding.doubt() for finding in findings)
        if by_autograd is not None:
            _refuse_wrong_norms(scored, by_autograd.squares)
            self.checked.worst = max(finding.off() for finding in findings)
            differing = any(finding.differs() for finding in findings)
            smaller = next((one for one in _SMALLER if _carried(replica, scoring.sigma * one, scoring.seed)), 1.0)
            if differing and smaller < 1:
                (found,) = check(scoring.sigma * smaller, by_autograd, False)([batch], [theta], [scored.norms])
                # at a smaller sigma, rounding stays the same, and the model's own deviations shrink a lot
                rounding = max(finding.off() for finding in found) * math.sqrt(smaller) > self.checked.worst
            if differing and (smaller == 1 or rounding):
                self._leave(_rounds_away(model, "what sigma does to the samples"))
                return
        self.checked.every_sample = self.checked.choices or (doubtful and not sharded)
        if self.checked.every_sample:
            first_order = None if sharded else first_order_of(replica, norms, scoring)[0]
            self._check = check(scoring.sigma, first_order, self.checked.choices)
            if sharded:
                self.checked.unchecked = "weights are spread over processes, so only draws far out are noticed"

    def _leave(self, why: str) -> None:
        self.checked.unchecked, self.checked.every_sample, self._check = why, False, None

    def doubts(self, scored: Sequence[Scored], mu: Mapping[str, float]) -> dict[str, str]:
        """Why scores are in doubt, keyed by the sample_id of those that are. mu: E Delta, where it is known."""
        ids = [sample_id for one in scored for sample_id in one.sample_ids]
        if self._check is None:
            return dict.fromkeys(ids, _CHOICES_UNCHECKED) if self.checked.choices and self.checked.unchecked else {}
        batches, theta, norms = ([getattr(one, name) for one in scored] for name in ("batch", "theta", "norms"))
        try:
            findings = [finding for of_batch in self._check(batches, theta, norms) for finding in of_batch]
        except RuntimeError as problem:
            if self._sharded or not out_of_memory(problem):
                raise
            return dict.fromkeys(ids, _NO_MEMORY)
        found = {}
        for sample_id, finding, norm in zip(ids, findings, itertools.chain(*norms), strict=True):
            s = self._scoring.sigma * norm
            if (doubt := finding.doubt(mu.get(sample_id, 0.0) / s if s else 0.0)) is not None:
                found[sample_id] = doubt
        return found


def _rounds_away(model: PreTrainedModel, what: str = "sigma") -> str:
    return f"{str(model.dtype).removeprefix('torch.')} rounds {what} away"


def _refuse_wrong_norms(scored: Scored, squares: Sequence[float]) -> None:
    """Raises UserError if the norms differ from autograd's."""
    for sample_id, norm, square in zip(scored.sample_ids, scored.norms, squares, strict=True):
        expected = math.sqrt(square)
        if not abs(norm - expected) <= _TOLERANCE * expected and math.isfinite(norm):
            raise UserError(
                f"scoring.estimator: closed_form does not agree with autograd on sample {sample_id!r}, whose gradient "
                f"norm is {expected:.4g}, not {norm:.4g}; use monte_carlo, and report the model"
            )


def _carried(replica: Replica, sigma: float, seed: int) -> bool:
    """Whether the weights' precision is enough to represent sigma z."""
    return realised(replica, sigma, noise_key(seed, 0))[1] >= MIN_COSINE
