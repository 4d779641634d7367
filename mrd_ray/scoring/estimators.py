"""From samples and draws to a unit's result, with one class per estimator; each owns its replica's memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import NamedTuple, cast

import torch
from transformers import PreTrainedModel

from mrd_ray.config import ScoringSettings
from mrd_ray.errors import UserError
from mrd_ray.models import load
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.coverage import coverage
from mrd_ray.mrd.curvature import TraceEstimator
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch, TokenMeasures, sum_log_probs
from mrd_ray.mrd.monte_carlo import Moments, draw_deltas, noise_key
from mrd_ray.mrd.perturb import Replica, Shard
from mrd_ray.mrd.precision import examine
from mrd_ray.mrd.self_check import SelfCheck, has_choices
from mrd_ray.scoring.advice import Case, insufficient
from mrd_ray.scoring.control import Control, disagreements_of
from mrd_ray.scoring.result import Result
from mrd_ray.scoring.verification import Scored, Verification
from mrd_ray.workers.memory import TOO_LARGE, Sample, activation_bytes, collate, fitting, out_of_memory, release

Shards = Callable[[], Mapping[str, Shard]]


def refuse_uncovered(skeleton: PreTrainedModel, scoring: ScoringSettings) -> None:
    """Raises UserError if scoring.parameters selects nothing, or parameters for which the closed form has no rule."""
    selected = load.select(dict(skeleton.named_parameters()), scoring.parameters)
    if scoring.estimator != "closed_form" or scoring.allow_slow_parameters:
        return
    if slow := coverage(skeleton, selected).slow:
        raise UserError(
            f"scoring.estimator: closed_form has no rule for {len(slow)} of the {len(selected)} parameters: "
            f"{', '.join(slow[:8])}{', ...' if len(slow) > 8 else ''}. Set scoring.allow_slow_parameters to "
            "differentiate them sample by sample, leave them out with scoring.parameters, or use monte_carlo"
        )


def refuse_wrong_rules(model: PreTrainedModel, scoring: ScoringSettings) -> None:
    """Raises UserError if the closed form is requested and its rules do not hold for this model (of whole weights)."""
    if scoring.estimator != "closed_form" or scoring.allow_slow_parameters:  # the latter uses autograd instead
        return
    selected = load.select(dict(model.named_parameters()), scoring.parameters)
    if wrong := disagreements_of(GradientNorms(model, selected), "scoring.estimator: closed_form"):
        raise UserError(
            f"scoring.estimator: closed_form does not agree with autograd on this model, in {len(wrong)} of "
            f"{len(selected)} parameters, first {wrong[0]}; set scoring.allow_slow_parameters to differentiate them "
            "sample by sample, or use monte_carlo, and report the model"
        )


class MonteCarlo:
    """Algorithm 1: moments of Delta over draws.

    Args:
        trial: a few samples to try sigma on, before any other is scored.
        shards: for weights spread over processes (see `Replica`). Then all processes must call this in the same way,
            and a micro-batch that does not fit is an error, because halving it would add a forward that the others
            do not make.

    Raises:
        UserError: the model's precision is too low for sigma.
    """

    checked = None

    def __init__(
        self, model: PreTrainedModel, scoring: ScoringSettings, trial: Sequence[Sample], shards: Shards | None = None
    ) -> None:
        self._scoring = scoring
        self._device = model.device
        self._halve = shards is None
        self._likelihood = Likelihood(model)
        selected = load.select(dict(model.named_parameters()), scoring.parameters)
        self._replica = Replica(model, selected, shards)
        self._block: _Block | None = None
        batch = collate(trial, self._device)
        self._control: Control | None = None
        self.says: str | None = None
        if scoring.controlled:
            try:
                self._control = Control.of(self._replica, model, selected, scoring)
            except UserError as problem:
                if scoring.control_variate:  # requested explicitly
                    raise
                self.says = f"Draws are plain, without a control variate. {problem}"
            else:
                self.says = self._control.note
        self._paired = scoring.antithetic or self._control is not None
        self._choices: SelfCheck | None = None
        if self._control is not None and has_choices(model, batch.token_ids):
            self._choices = SelfCheck(
                self._replica, self._likelihood, self._control.norms, None, scoring.sigma, scoring.seed,
                draws=2, choices=True, exact=True,
            )  # fmt: skip
        even = self._paired and scoring.resolves_mean
        given = (self._replica, self._likelihood, batch, scoring.sigma, scoring.seed)
        precision = examine(*given, even)
        knows_mean = not self._paired or even or examine(*given, True).sufficient
        self.precision = asdict(precision) | {"sufficient": precision.sufficient, "knows_mean": knows_mean}
        if not precision.sufficient and not scoring.allow_low_precision:
            raise UserError(insufficient(precision, Case(model, self._replica, trial, scoring)))

    def __call__(self, samples: Sequence[Sample], draws: range) -> list[Result]:
        """Results of these samples for these draws; of each half in turn if a perturbed forward runs out of memory."""
        try:
            return self._results(self._block_of(samples), draws)
        except RuntimeError as problem:
            if len(samples) == 1 or not (self._halve and out_of_memory(problem)):
                raise
        release(self._device)
        middle = len(samples) // 2
        return self(samples[:middle], draws) + self(samples[middle:], draws)

    def _results(self, block: "_Block", draws: range) -> list[Result]:
        scoring = self._scoring
        deltas = draw_deltas(
            self._replica, self._likelihood, [part.batch for part in block.parts], [part.theta for part in block.parts],
            scoring.sigma, scoring.seed, draws, self._paired, self._control and self._control.first_order,
        )  # fmt: skip
        found = list(block.too_large)
        for part, of_part in zip(block.parts, deltas, strict=True):
            log_probs = sum_log_probs(part.theta, part.batch.scored).tolist()
            for i, (sample_id, log_prob) in enumerate(zip(part.sample_ids, log_probs, strict=True)):
                result = _result(sample_id, log_prob, part.measures, i)
                if part.norms is not None:
                    result |= {"gradient_norm": part.norms[i], "flip_squares": part.flips[i] if part.flips else None}
                std = None if part.norms is None else scoring.sigma * part.norms[i]
                found.append(_with_draws(result, of_part[i].tolist(), draws, std))
        return found

    def restore(self) -> None:
        """Put the model back as it was."""
        self._replica.restore()

    def _block_of(self, samples: Sequence[Sample]) -> "_Block":
        """The samples at theta; reused from the last unit if it had the same samples, since theta does not change."""
        sample_ids = [sample["sample_id"] for sample in samples]
        if self._block is None or self._block.sample_ids != sample_ids:
            self._replica.restore()
            block = _Block(sample_ids, [], [])
            for members, found in fitting(samples, self._device, self._at_theta, self._halve):
                if found is None:
                    block.too_large.append({"sample_id": members[0]["sample_id"], "error": TOO_LARGE})
                else:
                    block.parts.append(found)
            if self._choices is not None:
                block.parts = self._with_flips(self._choices, block.parts)
            self._block = block
        return self._block

    def _with_flips(self, choices: SelfCheck, parts: list["_Part"]) -> list["_Part"]:
        findings = choices(
            [part.batch for part in parts], [part.theta for part in parts], [part.norms or [] for part in parts]
        )
        return [
            part._replace(flips=[finding.flip_squares for finding in of_part])
            for part, of_part in zip(parts, findings, strict=True)
        ]

    def _at_theta(self, members: Sequence[Sample], batch: MicroBatch) -> "_Part":
        measures = TokenMeasures(batch) if self._scoring.measures else None
        theta = self._likelihood.log_neg_log_probs(batch, measures)
        means = {} if measures is None else measures.means()
        norms = None if self._control is None else self._control.norms(batch)[1].sqrt().tolist()
        return _Part([sample["sample_id"] for sample in members], batch, theta, means, norms)


class ClosedForm:
    """Exact gradient norms, and on request probes of the curvature.

    Args:
        trial: a few samples to check against draws, and to try a probe on, before any other is scored.
        shards: as for `MonteCarlo`.

    Raises:
        UserError: the model cannot be differentiated twice, or cannot be recomputed.
    """

    precision = None
    says = None

    def __init__(
        self, model: PreTrainedModel, scoring: ScoringSettings, trial: Sequence[Sample], shards: Shards | None = None
    ) -> None:
        self._scoring = scoring
        self._device = model.device
        self._halve = shards is None
        selected = load.select(dict(model.named_parameters()), scoring.parameters)
        self._norms = GradientNorms(model, selected, activation_bytes(model, scoring, shards is not None))
        if scoring.allow_slow_parameters:  # needs whole weights
            self._norms.give_up_rules(disagreements_of(self._norms, "scoring.estimator: closed_form"))
        self._traces = TraceEstimator(model, selected)
        self._verification = Verification(
            model, self._norms, scoring, trial, lambda: Replica(model, selected, shards), shards is not None
        )
        self.checked = asdict(self._verification.checked)
        if scoring.curvature_probes:
            self._traces.aim(noise_key(scoring.seed, 0))
            try:
                self._traces.probe(collate(trial[:1], self._device))
            except NotImplementedError as problem:
                reason = str(problem).splitlines()[0]
                raise UserError(
                    "scoring.curvature_probes: not for this model, because torch cannot compute its second derivatives "
                    f"or they do not show everything ({reason}); use monte_carlo with scoring.antithetic or "
                    "scoring.control_variate"
                ) from problem

    def __call__(self, samples: Sequence[Sample], draws: range) -> list[Result]:
        """Results of these samples; the closed form has no draws."""
        found: list[Result] = []
        scored: list[Scored] = []
        for members, of_part in fitting(samples, self._device, self._score, self._halve):
            if of_part is None:
                found.append({"sample_id": members[0]["sample_id"], "error": TOO_LARGE})
            else:
                scored.append(of_part[0])
                found += of_part[1]
        for k in range(self._scoring.curvature_probes):
            self._traces.aim(noise_key(self._scoring.seed, k))
            probes = fitting(samples, self._device, lambda _, batch: self._traces.probe(batch).tolist(), self._halve)
            values = [value for members, probe in probes for value in probe or [math.nan] * len(members)]
            for result, value in zip(found, values, strict=True):
                if result["error"] is None and not math.isfinite(value):
                    result["error"] = "its curvature is not finite, or does not fit in the device's memory"
                if result["error"] is None:
                    result["num_draws"] += 1
                    result["probes"].append(value)
        mu = {one["sample_id"]: self._scoring.sigma**2 * fmean(one["probes"]) for one in found if one.get("probes")}
        doubts = self._verification.doubts(scored, mu)
        return [result | {"doubt": doubts.get(result["sample_id"])} for result in found]

    def restore(self) -> None:
        """Nothing to restore: the model is unchanged."""

    def _score(self, members: Sequence[Sample], batch: MicroBatch) -> tuple[Scored, list[Result]]:
        measures = TokenMeasures(batch) if self._scoring.measures else None
        theta, squares = self._norms(batch, measures)
        measured = {} if measures is None else measures.means()
        if "log_prob_gradient_norm" in self._scoring.measures:
            measured["log_prob_gradient_norm"] = self._norms(batch, of_log_prob=True)[1].sqrt().tolist()
        log_probs, norms = sum_log_probs(theta, batch.scored).tolist(), squares.sqrt().tolist()
        results = []
        for i, sample in enumerate(members):
            result = _result(sample["sample_id"], log_probs[i], measured, i)
            if result["error"] is None and not math.isfinite(norms[i]):
                result["error"] = "its gradient is not finite"
            results.append(result | {"num_draws": 0, "gradient_norm": norms[i], "probes": []})
        return Scored([sample["sample_id"] for sample in members], batch, theta, norms), results


def estimator_of(
    model: PreTrainedModel, scoring: ScoringSettings, trial: Sequence[Sample], shards: Shards | None = None
) -> MonteCarlo | ClosedForm:
    """The estimator that the settings name. Raises UserError as its constructor does."""
    kind = ClosedForm if scoring.estimator == "closed_form" else MonteCarlo
    return kind(model, scoring, trial, shards)


class _Part(NamedTuple):
    """Samples of one forward, at theta (see `draw_deltas`). flips: what flips of choices add to E Delta^2, if known."""

    sample_ids: list[str]
    batch: MicroBatch
    theta: torch.Tensor
    measures: dict[str, list[float]]
    norms: list[float] | None
    flips: list[float] | None = None


@dataclass
class _Block:
    """A unit's samples: those that fit in memory, and the results of those that do not."""

    sample_ids: list[str]
    parts: list[_Part]
    too_large: list[Result]


