"""What to set when rounding hides a sigma's effect. Advises only what was tried, on the samples where sigma failed."""

import copy
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch
from transformers import PreTrainedModel

from mrd_ray.config import ScoringSettings
from mrd_ray.mrd.autograd_check import disagreements
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.curvature import TraceEstimator
from mrd_ray.mrd.double import keep_float64
from mrd_ray.mrd.likelihood import Likelihood
from mrd_ray.mrd.monte_carlo import noise_key
from mrd_ray.mrd.perturb import Replica
from mrd_ray.mrd.precision import Precision, examine
from mrd_ray.workers.memory import Sample, activation_bytes, collate, release

_WIDER = {torch.bfloat16: (torch.float32, torch.float64), torch.float32: (torch.float64,)}
_POWERS = range(-8, -2)  # powers of ten: the sigmas to try
_PROBES = 16
_OF_DRAWS = ("antithetic", "control_variate", "target_relative_se", "allow_low_precision")  # refused by closed_form


class Case(NamedTuple):
    """Settings, and the model and samples they are tried on. replica: of the model, at theta before and after."""

    model: PreTrainedModel
    replica: Replica
    trial: Sequence[Sample]
    scoring: ScoringSettings


def insufficient(precision: Precision, case: Case) -> str:
    """What is wrong with the case's sigma, and each change of the settings that would fix it by itself."""
    name, scoring = str(case.model.dtype).removeprefix("torch."), case.scoring
    signal = "the even part, which pairs of draws are meant to measure" if scoring.resolves_mean else "the signal"
    if math.isinf(precision.noise_floor):
        found = "changes nothing, or causes infinite values, in some of the samples tried"
    else:
        found = (
            f"would make scores rounding noise: it moves {precision.share_moved:.1%} of the weights, their change has "
            f"a cosine of {precision.cosine:.3f} with the noise, and rounding in the forward is "
            f"{precision.noise_floor:.2g} of {signal}"
        )
    if case.replica.sharded:
        use = "Other settings cannot be tried where weights are spread over processes; set"
    else:
        ways = ways_out(case)
        use = f"Use {', or '.join(ways)}; or" if ways else "No other setting that was tried works; set"
    return (
        f"scoring.sigma: {scoring.sigma:g} in {name}, on scoring.parameters: {scoring.parameters}, {found}. {use} "
        "scoring.allow_low_precision to continue with marked scores"
    )


def ways_out(case: Case) -> list[str]:
    """Changes of the settings that worked when they were tried."""
    ways = []
    for attempt in (_wider_type, _closed_form, _other_sigma):
        case.replica.restore()
        try:
            way = attempt(case)
        except Exception:  # mostly out of memory; what cannot be tried is not advised, nor reported
            way = None
        release(case.model.device)
        ways += [way] if way else []
    return ways


def _does(case: Case, sigma: float) -> bool:
    model, replica, trial, scoring = case
    batch = collate(trial, model.device)
    return examine(replica, Likelihood(model), batch, sigma, scoring.seed, scoring.resolves_mean).sufficient


def _wider_type(case: Case) -> str | None:
    for dtype in _WIDER.get(case.model.dtype, ()):
        if not _room_for_copies(case.model, dtype):
            break
        wide: PreTrainedModel = copy.deepcopy(case.model).to(dtype)  # type: ignore[arg-type]
        keep_float64(wide)
        if _does(case._replace(model=wide, replica=Replica(wide, case.replica.base)), case.scoring.sigma):
            return f"model.dtype: {str(dtype).removeprefix('torch.')}"
    return None


def _room_for_copies(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether two copies may fit in this process's memory. A GPU raises an error if not; a machine kills processes."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return False
    if model.device.type == "cuda":
        return True
    share = torch.get_num_threads() / (os.cpu_count() or 1)  # other actors do the same at this moment
    needed = 2 * dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    return needed < 0.5 * min(1.0, share) * psutil.virtual_memory().available


def _closed_form(case: Case) -> str | None:
    """The closed form never rounds sigma away; it needs rules that hold, and a smooth model for probes."""
    scoring, selected = case.scoring, list(case.replica.base)
    of_draws = [name for name in _OF_DRAWS if getattr(scoring, name)]
    probes = _PROBES if scoring.resolves_mean or scoring.statistic == "abs_mean" or scoring.sigma > 1e-4 else 0
    changes = {"estimator": "closed_form", "curvature_probes": probes}
    settings = scoring.model_dump(exclude=set(of_draws)) | changes
    advised = ScoringSettings(**settings)  # may raise, for example because of sigma
    norms = GradientNorms(case.model, selected, activation_bytes(case.model, advised))
    if (norms.coverage.slow and not advised.allow_slow_parameters) or disagreements(norms):
        return None
    if probes and not _has_curvature(case):
        return None
    without = f", without {' and '.join(f'scoring.{name}' for name in of_draws)}" if of_draws else ""
    return f"scoring.estimator: closed_form{f' with scoring.curvature_probes: {probes}' if probes else ''}{without}"


def _has_curvature(case: Case) -> bool:
    traces = TraceEstimator(case.model, case.replica.base)
    traces.aim(noise_key(case.scoring.seed, 0))
    try:
        return bool(torch.isfinite(traces.probe(collate(case.trial[:1], case.model.device))).all())
    except NotImplementedError:
        return False


def _other_sigma(case: Case) -> str | None:
    """The smallest larger sigma that works; the paper's 1e-5 if sigma is larger than all that are tried."""
    powers = [10.0**power for power in _POWERS]
    for sigma in [sigma for sigma in powers if sigma > case.scoring.sigma] or [1e-5]:
        if _does(case, sigma):
            return f"scoring.sigma: {sigma:g}"
    return None
