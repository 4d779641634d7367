"""Per-sample gradient norms of mixtures of experts: compares the rules with autograd, one sample at a time."""

import functools
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import Raw, stopwatch
from benchmarks.figures import Figure, Results, ratios
from mrd_ray.mrd.autograd import square_norms
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.likelihood import LogNegLogProb, MicroBatch

_FAMILIES: dict[str, Raw] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 4},
    "gpt_oss": {"num_local_experts": 16, "num_experts_per_tok": 4},
}


def main(
    hidden: int = 512,
    layers: int = 4,
    samples: int = 8,
    tokens: int = 128,
    repeats: int = 3,
    threads: int = 1,
    device: str = "cpu",
    out: str = "benchmarks/results",
) -> None:
    """Benchmark norms of random models with random samples; the ways take turns.

    Args:
        hidden: width of the models and of their experts.
        layers: number of layers of the models.
        samples: number of samples in the batch.
        tokens: per sample.
        repeats: of each way.
        threads: number of torch threads.
        device: where the models are.
        out: folder of the JSON file.
    """
    results = Results("experts", locals(), out)
    torch.set_num_threads(threads)
    figures = []
    for family in _FAMILIES:
        model: Any = _model(family, hidden, layers)
        model.to(device)
        timed = _timed(model, samples, tokens, repeats)
        results.keep(family, timed | {"parameters": model.num_parameters()})
        times = ratios(timed["autograd"], timed["rules"])
        size = f"{model.num_parameters() / 1e6:.0f} M parameters; largest difference {timed['difference']:.1g}"
        figures.append(Figure.of(f"{family}: autograd / rules, time", times, detail=size, at_least=1.0))
    results.show(figures)


def _model(family: str, hidden: int, layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": layers, "vocab_size": 8192}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": hidden // 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **shape, **heads, **tokens, **_FAMILIES[family])
    model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model.eval()


def _timed(model: PreTrainedModel, samples: int, tokens: int, repeats: int) -> Raw:
    """Seconds of each way by repetition, and the largest relative difference of a norm."""
    ids = torch.randint(3, 8192, (samples, tokens)).to(model.device)
    batch = MicroBatch(ids, torch.ones(samples, tokens - 1, dtype=torch.bool, device=model.device))
    norms, parameters = GradientNorms(model), dict(model.named_parameters())

    def rules() -> torch.Tensor:
        return norms(batch)[1].cpu()

    def autograd() -> torch.Tensor:
        objectives = [functools.partial(_objective, model, row) for row in ids.split(1)]
        squares = [sum(square_norms(model, parameters, objective).values()) for objective in objectives]
        return torch.tensor(squares, dtype=torch.float64)

    seconds: dict[str, list[float]] = {"rules": [], "autograd": []}
    for _ in range(repeats + 1):
        lap = stopwatch()
        ours = rules()
        seconds["rules"].append(lap())
        theirs = autograd()
        seconds["autograd"].append(lap())
    difference = float((ours.sqrt() / theirs.sqrt() - 1).abs().max())
    return {way: timed[1:] for way, timed in seconds.items()} | {"difference": difference}  # the first is the warm-up


def _objective(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """sum_t log(-P_t) of one sample, [1, T]."""
    values: torch.Tensor = LogNegLogProb.apply(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:], False)
    return values.sum()