def _result(sample_id: str, log_prob: float, measures: dict[str, list[float]], i: int) -> Result:
    error = None if math.isfinite(log_prob) else "its log-probability is not finite under the model as it is"
    own = {name: values[i] for name, values in measures.items()}
    return {"sample_id": sample_id, "log_prob": log_prob, "error": error, "measures": own}


def _with_draws(result: Result, values: list[list[float]], draws: range, first_std: float | None) -> Result:
    """A sample's result with the moments of its draws. first_std: sigma |g| if each draw ends with L, else None."""
    controlled = first_std is not None
    deltas = [of_draw[:-1] for of_draw in values] if controlled else values
    first = [of_draw[-1] for of_draw in values] if controlled else None
    broken = [k for k, pair in zip(draws, deltas, strict=True) if not all(map(math.isfinite, pair))]
    error = result["error"]
    if error is None and broken:
        error = f"its relative change is not finite in {len(broken)} draw(s), the first {broken[0]}: sigma too large?"
    moments = vars(Moments.of(deltas, first, first_std, draws.start))
    if error is None and controlled and not math.isfinite(result["gradient_norm"]):
        error = "its gradient is not finite"
    if error is None and any(part != part for name in Moments.sums() for part in moments[name]):
        error = "its relative changes are too large to add up their squares: sigma too large?"
    return cast("Result", {**result, "error": error, **moments})
