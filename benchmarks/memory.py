"""Memory of a scoring actor over one unit, beside its weights: two copies for Monte Carlo, one for the closed form."""

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
from mrd_ray import ModelConfig, ScoringConfig, models
from mrd_ray.scoring import plan
from mrd_ray.scoring.actor import ScoringActor, Task

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

    What lies beyond the copies of the weights is activations, for which a model of the same layers with a unit of
    half the tokens is run: two sizes give the part that does not go with tokens.

    Args:
        out: folder of the JSON file.
        vocabularies: of models made up, which decide how large the output layer is.
        draws: K of monte_carlo.
        hidden_size: of the models.
        tokens: of a sample; eight samples are a unit.
    """
    results = Results("memory", locals(), out)
    shape: Raw = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": 2}
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in vocabularies:
            llama = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, num_attention_heads=16, **shape)
            LlamaForCausalLM(llama).save_pretrained(f"{folder}/{vocabulary}")
        # a fresh process each, for a peak cannot be undone; one after another, since they are large
        spawn = multiprocessing.get_context("spawn")
        cases: list[tuple[int, Estimator, int]] = []
        for vocabulary in vocabularies:
            cases += [(vocabulary, "monte_carlo", k) for k in draws] + [(vocabulary, "closed_form", 1)]
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
            found = [
                {n: processes.submit(_case, folder, *case, n).result() for n in (tokens, tokens // 2)} for case in cases
            ]
    results.keep("cases", [[*case, *sizes.values()] for case, sizes in zip(cases, found, strict=True)])
    figures = []
    for (vocabulary, estimator, k), sizes in zip(cases, found, strict=True):
        whole, half = sizes[tokens], sizes[tokens // 2]
        resting = 2 * half["peak"] - whole["peak"]  # where activations, which go with tokens, come to none
        name = f"{estimator}{f', K = {k}' if estimator == 'monte_carlo' else ''}, vocabulary {vocabulary:,}"
        detail = f"peak {whole['peak']:.0f} MiB, of which {whole['before']:.0f} before loading, beside weights of "
        detail += f"{whole['weights']:.0f}; activations of {8 * tokens} tokens {whole['peak'] - resting:.0f}"
        copies = (resting - whole["before"]) / whole["weights"]
        figures.append(Figure(name, copies, "times the weights", detail, at_most=COPIES[estimator]))
    results.show(figures)


def _case(folder: str, vocabulary: int, estimator: Estimator, draws: int, tokens: int) -> Raw:
    path = str(Path(folder) / str(vocabulary))
    model = ModelConfig(path=path)
    ids = np.random.default_rng(0).integers(vocabulary, size=(8, tokens)).tolist()
    scored = [False] + [True] * (tokens - 1)
    samples = [{"micro_batch": 0, "sample_id": str(i), "token_ids": x, "scored": scored} for i, x in enumerate(ids)]
    scoring = ScoringConfig(estimator=estimator)
    _touch_libraries(samples, scoring)
    before = resident("VmRSS")
    actor = ScoringActor(Task(model, scoring, models.files_digest(model), 1, False, samples[:1]))
    (result,) = actor(plan.Unit(0, 0, 1, 0, draws).unit_id, pa.Table.from_pylist(samples)).to_pylist()
    if result["fatal"] or any(sample["error"] for sample in result["samples"]):
        raise RuntimeError(f"the unit failed: {result}")
    weights = (Path(path) / "model.safetensors").stat().st_size / 2**20
    return {"before": before, "peak": resident("VmHWM"), "weights": weights}


def _touch_libraries(samples: list[Raw], scoring: ScoringConfig) -> None:
    """What the first model of a process brings with it, whatever its size: code and buffers of the libraries."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = LlamaConfig(vocab_size=1 << 17, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                           num_attention_heads=1, tie_word_embeddings=True)  # fmt: skip
        LlamaForCausalLM(tiny).save_pretrained(folder)
        config = ModelConfig(path=folder)
        few = [sample | {"token_ids": sample["token_ids"][:4], "scored": sample["scored"][:4]} for sample in samples]
        actor = ScoringActor(Task(config, scoring, models.files_digest(config), 1, False, few[:1]))
        actor(plan.Unit(0, 0, 1, 0, 1).unit_id, pa.Table.from_pylist(few))
