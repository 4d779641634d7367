"""Models and tokenizers from a hub id or a directory, and digests that say which weights they are."""

import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mrd_ray import storage
from mrd_ray.config import ModelConfig
from mrd_ray.errors import UserError

_SAFE, _PICKLED = "model.safetensors", "pytorch_model*.bin"
_SAFE_ADAPTER = "adapter_model.safetensors"


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
        raise UserError(f"model.path: {base} has no weights; expected {_SAFE}, its index and parts, or {_PICKLED}")
    for folder in dict.fromkeys([base, path]):  # a whole model may have an adapter beside it
        if (folder / "adapter_config.json").is_file():
            safe = folder / _SAFE_ADAPTER
            files += [safe] if safe.is_file() else _pickles(folder, "adapter_model*.bin", model)
    return files


def safetensors_of(folder: Path) -> list[Path]:
    """The safetensors that loaders read here, by the names that they look for, and not whatever else is beside them.

    Raises UserError if an index names other files, or some that are not there.
    """
    index = folder / f"{_SAFE}.index.json"
    if (folder / _SAFE).is_file() or not index.is_file():
        return [folder / _SAFE] if (folder / _SAFE).is_file() else []
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
    files += sorted(base.glob(f"{_SAFE}.index.json"))
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


def weights_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Digest of weights in memory: names, dtypes, shapes and bits."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def load_config(model: ModelConfig) -> PretrainedConfig:
    """The architecture's configuration, of an adapter's base model if `model` is an adapter. Raises UserError."""
    base = base_directory(directory(model))
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=model.trust_remote_code)
    except Exception as problem:  # each architecture, or its own code, objects in a way of its own
        _refuse_code("model.path", base, problem)
        raise UserError(f"model.path: {base} is not a model directory that transformers reads: {problem}") from None
    if elsewhere := getattr(config, "transformers_weights", None):
        raise UserError(
            f"model.path: {base / 'config.json'} takes weights from {elsewhere} (transformers_weights), which no "
            f"digest covers; rename it to {_SAFE}, and leave that setting out"
        )
    if model.trust_remote_code:
        _refuse_code_from_elsewhere(base, getattr(config, "auto_map", None) or {})
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise UserError(
            f"model.path: {base} holds quantised weights ({method}), which take neither noise nor gradients; "
            "give the model as it was before quantisation"
        )
    return config


def _refuse_code_from_elsewhere(base: Path, auto_map: dict[str, Any]) -> None:
    """Raises UserError if a class is to come from another repository, whose code could differ from node to node."""
    for reference in auto_map.values():
        if "--" in str(reference):
            raise UserError(
                f"model.path: {base / 'config.json'} takes code from another repository ({reference}), which no digest "
                "of this one covers; copy its .py files beside it, and leave out the part up to -- there"
            )


def _refuse_code(setting: str, path: Path, problem: Exception) -> None:
    """Raises UserError if that is transformers' refusal to run the Python code of a model."""
    if "trust_remote_code=True" in str(problem):
        raise UserError(
            f"{setting}: {path} needs Python code that comes with it; read that code, and set model.trust_remote_code: "
            "true if you trust it"
        ) from None


def skeleton(model: ModelConfig) -> PreTrainedModel:
    """The model, adapter included, without storage for weights: names, shapes and layers. Raises UserError."""
    config, path = load_config(model), directory(model)
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
            if (path / "adapter_config.json").is_file():
                adapter = require_peft("model.path, an adapter,").PeftConfig.from_pretrained(path)
                if getattr(adapter, "use_dora", False):
                    raise UserError(f"model.path: {path} holds a DoRA adapter, which is not supported; merge it first")
                empty.add_adapter(adapter)
    except (ValueError, RuntimeError) as problem:
        _refuse_code("model.path", path, problem)
        raise UserError(f"model.path: {path} is not a causal language model: {problem}") from None
    return empty


