"""Plain fine-tuning that makes a model memorise a set, for the demo and for experiments with other models."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from mrd_ray.config import ModelSettings
from mrd_ray.errors import UserError
from mrd_ray.models import adapters, load, saving
from mrd_ray.models.files import parts
from mrd_ray.runs.meter import Meter


def cached(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder cache/name, made if it is not there. A kill while it is made leaves nothing under that name."""
    folder, partial = cache / name, cache / f"{name}.partial"
    if folder.is_dir():
        return folder
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(folder)
    except OSError as problem:
        raise UserError(f"cache: cannot make {folder}: {problem.strerror or problem}") from None
    return folder


def memorise(
    pretrained: ModelSettings,
    folder: Path,
    token_ids: Sequence[Sequence[int]],
    title: str,
    epochs: int = 4,
    batch_size: int = 8,
    learning_rate: float = 3e-4,
    console: Console | None = None,
) -> None:
    """Train on these samples with AdamW, on every token after the first, and save model and tokenizer.

    Raises UserError if the model is an adapter.
    """
    if (adapter := parts(pretrained).adapter) is not None:
        raise UserError(f"model.path: {adapter} is an adapter, but all weights are trained here; {adapters.MERGE}")
    torch.manual_seed(0)
    shuffle, order = random.Random(0), list(token_ids)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load.load_model(pretrained.model_copy(update={"dtype": "float32"}), device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    with Meter(title, epochs * len(order), console) as meter:
        meter.advance(0, f"{len(order)} samples, {epochs} epochs")
        for epoch in range(epochs):
            shuffle.shuffle(order)
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                loss = _loss(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                meter.advance(len(batch), f"epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}")
    saving.save(model, model.state_dict(), pretrained, folder)
    for_transformers_4(folder)


def for_transformers_4(folder: Path) -> None:
    """Make a model's directory readable for transformers 4, which has other names for rotary base and tokenizer class.

    Without them it silently uses its default for the rotary base.
    """
    config = _read(folder / "config.json")
    rotary = config.get("rope_parameters") or {}
    if "rope_theta" in rotary and "rope_theta" not in config:
        config["rope_theta"] = rotary["rope_theta"]
        if rotary.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {key: value for key, value in rotary.items() if key != "rope_theta"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file() and (settings := _read(tokenizer)).get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokenizer.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _loss(model: PreTrainedModel, token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean negative log-likelihood of every token after the first."""
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in token_ids], batch_first=True)
    lengths = torch.tensor([len(ids) for ids in token_ids])
    labels = padded.masked_fill(torch.arange(padded.shape[1]) >= lengths[:, None], -100)
    loss: torch.Tensor = model(padded.to(model.device), labels=labels.to(model.device), use_cache=False).loss
    return loss
