"""Settings of evaluation."""

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mrd_ray.config.base import COMMON, Frozen, LocalPath, ModelSettings, OutputSettings, RaySettings, RunSettings
from mrd_ray.config.data import DataSettings, is_plain_text

Metric = Literal[
    "probability",
    "normalized_probability",
    "truth_ratio",
    "accuracy",
    "embedding_accuracy",
    "rouge_l",
    "memorization_accuracy",
    "extraction_likelihood",
    "min_k",
    "perplexity",
    "multiple_choice",
    "toxicity",
]
_OF_ALTERNATIVES = {"normalized_probability", "truth_ratio", "accuracy", "embedding_accuracy"}
OF_ANSWERS = {"rouge_l", "embedding_accuracy", "toxicity"}  # that need the model to answer
OF_RESPONSES = {"probability", "multiple_choice"} | OF_ANSWERS | _OF_ALTERNATIVES  # that no text can serve


def _refuse_repeats(setting: str, values: Sequence[str]) -> None:
    for value in values:
        if values.count(value) > 1:  # its rows would count twice
            raise ValueError(f"{setting}: {value} stands more than once; name it once")


class EvaluatedSet(DataSettings):
    """A set that the model is asked about, and what is measured on it."""

    score_on: Literal["all", "response"] = Field(
        "response", description="Which tokens count: only the response, or all. Of a text, all always count."
    )
    metrics: tuple[Metric, ...] = Field(
        min_length=1, description="What is measured; docs/reference/metrics.md defines each."
    )
    paraphrase: str | None = Field(
        None, description="Column with the true answer in other words. Unset: the response is used."
    )
    wrong: str | None = Field(
        None, description="Column with a list of wrong answers, or with a text that list_separator splits."
    )
    choices: str | tuple[str, ...] | None = Field(
        None,
        description="multiple_choice: column with a list of choices, with {text, label} as ARC has it, or with choices "
        "by their labels; or a list of columns, one per choice. The response is the right choice's index, "
        "letter, label or text, or a list with 1 for it and 0 for the others.",
    )
    answers_count_from: Literal["auto", 0, 1] | None = Field(
        "auto",
        description="multiple_choice: whether a number in the response is an index from 0 (1 is the second choice) or "
        "from 1 (1 is the first). auto: detected from the set's answers; if they leave it open, from 0, and a message "
        "says so. null: it is not an index, but the label or text of a choice.",
    )
    subject: str | None = Field(
        None, description="multiple_choice: column with the subject. Accuracy is also reported per subject."
    )

    @model_validator(mode="before")
    @classmethod
    def _texts_count_whole(cls, given: Any) -> Any:
        return {**given, "score_on": "all"} if isinstance(given, dict) and given.get("text") is not None else given

    @model_validator(mode="after")
    def _columns_serve_the_metrics(self) -> "EvaluatedSet":
        _refuse_repeats("metrics", self.metrics)
        metrics = set(self.metrics)
        if (of := metrics & _OF_ALTERNATIVES) and self.wrong is None:
            raise ValueError(f"metrics: {min(of)} needs `wrong`, a column with wrong answers")
        if "multiple_choice" in metrics and (self.choices is None or len(metrics) > 1):
            raise ValueError("metrics: multiple_choice needs `choices`, a column, and goes with no other metric")
        if self.choices is not None and "multiple_choice" not in metrics:
            raise ValueError(f"choices: serves multiple_choice alone, not {min(metrics)}")
        if self.answers_count_from != "auto" and self.choices is None:
            raise ValueError(f"answers_count_from: serves multiple_choice alone, not {min(metrics)}")
        texts = self.text is not None or is_plain_text(self.path)
        if texts and (of := metrics & OF_RESPONSES):
            raise ValueError(f"metrics: {min(of)} needs prompts with responses, not texts")
        if metrics >= {"perplexity", "extraction_likelihood"}:
            raise ValueError("metrics: perplexity, of windows, and extraction_likelihood, of whole texts; use two sets")
        if "perplexity" in metrics and not texts:
            raise ValueError("metrics: perplexity needs texts (`text`, or a .txt file)")
        return self


class MembershipSettings(Frozen):
    """Which sets min_k tells apart. Both need it among their metrics."""

    members: str = Field(description="The set that the model was probably trained on.")
    non_members: str = Field(description="A set of the same kind that it has not seen.")


