"""A run directory: what its run computes, who holds it, and files that are complete or absent."""

import contextlib
import json
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, TypeAdapter, ValidationError

from mrd_ray.config import RunSettings
from mrd_ray.config.credentials import recordable
from mrd_ray.errors import SettingsError, UserError
from mrd_ray.runs import meter, storage

T = TypeVar("T")
_LONGEST_PAUSE = 15.0  # seconds between two attempts
_PACKAGES = (
    "mrd-ray",
    "ray",
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "numpy",
    "pyarrow",
)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # an extra that is not installed
        return None


class Identified(BaseModel):
    """The part of a manifest that identifies what its run computes."""

    identity: dict[str, Any]


class Manifest(Identified):
    """What every manifest has."""

    invocations: list[dict[str, Any]]


PROGRESS, EVENTS, TRACEBACK = "progress.json", "events.jsonl", "traceback.txt"
_OF_JOB = "/runtime_resources/working_dir_files/"  # in the path of a job's working directory
REMAKE = "delete it and run the same command again"


def refuse_other_shape(where: str, shape: Any, content: Any, remedy: str = REMAKE) -> None:
    """Raises UserError if a file's content does not have this shape, a type that pydantic knows."""
    try:
        TypeAdapter(shape).validate_python(content)
    except ValidationError as problem:
        first = problem.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{where} is damaged ({place}{': ' if place else ''}{first['msg']}); {remedy}") from None


def parsed_json(where: str, content: bytes, shape: Any, remedy: str = REMAKE) -> Any:
    """The value in a JSON file. Raises UserError if it does not have this shape (see `refuse_other_shape`)."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{where} is damaged ({problem}); {remedy}") from None
    refuse_other_shape(where, shape, found, remedy)
    return found


def _alike(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether the types are equal, except for offset widths: older files with narrow offsets can be read."""
    if pa.types.is_large_list(expected) and pa.types.is_list(found):
        return _alike(found.value_type, expected.value_type)
    return bool(found == expected or (pa.types.is_large_string(expected) and pa.types.is_string(found)))


