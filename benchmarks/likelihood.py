"""Forwards of a forget set: their rate compared with matrix products, where the time goes, and the share of padding."""

from typing import Literal

import torch

from benchmarks.common import Batches, stopwatch
from benchmarks.figures import Figure, Results, ratios
from mrd_ray import ScoreConfig
from mrd_ray.mrd.likelihood import Likelihood
from mrd_ray.scoring.cost import ModelCost

_PRODUCT = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices


def main(
    model: str,
    data: str,
    out: str = "benchmarks/results",
    max_samples: int = 400,
    micro_batch_tokens: int | None = None,
    repeats: int = 3,
    threads: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Benchmark the pass over a forget set that every draw makes.

    Model FLOPs are two for each weight and token. The output layer only counts scored tokens; padding does not count.

    Args:
        model: directory or hub id; the demo keeps one under ~/.cache/mrd_ray.
        data: forget set, for example TOFU's ../shared/data/tofu/forget10.json.
        out: folder of the JSON file.
        max_samples: rows of the forget set.
        micro_batch_tokens: tokens per forward, padding included (default: as in scoring).
        repeats: passes, each with a matrix product just before and after it.
        threads: number of torch threads.
        device: where the model is.
        dtype: of the weights and of the matrix product.
    """
    results = Results("likelihood", locals(), out)
    torch.set_num_threads(threads)
    scoring = {} if micro_batch_tokens is None else {"micro_batch_tokens": micro_batch_tokens}
    tree = {
        "model": {"path": model, "dtype": dtype},
        "data": {"path": data, "max_samples": max_samples},
        "scoring": scoring,
    }
    work = Batches(ScoreConfig.model_validate(tree | {"run": {"dir": "unused"}}), device)
    likelihood = Likelihood(work.model)
    head = work.model.get_output_embeddings().weight.numel()
    layers = ModelCost.of(work.model).flops_per_token - 2 * head
    scored = sum(int(batch.scored.sum()) for batch in work.batches)
    flops = work.size["tokens"] * layers + scored * 2 * head
    likelihood.margins(work.batches[0])
    products, passes, bodies = [], [], []
    for _ in range(repeats):
        before = _product_flops(device, dtype)
        lap = stopwatch()
        for batch in work.batches:
            likelihood.margins(batch)
        passes.append(lap())
        with torch.no_grad():
            for batch in work.batches:
                work.model.base_model(batch.token_ids, use_cache=False)
        bodies.append(lap())
        products.append((before + _product_flops(device, dtype)) / 2)
    results.keep("size", work.size | {"scored tokens": scored, "FLOPs": flops})
    results.keep("seconds", {"passes": passes, "layers alone": bodies})
    results.keep("matrix product, FLOP/s", products)
    rates = [flops / seconds for seconds in passes]
    of_layers = [work.size["tokens"] * layers / seconds for seconds in bodies]
    waste = 1 - work.size["tokens"] / work.size["padded tokens"]
    results.show(
        [
            Figure.of("matrix product", [rate / 1e9 for rate in products], "GFLOP/s",
                      f"{dtype}, {_PRODUCT[device]:,} squared"),
            Figure.of("forwards, of the product's rate", ratios(rates, products), at_least=0.75,
                      detail=f"{scored:,} tokens, margins included"),
            Figure.of("layers alone, of the product's rate", ratios(of_layers, products)),
            Figure("padding", waste, detail="of the positions in forwards", at_most=0.05),
        ]
    )  # fmt: skip


def _product_flops(device: str, dtype: str, seconds: float = 1.0) -> float:
    """FLOP/s of products of square matrices."""
    size = _PRODUCT[device]
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))
    out = a @ b
    lap, spent, times = stopwatch(), 0.0, 0
    while spent < seconds:
        torch.mm(a, b, out=out)
        spent += lap()
        times += 1
    return times * 2 * size**3 / spent
