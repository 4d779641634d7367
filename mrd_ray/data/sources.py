"""Finds what data.path names: files (also by folder or pattern), a save_to_disk folder, or a dataset of the hub."""

import contextlib
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import yaml

from mrd_ray.config import DataSettings
from mrd_ray.data.files import Say, open_bytes
from mrd_ray.data.formats import ENDINGS, JSON, TEXT, ending
from mrd_ray.errors import UserError
from mrd_ray.models import foreign
from mrd_ray.runs import storage

CARDS = ("README.md", ".huggingface.yaml")  # where a data set lists its files, by configuration and split
_ABOUT = {"dataset_infos.json", "dataset_info.json", "state.json"}  # written by `datasets` next to the data
_LAYOUT = ("field", "column_names", "names", "header", "skiprows", "columns")  # settings of the builders in `datasets`
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ENDS = f"a file ending in {', '.join(ENDINGS)} (or one of these followed by .gz, .zst, .bz2 or .xz)"


@dataclass(frozen=True)
class File:
    """A file, its name among the others, and the columns that its folders name (`year=2024/`)."""

    path: str
    name: str
    columns: dict[str, str | None] = field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        """Whether it is plain text and not a table."""
        return ending(self.path) == TEXT


@dataclass(frozen=True)
class Saved:
    """A folder written by `datasets.Dataset.save_to_disk`."""

    path: str


@dataclass(frozen=True)
class Hub:
    """A dataset of the Hugging Face hub."""

    path: str


def find(data: DataSettings, split: str, say: Say) -> tuple[list[File] | Saved | Hub, bool]:
    """What to read, with files in the order of their rows, and whether `split` is already taken into account.

    Args:
        say: receives notices about files that are not read.

    Raises:
        UserError: there is no such file, or the folder has no such split.
    """
    paths = [data.path] if isinstance(data.path, str) else list(data.path)
    if len(paths) == 1:
        found, settled = _find(paths[0], data, split, say)
        if not isinstance(found, list):
            return found, settled
    else:
        several = [_find(path, data, split, say) for path in paths]
        if other := [path for path, (one, _) in zip(paths, several, strict=True) if not isinstance(one, list)]:
            raise UserError(
                f"data.path: {other[0]} cannot be one of several paths; expected files, folders of files or patterns"
            )
        found = [file for one, _ in several if isinstance(one, list) for file in one]
        settled = any(settled for _, settled in several)
    if len({file.is_text for file in found}) > 1:
        raise UserError(
            f"data.path: {data.path} names both .txt files and tables; give one kind, for example by a pattern"
        )
    return _with_names(found), settled


def _find(path: str, data: DataSettings, split: str, say: Say) -> tuple[list[File] | Saved | Hub, bool]:
    path = os.path.expanduser(path)
    try:
        fs, inner = storage.filesystem(path)
        is_file, is_folder = fs.isfile(inner), fs.isdir(inner)
        matching = [] if is_file or is_folder or not re.search(r"[*?\[]", path) else sorted(fs.glob(inner))
    except Exception as problem:  # unknown protocol, missing package, no access: each has its own exceptions
        raise UserError(f"data.path: cannot open {path}: {problem}") from problem
    if is_file:
        if given := [f"data.{name}" for name in ("name", "revision") if getattr(data, name) is not None]:
            raise UserError(f"{' and '.join(given)}: {path} is a file, which has none; leave it out")
        return [_file(path)], False
    if is_folder:
        return _folder(path, fs, inner, data, split, say)
    prefix = _scheme(path)
    if matching:
        ours = [name for name in matching if ending(name)]
        if not ours:
            raise UserError(f"data.path: {path} matches {matching[0]}; expected {_ENDS}")
        if left := [name for name in matching if name not in ours]:
            say(f"Not read: {_some(left)}; expected {_ENDS}")
        files: list[File] = []
        for name in ours:
            if fs.isfile(name):
                files.append(File(prefix + name, name))
                continue
            inside, _ = _folder(prefix + name, fs, name, data, split, say)  # Spark writes folders with such names
            if not isinstance(inside, list):
                raise UserError(f"data.path: {path} matches {name}, a folder of save_to_disk; give only that folder")
            files += inside
        return files, False
    if re.search(r"[*?\[]", path):
        raise UserError(f"data.path: no file matches {path}")
    if prefix:
        with open_bytes(path):  # raises with the storage's own reason: no such bucket, no access
            pass
    if prefix or ending(path) or path.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(path):
        raise UserError(f"data.path: no such file or folder: {path}")
    return Hub(path), True


def _scheme(path: str) -> str:
    """The beginning of a URI, which file systems omit from the names that they return."""
    return path.split("://")[0] + "://" if "://" in path else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _file(path: str) -> File:
    if ending(path) is None:
        raise UserError(f"data.path: {path} exists, but its name does not show its format; expected {_ENDS}")
    return File(path, path)


