"""Memory of a scoring actor during one unit, in sizes of its weights: two for Monte Carlo, one for the closed form."""

import ctypes
import gc
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Raw, resident
from benchmarks.figures import Figure, Results
from mrd_ray import ModelSettings, ScoringSettings
from mrd_ray.models.files import model_digest
from mrd_ray.scoring.actor import ScoringActor, ScoringSetup
from mrd_ray.scoring.units import Unit
from mrd_ray.workers.memory import Sample

Estimator = Literal["monte_carlo", "closed_form"]
COPIES: dict[Estimator, float] = {"monte_carlo": 2.05, "closed_form": 1.05}


def main(
    out: str = "benchmarks/results",
    vocabularies: tuple[int, ...] = (131072, 8192),
    draws: tuple[int, ...] = (20, 2),
    hidden_size: int = 1024,
    tokens: int = 64,
) -> None:
    """Benchmark an actor's memory at small and large vocabularies, and for few and many draws.

    What an actor holds after a unit, with a trimmed heap, counts as copies of the weights; what it held in addition
    during the unit counts as activations. Files and actors use float32, so the copies that are the mapped file are
    shared by the actors of a node.

    Args:
        out: folder of the JSON file.
        vocabularies: of invented models; they decide the size of the output layer.
        draws: K of monte_carlo.
        hidden_size: width of the models.
        tokens: per sample; a unit has eight samples.
    """
    results = Results("memory", locals(), out)
    shape: Raw = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": 2}
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in vocabularies:
            llama = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, num_attention_heads=16, **shape)
            LlamaForCausalLM(llama).save_pretrained(f"{folder}/{vocabulary}")
        # a fresh process each, since peaks add up; one after another, since they are large
        spawn = multiprocessing.get_context("spawn")
        cases: list[tuple[int, Estimator, int]] = []
        for vocabulary in vocabularies:
            cases += [(vocabulary, "monte_carlo", k) for k in draws] + [(vocabulary, "closed_form", 1)]
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
            usage = [processes.submit(_case, folder, *case, tokens).result() for case in cases]
    results.keep("cases", [[*case, mebibytes] for case, mebibytes in zip(cases, usage, strict=True)])
    figures = []
    for (vocabulary, estimator, k), mebibytes in zip(cases, usage, strict=True):
        weights = mebibytes["weights"]
        name = f"{estimator}{f', K = {k}' if estimator == 'monte_carlo' else ''}, vocabulary {vocabulary:,}"
        detail = f"weights of {weights:.0f} MiB; activations of {8 * tokens} tokens {mebibytes['activations']:.0f} more"
        copies, private = mebibytes["resting"] / weights, mebibytes["private"] / weights
        figures.append(Figure(name, copies, "times the weights", detail, at_most=COPIES[estimator]))
        figures.append(Figure(f"{name}: private", private, "times the weights", at_most=COPIES[estimator] - 1))
    results.show(figures)


def _case(folder: str, vocabulary: int, estimator: Estimator, draws: int, tokens: int) -> Raw:
    path = str(Path(folder) / str(vocabulary))
    model = ModelSettings(path=path)
    ids = np.random.default_rng(0).integers(vocabulary, size=(8, tokens)).tolist()
    scored = [False] + [True] * (tokens - 1)
    samples: list[Sample] = [
        {"micro_batch": 0, "sample_id": str(i), "token_ids": x, "scored": scored} for i, x in enumerate(ids)
    ]
    scoring = ScoringSettings(estimator=estimator)
    _touch_libraries(samples, scoring)
    before = _resting()
    actor = ScoringActor(ScoringSetup(model, scoring, model_digest(model), 1, False, samples[:1]))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak of loading
    (result,) = actor(Unit(0, 0, 1, 0, draws).unit_id, pa.Table.from_pylist(samples)).to_pylist()
    if result["fatal"] or any(sample["error"] for sample in result["samples"]):
        raise RuntimeError(f"the unit failed: {result}")
    peak, after = resident("VmHWM"), _resting()
    return {
        "weights": (Path(path) / "model.safetensors").stat().st_size / 2**20,
        "resting": after["VmRSS"] - before["VmRSS"],
        "private": after["RssAnon"] - before["RssAnon"],
        "activations": peak - after["VmRSS"],
    }


def _resting() -> dict[Literal["VmRSS", "RssAnon"], float]:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return {"VmRSS": resident("VmRSS"), "RssAnon": resident("RssAnon")}


def _touch_libraries(samples: list[Sample], scoring: ScoringSettings) -> None:
    """Make a tiny first model, so that the libraries load their code and buffers."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = LlamaConfig(vocab_size=1 << 17, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                           num_attention_heads=1, tie_word_embeddings=True)  # fmt: skip
        LlamaForCausalLM(tiny).save_pretrained(folder)
        config = ModelSettings(path=folder)
        few: list[Sample] = [
            {**sample, "token_ids": sample["token_ids"][:4], "scored": sample["scored"][:4]} for sample in samples
        ]
        actor = ScoringActor(ScoringSetup(config, scoring, model_digest(config), 1, False, few[:1]))
        actor(Unit(0, 0, 1, 0, 1).unit_id, pa.Table.from_pylist(few))
