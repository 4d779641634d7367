"""Loads models and tokenizers in full precision or refuses them, and computes digests that identify them."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mrd_ray.config import ModelSettings
from mrd_ray.errors import UserError
from mrd_ray.models import adapters, tokenizer_checks, weights
from mrd_ray.models.files import (
    SAFE,
    Parts,
    adapter_files,
    code_files,
    content_digest,
    directory,
    fetch,
    parts,
    refuse_tokenizer_pointers,
    refuse_wild_settings,
    tokenizer_files,
    weight_files,
)
from mrd_ray.mrd.double import Float64, keep_float64


def weights_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Digest of weights in memory: their names, dtypes, shapes and bits."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def load_config(model: ModelSettings) -> PretrainedConfig:
    """The configuration of the model, or of its base model if it is an adapter. Raises UserError."""
    base = parts(model).base
    refuse_wild_settings("model.path", base, model.trust_remote_code)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(base, trust_remote_code=model.trust_remote_code)
    except Exception as problem:  # each architecture, or its own code, objects in a way of its own
        _refuse_code("model.path", base, problem)
        raise UserError(
            f"model.path: {base} is not a model directory that transformers can read: {problem}"
        ) from problem
    if elsewhere := getattr(config, "transformers_weights", None):
        raise UserError(
            f"model.path: {base / 'config.json'} takes weights from {elsewhere} (transformers_weights), which no "
            f"digest covers; rename it to {SAFE}, and remove that setting"
        )
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise UserError(
            f"model.path: {base} holds quantised weights ({method}), which cannot have noise or gradients; "
            "give the model as it was before quantisation"
        )
    _ignore_pad_outside_vocabulary(config)
    config.return_dict = config.get_text_config().return_dict = True  # some configurations request tuples
    return config


def _ignore_pad_outside_vocabulary(config: PretrainedConfig) -> None:
    """Remove a pad token id for which there is no embedding row. The pad token is not used for padding here."""
    for one in {id(one): one for one in (config, config.get_text_config())}.values():
        pad, rows = getattr(one, "pad_token_id", None), getattr(one, "vocab_size", None)
        if pad is not None and isinstance(rows, int) and not 0 <= pad < rows:
            one.pad_token_id = None


def _refuse_code(setting: str, path: Path, problem: Exception) -> None:
    """Raises UserError if the problem is that transformers refuses to run the Python code of a model."""
    if "trust_remote_code=True" in str(problem):
        raise UserError(
            f"{setting}: {path} needs Python code that comes with it; read that code, and set model.trust_remote_code: "
            "true if you trust it"
        ) from None


def skeleton(model: ModelSettings) -> PreTrainedModel:
    """The model, including an adapter, without storage for weights: names, shapes, layers. Raises UserError.

    The weight files of a whole model may be missing.
    """
    config, found = load_config(model), parts(model)
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    except Exception as problem:
        _refuse_code("model.path", found.base, problem)
        raise UserError(f"model.path: {found.base} is not a causal language model: {problem}") from problem
    if found.adapter is not None:
        with torch.device("meta"):
            adapters.shape(empty, found.adapter, weights.shapes(adapter_files(model)))
    return empty


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
            f"scoring.parameters: {parameters!r} matches none of the model's {len(names)} parameter names, "
            f"for example {', '.join(names[:3])}"
        )
    return found


def context_length(config: PretrainedConfig) -> int | None:
    """Longest input in tokens, or None if the architecture has no limit."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if length is None or length > 0 else None  # XLNet has -1


def rope_switch(config: PretrainedConfig) -> int | None:
    """The length in tokens above which all positions of an input use other rotary frequencies (longrope), or None.

    A forward decides by its longest row, so shorter and longer samples than this must not share a forward.
    """
    settings = getattr(config.get_text_config(), "rope_parameters", None) or {}
    layers = [one for one in settings.values() if isinstance(one, dict)]  # in some models, settings by type of layer
    for of_layers in layers or [settings]:
        if of_layers.get("rope_type") == "longrope":
            own = of_layers.get("original_max_position_embeddings")
            return int(own or config.get_text_config().original_max_position_embeddings)
    return None


def ending_ids(model: ModelSettings) -> dict[str, object]:
    """EOS and pad ids of the model that `load_model` returns, from its generation settings, else its configuration.

    Raises UserError.
    """
    base, config = parts(model).base, load_config(model)
    try:
        settings = GenerationConfig.from_pretrained(base)
    except OSError:  # transformers does the same if there is no such file
        settings = GenerationConfig.from_model_config(config)
    except ValueError as problem:
        raise UserError(f"model.path: cannot read {base / 'generation_config.json'}: {problem}") from problem
    text, names = config.get_text_config(), ("eos_token_id", "pad_token_id")
    return {name: getattr(text, name, None) if (own := getattr(settings, name)) is None else own for name in names}


def tokenizer_directory(model: ModelSettings) -> Path:
    """The directory of `model.tokenizer`, else of the model, or its base model if an adapter has no tokenizer.

    Raises UserError.
    """
    if model.tokenizer is not None and model.tokenizer != model.path:
        return fetch("model.tokenizer", model.tokenizer)
    path = directory(model)
    return path if tokenizer_files(path) else parts(model).base


