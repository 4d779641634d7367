"""Compares a draw's perturbation of a whole model with a copy of the same weights and with a forward."""

from typing import Any, Literal

import torch

from benchmarks.common import stopwatch
from benchmarks.figures import Figure, Results, ratios
from mrd_ray import ModelSettings
from mrd_ray.models import load
from mrd_ray.mrd.monte_carlo import noise_key
from mrd_ray.mrd.perturb import Replica


def main(
    model: str,
    out: str = "benchmarks/results",
    repeats: int = 7,
    threads: int = 1,
    tokens: int = 512,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Benchmark `Replica.perturb`: its share of memory traffic, and its cost in tokens' forwards.

    Args:
        model: directory or hub id; the demo keeps one under ~/.cache/mrd_ray.
        out: folder of the JSON file.
        repeats: of each way; they take turns.
        threads: number of torch threads.
        tokens: of the forward to compare with.
        device: where the model is.
        dtype: of the weights.
    """
    results = Results("perturb", locals(), out)
    torch.set_num_threads(threads)
    loaded = load.load_model(ModelSettings(path=model, dtype=dtype), torch.device(device))
    replica = Replica(loaded)
    size = sum(parameter.numel() for parameter in loaded.parameters())
    token_ids = torch.randint(loaded.config.vocab_size, (tokens // 64, 64), device=device)

    def forward() -> None:
        with torch.no_grad():
            loaded(token_ids, use_cache=False)

    def copy() -> None:
        for name, shard in replica.working().items():
            shard.tensor.copy_(replica.base[name])

    ways = {"perturb": lambda: replica.perturb(1e-5, noise_key(0, 0)), "copy": copy, "forward": forward}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):  # the first one warms up
        for way, run in ways.items():
            lap = stopwatch()
            run()
            if repeat:
                seconds[way].append(lap())
    results.keep("seconds", seconds)
    bandwidth = ratios(seconds["copy"], seconds["perturb"])
    bound: dict[str, Any] = {"at_least": 0.8} if device == "cuda" else {"detail": "a CPU makes noise for longer"}
    in_tokens = [tokens * ratio for ratio in ratios(seconds["perturb"], seconds["forward"])]
    results.show(
        [
            Figure.of("perturb", [1e9 * s / size for s in seconds["perturb"]], "ns a weight"),
            Figure.of("copy", [1e9 * s / size for s in seconds["copy"]], "ns a weight", "one read, one write"),
            Figure.of("perturb, of a copy's bandwidth", bandwidth, **bound),
            Figure.of("perturb, in tokens' forwards", in_tokens, detail="the plan counts 256", at_most=256.0),
        ]
    )
