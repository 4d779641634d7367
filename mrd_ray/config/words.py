"""Settings in people's words: the type of each, its default, and what is wrong with a value."""

import difflib
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mrd_ray.config.credentials import refuse_credentials

_BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}
_WORDS: dict[object, str] = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "unset"}


def kind(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type as people write it.

    >>> kind(Literal["mrd", "uniform"])
    'one of mrd, uniform'
    >>> kind(tuple[int, ...] | None)
    'list: integer, or unset'
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return kind(parts[0], [*annotation.__metadata__, *metadata])
    if origin is Literal:
        words = [str(part).lower() if isinstance(part, bool) else str(part) for part in parts]
        return words[0] if len(words) == 1 else "one of " + ", ".join(words)
    if origin in (Union, types.UnionType):
        kinds = [kind(part, metadata) for part in parts if part is not type(None)]
        return ", or ".join([*dict.fromkeys(kinds), *(["unset"] if type(None) in parts else [])])
    if origin is tuple:
        return "list: " + kind(parts[0])
    if origin is dict:
        return "mapping to: " + kind(parts[1])
    if is_section(annotation):
        return "settings of " + annotation.__name__.removesuffix("Settings")
    bounds = [
        words.format(f"{bound:,}")
        for name, words in _BOUNDS.items()
        for one in metadata
        if (bound := getattr(one, name, None)) is not None
    ]
    word = _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
    return " ".join([word, " and ".join(bounds)]).strip()


def kind_of(field: FieldInfo) -> str:
    """The type of a setting."""
    return kind(field.annotation, field.metadata)


def default_of(field: FieldInfo) -> str:
    """The default of a setting as people write it: `required`, `unset`, `none` of a list, or the value."""
    if field.is_required():
        return "required"
    return _written(field.get_default(call_default_factory=True, validated_data={}))


def default_in(section: BaseModel | None, name: str, field: FieldInfo) -> str:
    """The default of a setting in a section's own default, which may differ from the class's."""
    if section is None or field.is_required():
        return default_of(field)
    value: Any = section
    for part in name.split("."):
        value = None if value is None else getattr(value, part)
    return _written(value)


def _written(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | dict):
        return f"[{', '.join(map(str, value))}]" if value else "none"
    return repr(value) if value == "" else str(value).replace("\n", "\\n")


def is_section(annotation: Any) -> bool:
    """Whether a type is that of settings with names of their own."""
    return inspect.isclass(annotation) and issubclass(annotation, BaseModel)


def known_part(annotation: Any) -> Any:
    """A type without its marks, and without None if one other type is left."""
    while hasattr(annotation, "__metadata__"):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        others = [part for part in get_args(annotation) if part is not type(None)]
        if len(others) == 1:
            return known_part(others[0])
    return annotation


def leaves(fields: Mapping[str, FieldInfo], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Settings by their whole names (scoring.sigma), those of sections among them."""
    for name, field in fields.items():
        inner = known_part(field.annotation)
        if is_section(inner):
            yield from leaves(inner.model_fields, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def sections(fields: Mapping[str, FieldInfo], prefix: str = "") -> dict[str, FieldInfo]:
    """Sections by their whole names, those within others among them."""
    found: dict[str, FieldInfo] = {}
    for name, field in fields.items():
        inner = known_part(field.annotation)
        if is_section(inner):
            found |= {f"{prefix}{name}": field} | sections(inner.model_fields, f"{prefix}{name}.")
    return found


def problems(config: type[BaseModel], error: ValidationError) -> list[str]:
    """What is wrong with settings of this class, a sentence for each. Raises UserError if a value holds credentials."""
    found: dict[str, str] = {}
    for one in error.errors(include_url=False):
        name, sentence = _problem(config, one)
        found.setdefault(name or sentence, sentence)  # of a setting with several types, each complains
    return list(found.values())


def _problem(config: type[BaseModel], error: Any) -> tuple[str, str]:
    """The name of the setting, and the sentence about it."""
    annotation: Any = config
    metadata: list[Any] = []
    names: list[str] = []
    for part in error["loc"]:
        annotation = known_part(annotation)
        if is_section(annotation):
            names.append(str(part))
            if part not in annotation.model_fields:
                return ".".join(names), _unknown(names, annotation.model_fields)
            annotation, metadata = annotation.model_fields[part].annotation, annotation.model_fields[part].metadata
        elif get_origin(annotation) is dict:
            names.append(str(part))
            annotation, metadata = get_args(annotation)[1], []
        elif get_origin(annotation) is tuple:
            annotation, metadata = get_args(annotation)[0], []
        else:  # which of several types was tried
            break
    name = ".".join(names)
    if error["type"] == "value_error":  # in our own words, which name the setting
        return "", _in_place(names, annotation, str(error["ctx"]["error"]))
    if error["type"] == "missing":
        return name, f"{name} is required"
    expected = "settings by name" if is_section(known_part(annotation)) else kind(annotation, metadata)
    refuse_credentials(name, error["input"])  # before the value is shown
    where = f"{name}: " if name else ""
    return name, f"{where}expected {expected}, not {_shown(error['input'])}"


def _in_place(names: list[str], annotation: Any, sentence: str) -> str:
    """A sentence of ours, with the whole name of the setting, of which it may hold a part or nothing."""
    if not names or sentence.startswith(names[0]):
        return sentence
    section = known_part(annotation)
    about = sentence.partition(":")[0].partition(" ")[0]
    joined = "." if is_section(section) and about in section.model_fields else ": "
    return f"{'.'.join(names)}{joined}{sentence}"


def _unknown(names: list[str], known: Iterable[str]) -> str:
    close = difflib.get_close_matches(names[-1], list(known), 1, 0.75)
    meant = f"; did you mean {'.'.join([*names[:-1], *close])}?" if close else ""
    return f"{'.'.join(names)}: there is no such setting{meant}"


def _shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else "unset" if value is None else str(value)
    if isinstance(value, str):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
