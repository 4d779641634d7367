"""Settings of the paper's experiments."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mrd_ray.config.base import Frozen, LocalPath, ModelSettings, Processes, RaySettings, RunSettings, SettingsOf
from mrd_ray.config.data import DataSettings, RetainSettings
from mrd_ray.config.evaluation import EvaluationSettings
from mrd_ray.config.scoring import ScoringSettings, closed_form_unless_said
from mrd_ray.config.unlearning import (
    CheckpointsSettings,
    DeepSpeedSettings,
    StoppingSettings,
    UnlearningSettings,
    Weighting,
    WorkersSettings,
)

Method = Literal["ga", "graddiff", "po", "npo"]
Several = Annotated[tuple[NonNegativeInt, ...], Field(min_length=2)]


class LearnSettings(Frozen):
    """Fine-tune model.path on the forget and the retain set first, if it has not seen them."""

    epochs: NonNegativeInt = Field(0, description="Passes over both sets. 0: no fine-tuning, the model knows them.")
    batch_size: PositiveInt = Field(8, description="Samples per step.")
    learning_rate: PositiveFloat = Field(3e-4, description="Constant learning rate of AdamW.")
    cache: str = Field(
        "~/.cache/mrd_ray", description="Folder that keeps the fine-tuned models. Every node must see it."
    )


class ExperimentConfig(Frozen):
    """What all experiments have in common."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    retain: RetainSettings = Field(RetainSettings(), description=str(RetainSettings.__doc__))
    learn: LearnSettings = Field(LearnSettings(), description=str(LearnSettings.__doc__))
    scoring: ScoringSettings = Field(ScoringSettings(estimator="closed_form"), description=str(ScoringSettings.__doc__))
    results: str | None = Field(None, description="Folder for a copy of the findings, NAME.json and NAME.png.")

    @field_validator("run")
    @classmethod
    def _run_is_a_folder(cls, run: RunSettings) -> RunSettings:
        if "://" in run.dir:
            raise ValueError(f"run.dir: {run.dir}, but an experiment needs a folder that every node sees, not a URI")
        return run

    @field_validator("scoring", mode="before")
    @classmethod
    def _closed_form_unless_said(cls, scoring: object) -> object:
        return closed_form_unless_said(scoring)


class AloneSettings(Frozen):
    """Gradient ascent with AdamW on one sample or a few, from the initial model, until they are forgotten."""

    learning_rate: PositiveFloat = Field(5e-6, description="Constant learning rate of AdamW, without weight decay.")
    max_updates: PositiveInt = Field(
        100, description="Give up after this many updates. A sample that is not forgotten counts with this number."
    )
    reference: LocalPath | None = Field(
        None,
        description="Model (directory or hub id) that never saw the samples. A sample is forgotten when its MA and EL "
        "are below the forget set's averages on that model. Unset: with learn.epochs, model.path before fine-tuning; "
        "otherwise the model itself (the paper, C.4), so that samples below average count as forgotten at once.",
    )
    extraction_n: NonNegativeInt = Field(10, description="n of EL_n; 0 leaves EL out.")
    extraction_stride: PositiveInt = Field(1, description="Use every N-th prefix of a sample for EL_n.")


class TasksOfSweep(Processes):
    """Ray tasks, each with a replica of the model, its gradient and two AdamW moments, in float32."""

    gpus_per_task: NonNegativeFloat = Field(0.0, description="GPUs per task.")
    samples_per_task: PositiveInt = Field(8, description="Samples, or composite samples, per task.")


class UnlearningAlone(ExperimentConfig):
    """What experiments that unlearn a few samples at a time have in common."""

    alone: AloneSettings = Field(AloneSettings(), description=str(AloneSettings.__doc__))
    ray: TasksOfSweep = Field(TasksOfSweep(), description=str(TasksOfSweep.__doc__))

    @model_validator(mode="after")
    def _updates_must_not_round_away(self) -> "UnlearningAlone":
        if self.model.dtype != "float32":
            raise ValueError(f"model.dtype: {self.model.dtype}, but these updates are made in float32")
        return self


