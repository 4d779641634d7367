"""Models and tokenizers, loaded in true precision or refused, and digests that tell them apart."""

import hashlib
import importlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
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

from mrd_ray.config import ModelConfig
from mrd_ray.errors import UserError
from mrd_ray.model_files import SAFE, SAFE_ADAPTER, base_directory, directory, fetch, weight_files


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
            f"digest covers; rename it to {SAFE}, and leave that setting out"
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
            safe = (path / SAFE_ADAPTER).is_file()  # transformers looks for one of the two alone
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
