"""What the settings of all commands have in common."""

import os
import re
from dataclasses import dataclass
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
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from mrd_ray.config.credentials import refuse_credentials
from mrd_ray.config.renamed import section_with_new_names
from mrd_ray.config.words import kind_of


@dataclass(frozen=True)
class NamesFile:
    """Marks a text as one that may name a file or folder. created: it is one even if it does not exist yet."""

    created: bool = False


@dataclass(frozen=True)
class SettingsOf:
    """Marks a mapping as one that holds some settings of a config class, given by its fields' names."""

    config: type[BaseModel]


# json_schema_extra of the settings that most people need, which --help shows
COMMON: dict[str, Any] = {"common": True}


def is_common(field: FieldInfo) -> bool:
    """Whether most people need this setting."""
    return field.json_schema_extra == COMMON


Name = Annotated[str, StringConstraints(min_length=1)]
LocalPath = Annotated[str, NamesFile()]  # or a URI, or a hub id
_OF_JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_ID"}  # of the command that a job runs, and of workers


class Frozen(BaseModel):
    """Settings that nobody changes, of which none is misspelt, and none holds credentials (UserError)."""

    # built when first used: --help is not to wait for what checks settings
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, about: ValidationInfo) -> object:
        """YAML reads `no` as false, which pydantic takes for 0."""
        if isinstance(value, bool) and about.field_name is not None:
            wanted = kind_of(cls.model_fields[about.field_name])
            if wanted.startswith(("integer", "number")):
                raise PydanticCustomError("not_a_number", "a number was expected")
        return value

    @field_validator("*")
    @classmethod
    def _no_credentials(cls, value: object, about: ValidationInfo) -> object:
        refuse_credentials(
            f"{cls.__name__.removesuffix('Settings').removesuffix('Config').lower()}.{about.field_name}", value
        )
        return value


def refuse_no_pattern(setting: str, value: str) -> str:
    """The value of a setting that must be a regular expression. Raises ValueError."""
    try:
        re.compile(value)
    except re.error as problem:
        raise ValueError(f"{setting}: {value!r} is not a regular expression: {problem}") from None
    return value


class ModelSettings(Frozen):
    """The causal language model whose memory is measured."""

    path: Annotated[Name, NamesFile()] = Field(
        description="Directory of a Hugging Face model, its URI (s3://...), or a hub id such as Qwen/Qwen3-0.6B.",
        json_schema_extra=COMMON,
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the hub id model.path.")
    base: LocalPath | None = Field(
        None,
        description="Directory, URI or hub id of the model that the adapter in model.path was trained on. It replaces "
        "the one in adapter_config.json, and is needed if that is a folder outside the adapter's own.",
    )
    tokenizer: LocalPath | None = Field(
        None, description="Directory or hub id (default branch) of the tokenizer. Unset: the model's own."
    )
    dtype: Literal["float32", "float64", "bfloat16"] = Field(
        "float32",
        description="Precision of the weights and the forward pass. Use bfloat16 only with the closed form: it rounds "
        "small sigmas away.",
        json_schema_extra=COMMON,
    )
    allow_pickle: bool = Field(
        False, description="Also read weights from pickles (pytorch_model*.bin) if there are no safetensors."
    )
    allow_unused_weights: bool = Field(
        False,
        description="Accept tensors in the weight files that the model does not use. Their names are written to the "
        "run's manifest.json.",
    )
    trust_remote_code: bool = Field(
        False, description="Run the Python code that comes with the model or tokenizer. Read it first."
    )


class RunSettings(Frozen):
    """Where results go."""

    dir: Annotated[Name, NamesFile(created=True)] = Field(
        description="Run directory: a local path or a URI (s3://..., gs://...). Starting again with the same directory "
        "resumes the run. Only its owner can read a new one.",
        json_schema_extra=COMMON,
    )
    storage_patience: NonNegativeFloat = Field(
        300.0,
        description="Seconds to retry storage errors that can pass (time-outs, refused connections, server errors) "
        "before the run ends. Work continues meanwhile; results wait in Ray's object store.",
    )


class OutputSettings(Frozen):
    """What a run shows. Ids, scores and paths are always shown; the run directory's files are not affected."""

    include_text: bool | None = Field(
        None,
        description="Whether to show texts (samples, prompts, answers, errors that quote them) on the terminal, in "
        "summary.png and in reports. Unset: yes, except in a Ray job, whose log others can read, and with quiet.",
    )
    quiet: bool = Field(False, description="Print only errors and the paths of results.")

    @property
    def texts(self) -> bool:
        """Whether texts are shown."""
        if self.include_text is None:
            return not self.quiet and not _OF_JOB & os.environ.keys()
        return self.include_text


class Processes(Frozen):
    """What a cluster gives to each actor, worker or task, and how long it is waited for."""

    cpus_per_process: PositiveFloat = Field(
        1.0,
        description="CPUs of each actor, worker or task; also its number of threads (at least one).",
        json_schema_extra=COMMON,
    )

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, given: object) -> object:
        return section_with_new_names("ray", given) if isinstance(given, dict) else given


class Patience(Processes):
    """How long a cluster is waited for."""

    start_timeout: PositiveFloat = Field(1800.0, description="Seconds to wait for a node with room if none has any.")
    stall_after: PositiveFloat = Field(
        900.0, description="Seconds on one unit, or without any actor, before a warning names the unit and the node."
    )


class RaySettings(Patience):
    """The actors. Each holds a replica of the model; for Monte Carlo scores it holds the weights twice.

    On CPUs the unperturbed copy is the file itself, mapped into memory once per node, if its dtype is model.dtype.
    """

    actors: PositiveInt | None = Field(
        None,
        description="Number of actors. Unset: as many as fit. On an existing cluster, actors that do not fit yet start "
        "when nodes join.",
        json_schema_extra=COMMON,
    )
    gpus_per_actor: NonNegativeFloat | None = Field(
        None,
        description="GPUs per actor. Unset: one if the cluster has any, else none. With several, the model's layers "
        "are spread over them, for models that do not fit on one.",
        json_schema_extra=COMMON,
    )

    max_bad_nodes: NonNegativeInt | None = Field(
        None,
        description="A node that cannot load the model is set aside, and its work goes elsewhere. The run ends if "
        "there are more such nodes than this. Unset: when no node is left.",
    )

    @field_validator("gpus_per_actor")
    @classmethod
    def _whole_gpus(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(
                "ray.gpus_per_actor: expected at most 1 (actors can share one GPU), or a whole number of GPUs"
            )
        return gpus
