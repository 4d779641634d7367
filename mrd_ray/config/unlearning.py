"""Settings of unlearning."""

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mrd_ray.config.base import (
    COMMON,
    Frozen,
    LocalPath,
    ModelSettings,
    OutputSettings,
    Patience,
    RunSettings,
    refuse_no_pattern,
)
from mrd_ray.config.data import DataSettings, RetainSettings
from mrd_ray.config.evaluation import EvaluationSettings
from mrd_ray.config.scoring import ScoringSettings, closed_form_unless_said

Weighting = Literal["mrd", "inverse_mrd", "uniform"]


class UnlearningSettings(Frozen):
    """The method, which samples it takes, and how far it goes."""

    method: Literal["ga", "graddiff", "po", "npo"] = Field(
        "npo",
        description="ga: ascent on the forget set (with weighting: mrd, the paper's Curriculum Gradient Ascent); "
        "graddiff: ascent there, descent on the retain set; po: descent on refusals of the forget set's prompts, "
        "and on the retain set; npo: negative preference optimisation, and descent on the retain set.",
        json_schema_extra=COMMON,
    )
    weighting: Weighting = Field(
        "mrd",
        description="How to draw forget samples, with replacement: in proportion to MRD (Algorithm 2: easy ones more "
        "often), in proportion to 1/MRD, or uniformly.",
        json_schema_extra=COMMON,
    )
    retain_weight: NonNegativeFloat = Field(
        1.0, description="Weight lambda of the retain loss, in all methods except ga.", json_schema_extra=COMMON
    )
    beta: PositiveFloat = Field(0.1, description="npo: inverse temperature.")
    refusals: LocalPath | None = Field(
        None, description="po: a .txt file with one refusal per line. Each draw of a forget sample takes a random one."
    )
    learning_rate: PositiveFloat = Field(5e-5, description="Constant learning rate of AdamW.", json_schema_extra=COMMON)
    weight_decay: NonNegativeFloat = Field(0.01, description="Weight decay of AdamW.")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="Clip gradients to this norm; 0 means no clipping.")
    batch_size: PositiveInt = Field(
        8,
        description="Forget samples per optimiser step, over all workers. The same number of retain samples is added.",
        json_schema_extra=COMMON,
    )
    micro_batch_size: PositiveInt | None = Field(
        None,
        description="Samples per forward on each worker; gradients are accumulated. Unset: the worker's whole share.",
    )
    epochs: PositiveInt = Field(
        5, description="Most passes over the forget set, counted in draws.", json_schema_extra=COMMON
    )
    steps: PositiveInt | None = Field(
        None, description="Most optimiser steps; replaces epochs.", json_schema_extra=COMMON
    )
    seed: NonNegativeInt = Field(0, lt=2**32, description="Random seed of the draws and of new LoRA factors.")
    refresh_every: PositiveInt | None = Field(
        None,
        description="Steps between refreshes, which score the forget set again. Unset: once per epoch.",
        json_schema_extra=COMMON,
    )
    refresh: Literal["in_place", "actors"] = Field(
        "in_place",
        description="in_place: the workers score with the live weights. actors: training pauses while `mrd-ray score` "
        "scores the checkpoint with its own actors, which takes about a minute each time.",
    )

    @model_validator(mode="after")
    def _settings_fit_the_method(self) -> "UnlearningSettings":
        if (self.method == "po") != (self.refusals is not None):
            if self.method == "po":
                raise ValueError("unlearning.method: po needs unlearning.refusals, a .txt file with a refusal a line")
            raise ValueError(f"unlearning.refusals has no meaning with unlearning.method: {self.method}")
        return self


class StoppingSettings(Frozen):
    """When to stop before the last step."""

    evaluate_every: PositiveInt | None = Field(
        None,
        description="Steps between evaluations. Each is a pass over the forget set, and is followed by a checkpoint. "
        "Unset: once per epoch.",
        json_schema_extra=COMMON,
    )
    forgotten: Literal["every", "mean", "never"] = Field(
        "every",
        description="Appendix C.4 of the paper: stop when EL_n and MA of every forget sample, or their means, are "
        "below their averages on the initial model. never: train to the last step.",
    )
    extraction_n: NonNegativeInt = Field(
        10, description="n of the extraction likelihood EL_n. 0 leaves EL out and saves its generation."
    )
    extraction_stride: PositiveInt = Field(
        1, description="Use every N-th prefix of a sample for EL_n. 1 is the definition; larger values cost less."
    )
    max_retain_loss_ratio: float | None = Field(
        2.0,
        gt=1,
        description="Utility floor: stop when the retain loss or the retain perplexity exceeds this many times its "
        "first value and the loss has risen by more than 0.1 nats, and keep the checkpoint before. null: no floor.",
    )
    retain_samples: PositiveInt = Field(64, description="Number of retain samples that the floor is measured on.")


