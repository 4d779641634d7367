"""Writes a model as a copy of the directory it came from, except for the weights: training changes nothing else."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel

from mrd_ray.config import ModelSettings
from mrd_ray.errors import UserError
from mrd_ray.models import adapters, load, weights
from mrd_ray.models.files import (
    ADAPTER_CONFIG,
    SAFE_ADAPTER,
    adapter_files,
    descriptions,
    parts,
    tokenizer_files,
    weight_files,
)


def save(model: PreTrainedModel, trained: Mapping[str, torch.Tensor], source: ModelSettings, folder: Path) -> None:
    """Write a Hugging Face directory: only the adapter if there is one, else the model; always with the tokenizer.

    Args:
        trained: every parameter and saved buffer of a whole model, or the factors of an adapter.
        source: what the model was loaded from. Its other files are copied byte for byte, and tensors in its weight
            files that the model does not use are copied too.
    """
    found = parts(source)
    adapted = bool(getattr(model, "_hf_peft_config_loaded", False))
    whole = dict(trained)
    if not adapted:
        whole |= _beside(model, trained, source)
    _write_weights(model, whole, folder)
    if found.adapter is not None:
        _complete_adapter(folder / SAFE_ADAPTER, source)
    if found.adapter is not None or not adapted:
        (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
        _copy(descriptions(found.adapter or found.base), folder)
    _save_tokenizer(source, folder)


def refuse_loss(source: ModelSettings, unused: Iterable[str]) -> None:
    """Raises UserError if `save` could not copy one of these tensors that the model does not use."""
    held = set(map(adapters.plain, weights.shapes(weight_files(source))))
    if lost := sorted(set(unused) - held):
        raise UserError(
            f"model.path: {len(lost)} tensor(s) of {source.path} that the model does not use, first {lost[0]}, are "
            "stored under other names, so the unlearned model could not keep them. Save the model without them first "
            "(from_pretrained, then save_pretrained)"
        )


def _beside(model: PreTrainedModel, trained: Mapping[str, torch.Tensor], source: ModelSettings) -> dict[str, Any]:
    """The tensors in a whole model's files that it does not use, except those that follow from its configuration."""
    files = weight_files(source)
    names = set(load.unused_weights(source)) | weights.set_aside(model, weights.shapes(files))
    return weights.read(files, names - trained.keys())


def _write_weights(model: PreTrainedModel, whole: dict[str, torch.Tensor], folder: Path) -> None:
    """Write only weight files and, for an adapter, adapter_config.json."""
    generator: Any = model
    kept, generator.generation_config = (
        generator.generation_config,
        GenerationConfig(),
    )  # some generation settings refuse to be saved
    try:
        model.save_pretrained(folder, state_dict=whole)
    finally:
        generator.generation_config = kept
    for file in folder.iterdir():
        if not file.name.endswith((".safetensors", ".safetensors.index.json")) and file.name != ADAPTER_CONFIG:
            file.unlink()


def _complete_adapter(written: Path, source: ModelSettings) -> None:
    """Add the adapter's other tensors, for example embeddings, and factors that the model does not use."""
    files, unused = adapter_files(source), set(load.unused_weights(source))
    factors = load_file(written)
    names = {
        name
        for name in weights.shapes(files)
        if name not in factors and ("lora_" not in name or adapters.plain(name) in unused)
    }
    if names:
        save_file(factors | weights.read(files, names), written, metadata={"format": "pt"})


def _save_tokenizer(source: ModelSettings, folder: Path) -> None:
    """Copy the tokenizer's files. If they would be read differently in this folder, save the tokenizer instead."""
    tokenizer, origin = load.load_tokenizer(source), load.tokenizer_directory(source)
    names = tokenizer_files(origin)
    names |= {name: origin / name for name in tokenizer.vocab_files_names.values() if (origin / name).is_file()}
    code = descriptions(origin).items()
    names |= {name: file for name, file in code if file.suffix == ".py" and not (folder / name).exists()}
    _copy(names, folder)
    try:
        copied = load.load_tokenizer(ModelSettings(path=str(folder), trust_remote_code=source.trust_remote_code))
        same = load.tokenizer_digest(copied) == load.tokenizer_digest(tokenizer)
    except UserError:
        same = False
    if not same:
        for name in names:
            (folder / name).unlink()
        tokenizer.save_pretrained(folder)


def _copy(files: Mapping[str, Path], folder: Path) -> None:
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
