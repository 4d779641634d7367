"""Paths in settings, for workers that have a working directory of their own."""

from pathlib import Path
from typing import Any, TypeVar

from mrd_ray.config.base import Frozen

C = TypeVar("C", bound=Frozen)
# settings that may name a file or folder
NAMES_OF_PATHS = {"path", "base", "tokenizer", "dir", "reference", "corpus", "refusals", "config"}
NAMES_OF_PATHS |= {"embedding_model", "toxicity_model", "zero_shot_tasks"}


def with_absolute_paths(config: C) -> C:
    """The same settings, with what is a file or folder here, or is to be one (`dir`), by its absolute path."""

    def absolute(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: absolute(of, str(key)) for key, of in value.items()}
        if isinstance(value, list | tuple):
            return [absolute(of, name) for of in value]
        if isinstance(value, str) and name in NAMES_OF_PATHS and "://" not in value:
            there = Path(value).expanduser()
            return str(there.absolute()) if there.exists() or name == "dir" else value
        return value

    return type(config)(**absolute(config.model_dump(exclude_unset=True)))
