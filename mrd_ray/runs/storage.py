"""Files at local paths and URIs. Credentials come only from the environment (AWS_..., GOOGLE_..., ~/.aws)."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem

from mrd_ray.errors import UserError

CACHE = Path("~/.cache/mrd_ray").expanduser()
_PASSING = {
    getattr(errno, name)
    for name in (
        "ETIMEDOUT", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EHOSTUNREACH", "EHOSTDOWN", "ENETUNREACH",
        "ENETDOWN", "ENOTCONN", "EPIPE", "ESTALE", "EIO", "EREMOTEIO", "EAGAIN", "EBUSY",
    )
}  # fmt: skip
_SAID_PASSING = re.compile(  # in Arrow's messages about AWS, curl and Google, whose errors have no numbers
    r"HTTP status (429|5\d\d)|NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT|THROTTL"
    r"|curlCode: (5|6|7|18|28|35|52|55|56)\b|\bUNAVAILABLE\b|DEADLINE_EXCEEDED|[Tt]imed out|onnection (refused|reset)"
)
_LFS = b"version https://git-lfs.github.com/spec/"
_OF_ARROW = ("s3", "gs", "gcs", "hdfs")  # read by Arrow, as in Ray Train, which stores checkpoints in the run directory


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a local path or URI, and the path in it.

    Raises ImportError, ValueError or OSError: no such protocol, its package is missing, or it cannot be reached.
    """
    scheme = uri.split("://")[0] if "://" in uri else ""
    if scheme not in _OF_ARROW:
        found: tuple[fsspec.AbstractFileSystem, str] = fsspec.core.url_to_fs(uri)
        return found
    arrow, root = pyarrow.fs.FileSystem.from_uri(for_arrow(uri))
    return ArrowFSWrapper(arrow), root.rstrip("/")


def may_pass(problem: OSError) -> bool:
    """Whether a file system's error may be temporary: no answer or an internal failure, but not a refusal."""
    if isinstance(problem, TimeoutError) or problem.errno in _PASSING:
        return True
    return _SAID_PASSING.search(str(problem)) is not None


def refuse_lfs_pointer(setting: str, path: str | Path, head: bytes) -> None:
    """Raises UserError, which names the setting, if a file is a Git LFS pointer. head: its first bytes, 64 or more."""
    if head.startswith(_LFS):
        raise UserError(
            f"{setting}: {path} is a Git LFS pointer, not the file itself: the repository was cloned without its large "
            "files. Run `git lfs install` and `git lfs pull` in the clone"
        )


def for_arrow(uri: str) -> str:
    """The URI as pyarrow and Ray Train expect it, with spaces and the like quoted. Local paths are unchanged."""
    return urllib.parse.quote(uri, safe=":/?=&%") if uri.split("://")[0] in _OF_ARROW else uri


def open_file(uri: str, mode: str = "rb", **options: Any) -> Any:
    """An open file at a local path or URI. Raises like `filesystem`, and OSError."""
    fs, path = filesystem(uri)
    return fs.open(path, mode, **options)


def make_private(folder: Path) -> None:
    """Make a local folder and any missing parents, readable only by their owner. Raises OSError."""
    for missing in [above for above in (folder, *folder.parents) if not above.exists()][::-1]:
        missing.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(exist_ok=True)  # FileExistsError if it is a file


def remove(path: Path) -> None:
    """Remove a local file, folder or link if it is there, never the target of a link. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_file(target: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a local file whole or not at all; a link at its temporary name is not followed. Raises OSError."""
    partial = target.with_name(f"{target.name}.tmp")
    remove(partial)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def write_private(uri: str, content: bytes) -> None:
    """Write a file that only its owner can read, if the storage supports that. Raises like `open_file`."""
    fs, path = filesystem(uri)
    file = Path(path)
    if isinstance(fs, LocalFileSystem) and not file.is_symlink() and (file.is_file() or not file.exists()):
        replace_file(file, content, 0o600)
        return
    with fs.open(path, "wb") as opened:  # for example /dev/stdout
        opened.write(content)


def _lasting(info: dict[str, object]) -> dict[str, object]:
    """The information without access times, which sftp calls `time`."""
    return {name: value for name, value in info.items() if name != "time" and "access" not in name}


def local_folder(uri: str) -> Path:
    """A copy of the folder at `uri` on this machine, made once and reused while the folder does not change.

    Raises like `filesystem`, FileNotFoundError if nothing is there, and ValueError if a file would be put outside.
    """
    fs, root = filesystem(uri)
    files = sorted(fs.find(root))
    if not files:
        raise FileNotFoundError(f"{uri} holds no files")
    # everything the file system reports: some show a change by a time, some by a tag
    state = [uri, *(f"{file} {sorted(map(str, _lasting(fs.info(file)).items()))}" for file in files)]
    copy = CACHE / "copies" / hashlib.sha256("\n".join(state).encode()).hexdigest()[:16]
    if copy.is_dir():
        return copy
    make_private(copy.parent)
    partial = Path(tempfile.mkdtemp(prefix=f"{copy.name}-", dir=copy.parent))  # several processes may copy at once
    try:
        for file in files:
            target = partial / os.path.relpath(file, root)
            if ".." in target.parts:
                raise ValueError(f"it holds {file}, which would be written outside its copy")
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(file, str(target))
        try:
            partial.rename(copy)
        except OSError:  # another process was faster
            if not copy.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return copy