def load_tokenizer(model: ModelSettings, console: Console | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.tokenizer`, else of the model.

    Args:
        console: shows a notice if texts begin, or are split, differently than the files suggest.

    Raises UserError, also if transformers reads the tokenizer differently than its files intend.
    """
    path = tokenizer_directory(model)
    refuse_tokenizer_pointers(path)
    refuse_wild_settings("model.tokenizer", path, model.trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except Exception as problem:  # each tokenizer, or its code, has its own exceptions
        _refuse_code("model.tokenizer", path, problem)
        raise UserError(
            f"model.tokenizer: {path} holds no tokenizer that transformers can read: {problem}"
        ) from problem
    tokenizer_checks.refuse_misread(tokenizer, path)
    if console is not None:
        begins = getattr(load_config(model).get_text_config(), "bos_token_id", None)
        for notice in tokenizer_checks.notices(tokenizer, path, begins):
            console.print(notice, style="red", markup=False, highlight=False, soft_wrap=True)
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of everything that decides how text becomes tokens, except code that comes with the tokenizer."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        del rules["truncation"], rules["padding"]  # left by the last call, and set again by each
        backend = json.dumps(rules)
    else:
        backend = repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{backend}\0{tokenizer.chat_template}".encode()).hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase, model: ModelSettings) -> str:
    """The tokenizer's digest, and the digest of its code if the settings allow that."""
    digest = tokenizer_digest(tokenizer)
    if not model.trust_remote_code or not (code := code_files(tokenizer_directory(model))):
        return digest
    return f"{digest} {content_digest(code)}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses transformers' tables of mismatches: these are either refused with an error or allowed."""
    transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)


def unused_weights(model: ModelSettings) -> list[str]:
    """Names of the tensors in the model's files that it does not use, if model.allow_unused_weights allows any.

    Only names and shapes are read. Raises UserError if the weights do not fit the model.
    """
    return _assembled(model, device_map="meta")[1]


def _assembled(model: ModelSettings, device_map: str | None) -> tuple[PreTrainedModel, list[str]]:
    """The model, including an adapter, with every parameter from its files, and the names of unused tensors there.

    Raises UserError.
    """
    found, files, of_adapter = parts(model), weight_files(model), adapter_files(model)  # refuses pickles
    config = load_config(model)  # refuses code that the digest does not cover
    of_base = [file for file in files if file not in of_adapter]
    weights.refuse_empty(files)
    weights.refuse_contradictions(of_base)
    with _quiet():
        loaded, fit = _base(model, found, config, device_map)
        held = weights.shapes(of_base)
        weights.refuse_quantised(of_base, weights.whole_numbers(loaded, fit, held))
        fit.unused = weights.unused(loaded, fit.unused, held)
        fit.refuse(found.base, model.allow_unused_weights)
        unused = sorted(fit.unused)
        if found.adapter is not None:
            fit = adapters.put_on(loaded, found.adapter, of_adapter)
            fit.refuse(found.adapter, model.allow_unused_weights, of_adapter=True)
            unused += sorted(fit.unused)
    return loaded, unused


def _base(
    model: ModelSettings, found: Parts, config: PretrainedConfig, device_map: str | None
) -> tuple[PreTrainedModel, weights.Fit]:
    exact = Float64() if model.dtype == "float64" else contextlib.nullcontext()  # rotary frequencies too
    try:
        with found.base_alone() as folder, exact:
            both: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, model.dtype),
                use_safetensors=None if model.allow_pickle else True,  # None: if there are any
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with their names
                device_map=device_map,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # each architecture, or its own code, objects in a way of its own
        _refuse_code("model.path", found.base, problem)
        raise UserError(f"model.path: cannot load {found.base}: {problem}") from problem
    return both[0], weights.Fit.of(both[1])


def load_model(model: ModelSettings, device: torch.device, spread: bool = False) -> PreTrainedModel:
    """The model in eval mode with exact `model.dtype` arithmetic: no TF32, and in float64 no casts to float32.

    Args:
        spread: distribute the layers over all GPUs of this process instead of `device`.

    Raises UserError if weights are absent, unused, of another shape or not finite, or if the settings do not allow a
    file.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    path, dtype = directory(model), getattr(torch, model.dtype)
    loaded: Any = _assembled(model, device_map="balanced" if spread else None)[0]
    places = {str(place) for place in getattr(loaded, "hf_device_map", {}).values()}
    if elsewhere := sorted(places & {"cpu", "disk"}):
        raise UserError(
            f"ray.gpus_per_actor: {torch.cuda.device_count()} GPU(s) cannot hold {path}: a part would be on the "
            f"{elsewhere[0]}; give an actor more GPUs"
        )
    loaded = loaded.eval() if spread else loaded.to(device).eval()
    for parameter in loaded.parameters():  # for adapters; not for buffers, whose rotary angles bfloat16 would round
        parameter.data = parameter.data.to(dtype)
    keep_float64(loaded)
    broken = [name for name, parameter in loaded.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        raise UserError(
            f"model.path: {path} has NaN or infinite weights in {len(broken)} parameter(s), first in {broken[0]}"
        )
    ready: PreTrainedModel = loaded
    return ready