def parsed_table(
    where: str, content: bytes, schema: pa.Schema, required: Collection[str] | None = None, remedy: str = REMAKE
) -> pa.Table:
    """The table of a Parquet file, which may have more columns than the schema.

    required: columns that it must have, or None for all. Other columns of the schema may be absent but not wrong.

    Raises UserError if the file is incomplete, or a column is missing, has another type, or has nulls that the schema
    does not allow.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read()
        table.validate(full=True)  # finds for example text that is not UTF-8
    except (OSError, ValueError, pa.ArrowException) as problem:
        raise UserError(f"{where} is damaged ({problem}); {remedy}") from None
    for field in schema:
        found = table.schema.get_all_field_indices(field.name)
        if not found and required is not None and field.name not in required:
            continue
        column = table.column(found[0]) if found else None
        if column is None:
            wrong = f"no column {field.name}"
        elif len(found) > 1:
            wrong = f"{len(found)} columns {field.name}"
        elif not _alike(column.type, field.type):
            wrong = f"column {field.name} is {column.type}, not {field.type}"
        elif column.null_count and not field.nullable:
            wrong = f"column {field.name} has nulls"
        else:
            continue
        raise UserError(f"{where} is damaged ({wrong}); {remedy}")
    return table


class RunDirectory:
    """The files of one run under a local path or URI. Only the driver writes to it.

    New local directories, parents included, are readable only by their owner; existing ones keep their mode.
    """

    def __init__(self, uri: str, setting: str = "run.dir", make: bool = True, patience: float = 0.0) -> None:
        """Raises UserError if it cannot be opened.

        Args:
            setting: the setting that names it, for errors.
            make: whether to make it if it is not there.
            patience: seconds for which attempts are repeated after errors that may be temporary.
        """
        self.uri, self._patience = uri, patience
        self._waiting: float | None = None  # since when the storage has not answered
        if "://" in uri and ("?" in uri or "#" in uri):
            raise SettingsError(
                f"{setting}: {uri} has a part after ? or #, which cannot apply to the files in it; set its values in "
                "the environment instead: AWS_REGION, AWS_ENDPOINT_URL"
            )
        if make and "://" not in uri and _OF_JOB in str(Path(uri).expanduser().absolute()):
            raise SettingsError(
                f"{setting}: {uri} would be in the job's copy of the working directory, which Ray deletes; name an "
                "absolute path on storage that outlives the job, or a URI"
            )
        try:
            self._fs, self._root = storage.filesystem(uri)
            if self._fs.isfile(self._root):
                raise UserError(f"{setting}: {uri} is a file; expected a directory, or a path where one can be made")
            if not make:
                return
            self._writing("", self._make)
        except (ImportError, ValueError) as problem:
            raise UserError(f"{setting}: cannot open {uri}: {problem}") from None

    def _make(self) -> None:
        if isinstance(self._fs, LocalFileSystem):  # what should be forgotten is private
            storage.make_private(Path(self._root))
        else:
            self._fs.makedirs(self._root, exist_ok=True)

    @classmethod
    def of(cls, config: RunSettings) -> "RunDirectory":
        """The directory that the settings name. Raises UserError if it cannot be opened."""
        return cls(config.dir, patience=config.storage_patience)

    @staticmethod
    def is_one(uri: str) -> bool:
        """Whether a run has claimed it. Raises ImportError, ValueError or OSError if that cannot be determined."""
        fs, root = storage.filesystem(uri)
        return bool(fs.exists(f"{root}/manifest.json"))

    @classmethod
    def existing(cls, uri: str, setting: str) -> "RunDirectory":
        """A directory that is a run directory already; it is never made. Raises UserError, which names the setting."""
        run = cls(uri, setting, make=False)  # also, a reader may lack the permission
        if not run.exists("manifest.json"):
            raise UserError(
                f"{setting}: {uri} is not a run directory: no manifest.json in it. Name a directory that mrd-ray "
                "score, unlearn or evaluate has written to (its run.dir)"
            )
        return run

    def path(self, name: str) -> str:
        """The full path of a file of this run, in the form of its file system."""
        return f"{self._root}/{name}" if name else self._root

    @property
    def locks(self) -> bool:
        """Whether the storage has file locks, so that `locked` keeps others out."""
        return isinstance(self._fs, LocalFileSystem)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory; a second run in it is refused. The lock ends with the process, however that ends.

        Only local and shared POSIX file systems can lock. For object stores see `runs.hold`.
        """
        if not self.locks:
            yield
            return
        lock = FileLock(self.path(".lock"), blocking=False)

        def taken() -> None:
            try:
                lock.acquire()
            except Timeout:  # Timeout is an OSError, too
                raise UserError(
                    f"run.dir: another run is working in {self.uri}; wait for it, or use another directory"
                ) from None

        self._writing(".lock", taken)
        try:
            yield
        finally:
            lock.release()

    def exists(self, name: str) -> bool:
        """Whether the file is there, complete. Raises UserError if that cannot be determined."""
        return bool(self._reading(name, lambda: self._fs.exists(self.path(name))))

    def names(self, folder: str) -> list[str]:
        """Sorted names of the finished files in a folder. Raises UserError if it cannot be read."""

        def listed() -> list[str]:
            self._fs.invalidate_cache()
            try:
                found: list[str] = self._fs.ls(self.path(folder), detail=False)
            except FileNotFoundError:  # object stores have no empty folders
                return []
            return found

        files = self._reading(folder, listed)
        names = (file.rsplit("/", 1)[-1] for file in files)
        return sorted(name for name in names if not name.endswith(".tmp") and not name.startswith("."))

    def write(self, name: str, content: bytes, patiently: bool = True, mode: int = 0o666) -> None:
        """Write a file completely or not at all: a kill at any moment leaves the old one. Raises UserError.

        mode: permissions of a local file, limited further by the umask.
        """
        target = self.path(name)

        def written() -> None:
            if "/" in name:
                self._fs.makedirs(self.path(name.rsplit("/", 1)[0]), exist_ok=True)
            if not isinstance(self._fs, LocalFileSystem):
                self._fs.pipe_file(target, content)  # object stores publish an object once it is complete
                return
            storage.replace_file(Path(target), content, mode)

        self._writing(name, written, patiently)

    def put(self, name: str, folder: Path) -> None:
        """Replace `name` by a copy of a local folder. On local storage, only a complete copy takes its place."""
        target = self.path(name)

        def copied() -> None:
            if isinstance(self._fs, LocalFileSystem):
                storage.remove(Path(f"{target}.tmp"))
                shutil.copytree(folder, f"{target}.tmp")
                shutil.rmtree(target, ignore_errors=True)
                Path(f"{target}.tmp").replace(target)
                return
            # file by file: fsspec takes brackets in folder names for patterns, and object stores cannot rename
            for old in self._fs.find(target):
                self._fs.rm_file(old)
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                destination = f"{target}/{file.relative_to(folder).as_posix()}"
                self._fs.makedirs(destination.rsplit("/", 1)[0], exist_ok=True)
                self._fs.put_file(str(file), destination)

        self._writing(name, copied)

    def remove(self, folder: str) -> None:
        """Delete a folder or file of this run, if it is there."""
        if self.exists(folder):
            self._writing(folder, lambda: self._fs.rm(self.path(folder), recursive=True))

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises UserError if it is missing or cannot be read."""
        content: bytes = self._reading(name, lambda: self._fs.cat_file(self.path(name)))
        return content

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a table as Parquet, completely or not at all."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, write_page_checksum=True)
        self.write(name, sink.getvalue())

    def read_table(self, name: str, schema: pa.Schema, required: Collection[str] | None = None) -> pa.Table:
        """A table of this run. Raises UserError like `read` and `parsed_table`."""
        return parsed_table(self.path(name), self.read(name), schema, required)

    def read_json(self, name: str, shape: Any, remedy: str = REMAKE) -> Any:
        """The value of a JSON file of this run. Raises UserError like `read` and `parsed_json`."""
        return parsed_json(self.path(name), self.read(name), shape, remedy)

    def _reading(self, name: str, action: Callable[[], T]) -> T:
        try:
            return self._kept_at(name, action, self._patience)
        except OSError as problem:
            missing = isinstance(problem, FileNotFoundError)
            remedy = "run the command that writes it" if missing else "fix this and run the same command again"
            raise UserError(f"cannot read {self.path(name)}: {problem.strerror or problem}; {remedy}") from None

    def _writing(self, name: str, action: Callable[[], T], patiently: bool = True) -> T:
        try:
            return self._kept_at(name, action, self._patience if patiently else 0.0)
        except OSError as problem:
            raise UserError(
                f"run.dir: cannot write {self.path(name)}: {problem.strerror or problem}. "
                "Existing files are intact. Fix this and run the same command again"
            ) from None

    def _kept_at(self, name: str, action: Callable[[], T], patience: float) -> T:
        """Repeat `action` after errors that may be temporary, with growing pauses. Raises OSError if that fails."""
        pause, began, console = 0.5, time.monotonic(), meter.console()
        while True:
            try:
                found = action()
            except OSError as problem:
                waited = time.monotonic() - began
                if waited >= patience or not storage.may_pass(problem):
                    raise
                if self._waiting is None:
                    self._waiting = began
                    reason = str(problem.strerror or problem).splitlines()[0]
                    say = f"{self.path(name)} cannot be reached ({reason}); trying again for up to {patience:.0f} s"
                    console.print(say, markup=False, soft_wrap=True)
                time.sleep(min(pause, patience - waited))
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            if self._waiting is not None:
                waited, self._waiting = time.monotonic() - self._waiting, None
                console.print(f"{self.uri} answers again, after {waited:.0f} s", markup=False, soft_wrap=True)
            return found

    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json, with the shape of `Manifest`. Raises UserError if it is damaged."""
        found: dict[str, Any] = self.read_json("manifest.json", Manifest, "use another directory")
        return found

    def record(self, key: str, value: Any) -> None:
        """Add a value to the manifest of a claimed directory."""
        self._write_manifest(self.manifest() | {key: value})

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        self.write("manifest.json", json.dumps(manifest, indent=2).encode())

    def claim(self, identity: dict[str, Any], config: BaseModel, owns: Sequence[str] = ()) -> None:
        """Claim the directory for runs with `identity`. Raises UserError if it belongs to another run.

        Args:
            identity: settings and digests by name: everything that results depend on, except what may grow.
            owns: files that such a run makes here and may replace. They must not be there without a manifest.
        """
        manifest: dict[str, Any] = {"run_id": uuid.uuid4().hex[:12], "identity": identity, "invocations": []}
        if not self.exists("manifest.json"):
            for name in ("config.yaml", PROGRESS, EVENTS, TRACEBACK, *owns):
                if self.exists(name):
                    raise UserError(
                        f"run.dir: {self.uri} holds {name} but no manifest.json that says which run it belongs to; use "
                        "another directory"
                    )
        if self.exists("manifest.json"):
            manifest |= self.manifest()
            differing = [
                f"  {key}: {was if key in manifest['identity'] else 'not recorded'} there, {now} now"
                for key in sorted(manifest["identity"].keys() | identity.keys())
                if (was := manifest["identity"].get(key)) != (now := identity.get(key))
            ]
            if differing:
                raise UserError(
                    "\n".join([f"run.dir: {self.uri} holds a run of something else. What differs:", *differing])
                    + "\nUse another directory, or the settings of its config.yaml."
                )
        manifest["invocations"].append(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "command": recordable(sys.argv),
                "versions": {package: _version(package) for package in _PACKAGES}
                | {"python": platform.python_version()},
                "hardware": {"platform": platform.platform(), "cpus": os.cpu_count()},
                "config": config.model_dump(),
            }
        )
        self._write_manifest(manifest)
        self.write("config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