class CheckpointsSettings(Frozen):
    """What a run resumes from, and which state becomes the result."""

    keep: PositiveInt = Field(2, description="Number of checkpoints to keep.")
    best_by: Literal["last", "forget_memorization_accuracy", "retain_loss"] = Field(
        "last", description="Which checkpoint becomes the result: the last, or the one with the smallest value of this."
    )


class LoraSettings(Frozen):
    """Train LoRA factors, and leave the model's own weights unchanged."""

    rank: NonNegativeInt = Field(
        0,
        description="Rank of the LoRA factors. 0: train all weights (or the adapter in model.path).",
        json_schema_extra=COMMON,
    )
    alpha: PositiveFloat = Field(16.0, description="Scale: the factors are multiplied by alpha / rank.")
    target_modules: str = Field("all-linear", description="A regular expression for layer names, or all-linear.")

    @field_validator("target_modules")
    @classmethod
    def _target_modules_is_a_pattern(cls, target_modules: str) -> str:
        return refuse_no_pattern("lora.target_modules", target_modules)


class DeepSpeedSettings(Frozen):
    """How weights, gradients and optimiser states are spread over the workers."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="ZeRO stage. 0 shards nothing, 1 optimiser states, 2 also gradients, 3 also weights.",
        json_schema_extra=COMMON,
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none", description="Where to keep optimiser states: on the worker's device or in CPU memory."
    )
    offload_parameters: Literal["none", "cpu"] = Field(
        "none", description="Stage 3: where to keep weights: on the worker's device or in CPU memory."
    )
    config: LocalPath | None = Field(
        None, description="A DeepSpeed JSON file with more settings. Settings that contradict ours are refused."
    )


class WorkersSettings(Patience):
    """The training workers."""

    workers: PositiveInt | None = Field(
        None, description="Number of workers. Unset: one per GPU, or one if there is none.", json_schema_extra=COMMON
    )
    gpus_per_worker: NonNegativeFloat | None = Field(
        None, description="GPUs per worker. Unset: one if the cluster has any, else none.", json_schema_extra=COMMON
    )
    max_failures: NonNegativeInt = Field(3, description="How many failures to recover from before giving up.")


class TrackingSettings(Frozen):
    """Where the log goes besides metrics.jsonl."""

    tensorboard: bool = Field(False, description="Write event files to RUN/tensorboard. Needs the package tensorboard.")
    wandb_project: str | None = Field(
        None, description="Weights & Biases project. Needs the package wandb and a login."
    )


class UnlearnConfig(Frozen):
    """Unlearn a forget set with MRD weights: Ray Train over DeepSpeed ZeRO, rescoring as the model changes."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    retain: RetainSettings = Field(RetainSettings(), description=str(RetainSettings.__doc__))
    unlearning: UnlearningSettings = Field(UnlearningSettings(), description=str(UnlearningSettings.__doc__))
    scoring: ScoringSettings = Field(
        ScoringSettings(estimator="closed_form"), description="How MRD is estimated, at the start and at each refresh."
    )
    stopping: StoppingSettings = Field(StoppingSettings(), description=str(StoppingSettings.__doc__))
    checkpoints: CheckpointsSettings = Field(CheckpointsSettings(), description=str(CheckpointsSettings.__doc__))
    lora: LoraSettings = Field(LoraSettings(), description=str(LoraSettings.__doc__))
    deepspeed: DeepSpeedSettings = Field(DeepSpeedSettings(), description=str(DeepSpeedSettings.__doc__))
    ray: WorkersSettings = Field(WorkersSettings(), description=str(WorkersSettings.__doc__))
    tracking: TrackingSettings = Field(TrackingSettings(), description=str(TrackingSettings.__doc__))
    output: OutputSettings = Field(OutputSettings(), description=str(OutputSettings.__doc__))
    evaluation: EvaluationSettings = Field(
        EvaluationSettings(), description="As in `mrd-ray evaluate`, during training. zero_shot is not evaluated."
    )
    evaluation_every: PositiveInt | None = Field(
        None, description="Steps between evaluations during training, which go to RUN/evaluations/. Unset: none."
    )

    @field_validator("scoring", mode="before")
    @classmethod
    def _closed_form_unless_said(cls, scoring: Any) -> Any:
        return closed_form_unless_said(scoring)

    @model_validator(mode="after")
    def _groups_agree(self) -> "UnlearnConfig":
        method = self.unlearning.method
        if self.evaluation_every is not None and not self.evaluation.sets:
            raise ValueError("evaluation_every needs evaluation.sets, or --task")
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

    def result(self, folder: str) -> ModelSettings:
        """The model in the folder of a checkpoint or of the result. An adapter's base model is still where it was."""
        base = self.model.base
        if self.lora.rank and ("://" in self.model.path or Path(self.model.path).expanduser().is_dir()):
            base = self.model.path
        return self.model.model_copy(update={"path": folder, "revision": None, "tokenizer": None, "base": base})

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
