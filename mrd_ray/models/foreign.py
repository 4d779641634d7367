"""Limits what the files of other people may name: something below their own folder, or a hub id.

Models, adapters, tokenizers, data sets and tasks are made by others. If a name in such a file were followed without
limits, it could send credentials to a host of their choice, copy files from outside, or reach file systems that run
code.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mrd_ray.errors import UserError
from mrd_ray.runs import storage

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_MAX_JSON = 64 << 20  # bytes; the settings of large vocabularies have several MiB


def is_hub_id(name: str) -> bool:
    """Whether this could be a model or data set of the hub."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name


def refuse_address(said: str, name: object) -> str:
    """Return the name. Raises UserError if it is not text, or has a protocol.

    said: where the name appears, for messages: for example a setting, a file and a key in it.
    """
    if not isinstance(name, str) or "\0" in name:
        raise UserError(f"{said} is {name!r:.80}; expected text")
    if "://" in name or "::" in name:
        raise UserError(
            f"{said} is {name!r:.200}, an address. What a file names must be below its own folder, or a hub id; if you "
            "trust it, copy it there, or name it in the settings"
        )
    return name


def below(said: str, folder: Path, name: object) -> Path:
    """The path that a file in `folder` names. Raises UserError if it is not below `folder`. said: as above."""
    given = refuse_address(said, name)
    path = Path(os.path.normpath(folder / os.path.expanduser(given)))
    if not path.absolute().is_relative_to(os.path.normpath(folder.absolute())):
        raise UserError(
            f"{said} is {given!r:.200}, which is not below {folder}. What a file names must be there, or a hub id; if "
            "you trust it, copy it there, or name it in the settings"
        )
    return path


def read_json(setting: str, file: Path | str) -> dict[str, Any]:
    """The object in a JSON file or URI. Raises UserError, which names the setting, if it holds something else."""
    found = read_any_json(setting, file)
    if not isinstance(found, dict):
        raise UserError(f"{setting}: {file} holds {type(found).__name__}; expected a JSON object")
    return found


def read_any_json(setting: str, file: Path | str) -> Any:
    """The value in a JSON file or URI. Raises UserError, which names the setting, if it is not JSON."""
    try:
        with storage.open_file(str(file)) as opened:
            content = opened.read(_MAX_JSON + 1)
        if len(content) > _MAX_JSON:
            raise ValueError(f"it has over {_MAX_JSON >> 20} MiB")
        return json.loads(content.decode())
    except (OSError, ValueError, RecursionError) as problem:
        reason = type(problem).__name__ if isinstance(problem, RecursionError) else problem
        raise UserError(f"{setting}: cannot read {file} as JSON: {reason}; copy it again") from None


def values(of: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key and value at any depth, except objects and lists themselves; values in a list have its key."""
    waiting = [(key, of)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(str(name), one) for name, one in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(key, one) for one in value]
        else:
            yield key, value


def refuse_code_elsewhere(setting: str, file: Path, auto_map: object) -> None:
    """Raises UserError if a class comes from another repository, whose code could differ between nodes."""
    for _, reference in values(auto_map):
        if "--" in str(reference):
            raise UserError(
                f"{setting}: {file} takes code from another repository ({reference}), which no digest of this "
                "model covers; copy the .py files next to this file, and remove the part up to -- in it"
            )


def is_plain_name(name: object) -> bool:
    """Whether this is only the name of a file, without a path to another folder."""
    return isinstance(name, str) and PurePosixPath(name).name == name and "\\" not in name and name not in ("", "..")
