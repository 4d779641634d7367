"""Models and tokenizers from a hub id or a directory, and digests that say which weights they are."""

import hashlib
import json
import os
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
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mrd_ray.config import ModelConfig
from mrd_ray.errors import UserError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def directory(model: ModelConfig) -> Path:
    """The local directory of the model, downloaded if `model.path` is a hub id. Raises UserError."""
    return _fetch("model.path", model.path, model.revision)


def _fetch(setting: str, path: str, revision: str | None = None) -> Path:
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


def weight_files(path: Path) -> list[Path]:
    """The files that hold the model's weights, safetensors if there are any. Raises UserError if none do."""
    for pattern in _WEIGHTS:
        if files := sorted(path.glob(pattern)):
            return files
    raise UserError(f"model.path: {path} has no weights; expected {' or '.join(_WEIGHTS)}")


def files_digest(path: Path) -> str:
    """Digest of config.json and the weight files: equal on two machines when they would load the same model.

    Raises UserError if one is missing.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"model.path: {path} has no config.json; expected a Hugging Face model directory")
    state = hashlib.sha256()
    for file in [path / "config.json", *weight_files(path)]:
        with file.open("rb") as content:
            state.update(hashlib.file_digest(content, "sha256").digest())
    return state.hexdigest()


def weights_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Digest of weights in memory: names, dtypes, shapes and bits."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def load_config(path: Path) -> PretrainedConfig:
    """The architecture's configuration. Raises UserError."""
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as problem:
        raise UserError(f"model.path: {path} is not a model directory that transformers reads: {problem}") from None


def context_length(config: PretrainedConfig) -> int | None:
    """Longest input in tokens, or None where the architecture sets none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.tokenizer`, else of the model. Raises UserError."""
    if model.tokenizer is None or model.tokenizer == model.path:
        path = directory(model)
    else:
        path = _fetch("model.tokenizer", model.tokenizer)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as problem:
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


def load_model(path: Path, dtype: str, device: torch.device) -> PreTrainedModel:
    """The model in eval mode and true `dtype` arithmetic, no TF32. Raises UserError on absent or non-finite weights."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), output_loading_info=True)
        model, loading = loaded
        model = model.to(device).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
        raise UserError(f"model.path: cannot load {path}: {problem}") from None
    if absent := sorted(loading["missing_keys"]):  # transformers has filled them at random
        raise UserError(
            f"model.path: the weights in {path} lack {len(absent)} parameter(s) of its config.json, first {absent[0]}"
        )
    broken = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        raise UserError(
            f"model.path: {path} has NaN or infinite weights in {len(broken)} parameter(s), first in {broken[0]}"
        )
    return model
