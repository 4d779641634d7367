"""Which files a model is: found or fetched, refused where one could not answer for them, and digested."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mrd_ray import storage
from mrd_ray.config import ModelConfig
from mrd_ray.errors import UserError

SAFE, _PICKLED = "model.safetensors", "pytorch_model*.bin"
SAFE_ADAPTER = "adapter_model.safetensors"


def directory(model: ModelConfig) -> Path:
    """The local directory of the model, a copy if `model.path` is a hub id or URI. Raises UserError."""
    return fetch("model.path", model.path, model.revision)


def fetch(setting: str, path: str, revision: str | None = None) -> Path:
    """A local directory; a copy of what a URI or hub id names. Raises UserError, which names the setting."""
    if "://" in path:
        try:
            return storage.local_folder(path)
        except (ImportError, ValueError, OSError) as problem:
            raise UserError(f"{setting}: cannot copy {path} to this machine: {problem}") from None
    local = Path(os.path.expanduser(path))
    if local.is_dir():
        return local
    try:
        return Path(
            snapshot_download(path, revision=revision, ignore_patterns=["*.gguf", "*.onnx", "*.h5", "*.msgpack"])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as problem:
        reason = str(problem).splitlines()[0]
        raise UserError(
            f"{setting}: {path} is neither a directory here nor a model that the Hugging Face hub gives: {reason}"
        ) from None


def base_directory(path: Path) -> Path:
    """The directory of the model that an adapter in `path` is for; `path` itself if it holds a whole model.

    Raises UserError.
    """
    adapter = path / "adapter_config.json"
    if (path / "config.json").is_file() or not adapter.is_file():
        return path
    try:
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise UserError(f"model.path: {adapter} does not name the adapter's model; set its base_model_name_or_path")
    return fetch(f"model.path: {adapter}, base_model_name_or_path", base)


def weight_files(model: ModelConfig) -> list[Path]:
    """The files with the weights, those of an adapter's base model first: safetensors where a loader finds them.

    Raises UserError if there are none, or pickles alone without model.allow_pickle.
    """
    path = directory(model)
    base = base_directory(path)
    if not (files := safetensors_of(base) or _pickles(base, _PICKLED, model)):
        raise UserError(f"model.path: {base} has no weights; expected {SAFE}, its index and parts, or {_PICKLED}")
    for folder in dict.fromkeys([base, path]):  # a whole model may have an adapter beside it
        if (folder / "adapter_config.json").is_file():
            safe = folder / SAFE_ADAPTER
            files += [safe] if safe.is_file() else _pickles(folder, "adapter_model*.bin", model)
    return files


def safetensors_of(folder: Path) -> list[Path]:
    """The safetensors that loaders read here, by the names that they look for, and not whatever else is beside them.

    Raises UserError if an index names other files, or some that are not there.
    """
    index = folder / f"{SAFE}.index.json"
    if (folder / SAFE).is_file() or not index.is_file():
        return [folder / SAFE] if (folder / SAFE).is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        parts = [folder / name for name in names]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"model.path: {index} is no index of safetensors; copy the model again") from None
    for part in parts:
        if part.suffix != ".safetensors" or not part.is_file():
            raise UserError(f"model.path: {index} names {part.name}, which is no safetensors file beside it")
    return parts


def _pickles(folder: Path, pattern: str, model: ModelConfig) -> list[Path]:
    """Raises UserError if there are any and the settings do not allow them."""
    files = sorted(folder.glob(pattern))
    if files and not model.allow_pickle:
        raise UserError(
            f"model.path: {files[0]} is a pickle, which can run any code when it is read, and there are no safetensors "
            "beside it. Convert it (load the model, then save_pretrained), or set model.allow_pickle: true if you "
            "trust where it comes from"
        )
    return files


def files_digest(model: ModelConfig) -> str:
    """Digest of the configuration, the weight files and any code: equal on two machines that would load the same model.

    Raises UserError if one is missing, or not allowed.
    """
    path = directory(model)
    base = base_directory(path)
    if not (base / "config.json").is_file():
        raise UserError(f"model.path: {base} has no config.json; expected a Hugging Face model directory")
    files = [base / "config.json", *weight_files(model)]
    files += sorted(base.glob(f"{SAFE}.index.json"))
    files += [file for folder in dict.fromkeys([base, path]) if (file := folder / "adapter_config.json").is_file()]
    if model.trust_remote_code:
        files += sorted(base.rglob("*.py"))
    return content_digest(files)


def content_digest(files: Iterable[Path]) -> str:
    """Digest of what these files hold, in their order."""
    state = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            state.update(hashlib.file_digest(content, "sha256").digest())
    return state.hexdigest()


class Unchanged:
    """Makes sure that files are not written to from now on.

    On a CPU a model's weights may be its files, mapped: what is written there would be in the next forward. Once they
    are in use it does not matter if another file is put in the place of one, since the one that was opened lives on.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = [(file, file.open("rb")) for file in files]
        self._stamps = [_stamp(os.fstat(opened.fileno())) for _, opened in self._files]

    def check(self, replaced: bool = False) -> None:
        """Raises UserError, which names the first file that has changed, or with `replaced` is another one by now."""
        for (file, opened), before in zip(self._files, self._stamps, strict=True):
            if before != _stamp(file.stat() if replaced else os.fstat(opened.fileno())):
                raise UserError(
                    f"model.path: {file} was written to while its weights were in use. What was found since the last "
                    "unit is thrown away; put the model back as it was and start the same command again"
                )


def _stamp(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
