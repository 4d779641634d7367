"""Settings of scoring, of its plan, and of comparing two runs."""

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mrd_ray.config.base import (
    COMMON,
    Frozen,
    ModelSettings,
    Name,
    OutputSettings,
    RaySettings,
    RunSettings,
    refuse_no_pattern,
)
from mrd_ray.config.data import DataSettings

Measure = Literal["mean_log_prob", "entropy", "memorization_accuracy", "log_prob_gradient_norm"]


class ScoringSettings(Frozen):
    """Memory Removal Difficulty (arXiv 2504.06658), and how to estimate it."""

    estimator: Literal["monte_carlo", "closed_form"] = Field(
        "monte_carlo",
        description="Algorithm 1 as it stands, or its small-sigma limit from exact per-sample gradient norms: "
        "one forward and one backward instead of K + 1 forwards, and no sampling error.",
        json_schema_extra=COMMON,
    )
    parameters: Name = Field(
        "all",
        description="Which parameters count as theta: all, lora (the factors of a LoRA adapter), "
        "or a regular expression found in their names, such as 'layers[.](20|21)[.]'.",
    )
    sigma: PositiveFloat = Field(
        1e-5, description="Standard deviation of the parameter noise.", json_schema_extra=COMMON
    )
    statistic: Literal["mean_abs", "abs_mean"] = Field(
        "mean_abs", description="Which one is `mrd`: E|Delta| (Algorithm 1) or |E Delta| (Definition 3.1)."
    )
    seed: NonNegativeInt = Field(0, lt=2**32, description="Seed of the noise.", json_schema_extra=COMMON)
    micro_batch_tokens: PositiveInt = Field(
        512,
        description="Tokens per forward at most, padding included: 512 suit a CPU, 16384 a GPU. "
        "Part of the run's identity: shapes decide rounding.",
        json_schema_extra=COMMON,
    )
    num_draws: PositiveInt = Field(
        200,
        lt=2**32,
        description="monte_carlo: K, how many perturbations. A later run can add some.",
        json_schema_extra=COMMON,
    )
    antithetic: bool = Field(
        False,
        description="monte_carlo: each draw evaluates theta + delta and theta - delta. Their half sum resolves the "
        "second-order E Delta, which plain draws cannot at small sigma.",
    )
    control_variate: bool | None = Field(
        None,
        description="monte_carlo: take from each draw what the gradient foretells of it, whose mean is known. A draw "
        "is then a pair, theta + delta and theta - delta, and costs some five forwards; at sigma 1e-5 four are worth "
        "many thousands of plain ones. Unset: with target_relative_se, where the model and its placement allow it.",
    )
    target_relative_se: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="monte_carlo: after num_draws, add draws to the samples whose standard error is over this share "
        "of their score, twice as many in all each time, until none is or max_draws is reached.",
        json_schema_extra=COMMON,
    )
    max_draws: PositiveInt = Field(3200, lt=2**32, description="monte_carlo: the most that target_relative_se may use.")
    allow_low_precision: bool = Field(
        False,
        description="monte_carlo: score even where model.dtype rounds sigma away; every row says so.",
    )
    curvature_probes: NonNegativeInt = Field(
        0,
        description="closed_form: Hutchinson probes of the Hessian's trace (Theorem 3.2), each some nine forwards. "
        "They give abs_mean, nonlinearity, and the correction that large sigmas need.",
    )
    verify_draws: NonNegativeInt = Field(
        2,
        le=64,
        description="closed_form: draws that a few samples are held against before any is scored, and every sample of "
        "a model that chooses experts, or where those few differ. Scores that differ are marked (doubt). 0: no check.",
    )
    allow_slow_parameters: bool = Field(
        False,
        description="closed_form: parameters that no rule covers, or one that does not hold in this model, are "
        "differentiated sample by sample, not refused.",
    )
    activation_gib: PositiveFloat | None = Field(
        None,
        description="closed_form: GiB that a micro-batch's activations may take, on each GPU of several; layers for "
        "which there is no room are recomputed in the backward (gradient checkpointing), to the same scores. None: 4 "
        "on a CPU, 0.6 of what a GPU has free, so set it where actors share one. In refreshes with ZeRO-3: all are "
        "recomputed if this is set, else none.",
    )
    measures: tuple[Measure, ...] = Field(
        (),
        description="Other measures of difficulty, as columns from the same pass: mean_log_prob, entropy, "
        "memorization_accuracy; with closed_form also log_prob_gradient_norm.",
    )

    @property
    def controlled(self) -> bool:
        """Whether Monte Carlo is to have a control variate."""
        unset = self.control_variate is None
        return self.estimator == "monte_carlo" and bool(self.target_relative_se if unset else self.control_variate)

    @property
    def paired(self) -> bool:
        """Whether Monte Carlo is to evaluate theta - delta beside theta + delta."""
        return self.antithetic or self.controlled

    @property
    def resolves_mean(self) -> bool:
        """Whether pairs of draws are made for E Delta, which is then to stand out of rounding."""
        return self.antithetic or (self.controlled and self.statistic == "abs_mean")

    @field_validator("parameters")
    @classmethod
    def _parameters_is_a_pattern(cls, parameters: str) -> str:
        return refuse_no_pattern("scoring.parameters", parameters)

    @model_validator(mode="after")
    def _settings_fit_the_estimator(self) -> "ScoringSettings":
        other = {
            "monte_carlo": (
                "curvature_probes",
                *(() if self.controlled else ("allow_slow_parameters", "activation_gib")),
            ),
            "closed_form": ("antithetic", "control_variate", "target_relative_se", "allow_low_precision"),
        }[self.estimator]
        if misplaced := [name for name in other if getattr(self, name)]:
            raise ValueError(f"scoring.{misplaced[0]} has no meaning with scoring.estimator: {self.estimator}")
        if self.estimator == "monte_carlo" and "log_prob_gradient_norm" in self.measures:
            raise ValueError("scoring.measures: log_prob_gradient_norm needs scoring.estimator: closed_form")
        if self.estimator == "closed_form" and self.sigma > 1e-3:
            raise ValueError(f"scoring.sigma: {self.sigma:g} is too large for closed_form, which holds to about 1e-3")
        if self.estimator == "closed_form" and self.sigma > 1e-4 and not self.curvature_probes:
            raise ValueError(
                f"scoring.sigma: {self.sigma:g} with closed_form needs scoring.curvature_probes, 16 say: "
                "the small-sigma limit holds to about 1e-4"
            )
        if self.estimator == "closed_form" and self.statistic == "abs_mean" and not self.curvature_probes:
            raise ValueError("scoring.statistic: abs_mean with closed_form needs scoring.curvature_probes, 16 say")
        least = 4 if self.controlled else 16
        if self.target_relative_se is not None and self.num_draws < least:
            raise ValueError(
                f"scoring.num_draws: {self.num_draws} with scoring.target_relative_se; expected at least {least}, "
                "since a standard error from fewer may be small by chance"
            )
        if self.target_relative_se is not None and self.max_draws < self.num_draws:
            raise ValueError(f"scoring.max_draws: {self.max_draws} is under scoring.num_draws, {self.num_draws}")
        return self


def closed_form_unless_said(scoring: Any) -> Any:
    """Settings of scoring, as given, with the closed form for their estimator if they name none."""
    if isinstance(scoring, ScoringSettings):
        scoring = scoring.model_dump(include=scoring.model_fields_set)
    return {"estimator": "closed_form"} | scoring if isinstance(scoring, dict) else scoring


class ScoreConfig(Frozen):
    """Score every sample of a forget set by how hard it is to unlearn (its MRD)."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    scoring: ScoringSettings = Field(ScoringSettings(), description=str(ScoringSettings.__doc__))
    ray: RaySettings = Field(RaySettings(), description=str(RaySettings.__doc__))
    output: OutputSettings = Field(OutputSettings(), description=str(OutputSettings.__doc__))
