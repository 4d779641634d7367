"""Models larger than a device, on paper: `mrd-ray plan` estimates their memory and time; nothing runs."""

import dataclasses
import tempfile
from typing import NamedTuple

from transformers import LlamaConfig

from benchmarks.figures import Figure, Results
from mrd_ray import PlanConfig, plan

_LLAMA_3_1 = {  # hidden and intermediate size, layers, heads
    "8B": (4096, 14336, 32, 32),
    "70B": (8192, 28672, 80, 64),
}


class _Way(NamedTuple):
    size: str
    estimator: str
    dtype: str
    gpus: int


_WAYS = [
    _Way("8B", "closed_form", "bfloat16", 1),
    _Way("8B", "monte_carlo", "float32", 1),
    _Way("70B", "closed_form", "bfloat16", 4),
    _Way("70B", "closed_form", "float32", 8),
    _Way("70B", "monte_carlo", "float32", 8),
]


def main(
    tokenizer: str,
    data: str,
    out: str = "benchmarks/results",
    max_samples: int = 400,
    draws: int = 200,
    gpu_gib: float = 80.0,
    tflops_bfloat16: float = 300.0,
    tflops_float32: float = 25.0,
) -> None:
    """Plan scoring with Llama 3.1 8B and 70B and one actor.

    Args:
        tokenizer: directory or hub id; other tokenizers than Llama's make other numbers of tokens.
        data: forget set.
        out: folder of the JSON file.
        max_samples: rows of the forget set.
        draws: K of monte_carlo.
        gpu_gib: memory of a GPU.
        tflops_bfloat16: sustained rate of a GPU, an assumption. One of an actor's GPUs works at a time.
        tflops_float32: the same without TF32.
    """
    results = Results("on_paper", locals(), out)
    figures = []
    for way in _WAYS:
        hidden, intermediate, layers, heads = _LLAMA_3_1[way.size]
        shape = LlamaConfig(
            vocab_size=128256, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=8, max_position_embeddings=131072,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            shape.save_pretrained(folder)
            tree: dict[str, object] = {"model": {"path": folder, "tokenizer": tokenizer, "dtype": way.dtype}}
            tree["data"] = {"path": data, "max_samples": max_samples}
            tree["scoring"] = {"estimator": way.estimator, "micro_batch_tokens": 16384, "num_draws": draws}
            tree["ray"] = {"actors": 1, "gpus_per_actor": way.gpus}
            tree["tflops"] = tflops_bfloat16 if way.dtype == "bfloat16" else tflops_float32
            cost = plan(PlanConfig.model_validate(tree))
        name = f"{way.size}, {way.estimator}, {way.dtype}"
        results.keep(name, dataclasses.asdict(cost))
        each = cost.weight_bytes_per_actor / 2**30 / way.gpus
        detail = f"on each of {way.gpus} GPU(s), on average; {gpu_gib - each:.0f} GiB are left"
        figures.append(Figure(f"{name}: weights", each, "GiB", detail, at_most=0.9 * gpu_gib))
        detail = f"{cost.device_hours:.3g} GPU-hours for {cost.samples} samples of {cost.tokens:,} tokens; no loading"
        figures.append(Figure(f"{name}: time", cost.seconds / 60, "min", detail))
    results.show(figures)
