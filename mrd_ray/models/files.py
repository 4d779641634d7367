"""Finds or fetches the files of a model, refuses unsafe ones, and computes their digest."""

import contextlib
import functools
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mrd_ray.config import ModelSettings
from mrd_ray.errors import UserError
from mrd_ray.models import foreign
from mrd_ray.runs import storage

SAFE, _PICKLED = "model.safetensors", "pytorch_model*.bin"
SAFE_ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
_OF_TOKENIZERS = ["tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json"]
_OF_TOKENIZERS += ["chat_template*", "additional_chat_templates/*"]
_OF_TOKENIZERS += ["*.tiktoken", "*.spm", "spiece.model", "sentencepiece*", "tekken.json"]
# largest counts in config.json: objects are made one by one, so more would fill memory before any check
_LIMITS = {"layer": 10_000, "expert": 100_000, "num_labels": 1_000_000, "(num|n)_.*head": 1_000_000}
_OF_MODELS = ("*config.json", "LICENSE*", "NOTICE*")


def directory(model: ModelSettings) -> Path:
    """The local directory of the model, a copy if `model.path` is a hub id or URI. Raises UserError."""
    return fetch("model.path", model.path, model.revision)


def fetch(setting: str, path: str, revision: str | None = None) -> Path:
    """A local directory, or a local copy of a URI or hub id. Raises UserError, which names the setting."""
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
            f"{setting}: {path} is neither a directory here nor a model that the Hugging Face hub provides: {reason}"
        ) from None


@dataclass(frozen=True)
class Parts:
    """The directories that a model is read from: a whole model, and an adapter on it, if any."""

    base: Path
    adapter: Path | None

    @contextlib.contextmanager
    def base_alone(self) -> Iterator[Path]:
        """`base`, or a copy by links without its adapter, which transformers would put on unasked."""
        if not (self.base / ADAPTER_CONFIG).is_file():
            yield self.base
            return
        with tempfile.TemporaryDirectory() as folder:
            for file in self.base.iterdir():
                if file.name != ADAPTER_CONFIG:
                    (Path(folder) / file.name).symlink_to(file.absolute())
            yield Path(folder)


def parts(model: ModelSettings) -> Parts:
    """The directories of `model.path`. A directory with an adapter_config.json is an adapter, as in PEFT.

    A whole model in the same directory must be the adapter's base model: base_model_name_or_path must name it, or a
    model with the same weights. Raises UserError if it is another model, or the base model is unclear or missing.
    """
    path = directory(model)
    refuse_pointers("model.path", sorted(path.glob("*config.json")))
    if not (path / ADAPTER_CONFIG).is_file():
        if model.base is not None:
            raise UserError(
                f"model.base: {path} holds no adapter ({ADAPTER_CONFIG}), so it has no base model; leave it out"
            )
        return Parts(path, None)
    beside = [*safetensors_of(path), *sorted(path.glob(_PICKLED))]
    base = _base_of(model, path, bool(beside))
    refuse_pointers("model.path", sorted(base.glob("*config.json")))
    if base.resolve() == path.resolve():
        if not beside:
            raise UserError(
                f"model.path: {path / ADAPTER_CONFIG} names its own directory as the base model "
                "(base_model_name_or_path), which has no whole model's weights; name the model that it was trained on"
            )
        return Parts(path, path)
    if (base / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"model.path: {path} is an adapter of {base}, which holds an adapter too; merge that one into its model "
            "first (PEFT's merge_and_unload), or move it elsewhere"
        )
    if beside and not _same(tuple(beside), (*safetensors_of(base), *sorted(base.glob(_PICKLED)))):
        raise UserError(
            f"model.path: {path} holds a whole model ({beside[0].name}) and an adapter of another one ({base}), so "
            f"which of them is meant cannot be told. For the adapter, move {beside[0].name} elsewhere; for the whole "
            f"model, move {ADAPTER_CONFIG} elsewhere; for the adapter on the whole model beside it, write {path} into "
            f"base_model_name_or_path of {ADAPTER_CONFIG}"
        )
    return Parts(base, path)


def refuse_pointers(setting: str, files: Iterable[Path]) -> None:
    """Raises UserError, which names the setting, if one of these files is only a Git LFS pointer."""
    for file in filter(Path.is_file, files):
        with file.open("rb") as content:
            storage.refuse_lfs_pointer(setting, file, content.read(64))


