"""Where sigma drowns, each way out that the message names is one: an estimator of those settings does not refuse."""

import copy
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig

from mrd_ray import ScoringSettings, UserError
from mrd_ray.mrd.double import keep_float64
from mrd_ray.scoring import advice
from mrd_ray.scoring.estimators import estimator_of, refuse_wrong_rules

SHAPE = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, intermediate_size=48),
    "mixtral": MixtralConfig(**SHAPE, intermediate_size=48, num_key_value_heads=2, num_local_experts=4),
    "opt": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16),
}
TRIAL = [
    {"micro_batch": 0, "sample_id": str(i), "token_ids": ids, "scored": [True] * len(ids)}
    for i, ids in enumerate([[3, 5, 9, 3, 22, 17, 40, 8], [4, 33, 2], [9, 60, 59, 3, 3, 12, 14]])
]


def model_of(name, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return in_precision(model, dtype)


def in_precision(model, dtype):
    keep_float64(model.to(getattr(torch, dtype)))
    return model


def refusal(model, scoring) -> str:
    with pytest.raises(UserError) as refused:
        estimator_of(model, scoring, TRIAL)
    return str(refused.value)


def follow(message: str, model, scoring) -> set[str]:
    """Build an estimator for each way out, and tell the settings that the ways are of."""
    named = set()
    for way in re.search(r"Use (.*); or scoring.allow_low_precision", message)[1].split(", or "):
        changes, _, dropped = way.partition(", without ")
        new = {key: value.strip(",") for key, value in re.findall(r"([a-z_.]+): (\S+)", changes)}
        named |= {f"{key}: {value}" for key, value in new.items()}
        changed = copy.deepcopy(model)
        if "model.dtype" in new:
            changed = in_precision(changed, new.pop("model.dtype"))
        gone = {name.removeprefix("scoring.") for name in dropped.split(" and ")}
        settings = scoring.model_dump(exclude=gone) | {key.removeprefix("scoring."): new[key] for key in new}
        advised = ScoringSettings(**settings)
        refuse_wrong_rules(changed, advised)
        found = estimator_of(changed, advised, TRIAL)
        assert all(row["error"] is None for row in found(TRIAL, range(2)))
    return named


CLOSED = "scoring.estimator: closed_form"
PROBES = {CLOSED, "scoring.curvature_probes: 16"}


@pytest.mark.parametrize(("name", "dtype", "sigma", "antithetic", "expected"), [
    ("llama", "bfloat16", 1e-5, False, {"model.dtype: float32", CLOSED}),
    ("llama", "float32", 1e-9, False, {"model.dtype: float64", CLOSED, "scoring.sigma: 1e-07"}),
    ("llama", "float32", 1e-6, True, {"model.dtype: float64", "scoring.sigma: 0.0001", *PROBES}),
    ("llama", "bfloat16", 1e-6, True, {"model.dtype: float64", *PROBES}),  # float32 would not do
    ("mixtral", "float32", 1e-6, True, {"model.dtype: float64", "scoring.sigma: 0.001"}),  # no rules for experts
    ("opt", "float32", 1e-6, True, {"model.dtype: float64", "scoring.sigma: 0.001"}),  # no second derivatives
])  # fmt: skip
def test_each_way_out_is_one(name, dtype, sigma, antithetic, expected):
    model = model_of(name, dtype)
    scoring = ScoringSettings(sigma=sigma, antithetic=antithetic)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    message = refusal(model, scoring)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert follow(message, model, scoring) == expected


def test_where_nothing_does_nothing_is_advised():
    model = model_of("opt", "float64")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # nothing before it matters
    scoring = ScoringSettings(parameters="layers", antithetic=True)  # kinks allow no probes
    assert "No other setting that was tried works; set scoring.allow_low_precision" in refusal(model, scoring)


def test_what_there_is_no_memory_to_try_is_not_advised(monkeypatch):
    model, scoring = model_of("llama", "float32"), ScoringSettings(sigma=1e-6, antithetic=True)
    monkeypatch.setattr(advice.os, "cpu_count", lambda: 10**9)  # a billion actors beside this one
    assert "float64" not in refusal(model, scoring)
