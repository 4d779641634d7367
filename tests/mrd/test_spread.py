"""A model whose layers are on several devices: `accelerate` replaces each layer's forward by one that moves inputs."""

import pytest
import torch
from accelerate import dispatch_model
from architectures import CONFIGS, batch_of, model_of
from transformers import AutoModelForCausalLM

from mrd_ray import ModelSettings
from mrd_ray.models import load
from mrd_ray.mrd.autograd_check import disagreements
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.perturb import Replica

NAMES = ["llama", "llama-tied", "gpt2"]


def found(model: torch.nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a draw, and of the closed form."""
    norms = GradientNorms(model)
    assert disagreements(norms) == []
    _, squares = norms(batch)
    Replica(model).perturb(1e-2, noise_key=3)
    return Likelihood(model).margins(batch), squares


@pytest.mark.parametrize("name", NAMES)
def test_forwards_that_move_inputs_change_nothing(name):
    expected = found(model_of(name, torch.float32), batch_of())
    model = dispatch_model(model_of(name, torch.float32), {"": "cpu"}, force_hooks=True)
    assert "forward" in vars(model.get_output_embeddings())
    for alone, moved in zip(expected, found(model, batch_of()), strict=True):
        torch.testing.assert_close(moved, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_two_gpus_score_as_one(name, tmp_path):
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    config, first = ModelSettings(path=str(tmp_path)), torch.device("cuda", 0)
    batch = MicroBatch(batch_of().token_ids.to(first), batch_of().scored.to(first))
    expected = found(load.load_model(config, first), batch)
    spread = load.load_model(config, first, spread=True)
    assert len(set(spread.hf_device_map.values())) == 2
    for alone, over_two in zip(expected, found(spread, batch), strict=True):
        torch.testing.assert_close(over_two, alone, rtol=1e-5, atol=1e-6)