def _base_of(model: ModelSettings, adapter: Path, beside: bool) -> Path:
    """The directory of an adapter's base model. beside: whether a whole model is in the same directory."""
    if model.base is not None:
        return fetch("model.base", model.base)
    settings = foreign.read_json("model.path", adapter / ADAPTER_CONFIG)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    said = f"model.path: {adapter / ADAPTER_CONFIG}, base_model_name_or_path,"
    remedy = "Name the adapter's model by --model.base: a directory, a hub id or a URI"
    if beside:
        remedy += f" ({adapter} for the whole model beside the adapter)"
    if base is None or base == "":
        raise UserError(f"{said} is not set. {remedy}")
    foreign.refuse_address(said, base)
    there = Path(os.path.normpath(adapter / base))
    if there.is_dir() and there.is_relative_to(os.path.normpath(adapter)):
        return there
    if Path(base).expanduser().is_dir():
        raise UserError(
            f"{said} is {base!r}, a folder outside the adapter's own, which is not read just because an adapter names "
            f"it. If that is the adapter's model, say so: --model.base {base}"
        )
    if not foreign.is_hub_id(base):
        raise UserError(f"{said} is {base!r}, which is neither a folder in {adapter} nor a hub id. {remedy}")
    if not isinstance(revision, str | None) or (revision and not _REVISION.fullmatch(revision)):
        raise UserError(
            f"model.path: {adapter / ADAPTER_CONFIG}, revision, is {revision!r:.80}; expected a commit or tag"
        )
    try:
        return fetch(said, base, revision or None)
    except UserError as problem:
        raise UserError(f"{problem} {remedy}") from problem


def _same(some: tuple[Path, ...], others: tuple[Path, ...]) -> bool:
    """Whether two lists of files hold the same bytes, file by file."""
    sizes = [[file.stat().st_size for file in files] for files in (some, others)]
    digests = (_digest(files, tuple(_stamp(file.stat()) for file in files)) for files in (some, others))
    return sizes[0] == sizes[1] and len(set(digests)) == 1


@functools.lru_cache(maxsize=8)
def _digest(files: tuple[Path, ...], _stamps: tuple[tuple[int, ...], ...]) -> str:
    return content_digest(files)


def weight_files(model: ModelSettings) -> list[Path]:
    """The weight files, an adapter's base model first: safetensors if loaders find them, else pickles.

    Raises UserError if there are none, or only pickles without model.allow_pickle.
    """
    found = parts(model)
    if not (files := safetensors_of(found.base) or _pickles(found.base, _PICKLED, model)):
        raise UserError(f"model.path: {found.base} has no weights; expected {SAFE}, its index and parts, or {_PICKLED}")
    return files + adapter_files(model)


def adapter_files(model: ModelSettings) -> list[Path]:
    """The weight files of an adapter; none for a whole model. Raises UserError like `weight_files`."""
    folder = parts(model).adapter
    if folder is None:
        return []
    if (safe := folder / SAFE_ADAPTER).is_file():
        refuse_pointers("model.path", [safe])
        return [safe]
    if not (files := _pickles(folder, "adapter_model*.bin", model)):
        raise UserError(
            f"model.path: {folder} holds {ADAPTER_CONFIG} but no {SAFE_ADAPTER}; copy that file there, or move "
            f"{ADAPTER_CONFIG} elsewhere if {folder} is a whole model"
        )
    return files


def safetensors_of(folder: Path) -> list[Path]:
    """The safetensors files that loaders read here, found by the names they look for; other files are ignored.

    Raises UserError if an index names files that are not safetensors or missing, or files next to a file with the
    whole model, or if a file is a Git LFS pointer.
    """
    index, whole = folder / f"{SAFE}.index.json", folder / SAFE
    refuse_pointers("model.path", [whole, index])
    if not index.is_file():
        return [whole] if whole.is_file() else []
    parts = _named_by(index)
    if whole.is_file():
        if beside := [part for part in parts if part != whole and part.is_file()]:
            raise UserError(
                f"model.path: {folder} holds a whole model twice: in {SAFE}, and in {beside[0].name} and the other "
                f"files that {index.name} names. transformers would read {SAFE} and ignore the others, even if it is "
                f"the older one. Move {SAFE} elsewhere, or {index.name} and its files"
            )
        return [whole]
    for part in parts:
        if part.suffix != ".safetensors" or not part.is_file():
            raise UserError(
                f"model.path: {index} names {part.name}, which is not a safetensors file in the same folder"
            )
    refuse_pointers("model.path", parts)
    return parts


def _named_by(index: Path) -> list[Path]:
    """The files that an index names, all in its folder. Raises UserError if it is not an index."""
    named = foreign.read_json("model.path", index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"model.path: {index} is not an index of weights (weight_map); copy the model again")
    files = {name: foreign.below(f"model.path: {index}, weight_map,", index.parent, name) for name in named.values()}
    return [files[name] for name in sorted(files)]