def require_peft(setting: str) -> Any:
    """The peft library. Raises UserError, with the setting that needs it, where it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise UserError(f"{setting} needs peft: pip install 'mrd-ray[lora]'") from None


def _require_accelerate() -> None:
    try:
        importlib.import_module("accelerate")
    except ImportError:
        raise UserError(
            "ray.gpus_per_actor: a model over several GPUs needs accelerate: pip install 'mrd-ray[spread]'"
        ) from None


def select(names: Iterable[str], parameters: str) -> list[str]:
    """The parameters that `scoring.parameters` names. Raises UserError if it names none."""
    names = list(names)
    if parameters == "all":
        return names
    if parameters == "lora":
        if not (found := [name for name in names if "lora_" in name]):
            raise UserError("scoring.parameters: lora, but the model has no LoRA factors; give model.path an adapter")
        return found
    if not (found := [name for name in names if re.search(parameters, name)]):
        raise UserError(
            f"scoring.parameters: {parameters!r} is found in none of the model's {len(names)} parameter names, "
            f"which read like {', '.join(names[:3])}"
        )
    return found


def context_length(config: PretrainedConfig) -> int | None:
    """Longest input in tokens, or None where the architecture sets none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def ending_ids(model: ModelConfig) -> dict[str, Any]:
    """EOS and pad ids of the model that `load_model` gives, by name: of its generation settings, else of its config.

    Raises UserError.
    """
    base, config = base_directory(directory(model)), load_config(model)
    try:
        settings = GenerationConfig.from_pretrained(base)
    except OSError:  # without such a file transformers does the same
        settings = GenerationConfig.from_model_config(config)
    except ValueError as problem:
        raise UserError(f"model.path: cannot read {base / 'generation_config.json'}: {problem}") from None
    text, names = config.get_text_config(), ("eos_token_id", "pad_token_id")
    return {name: getattr(text, name, None) if (own := getattr(settings, name)) is None else own for name in names}


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.tokenizer`, else of the model. Raises UserError."""
    if model.tokenizer is None or model.tokenizer == model.path:
        path = directory(model)
        if not (path / "tokenizer_config.json").is_file():  # adapters come without
            path = base_directory(path)
    else:
        path = fetch("model.tokenizer", model.tokenizer)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as problem:
        _refuse_code("model.tokenizer", path, problem)
        raise UserError(f"model.tokenizer: {path} holds no tokenizer that transformers reads: {problem}") from None
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of everything that decides how text becomes tokens."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        del rules["truncation"], rules["padding"]  # left there by the last call, and set anew by each
        backend = json.dumps(rules)
    else:
        backend = repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{backend}\0{tokenizer.chat_template}".encode()).hexdigest()


def load_model(model: ModelConfig, device: torch.device, spread: bool = False) -> PreTrainedModel:
    """The model in eval mode and true `model.dtype` arithmetic, no TF32.

    Args:
        spread: over all GPUs of this process instead of `device`, some layers on each.

    Raises UserError on absent or non-finite weights, and on files that the settings do not allow.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    transformers.utils.logging.disable_progress_bar()
    path, dtype = directory(model), getattr(torch, model.dtype)
    base = base_directory(path)
    if base != path:
        require_peft("model.path, an adapter,")
    weight_files(model)  # refuses pickles
    load_config(model)  # refuses code that the digest cannot answer for
    if spread:
        _require_accelerate()
    use_safetensors = None if model.allow_pickle else True  # None: where there are some
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            use_safetensors=use_safetensors,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            device_map="balanced" if spread else None,
        )
        loaded, loading = found
        if elsewhere := sorted(
            {str(place) for place in getattr(loaded, "hf_device_map", {}).values()} & {"cpu", "disk"}
        ):
            raise UserError(
                f"ray.gpus_per_actor: {torch.cuda.device_count()} GPU(s) do not hold {path}, some of which would be on "
                f"the {elsewhere[0]}; give an actor more of them"
            )
        missing = sorted(loading["missing_keys"])
        if base != path:
            safe = (path / _SAFE_ADAPTER).is_file()  # transformers looks for one of the two alone
            missing += sorted(loaded.load_adapter(str(path), use_safetensors=safe).missing_keys)
        loaded = loaded.eval() if spread else loaded.to(device).eval()
        for parameter in loaded.parameters():  # an adapter's; not the buffers, whose rotary angles bfloat16 would round
            parameter.data = parameter.data.to(dtype)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
        _refuse_code("model.path", base, problem)
        raise UserError(f"model.path: cannot load {path}: {problem}") from None
    if missing:  # transformers has filled them at random
        raise UserError(
            f"model.path: the weights in {path} lack {len(missing)} parameter(s) of its configuration, "
            f"first {missing[0]}"
        )
    broken = [name for name, parameter in loaded.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        raise UserError(
            f"model.path: {path} has NaN or infinite weights in {len(broken)} parameter(s), first in {broken[0]}"
        )
    return loaded