class Fig3Config(UnlearningAlone):
    """Figure 3: how far parameters move until a composite sample, a few samples together, is forgotten."""

    size: PositiveInt = Field(4, description="Samples per composite sample.")
    composites: int = Field(12, ge=3, description="Number of composite samples, which share no sample.")
    seed: NonNegativeInt = Field(0, description="Random seed of the composite samples.")


class Fig4Config(UnlearningAlone):
    """Figure 4: MRD against the number of updates until a single sample is forgotten, and simpler measures too."""


class Fig5Config(ExperimentConfig):
    """Figure 5: MRD against sigma, in several precisions, and against the number of draws K."""

    scored: PositiveInt | None = Field(None, description="Score only this many samples, the first ones. Unset: all.")
    sigmas: tuple[PositiveFloat, ...] = Field(
        (1e-7, 1e-6, 1e-5, 1e-4, 1e-3), min_length=2, description="Values of sigma."
    )
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = Field(
        ("float32", "bfloat16"), min_length=1, description="Precisions of the weights and the forward pass."
    )
    sigma_draws: PositiveInt = Field(50, description="K at each sigma.")
    draws: tuple[PositiveInt, ...] = Field(
        (10, 25, 50, 100, 200), min_length=2, description="Values of K at scoring.sigma."
    )
    ray: RaySettings = Field(RaySettings(), description=str(RaySettings.__doc__))


class UnlearningSweep(ExperimentConfig):
    """What experiments that unlearn a set as a whole have in common."""

    unlearning: UnlearningSettings = Field(UnlearningSettings(), description=str(UnlearningSettings.__doc__))
    stopping: StoppingSettings = Field(StoppingSettings(), description=str(StoppingSettings.__doc__))
    checkpoints: CheckpointsSettings = Field(CheckpointsSettings(keep=1), description=str(CheckpointsSettings.__doc__))
    deepspeed: DeepSpeedSettings = Field(DeepSpeedSettings(), description=str(DeepSpeedSettings.__doc__))
    ray: WorkersSettings = Field(WorkersSettings(), description=str(WorkersSettings.__doc__))
    at_once: PositiveInt = Field(1, description="Number of runs at a time.")
    seeds: Several = Field((0, 1, 2), description="Random seeds of the draws of forget and retain samples.")


class Fig2Config(UnlearningSweep):
    """Figure 2: how much the same unlearning varies with the samples that are to be forgotten."""

    selections: int = Field(5, ge=2, description="Number of forget sets to draw from data.")
    size: PositiveInt = Field(20, description="Samples per forget set.")
    selection_seed: NonNegativeInt = Field(0, description="Random seed of the forget sets.")


class TablesConfig(UnlearningSweep):
    """Tables 1, 4, 5, 6: each method with uniform and with MRD weights, on a task."""

    methods: dict[Method, Annotated[dict[str, Any], SettingsOf(UnlearningSettings)]] = Field(
        {"ga": {}, "graddiff": {}, "npo": {}},
        description="Methods (ga is the paper's SGA, and with MRD weights its CGA), each with its own settings of "
        "unlearning.",
    )
    weightings: tuple[Weighting, ...] = Field(("uniform", "mrd"), min_length=1, description="How to draw samples.")
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description=str(EvaluationSettings.__doc__))


class Table7Config(ExperimentConfig):
    """Table 7: MRD against what samples are like: semantic complexity, frequency, initial probability, rare words."""

    corpus: LocalPath | None = Field(
        None, description="A .txt file of ordinary text, for word frequencies. Unset: the forget and the retain set."
    )
    common_words: PositiveInt = Field(5000, description="The N most frequent words are common; all others are rare.")
    ray: RaySettings = Field(RaySettings(), description=str(RaySettings.__doc__))
