"""What is checked of the closed form by draws before its scores are given, and which of them are then in doubt."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from mrd_ray.config import ScoringConfig
from mrd_ray.errors import UserError
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import delta, draw_seed
from mrd_ray.mrd.perturb import Replica
from mrd_ray.mrd.self_check import SelfCheck, has_choices
from mrd_ray.scoring.control import first_order_of
from mrd_ray.scoring.memory import Sample, collate, out_of_memory, release

_SAMPLES = 2  # of the trial
_ROUNDING, _SMALLER = 0.1, 1 / 1024  # of s, by a draw at so much of sigma
_CHOICES_UNCHECKED = "it depends on choices inside the model, such as of experts, and these could not be checked"


class Scored(NamedTuple):
    """A micro-batch with what the closed form found. theta: log(-P_t). norms: |g|."""

    sample_ids: list[str]
    batch: MicroBatch
    theta: torch.Tensor
    norms: list[float]


@dataclass
class Checked:
    """What was checked, for the manifest.

    samples, draws: of the trial. worst: its worst sample's root mean square of Delta_k - L_k, over s; None where L is
    not known, and only draws that are far out count. choices: whether the model makes discrete choices. every_sample:
    whether each sample is checked so, in the run. unchecked: why not all of it could be, or None.
    """

    samples: int = 0
    draws: int = 0
    worst: float | None = None
    choices: bool = False
    every_sample: bool = False
    unchecked: str | None = None


class Verification:
    """The trial, and the check of each sample where the model or the trial calls for one.

    Args:
        norms: of the model, at theta now.
        trial: the first of these are checked now.
        replica: makes one of the model.
        sharded: whether weights are spread over processes, which must all call this alike.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        norms: GradientNorms,
        scoring: ScoringConfig,
        trial: Sequence[Sample],
        replica: Callable[[], Replica],
        sharded: bool,
    ) -> None:
        self._scoring = scoring
        self._check: SelfCheck | None = None
        self.checked = Checked()
        if not scoring.verify_draws:
            self.checked.unchecked = "scoring.verify_draws is 0"
            return
        try:
            self._try(model, norms, trial[:_SAMPLES], replica)
        except RuntimeError as problem:
            if sharded or not out_of_memory(problem):
                raise
            self._leave("the device lacks memory for a perturbed copy of the weights")
        release(model.device)

    def _try(
        self,
        model: PreTrainedModel,
        norms: GradientNorms,
        trial: Sequence[Sample],
        make_replica: Callable[[], Replica],
    ) -> None:
        scoring, batch = self._scoring, collate(trial, model.device)
        self.checked.choices = has_choices(model, lambda: model.base_model(batch.token_ids, use_cache=False))
        if model.dtype not in (torch.float32, torch.float64):
            self._leave(f"{str(model.dtype).removeprefix('torch.')} rounds sigma away")
            return
        first_order, replica = None, make_replica()
        if not replica.sharded:
            try:
                first_order = first_order_of(replica, norms, scoring)
            except UserError as problem:
                self.checked.unchecked = f"draws are held against the size of the gradient alone, since {problem}"
        check = SelfCheck(
            replica, Likelihood(model), norms, first_order, scoring.sigma, scoring.seed, scoring.verify_draws,
            self.checked.choices, exact=not replica.sharded,
        )  # fmt: skip
        theta, squares = norms(batch)
        scored = Scored([sample["sample_id"] for sample in trial], batch, theta, squares.sqrt().tolist())
        (findings,) = check([batch], [theta], [scored.norms])
        self.checked.samples, self.checked.draws = len(trial), scoring.verify_draws
        if first_order is not None:
            self.checked.worst = max(finding.off() for finding in findings)
        doubtful = any(finding.doubt() for finding in findings)
        if doubtful and _rounded(replica, check.likelihood, scored, scoring):
            self._leave(f"{str(model.dtype).removeprefix('torch.')} rounds away what sigma does to the samples")
            return
        self.checked.every_sample = self.checked.choices or (doubtful and not replica.sharded)
        self._check = check if self.checked.every_sample else None

    def _leave(self, why: str) -> None:
        self.checked.unchecked, self.checked.every_sample, self._check = why, False, None

    def doubts(self, scored: Sequence[Scored], mu: Mapping[str, float]) -> dict[str, str]:
        """Why scores are in doubt, by sample_id of those that are. mu: E Delta, where it is known."""
        ids = [sample_id for one in scored for sample_id in one.sample_ids]
        if self._check is None:
            return dict.fromkeys(ids, _CHOICES_UNCHECKED) if self.checked.choices and self.checked.unchecked else {}
        batches, theta, norms = zip(*((one.batch, one.theta, one.norms) for one in scored), strict=True)
        findings = [finding for of_batch in self._check(batches, theta, norms) for finding in of_batch]
        found = {}
        for sample_id, finding, norm in zip(ids, findings, itertools.chain(*norms), strict=True):
            s = self._scoring.sigma * norm
            if (doubt := finding.doubt(mu.get(sample_id, 0.0) / s if s else 0.0)) is not None:
                found[sample_id] = doubt
        return found


def _rounded(replica: Replica, likelihood: Likelihood, scored: Scored, scoring: ScoringConfig) -> bool:
    """Whether a draw so small that it does next to nothing shows rounding that the check would take for a finding."""
    replica.perturb(scoring.sigma * _SMALLER, draw_seed(scoring.seed, 0))
    try:
        found = delta(scored.theta, likelihood.log_neg_log_probs(scored.batch), scored.batch.scored)
    finally:
        replica.restore()
    s = scoring.sigma * torch.tensor(scored.norms, dtype=torch.float64, device=found.device)
    return bool((found.abs() / s > _ROUNDING).any())
