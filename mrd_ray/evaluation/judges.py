"""Other models, on the workers, that rate the evaluated model's answers."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from mrd_ray.config import EvaluationSettings
from mrd_ray.errors import UserError
from mrd_ray.models import foreign
from mrd_ray.models.files import content_digest, fetch, refuse_wild_settings, safetensors_of


class Judges:
    """The models that the settings name, on one device.

    Raises:
        UserError: one cannot be loaded, or lacks what is needed of it.
    """

    def __init__(self, evaluation: EvaluationSettings, device: torch.device) -> None:
        self._label = evaluation.toxicity_label
        self._embedder: Any = None
        self._classifier: Any = None
        if evaluation.embedding_model is not None:
            self._embedder = _embedder(evaluation.embedding_model, device)
        if evaluation.toxicity_model is not None:
            self._classifier = _classifier(evaluation.toxicity_model, self._label, device)

    def similarities(self, text: str, others: Sequence[str]) -> list[float]:
        """Cosines between the sentence embeddings of a text and of others."""
        vectors = self._embedder.encode([text, *others], normalize_embeddings=True, show_progress_bar=False)
        cosines: list[float] = (vectors[1:].astype("float64") @ vectors[0].astype("float64")).tolist()
        return cosines

    def toxicity(self, text: str) -> float:
        """The classifier's probability of the label; labels are independent if the model's settings say so."""
        scores = self._classifier(text, top_k=None, truncation=True)
        return float(next(score["score"] for score in scores if score["label"] == self._label))


def identity(judge: str | None) -> str | None:
    """Identifies the model that a setting names: a digest of a folder's files, without hidden ones, or the hub id."""
    if judge is None or not (folder := Path(judge)).is_dir():
        return judge
    files = [file for file in sorted(folder.rglob("*")) if "/." not in f"/{file.relative_to(folder)}"]
    return content_digest(filter(Path.is_file, files))


def _folder(setting: str, path: str) -> str:
    """The judge's directory. Raises UserError if a part of it has no safetensors."""
    folder = fetch(setting, path)
    if (modules := folder / "modules.json").is_file():
        for key, value in foreign.values(foreign.read_any_json(setting, modules)):
            if key == "path":
                foreign.below(f"{setting}: {modules}, path,", folder, value)
            elif key == "type" and not str(value).startswith("sentence_transformers."):
                raise UserError(
                    f"{setting}: {modules} asks for {value!r:.80}; expected classes of sentence_transformers"
                )
    for part in {file.parent for name in ("config.json", "tokenizer_config.json") for file in folder.rglob(name)}:
        refuse_wild_settings(setting, part)
    for pickled in sorted(folder.rglob("pytorch_model*.bin")):
        if not safetensors_of(pickled.parent):
            raise UserError(
                f"{setting}: {pickled} is a pickle, which can run any code when it is read; judges are read "
                "only from safetensors. Convert it (load the model, then save_pretrained), or name another model"
            )
    return str(folder)


def _embedder(path: str, device: torch.device) -> Any:
    try:
        library = importlib.import_module("sentence_transformers")
    except ImportError:
        raise UserError(
            "evaluation.embedding_model needs sentence-transformers: pip install 'mrd-ray[judges]'"
        ) from None
    try:
        return library.SentenceTransformer(
            _folder("evaluation.embedding_model", path),
            device=str(device),
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError) as problem:
        raise UserError(f"evaluation.embedding_model: cannot load {path}: {problem}") from None


def _classifier(path: str, label: str, device: torch.device) -> Any:
    folder = _folder("evaluation.toxicity_model", path)
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as problem:
        raise UserError(f"evaluation.toxicity_model: cannot load {path}: {problem}") from None
    if label not in (labels := model.config.label2id):
        raise UserError(f"evaluation.toxicity_label: {path} has no label {label!r}, but {', '.join(labels)}")
    return transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device=device)
