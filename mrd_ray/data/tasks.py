"""Tasks: YAML files with a forget set, a retain set, evaluated sets and the paper's settings."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub import HfApi
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, field_validator

from mrd_ray.config import (
    DataSettings,
    EvaluationSettings,
    RetainSettings,
    ScoringSettings,
    UnlearningSettings,
    document,
)
from mrd_ray.config.base import Frozen, NamesFile, SettingsOf
from mrd_ray.config.paths import with_paths
from mrd_ray.config.words import problems
from mrd_ray.data.formats import ending
from mrd_ray.errors import UserError
from mrd_ray.models import foreign
from mrd_ray.runs import storage

_HUB_SECONDS = 5.0
PRESETS = Path(__file__).parent / "presets"


def _files_are_text(settings: dict[str, Any]) -> dict[str, Any]:
    for name in ("path", "refusals"):
        if not isinstance(settings.get(name), str | None):
            raise ValueError(f"{name} is {settings[name]!r}; expected text")
    return settings


_FilesAreText = AfterValidator(_files_are_text)
_Unlearning = Annotated[dict[str, Any], SettingsOf(UnlearningSettings), _FilesAreText]


class Task(Frozen):
    """A task file. Its sections are settings of `score`, `unlearn` and `evaluate`; each command uses its own."""

    model_config = ConfigDict(extra="forbid")

    description: str = Field("", description="What the task is, in one line.")
    copies: dict[str, str] = Field(
        {},
        description="By hub id, the file name pattern of a local copy, with {name} and {split}.",
    )
    data: Annotated[dict[str, Any], SettingsOf(DataSettings), _FilesAreText] = Field({}, description="The forget set.")
    retain: Annotated[dict[str, Any], SettingsOf(RetainSettings), _FilesAreText] = Field(
        {}, description="The retain set."
    )
    scoring: Annotated[dict[str, Any], SettingsOf(ScoringSettings)] = Field({}, description="Settings of scoring.")
    unlearning: _Unlearning = Field({}, description="Settings of unlearning.")
    methods: dict[str, _Unlearning] = Field({}, description="More settings of unlearning, by method.")
    evaluation: Annotated[dict[str, Any], SettingsOf(EvaluationSettings)] = Field(
        {}, description="Evaluated sets and settings of evaluation."
    )

    @field_validator("copies")
    @classmethod
    def _copies_have_known_fields(cls, copies: dict[str, str]) -> dict[str, str]:
        for pattern in copies.values():
            try:
                pattern.format(name="", split="")
            except (LookupError, ValueError, AttributeError):
                raise ValueError(f"{pattern!r} is not a format string with only {{name}} and {{split}}") from None
        return copies


def names() -> list[str]:
    """The tasks that come with the package."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def load(task: str, copies: Mapping[str, str], method: str | None = None) -> dict[str, Any]:
    """Settings by section: data, retain, scoring, unlearning, methods (unlearning settings by method), evaluation.

    Args:
        task: one of `names`, or a YAML file.
        copies: by hub id, the folder of a local copy to read instead.
        method: the unlearning method, if not the task's own.

    Raises:
        UserError: no such task, or it has unknown settings.
    """
    file, read = _read(task)
    if unknown := copies.keys() - read.copies.keys():
        raise UserError(
            f"task_data: the task does not read {min(unknown)!r}; it reads {', '.join(read.copies) or 'no hub id'}"
        )
    return _sections(file, read, copies, method)


def _sections(file: Path, read: Task, copies: Mapping[str, str], method: str | None) -> dict[str, Any]:
    method = method or read.unlearning.get("method")
    methods = {name: dict(settings) for name, settings in read.methods.items()}
    unlearning = dict(read.unlearning)
    unlearning |= methods.get(str(method), {})
    if method is not None:
        unlearning["method"] = method
    sections = {
        "data": read.data,
        "retain": read.retain,
        "scoring": read.scoring,
        "unlearning": unlearning,
        "methods": methods,
        "evaluation": read.evaluation,
    }
    sections = _located({name: section for name, section in sections.items() if section}, file)
    for _, source in _sources(sections):
        _use_copy(source, read.copies, copies)
    return sections


