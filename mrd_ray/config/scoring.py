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
        description="monte_carlo is Algorithm 1. closed_form is its limit for small sigma, from exact per-sample "
        "gradient norms: one forward and one backward instead of K + 1 forwards, and no sampling error.",
        json_schema_extra=COMMON,
    )
    parameters: Name = Field(
        "all",
        description="The parameters theta that get noise: all, lora (the factors of a LoRA adapter), or those whose "
        "name matches a regular expression, for example 'layers[.](20|21)[.]'.",
    )
    sigma: PositiveFloat = Field(
        1e-5, description="Standard deviation of the parameter noise.", json_schema_extra=COMMON
    )
    statistic: Literal["mean_abs", "abs_mean"] = Field(
        "mean_abs",
        description="What `mrd` is: E|Delta| (mean_abs, Algorithm 1) or |E Delta| (abs_mean, Definition 3.1).",
    )
    seed: NonNegativeInt = Field(0, lt=2**32, description="Seed of the noise.", json_schema_extra=COMMON)
    micro_batch_tokens: PositiveInt = Field(
        512,
        description="Most tokens per forward, padding included: 512 suits a CPU, 16384 a GPU. A run cannot resume with "
        "another value, because shapes affect rounding.",
        json_schema_extra=COMMON,
    )
    num_draws: PositiveInt = Field(
        200,
        lt=2**32,
        description="monte_carlo: K, the number of perturbations. A later run can add more.",
        json_schema_extra=COMMON,
    )
    antithetic: bool = Field(
        False,
        description="monte_carlo: evaluate theta + delta and theta - delta in each draw. Their mean resolves E Delta, "
        "which is of second order; plain draws cannot at small sigma.",
    )
    control_variate: bool | None = Field(
        None,
        description="monte_carlo: subtract from each draw its first-order part, whose mean is known exactly. A draw is "
        "then a pair, theta + delta and theta - delta, and costs about five forwards; at sigma 1e-5 four of them are "
        "worth many thousands of plain draws. Unset: used with target_relative_se if the model allows it.",
    )
    target_relative_se: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="monte_carlo: after num_draws, keep doubling the draws of every sample whose standard error is "
        "more than this share of its score, up to max_draws.",
        json_schema_extra=COMMON,
    )
    max_draws: PositiveInt = Field(
        3200, lt=2**32, description="monte_carlo: the most draws per sample with target_relative_se."
    )
    allow_low_precision: bool = Field(
        False,
        description="monte_carlo: score even if model.dtype rounds sigma away. Every row then says so.",
    )
    curvature_probes: NonNegativeInt = Field(
        0,
        description="closed_form: number of Hutchinson probes of the Hessian's trace (Theorem 3.2). Each costs about "
        "nine forwards. They give abs_mean, nonlinearity, and the correction for larger sigmas.",
    )
    verify_draws: NonNegativeInt = Field(
        2,
        le=64,
        description="closed_form: number of draws to check scores with. A few samples are checked before the run; all "
        "are if those differ, or if the model chooses experts. Scores that differ are marked (doubt). 0: no check.",
    )
    allow_slow_parameters: bool = Field(
        False,
        description="closed_form: differentiate sample by sample where no rule covers a parameter, or a rule fails, "
        "instead of refusing the model.",
    )
    activation_gib: PositiveFloat | None = Field(
        None,
        description="closed_form: activation memory per micro-batch and GPU, in GiB. Layers that do not fit use "
        "gradient checkpointing; scores do not change. Unset: 4 on a CPU, 0.6 of a GPU's free memory (set it if actors "
        "share a GPU). In refreshes with ZeRO-3, all layers use checkpointing if this is set, else none.",
    )
    measures: tuple[Measure, ...] = Field(
        (),
        description="More measures of difficulty, as columns, from the same pass: mean_log_prob, entropy, "
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