def _pickles(folder: Path, pattern: str, model: ModelSettings) -> list[Path]:
    """Files that match. Raises UserError if there are any without model.allow_pickle, or one is a Git LFS pointer."""
    files = sorted(folder.glob(pattern))
    for index in folder.glob(f"{pattern}.index.json"):
        _named_by(index)
    refuse_pointers("model.path", files)
    if files and not model.allow_pickle:
        raise UserError(
            f"model.path: {files[0]} is a pickle, which can run any code when it is read, and there are no safetensors "
            "in its folder. Convert it (load the model, then save_pretrained), or set model.allow_pickle: true if you "
            "trust its source"
        )
    return files


def model_digest(model: ModelSettings) -> str:
    """Digest of configuration, weight files and any code. It is equal on machines that would load the same model.

    Raises UserError if a file is missing or not allowed.
    """
    found = parts(model)
    base = found.base
    if not (base / "config.json").is_file():
        below = sorted({file.parent for name in ("config.json", ADAPTER_CONFIG) for file in base.glob(f"*/{name}")})
        hint = f"; do you mean {below[0]}?" if below else ""
        raise UserError(f"model.path: {base} has no config.json; expected a Hugging Face model directory{hint}")
    files = [base / "config.json", *weight_files(model)]
    files += sorted(base.glob(f"{SAFE}.index.json"))
    if found.adapter is not None:
        files.append(found.adapter / ADAPTER_CONFIG)
    if model.trust_remote_code:
        files += code_files(base)
    return content_digest(files)


def code_files(folder: Path) -> list[Path]:
    """The Python files of a model or tokenizer."""
    return sorted(folder.rglob("*.py"))


def refuse_wild_settings(setting: str, folder: Path, trust_remote_code: bool = False) -> None:
    """Raises UserError, which names the setting, if the settings of a model or tokenizer are not safe to follow.

    They could request code from another repository or the hub, files outside the folder, or more layers than any model
    has.
    """
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        settings = foreign.read_json(setting, file) if file.is_file() else {}
        if trust_remote_code:
            foreign.refuse_code_elsewhere(setting, file, settings.get("auto_map"))
        for key, value in foreign.values(settings):
            said = f"{setting}: {file}, {key},"
            if key.endswith("implementation") and isinstance(value, str) and "/" in value:
                raise UserError(f"{said} is {value!r:.200}, code from the hub, which a model may not choose; remove it")
            most = next((limit for part, limit in _LIMITS.items() if re.search(part, key)), math.inf)
            if isinstance(value, int | float) and abs(value) > most:
                raise UserError(f"{said} is {value!r:.80}; expected at most {most:,}")
            # often the file that a tokenizer was once made from, which is not on this machine
            if key.endswith("_file") and isinstance(value, str) and _exists(folder / Path(value).expanduser()):
                foreign.below(said, folder, value)


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except (OSError, ValueError):  # a name that is too long, or no permission to look for it
        return False


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a tokenizer, by their path below the folder: vocabulary, settings, chat templates."""
    return _matching(folder, _OF_TOKENIZERS)


def refuse_tokenizer_pointers(folder: Path) -> None:
    """Raises UserError if a file of the tokenizer is a Git LFS pointer.

    If there is a tokenizer.json, no other vocabulary is read, so those may be pointers.
    """
    files = tokenizer_files(folder)
    names = [name for name in files if "tokenizer.json" not in files or name.endswith(".json")]
    refuse_pointers("model.tokenizer", (files[name] for name in names))


def descriptions(folder: Path) -> dict[str, Path]:
    """The files that describe a model, by path below the folder: settings, code, licence; no weights or tokenizer."""
    code = {str(file.relative_to(folder)): file for file in code_files(folder)}
    return {
        name: file
        for name, file in (_matching(folder, _OF_MODELS) | code).items()
        if name not in tokenizer_files(folder) and not any(part.startswith((".", "__")) for part in Path(name).parts)
    }


def _matching(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    files = (file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file())
    return {str(file.relative_to(folder)): file for file in files}


def content_digest(files: Iterable[Path]) -> str:
    """Digest of the contents of these files, in this order."""
    state = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            state.update(hashlib.file_digest(content, "sha256").digest())
    return state.hexdigest()


class Unchanged:
    """Checks that files are not written to from now on.

    On a CPU a model's weights may be its files, mapped into memory: anything written to them would be used in the next
    forward. Replacing a file that is in use does no harm, since the opened file continues to exist.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = [(file, file.open("rb")) for file in files]
        self._stamps = [_stamp(os.fstat(opened.fileno())) for _, opened in self._files]

    def check(self, replaced: bool = False) -> None:
        """Raises UserError, which names the first file that was written to or, with `replaced`, was replaced."""
        for (file, opened), before in zip(self._files, self._stamps, strict=True):
            if before != _stamp(file.stat() if replaced else os.fstat(opened.fileno())):
                raise UserError(
                    f"model.path: {file} was written to while its weights were in use. Results since the last unit "
                    "are discarded; restore the model and run the same command again"
                )


def _stamp(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