def _located(sections: dict[str, Any], file: Path) -> dict[str, Any]:
    """A task's settings, with paths relative to the task's folder. Raises UserError if one is outside it."""

    def beside(path: str, _mark: NamesFile, name: str) -> str:
        said = f"task: {file}, {name},"
        if name == "zero_shot_tasks":
            raise UserError(
                f"{said} is {path!r}, whose files can run code; set it yourself, as evaluation.zero_shot_tasks"
            )
        there = foreign.below(said, file.parent, path)
        if there.exists() or ending(path) or not foreign.is_hub_id(path):
            return str(there)
        if Path(path).exists():
            raise UserError(
                f"{said} is {path!r}, which could be a name on the hub, and is also a folder here, but not next "
                "to the task; move the folder there, or give it on the command line"
            )
        return path

    located: dict[str, Any] = with_paths(Task, sections, beside)
    return located


@dataclass(frozen=True)
class Source:
    """A set of a task. problem: why it cannot be read from here, or None if it can."""

    name: str
    path: str
    problem: str | None


def sources(task: str, copies: Mapping[str, str]) -> tuple[str, list[Source]]:
    """A task's description and its sets, each checked for access to its file or hub data set. Copies as for `load`.

    Raises UserError like `load`, except for copies that the task does not read.
    """
    file, read = _read(task)
    sections = _sections(file, read, copies, None)
    found = []
    for name, source in _sources(sections):
        where = " ".join(filter(None, [source["path"], source.get("name")]))
        found.append(Source({"data": "forget set"}.get(name, name), where, _problem(source["path"])))
    return read.description, found


def _problem(path: str) -> str | None:
    if ending(path) is not None:
        filesystem, name = storage.filesystem(os.path.expanduser(path))
        return None if filesystem.exists(name) else "no such file"
    if Path(path).expanduser().is_dir():
        return None
    try:
        HfApi().dataset_info(path, timeout=_HUB_SECONDS)
    except Exception as problem:  # no network, no such dataset, no access: each library layer has its own exceptions
        return (str(problem).splitlines() or [type(problem).__name__])[0]
    return None


def _read(task: str) -> tuple[Path, Task]:
    file = PRESETS / f"{task}.yaml" if task in names() else Path(task).expanduser()
    try:
        content = document.load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"task: {task} is neither one of {', '.join(names())} nor a file") from None
    except (OSError, ValueError) as problem:
        raise UserError(f"task: cannot read {file}: {problem}") from None
    try:
        read = Task.model_validate(content)
        if read.evaluation:
            EvaluationSettings.model_validate(read.evaluation)
    except ValidationError as problem:
        kind = Task if problem.title == Task.__name__ else EvaluationSettings
        raise UserError(f"task: {file}: {'; '.join(problems(kind, problem))}") from None
    return file, read


def _sources(sections: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every set of a task, by name or role, except those whose path the command line must give."""
    yield from ((name, sections[name]) for name in ("data", "retain") if sections.get(name, {}).get("path"))
    yield from sections.get("evaluation", {}).get("sets", {}).items()


def _use_copy(source: dict[str, Any], patterns: Mapping[str, str], copies: Mapping[str, str]) -> None:
    """Make `source` read the local copy of its hub dataset, if there is one."""
    if (folder := copies.get(source["path"])) is None:
        return
    pattern = patterns[source["path"]]
    file = Path(folder).expanduser() / pattern.format(name=source.get("name", ""), split=source.get("split", "train"))
    if (
        not file.exists() and (Path(folder).expanduser() / "README.md").is_file()
    ):  # a clone, whose README says where the parts are
        source["path"] = folder
        return
    source["path"] = str(file)
    source.pop("name", None)
    source.pop("split", None)