class EvaluationSettings(Frozen):
    """The evaluated sets, and settings for all of them."""

    sets: dict[str, EvaluatedSet] = Field({}, description="Evaluated sets by name.", json_schema_extra=COMMON)
    forget: str | None = Field(
        None,
        description="The set to be forgotten. A warning says how many of its rows are also in other sets.",
    )
    reference: LocalPath | None = Field(
        None,
        description="Run directory of the same evaluation of a model that never saw the forget set. TOFU's forget "
        "quality compares with it.",
    )
    utility: tuple[str, ...] = Field((), description="Sets whose metrics are combined into TOFU's model utility.")
    membership: MembershipSettings | None = Field(None, description="Sets whose min_k gives a membership AUC.")
    min_k_percent: tuple[PositiveFloat, ...] = Field(
        (5, 10, 20, 30, 40, 50, 60), description="k of min_k, each in (0, 100]."
    )
    max_new_tokens: PositiveInt = Field(
        128, description="Longest generated answer, in tokens.", json_schema_extra=COMMON
    )
    stop: str | None = Field(
        None,
        min_length=1,
        description="A generated answer ends where this text first appears, or at the model's EOS. In it, \\n is a "
        "line break and \\t a tab.",
    )
    embedding_model: LocalPath | None = Field(
        None, description="embedding_accuracy: a sentence-transformers directory or hub id."
    )
    toxicity_model: LocalPath | None = Field(
        None, description="toxicity: a text-classification directory or hub id, for example unitary/toxic-bert."
    )
    toxicity_label: str = Field("toxic", description="toxicity: the label whose probability is reported.")
    extraction_n: PositiveInt = Field(10, description="n of the extraction likelihood EL_n.")
    extraction_stride: PositiveInt = Field(1, description="Use every N-th prefix of a sample for EL_n.")
    perplexity_window: int = Field(
        1024, ge=2, description="perplexity: tokens per window, at most the model's context length."
    )
    perplexity_stride: PositiveInt = Field(512, description="perplexity: tokens from one window to the next.")
    zero_shot: tuple[str, ...] = Field(
        (),
        description="Tasks of the LM Evaluation Harness, without examples in the prompt, for example hellaswag.",
        json_schema_extra=COMMON,
    )
    zero_shot_tasks: LocalPath | None = Field(None, description="Folder with YAML files of more zero-shot tasks.")
    zero_shot_limit: PositiveInt | None = Field(None, description="Use only this many rows of each zero-shot task.")
    micro_batch_tokens: PositiveInt = Field(512, description="Tokens per forward, padding included.")
    generation_batch: PositiveInt = Field(16, description="Number of answers generated together.")

    @field_validator("sets")
    @classmethod
    def _names_are_plain(cls, sets: dict[str, EvaluatedSet]) -> dict[str, EvaluatedSet]:
        for name in sets:
            if re.fullmatch(r"[a-z][a-z0-9_-]*", name) is None:
                raise ValueError(f"evaluation.sets: {name!r} is no name; expected a-z, then a-z, 0-9, _ and -")
        return sets

    @field_validator("stop")
    @classmethod
    def _stop_as_a_shell_gives_it(cls, stop: str | None) -> str | None:
        return None if stop is None else stop.replace("\\n", "\n").replace("\\t", "\t")

    @model_validator(mode="after")
    def _groups_agree(self) -> "EvaluationSettings":
        def require(setting: str, name: str, metrics: set[str]) -> None:
            if name not in self.sets:
                raise ValueError(f"evaluation.{setting}: no set {name!r}; there are {', '.join(self.sets)}")
            if lacking := metrics - set(self.sets[name].metrics):
                raise ValueError(f"evaluation.{setting}: set {name!r} needs {min(lacking)} among its metrics")

        for metric, model in {"embedding_accuracy": "embedding_model", "toxicity": "toxicity_model"}.items():
            asking = [name for name, evaluated in self.sets.items() if metric in evaluated.metrics]
            if asking and getattr(self, model) is None:
                raise ValueError(f"evaluation.{model}: set {asking[0]!r} needs it, for {metric}")
        if self.forget is not None:
            require("forget", self.forget, set())
        if self.reference is not None:
            if self.forget is None:
                raise ValueError("evaluation.reference needs evaluation.forget, the set to compare on")
            require("forget", self.forget, {"truth_ratio"})
        _refuse_repeats("evaluation.utility", self.utility)
        _refuse_repeats("evaluation.min_k_percent", [f"{k:g}" for k in self.min_k_percent])  # as figures name them
        for name in self.utility:
            require("utility", name, {"rouge_l", "truth_ratio"})
            if not {"probability", "normalized_probability"} & set(self.sets[name].metrics):
                raise ValueError(f"evaluation.utility: set {name!r} needs probability or normalized_probability")
        if self.membership is not None:
            require("membership.members", self.membership.members, {"min_k"})
            require("membership.non_members", self.membership.non_members, {"min_k"})
        if self.perplexity_stride >= self.perplexity_window:
            raise ValueError(
                f"evaluation.perplexity_stride: {self.perplexity_stride} is not under perplexity_window, "
                f"{self.perplexity_window}: windows must overlap, since the first token of each has none before it"
            )
        if wide := [k for k in self.min_k_percent if k > 100]:
            raise ValueError(f"evaluation.min_k_percent: {wide[0]:g} is over 100")
        return self


class EvaluateConfig(Frozen):
    """Measure what a model still knows, of what it was to forget and of the rest."""

    model: ModelSettings
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description=str(EvaluationSettings.__doc__))
    run: RunSettings
    ray: RaySettings = Field(RaySettings(), description=str(RaySettings.__doc__))
    output: OutputSettings = Field(OutputSettings(), description=str(OutputSettings.__doc__))

    @model_validator(mode="after")
    def _something_is_measured(self) -> "EvaluateConfig":
        if not self.evaluation.sets and not self.evaluation.zero_shot:
            raise ValueError("evaluation.sets: none; give some, evaluation.zero_shot, or --task")
        return self