def _folder(
    path: str, fs: Any, inner: str, data: DataSettings, split: str, say: Say
) -> tuple[list[File] | Saved, bool]:
    names = {PurePosixPath(name).name for name in fs.ls(inner, detail=False)}
    if "dataset_dict.json" in names:
        splits = sorted(name for name in names if fs.isfile(f"{inner}/{name}/state.json"))
        _require(path, split, splits)
        return Saved(f"{path.rstrip('/')}/{split}"), True
    if {"state.json", "dataset_info.json"} <= names:
        return Saved(path), False
    prefix = _scheme(path)
    inside = [name for name in sorted(fs.find(inner)) if not _is_hidden(os.path.relpath(name, inner))]
    ours = [name for name in inside if ending(name) and PurePosixPath(name).name not in _ABOUT]
    if not ours:
        raise UserError(f"data.path: the folder {path} holds no data: expected {_ENDS}")
    of_writer = ending(path) is not None or any("=" in os.path.relpath(name, inner) for name in ours)
    if prefix or of_writer:
        files = [File(prefix + name, name, _of_folders(os.path.relpath(name, inner))) for name in ours]
        return _of_one_format(path, files), False
    splits_of, left = _laid_out(path, data.name, ours)
    _require(path, split, list(splits_of))
    if left:
        say(f"Not read: {_some(left)}, whose names match no split")
    return _of_one_format(path, [_file(name) for name in splits_of[split]]), True


def _is_hidden(name: str) -> bool:
    """Files that writers leave next to the data: _SUCCESS, .part-0.crc, .git/."""
    return any(part.startswith((".", "_")) and "=" not in part for part in PurePosixPath(name).parts)


def _of_folders(name: str) -> dict[str, str | None]:
    """The columns in the folder names of a table with Hive partitions."""
    pairs = [part.split("=", 1) for part in PurePosixPath(name).parts[:-1] if "=" in part]
    return {
        column: None if value == "__HIVE_DEFAULT_PARTITION__" else urllib.parse.unquote(value)
        for column, value in pairs
    }


def _of_one_format(path: str, files: list[File]) -> list[File]:
    kinds = sorted({str(_family(file.path)) for file in files})
    if len(kinds) > 1:
        raise UserError(
            f"data.path: {path} holds files of several formats ({', '.join(kinds)}); give a pattern for one"
        )
    return files


def _laid_out(path: str, name: str | None, ours: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The files of each split of a local folder, as `datasets` assigns them, and the files that are in no split."""
    subfolder = Path(path) / name if name is not None else None
    refuse_wild_cards(f"data.path: {path}", {card: Path(path) / card for card in CARDS})
    try:
        with _quiet():
            builder = datasets.load_dataset_builder(path, name)
    except Exception as problem:
        if subfolder is not None and subfolder.is_dir():  # a copy of a data set without its README
            inside = [file for file in ours if Path(file).is_relative_to(subfolder.absolute())]
            return _laid_out(str(subfolder), None, inside)
        reason = " ".join(str(problem).split("Example of usage")[0].split())
        raise UserError(
            f"data.path: cannot tell which files of {path} to read (data.name={name}): {reason}"
        ) from problem
    for name in _LAYOUT:
        if (set_to := getattr(builder.config, name, None)) not in (None, "infer"):
            raise UserError(
                f"data.path: the README of {path} sets {name}: {set_to!r:.60}, which is not supported; name its files "
                "in data.path, in a form that docs/your-data.md shows"
            )
    found = {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    if unread := [file for files in found.values() for file in files if ending(file) is None]:
        raise UserError(f"data.path: {path} holds {unread[0]}; expected {_ENDS}")
    listed = {str(Path(file).absolute()) for files in found.values() for file in files}
    left = [] if _has_configs(path) else [file for file in ours if file not in listed]
    if odd := [file for file in left if _family(file) != _family(next(iter(listed)))]:
        raise UserError(
            f"data.path: {path} holds several formats, such as {sorted(listed)[0]} and {odd[0]}; give a pattern for one"
        )
    return found, left


def refuse_wild_cards(said: str, cards: Mapping[str, Path]) -> None:
    """Raises UserError if a data set's card names files outside its folder. said: names the data set in messages."""
    for card, file in cards.items():
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if card == "README.md":
            header = re.match(r"\s*---[ \t]*\r?\n(.*?)\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
            text = header.group(1) if header else ""
        try:
            settings = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as problem:
            reason = " ".join(str(problem).split())[:200]
            raise UserError(
                f"{said}: {card} is not valid YAML ({reason}); fix it, or name files in data.path"
            ) from None
        configs = settings.get("configs") if isinstance(settings, dict) else None
        for config in configs if isinstance(configs, list) else [configs]:
            of = config if isinstance(config, dict) else {}
            named = {key: of[key] for key in ("data_files", "data_dir") if of.get(key) is not None}
            for key, value in foreign.values(named):
                if key != "split":
                    foreign.below(f"{said}: {card}, {key},", file.parent, value)


def _has_configs(path: str) -> bool:
    readme = Path(path) / "README.md"
    return readme.is_file() and "configs:" in readme.read_text(encoding="utf-8", errors="replace")


def _family(path: str) -> str | None:
    """The format; all kinds of JSON count as one."""
    return JSON[0] if ending(path) in JSON else ending(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _require(path: str, split: str, splits: Iterable[str]) -> None:
    if split not in (splits := list(splits)):
        raise UserError(f"data.split: {split}, but {path} holds {', '.join(splits) or 'nothing'}; choose one of these")


def _with_names(files: list[File]) -> list[File]:
    """The files, each named by its path relative to their common folder."""
    if len(files) < 2 or any("://" in file.path for file in files):
        return files
    places = [Path(file.path).absolute() for file in files]
    common = os.path.commonpath([place.parent for place in places])
    return [
        File(file.path, str(place.relative_to(common)), file.columns) for file, place in zip(files, places, strict=True)
    ]
