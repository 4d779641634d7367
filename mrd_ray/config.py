"""Every setting, in one frozen tree per command. The descriptions here are the ones `--help` prints."""

import re
import string
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    field_validator,
    model_validator,
)

_Name = Annotated[str, StringConstraints(min_length=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Frozen):
    """The causal language model whose memory is measured."""

    path: _Name = Field(description="Directory of a Hugging Face model, or a hub id such as Qwen/Qwen3-0.6B.")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub id model.path.")
    tokenizer: str | None = Field(
        None, description="Directory of the tokenizer, or a hub id (its default branch); the model's own if unset."
    )
    dtype: Literal["float32", "float64", "bfloat16"] = Field(
        "float32",
        description="Precision of weights and forward. bfloat16 is for the closed form: it rounds small sigmas away.",
    )


class DataConfig(_Frozen):
    """The forget set, and what of each sample is scored."""

    path: _Name = Field(
        description="A .jsonl, .json, .csv, .parquet or .txt file (local path or fsspec URI), "
        "or the id of a Hugging Face dataset."
    )
    name: str | None = Field(None, description="Configuration of a hub dataset, e.g. forget10 of locuslab/TOFU.")
    split: str = Field("train", description="Split of a hub dataset.")
    text: str | None = Field(None, description="Column that holds whole texts.")
    prompt: str | None = Field(None, description="Column that holds prompts; goes with data.response.")
    response: str | None = Field(None, description="Column that holds responses; goes with data.prompt.")
    id: str | None = Field(
        None,
        description="Column with a unique id per sample. Unset: a column named sample_id or id where there is one, "
        "else a digest of the columns that make the sample.",
    )
    template: str = Field(
        "Question: {prompt}\nAnswer: {response}",
        description="How prompt and response are joined: a format string with {prompt} and {response}, "
        "or 'chat' for the tokenizer's chat template (where that asks for today's date, it is 26 Jul 2024, always).",
    )
    score_on: Literal["all", "response"] = Field(
        "all", description="Which tokens count: every one after the first, or the response alone."
    )
    max_tokens: PositiveInt | None = Field(
        None, description="Longest sample in tokens; unset, the model's context length."
    )
    truncate: bool = Field(
        False, description="Cut longer samples to data.max_tokens. Otherwise they are reported as errors."
    )
    window_tokens: int = Field(256, ge=2, description="A .txt file is cut into samples of this many tokens.")
    max_samples: PositiveInt | None = Field(None, description="Use only the first so many rows.")

    @field_validator("template")
    @classmethod
    def _template_has_both_fields(cls, template: str) -> str:
        if template == "chat":
            return template
        try:
            pieces = [piece for piece in string.Formatter().parse(template) if piece[1] is not None]
        except ValueError as problem:
            raise ValueError(f"data.template is not a format string: {problem}") from None
        fields = [name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                  for _, name, spec, conversion in pieces if name is not None]  # fmt: skip
        if sorted(fields) != ["prompt", "response"]:
            raise ValueError(
                "data.template must hold {prompt} and {response} once each and no other field "
                f"(write {{{{ and }}}} for literal braces), or be 'chat'; its fields are {fields}"
            )
        return template

    @model_validator(mode="after")
    def _columns_agree(self) -> "DataConfig":
        if (self.prompt is None) != (self.response is None):
            raise ValueError("data.prompt and data.response go together; set both or neither")
        if self.text is not None and self.prompt is not None:
            raise ValueError("set data.text, or data.prompt with data.response, not both")
        if self.text is not None and self.score_on == "response":
            raise ValueError("data.score_on: response needs data.prompt and data.response; data.text has no response")
        return self


Measure = Literal["mean_log_prob", "entropy", "memorization_accuracy", "log_prob_gradient_norm"]


class ScoringConfig(_Frozen):
    """Memory Removal Difficulty (arXiv 2504.06658), and how to estimate it."""

    estimator: Literal["monte_carlo", "closed_form"] = Field(
        "monte_carlo",
        description="Algorithm 1 as it stands, or its small-sigma limit from exact per-sample gradient norms: "
        "one forward and one backward instead of K + 1 forwards, and no sampling error.",
    )
    parameters: _Name = Field(
        "all",
        description="Which parameters count as theta: all, lora (the factors of a LoRA adapter), "
        "or a regular expression found in their names, such as 'layers[.](20|21)[.]'.",
    )
    sigma: PositiveFloat = Field(1e-5, description="Standard deviation of the parameter noise.")
    statistic: Literal["mean_abs", "abs_mean"] = Field(
        "mean_abs", description="Which one is `mrd`: E|Delta| (Algorithm 1) or |E Delta| (Definition 3.1)."
    )
    seed: NonNegativeInt = Field(0, lt=2**32, description="Seed of the noise.")
    micro_batch_tokens: PositiveInt = Field(
        512,
        description="Tokens per forward, padding included: few pad less, which suits CPUs; 16384 suits a GPU. "
        "Part of the run's identity: shapes decide rounding.",
    )
    num_draws: PositiveInt = Field(
        200, lt=2**32, description="monte_carlo: K, how many perturbations. A later run can add some."
    )
    antithetic: bool = Field(
        False,
        description="monte_carlo: each draw evaluates theta + delta and theta - delta. Their half sum resolves the "
        "second-order E Delta, which plain draws cannot at small sigma.",
    )
    target_relative_se: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="monte_carlo: after num_draws, add draws to the samples whose standard error is over this share "
        "of their score, twice as many in all each time, until none is or max_draws is reached.",
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
    allow_slow_parameters: bool = Field(
        False,
        description="closed_form: parameters that no rule covers are differentiated sample by sample, not refused.",
    )
    gradient_checkpointing: bool = Field(
        False, description="closed_form: recompute layers in the backward; long samples need less memory."
    )
    measures: tuple[Measure, ...] = Field(
        (),
        description="Other measures of difficulty, as columns from the same pass: mean_log_prob, entropy, "
        "memorization_accuracy; with closed_form also log_prob_gradient_norm.",
    )

    @field_validator("parameters")
    @classmethod
    def _parameters_is_a_pattern(cls, parameters: str) -> str:
        try:
            re.compile(parameters)
        except re.error as problem:
            raise ValueError(f"scoring.parameters: {parameters!r} is not a regular expression: {problem}") from None
        return parameters

    @model_validator(mode="after")
    def _settings_fit_the_estimator(self) -> "ScoringConfig":
        other = {
            "monte_carlo": ("curvature_probes", "allow_slow_parameters", "gradient_checkpointing"),
            "closed_form": ("antithetic", "target_relative_se", "allow_low_precision"),
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
        if self.target_relative_se is not None and self.num_draws < 16:
            raise ValueError(
                f"scoring.num_draws: {self.num_draws} with scoring.target_relative_se; expected at least 16, "
                "since a standard error from fewer may be small by chance"
            )
        if self.target_relative_se is not None and self.max_draws < self.num_draws:
            raise ValueError(f"scoring.max_draws: {self.max_draws} is under scoring.num_draws, {self.num_draws}")
        return self


class RayConfig(_Frozen):
    """The actor pool. Each actor holds a replica of the model: two copies of its weights, plus activations."""

    actors: PositiveInt | None = Field(None, description="How many; unset, as many as the cluster has room for.")
    cpus_per_actor: PositiveFloat = Field(1.0, description="CPUs per actor; also its number of threads (at least one).")
    gpus_per_actor: NonNegativeFloat | None = Field(
        None, description="GPUs per actor; unset, one if the cluster has any, else none."
    )


class RunConfig(_Frozen):
    """Where results go."""

    dir: _Name = Field(description="Run directory: a local path or an fsspec URI. Starting again on it resumes.")


class ScoreConfig(_Frozen):
    """Score every sample of a forget set by how hard it is to unlearn (its MRD)."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    scoring: ScoringConfig = Field(ScoringConfig(), description=str(ScoringConfig.__doc__))
    ray: RayConfig = Field(RayConfig(), description=str(RayConfig.__doc__))


class RetainConfig(_Frozen):
    """The samples whose knowledge is to stay. Read as `data` says: its columns, template and limits."""

    path: _Name | None = Field(None, description="A file or hub dataset, as data.path. Unset: none.")
    name: str | None = Field(None, description="Configuration of a hub dataset, e.g. retain90 of locuslab/TOFU.")
    split: str = Field("train", description="Split of a hub dataset.")
    max_samples: PositiveInt | None = Field(None, description="Use only the first so many rows.")


Weighting = Literal["mrd", "inverse_mrd", "uniform"]


class UnlearningConfig(_Frozen):
    """The method, which samples it takes, and how far it goes."""

    method: Literal["ga", "graddiff", "po", "npo"] = Field(
        "npo",
        description="ga: ascent on the forget set (with weighting: mrd, the paper's Curriculum Gradient Ascent); "
        "graddiff: ascent there, descent on the retain set; po: descent on refusals of the forget set's prompts, "
        "and on the retain set; npo: negative preference optimisation, and descent on the retain set.",
    )
    weighting: Weighting = Field(
        "mrd",
        description="How forget samples are drawn, with replacement: by MRD (Algorithm 2: easy ones more often), "
        "by 1/MRD, or all alike.",
    )
    retain_weight: NonNegativeFloat = Field(1.0, description="lambda, the retain loss's weight; of all methods but ga.")
    beta: PositiveFloat = Field(0.1, description="npo: inverse temperature.")
    refusals: str | None = Field(
        None, description="po: a .txt file with a refusal a line; each draw of a forget sample takes one by chance."
    )
    learning_rate: PositiveFloat = Field(5e-5, description="Of AdamW, constant.")
    weight_decay: NonNegativeFloat = Field(0.01, description="Of AdamW.")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="Gradients are clipped to this norm; 0 for no clipping.")
    batch_size: PositiveInt = Field(
        8, description="Forget samples per optimiser step, over all workers; as many retain samples go with them."
    )
    micro_batch_size: PositiveInt | None = Field(
        None, description="Samples per forward and worker, gradients being accumulated; unset, a worker's whole share."
    )
    epochs: PositiveInt = Field(5, description="The most passes over the forget set, in number of draws.")
    steps: PositiveInt | None = Field(None, description="The most optimiser steps; goes over epochs.")
    seed: NonNegativeInt = Field(0, lt=2**32, description="Of the draws, and of new LoRA factors.")
    refresh_every: PositiveInt | None = Field(
        None, description="Score the forget set anew every so many steps; unset, once an epoch."
    )
    refresh: Literal["in_place", "actors"] = Field(
        "in_place",
        description="in_place: the workers score, on the live weights. actors: training stops for `mrd-ray score` on "
        "the checkpoint, with machines of its own; about a minute each time.",
    )

    @model_validator(mode="after")
    def _settings_fit_the_method(self) -> "UnlearningConfig":
        if (self.method == "po") != (self.refusals is not None):
            if self.method == "po":
                raise ValueError("unlearning.method: po needs unlearning.refusals, a .txt file with a refusal a line")
            raise ValueError(f"unlearning.refusals has no meaning with unlearning.method: {self.method}")
        return self


class StoppingConfig(_Frozen):
    """When to stop before the last step."""

    evaluate_every: PositiveInt | None = Field(
        None,
        description="Steps between evaluations, each a pass over the forget set that ends in a checkpoint; unset, once "
        "an epoch.",
    )
    forgotten: Literal["every", "mean", "never"] = Field(
        "every",
        description="Appendix C.4 of the paper: stop when EL_n and MA of every forget sample, or their means, are "
        "below their averages on the initial model. never: go on to the last step.",
    )
    extraction_n: NonNegativeInt = Field(
        10, description="n of the extraction likelihood EL_n; 0 leaves EL out, which saves its generation."
    )
    extraction_stride: PositiveInt = Field(
        1, description="EL_n starts from every so many-th prefix of a sample; 1 is the definition, more costs less."
    )
    max_retain_loss_ratio: float | None = Field(
        2.0,
        gt=1,
        description="Utility floor: stop when the retain loss is over this many times what it was (not before it is "
        "over 0.1 nats above), and keep the checkpoint before. Unset (null): no floor.",
    )
    retain_samples: PositiveInt = Field(64, description="Retain samples that the floor is measured on.")


class CheckpointsConfig(_Frozen):
    """What a run goes on from, and which state becomes the result."""

    keep: PositiveInt = Field(2, description="How many to keep.")
    best_by: Literal["last", "forget_memorization_accuracy", "retain_loss"] = Field(
        "last", description="The result: the last checkpoint, or the one where this is smallest."
    )


class LoraConfig(_Frozen):
    """Train LoRA factors, and leave the model's own weights as they are."""

    rank: NonNegativeInt = Field(0, description="0: train all weights (or the adapter that model.path holds).")
    alpha: PositiveFloat = Field(16.0, description="Scale: factors count alpha / rank times.")
    target_modules: str = Field("all-linear", description="A regular expression for layer names, or all-linear.")


class DeepSpeedConfig(_Frozen):
    """How weights, gradients and optimiser states lie on the workers."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="ZeRO: shard nothing, optimiser states, gradients too, or weights too."
    )
    offload_optimizer: Literal["none", "cpu"] = Field("none", description="Where optimiser states lie.")
    offload_parameters: Literal["none", "cpu"] = Field("none", description="Stage 3: where weights lie.")
    config: str | None = Field(
        None, description="A DeepSpeed JSON file with more settings; what contradicts ours is refused."
    )


class WorkersConfig(_Frozen):
    """The training workers."""

    workers: PositiveInt | None = Field(None, description="How many; unset, one for each GPU, or one without any.")
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPUs per worker; also its number of threads.")
    gpus_per_worker: NonNegativeFloat | None = Field(
        None, description="GPUs per worker; unset, one if the cluster has any, else none."
    )
    max_failures: NonNegativeInt = Field(3, description="So often the run goes on from its checkpoint after a failure.")


class TrackingConfig(_Frozen):
    """Where the log goes besides metrics.jsonl."""

    tensorboard: bool = Field(False, description="Event files under RUN/tensorboard; needs tensorboard.")
    wandb_project: str | None = Field(None, description="Weights & Biases project; needs wandb and a login.")


class UnlearnConfig(_Frozen):
    """Unlearn a forget set with MRD weights: Ray Train over DeepSpeed ZeRO, rescoring as the model changes."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    retain: RetainConfig = Field(RetainConfig(), description=str(RetainConfig.__doc__))
    unlearning: UnlearningConfig = Field(UnlearningConfig(), description=str(UnlearningConfig.__doc__))
    scoring: ScoringConfig = Field(
        ScoringConfig(estimator="closed_form"), description="How MRD is estimated, at the start and at each refresh."
    )
    stopping: StoppingConfig = Field(StoppingConfig(), description=str(StoppingConfig.__doc__))
    checkpoints: CheckpointsConfig = Field(CheckpointsConfig(), description=str(CheckpointsConfig.__doc__))
    lora: LoraConfig = Field(LoraConfig(), description=str(LoraConfig.__doc__))
    deepspeed: DeepSpeedConfig = Field(DeepSpeedConfig(), description=str(DeepSpeedConfig.__doc__))
    ray: WorkersConfig = Field(WorkersConfig(), description=str(WorkersConfig.__doc__))
    tracking: TrackingConfig = Field(TrackingConfig(), description=str(TrackingConfig.__doc__))

    @field_validator("scoring", mode="before")
    @classmethod
    def _closed_form_unless_said(cls, scoring: Any) -> Any:
        return {"estimator": "closed_form"} | scoring if isinstance(scoring, dict) else scoring

    @model_validator(mode="after")
    def _groups_agree(self) -> "UnlearnConfig":
        method = self.unlearning.method
        if self.checkpoints.best_by == "retain_loss" and self.retain.path is None:
            raise ValueError("checkpoints.best_by: retain_loss needs retain.path")
        if method != "ga" and self.retain.path is None and self.unlearning.retain_weight:
            raise ValueError(f"retain.path: unlearning.method: {method} needs a retain set, or retain_weight: 0")
        if self.model.dtype == "float64":
            raise ValueError("model.dtype: float64 is for scoring; unlearning trains in float32 or bfloat16")
        if self.unlearning.refresh == "actors" and "://" in self.run.dir:
            raise ValueError("unlearning.refresh: actors needs a run.dir that every node sees as a folder, not a URI")
        if self.deepspeed.offload_parameters != "none" and self.deepspeed.zero_stage != 3:
            raise ValueError("deepspeed.offload_parameters needs deepspeed.zero_stage: 3")
        if self.deepspeed.offload_optimizer != "none" and self.deepspeed.zero_stage == 0:
            raise ValueError("deepspeed.offload_optimizer needs deepspeed.zero_stage: 1, 2 or 3")
        if self.unlearning.weighting != "uniform" and self.unlearning.refresh == "in_place":
            self._refuse_in_place()
        return self

    def _refuse_in_place(self) -> None:
        """What a refresh on live weights cannot honour."""
        scoring, way_out = self.scoring, "; use unlearning.refresh: actors"
        if scoring.estimator == "monte_carlo" and self.model.dtype == "bfloat16" and not scoring.allow_low_precision:
            raise ValueError(
                "scoring.estimator: monte_carlo in bfloat16 rounds sigma away; use closed_form, or "
                "scoring.allow_low_precision where you know that sigma is large enough"
            )
        if scoring.estimator == "monte_carlo" and self.deepspeed.offload_parameters != "none":
            raise ValueError(
                "scoring.estimator: monte_carlo cannot shake offloaded weights in place (deepspeed.offload_parameters)"
                "; use closed_form, or unlearning.refresh: actors"
            )
        if scoring.target_relative_se is not None:
            raise ValueError(f"scoring.target_relative_se is not for refreshes in place{way_out}")
        if scoring.curvature_probes and self.deepspeed.zero_stage == 3:
            raise ValueError(f"scoring.curvature_probes needs whole weights, not deepspeed.zero_stage: 3{way_out}")
        if scoring.allow_slow_parameters and self.deepspeed.zero_stage == 3:
            raise ValueError(f"scoring.allow_slow_parameters needs whole weights, not deepspeed.zero_stage: 3{way_out}")


class CompareConfig(_Frozen):
    """Say how far two runs agree on the same samples, whatever their estimator, sigma, K, precision or model."""

    run_a: str = Field(description="A run directory, or a scores.parquet.")
    run_b: str = Field(description="Another.")
    out: str = Field("compare.png", description="Where the scatter plot goes.")


class PlanConfig(_Frozen):
    """Say what scoring would cost, without loading the model's weights or starting Ray."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig | None = Field(None, description="Not used; so that a configuration of `score` can be planned.")
    scoring: ScoringConfig = Field(ScoringConfig(), description=str(ScoringConfig.__doc__))
    ray: RayConfig = Field(RayConfig(actors=1), description="The cluster's shape.")
    tflops: PositiveFloat | None = Field(
        None,
        description="Sustained float32 TFLOP/s of one actor. Unset: measured on this machine's CPU for CPU actors; "
        "a cautious guess for GPU actors.",
    )


class DemoConfig(_Frozen):
    """Score a bundled set of invented authors on a small real model that has memorised it, and unlearn it."""

    model: str | None = Field(None, description="Your own model (directory or hub id); else SmolLM2-135M-Instruct.")
    data: str | None = Field(None, description="Your own forget set; else 40 questions about invented authors.")
    dir: str | None = Field(None, description="Run directory of the scores; unset, a folder under runs/.")
    cache: str = Field("~/.cache/mrd_ray", description="Folder that keeps the demo's model between runs.")
    estimator: Literal["closed_form", "monte_carlo"] = Field(
        "closed_form",
        description="Exact scores in a minute, or Algorithm 1 with num_draws draws.",
    )
    unlearn: bool = Field(
        True,
        description="Go on to unlearn, on two workers; only of the bundled model and set, for want of a retain set.",
    )
    num_draws: PositiveInt = Field(
        24, description="K of monte_carlo; few, since the demo is for two CPU cores: a standard error of some 15%."
    )
    ray: RayConfig = Field(RayConfig(), description=str(RayConfig.__doc__))
