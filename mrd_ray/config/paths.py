"""Paths in settings, for workers that have a working directory of their own."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from mrd_ray.config.base import Frozen, NamesFile, SettingsOf

C = TypeVar("C", bound=Frozen)


def with_absolute_paths(config: C) -> C:
    """The same settings, with what is a file or folder here, or is to be one (`dir`), by its absolute path."""

    def absolute(path: str, mark: NamesFile, _name: str) -> str:
        if "://" in path:
            return path
        there = Path(path).expanduser()
        return str(there.absolute()) if there.exists() or mark.created else path

    return type(config)(**with_paths(type(config), config.model_dump(exclude_unset=True), absolute))


def with_paths(kind: Any, value: Any, change: Callable[[str, NamesFile, str], str], name: str = "") -> Any:
    """A value, with each text in it changed that may name a file or folder by its type.

    Args:
        kind: the value's type: a config class, for its settings as a mapping, or what a field is annotated with.
        value: the value, which need not be valid.
        change: takes the text, its mark and the name of its setting.
        name: of the setting that the value is of.
    """
    if isinstance(value, Mapping):
        fields = {key: one for config in _configs(kind) for key, one in _fields(config).items()}
        of_any = [part for part in _parts(kind) if get_origin(part) is dict]
        kinds = {key: fields.get(key, get_args(of_any[0])[1] if of_any else None) for key in value}
        return {key: with_paths(kinds[key], one, change, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [with_paths(kind, one, change, name) for one in value]
    if isinstance(value, str) and (mark := path_mark(kind)):
        return change(value, mark, name)
    return value


def path_mark(kind: object) -> NamesFile | None:
    """How a type is marked whose texts, alone or in a list, may name files or folders; None if it is not."""
    return next((part for part in _parts(kind) if isinstance(part, NamesFile)), None)


@lru_cache
def _fields(config: type[BaseModel]) -> dict[str, object]:
    hints = get_type_hints(config, include_extras=True)
    return {name: hints[name] for name in config.model_fields}


def _configs(kind: object) -> list[type[BaseModel]]:
    marked = [part.config for part in _parts(kind) if isinstance(part, SettingsOf)]
    return marked + [part for part in _parts(kind) if isinstance(part, type) and issubclass(part, BaseModel)]


def _parts(kind: Any) -> list[Any]:
    """A type, what it is marked with, and those that it is a union or a list of."""
    if get_origin(kind) is dict or isinstance(kind, type) or kind is None:
        return [kind]
    marks = kind.__metadata__ if get_origin(kind) is Annotated else ()
    inner = get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind)
    return [kind, *marks, *(part for one in inner for part in _parts(one))]
