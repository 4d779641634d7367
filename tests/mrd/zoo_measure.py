"""What scoring says of an architecture, beside what is right: a row of docs/models.md."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import zoo_reference as reference
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo_reference import DRAWS, SAMPLES, SCORED, SEED
from zoo_shrink import shrunk

from mrd_ray import UserError
from mrd_ray.config import ScoringSettings
from mrd_ray.mrd.coverage import coverage
from mrd_ray.scoring.estimators import estimator_of, refuse_wrong_rules
from mrd_ray.workers.replica import refuse_not_causal

RIGHT, REFUSED, WRONG, CRASHED = "right", "refused", "WRONG", "CRASHED"
# Delta may differ by this share of sigma |g|. Some layers compute in float32 whatever the model's dtype, or the model
# knows no float64: rounding then weighs 100 times less at the larger sigma, and anything else as much.
DELTA_TOLERANCES = {1e-5: 2e-2, 1e-3: 2e-4}
# Of |g|, and of L in units of sigma |g|.
TOLERANCES = {torch.float64: (1e-5, 1e-4), torch.float32: (1e-3, 1e-2)}
ROWS = [
    {"sample_id": str(i), "micro_batch": 0, "token_ids": ids, "scored": scored}
    for i, (ids, scored) in enumerate(zip(SAMPLES, SCORED, strict=True))
]
Numbers = Sequence[Sequence[float]]  # of each sample


@dataclass(frozen=True)
class Row:
    """Columns of the page, as text, and what the first refusal says."""

    model_type: str
    model_class: str
    precision: str
    causal: str
    monte_carlo: str
    closed_form: str
    control_variate: str
    chooses: str
    reason: str = ""

    @property
    def cells(self) -> list[str]:
        """All but the reason."""
        return [value for name, value in vars(self).items() if name != "reason"]


def model_of(model_type: str, **settings: Any) -> PreTrainedModel:
    """In float64 if it runs there, else float32. Weights are random, and no bias or norm is at 0 or 1."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    # the default way to multiply by experts has no float64
    built: Any = AutoModelForCausalLM.from_config(shrunk(model_type, **settings), experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        try:
            built.double()(torch.tensor([SAMPLES[0]]), use_cache=False)
        except RuntimeError:
            built.float()
    return built


def measure(model_type: str) -> Row:
    """Builds the model, and tries every estimator on it."""
    model = model_of(model_type)
    plain = copy.deepcopy(model)  # some keep what a forward left in them
    about = (model_type, type(model).__name__, str(model.dtype).removeprefix("torch."))
    if problem := _not_causal(model):
        return Row(*about, "no", *[REFUSED] * 3, chooses(model), problem)
    judged = [_judged(lambda judge=judge: judge(model, plain)) for judge in (_of_delta, _of_norm, _of_first_order)]
    reason = next((reason for _, reason in judged if reason), "")
    return Row(*about, _causal(model_type, model), *(verdict for verdict, _ in judged), chooses(model), reason)


def _not_causal(model: PreTrainedModel) -> str | None:
    try:
        refuse_not_causal(model)
    except UserError as problem:
        return str(problem)
    return None


def _causal(model_type: str, model: PreTrainedModel) -> str:
    if not getattr(model.config, "is_decoder", False):
        return "yes"
    try:
        encoder = model_of(model_type, is_decoder=False)
    except AssertionError:  # Reformer insists
        return "if is_decoder"
    return "if is_decoder" if _not_causal(encoder) else "yes"


def _judged(judge: Callable[[], str]) -> tuple[str, str]:
    """The verdict, and the reason if there is one."""
    try:
        return judge(), ""
    except UserError as problem:
        return REFUSED, str(problem)
    except Exception as problem:
        return CRASHED, f"{type(problem).__name__}: {str(problem).splitlines()[0]}"


def _of_delta(model: PreTrainedModel, plain: PreTrainedModel) -> str:
    for sigma, tolerance in DELTA_TOLERANCES.items():
        # at the larger one a choice of experts may change, which is no rounding
        found, _ = monte_carlo(model, sigma, allow_low_precision=sigma > min(DELTA_TOLERANCES))
        expected = reference.algorithm_1(plain, sigma)
        # the size of Delta is no gradient's affair here, for some models have none
        sizes = [sum(value * value for value in of_draws) ** 0.5 for of_draws in expected]
        if not _agree(found, expected, [size * tolerance for size in sizes]):
            return WRONG
    return RIGHT


def _of_norm(model: PreTrainedModel, plain: PreTrainedModel) -> str:
    found = closed_form(model)
    expected = [reference.norm(gradient) for gradient in reference.gradients(plain)]
    tolerance = TOLERANCES[model.dtype][0]
    if not _agree([[x] for x in found], [[x] for x in expected], [x * tolerance for x in expected]):
        return WRONG
    names = dict(model.named_parameters())
    slow = len(coverage(model, names).slow)
    return f"{RIGHT}, {slow} of {len(names)} parameters by autograd" if slow else RIGHT


def _of_first_order(model: PreTrainedModel, plain: PreTrainedModel) -> str:
    sigma = min(DELTA_TOLERANCES)
    _, found = monte_carlo(model, sigma, control_variate=True, allow_slow_parameters=True)
    gradients = reference.gradients(plain)
    z = [reference.noise(plain, k) for k in range(DRAWS)]
    expected = [[sigma * abs(reference.along(gradient, of_draw)) for of_draw in z] for gradient in gradients]
    tolerance = TOLERANCES[model.dtype][1] * sigma
    return RIGHT if _agree(found, expected, [reference.norm(one) * tolerance for one in gradients]) else WRONG


def _agree(found: Numbers, expected: Numbers, tolerances: Sequence[float]) -> bool:
    """Whether all numbers of each sample are within its tolerance, and none is nan."""
    return all(
        abs(a - b) <= tolerance
        for x, y, tolerance in zip(found, expected, tolerances, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def monte_carlo(model: PreTrainedModel, sigma: float, **settings: Any) -> tuple[Numbers, Numbers]:
    """Delta, and |L| if there is a control variate, of each sample and draw, as an actor makes them."""
    scoring = ScoringSettings(estimator="monte_carlo", sigma=sigma, seed=SEED, **settings)
    estimator = estimator_of(model, scoring, ROWS)
    try:  # moments of one draw are that draw
        draws = [estimator(ROWS, range(k, k + 1)) for k in range(DRAWS)]
    finally:
        estimator.restore()
    _refuse_errors(*draws)
    names = ("sum", "sum_first_abs")
    return tuple([[math.fsum(of[i][name]) for of in draws] for i in range(len(ROWS))] for name in names)


def closed_form(model: PreTrainedModel) -> list[float]:
    """|g| of each sample, as an actor makes it."""
    scoring = ScoringSettings(estimator="closed_form", allow_slow_parameters=True)
    refuse_wrong_rules(model, scoring)
    results = estimator_of(model, scoring, ROWS)(ROWS, range(0))
    _refuse_errors(results)
    return [result["gradient_norm"] for result in results]


def _refuse_errors(*draws: list[dict[str, Any]]) -> None:
    """A sample's error is as good as a refusal."""
    if errors := [result["error"] for results in draws for result in results if result["error"]]:
        raise UserError(errors[0])


class _Choices(TorchFunctionMode):
    """Sees whether the largest of some numbers are looked for, by their places."""

    seen = False

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        of_places = name in ("topk", "argmax", "argsort", "sort") or (name == "max" and isinstance(found, tuple))
        self.seen |= of_places and torch.is_tensor(args[0]) and args[0].is_floating_point()
        return found


@torch.no_grad()
def chooses(model: PreTrainedModel) -> str:
    """Whether a forward chooses experts or positions by size, so that Delta jumps where the choice changes."""
    with _Choices() as choices:
        model(torch.tensor([SAMPLES[-1]]), use_cache=False)
    return "yes" if choices.seen else "no"
