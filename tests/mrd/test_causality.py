"""What is not causal is found out, whatever its class is called; what is causal passes."""

import numpy as np
import pytest
import torch
from architectures import CONFIGS, GROUPED, SHAPE, model_of
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    Phi3Config,
    RobertaConfig,
    RobertaForCausalLM,
    XLNetConfig,
)

from mrd_ray import UserError
from mrd_ray.data.micro_batches import lay_out
from mrd_ray.models.load import context_length, rope_switch
from mrd_ray.mrd.causality import dependence
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.workers.replica import refuse_not_causal

ENCODERS = {"bert": (BertConfig, BertLMHeadModel), "roberta": (RobertaConfig, RobertaForCausalLM)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_causal_models_pass(name, dtype):
    assert dependence(model_of(name, dtype)) is None


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_refused_and_decoders_are_not(name):
    of_config, of_model = ENCODERS[name]
    torch.manual_seed(0)
    decoder, encoder = (of_model(of_config(**SHAPE, is_decoder=decodes)).eval() for decodes in (True, False))
    assert dependence(decoder) is None
    assert dependence(encoder) == "later tokens"
    with pytest.raises(UserError, match=f"{of_model.__name__} .model type {name}. is not causal here: .* later tokens"):
        refuse_not_causal(encoder)


def test_what_sees_the_padding_is_found_out():
    model = model_of("llama")
    forward = model.model.layers[0].forward

    def mixed(hidden, *args, **kwargs):
        """The batch's width moves every token."""
        return forward(hidden + hidden.shape[1] * 1e-2 * (hidden.shape[1] > 8), *args, **kwargs)

    model.model.layers[0].forward = mixed
    assert dependence(model) == "padding"


def test_longrope_does_not_depend_on_the_micro_batch():
    factors = {"short_factor": [1.0] * 3, "long_factor": [2.0, 5.0, 9.0]}
    config = Phi3Config(
        **GROUPED, pad_token_id=0, original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    assert rope_switch(config) == 16
    assert rope_switch(CONFIGS["llama"]) is None
    samples = [torch.arange(1, n + 1).tolist() for n in (15, 16, 17, 18, 8)]

    def log_probs(cut):
        found = {}
        for number in range(len(cut)):
            members = cut.samples(number)
            rows = [samples[i] for i in members]
            batch = MicroBatch.collate(rows, [[True] * len(row) for row in rows], model.device)
            values = Likelihood(model).log_neg_log_probs(batch)
            found |= {i: row[: len(samples[i]) - 1] for i, row in zip(members.tolist(), values, strict=True)}
        return found

    lengths = np.array([len(sample) for sample in samples])
    together, alone = log_probs(lay_out(lengths, 1000, rope_switch(config))), log_probs(lay_out(lengths, 1))
    for i in range(len(samples)):
        torch.testing.assert_close(together[i], alone[i], rtol=1e-9, atol=1e-9)
    mixed = log_probs(lay_out(lengths, 1000))
    assert (mixed[0] - alone[0]).abs().max() > 1e-4  # what the cut is for


@pytest.mark.parametrize("context", [4, 8, 12])
def test_a_short_context_is_no_obstacle(context):
    config = GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=context)
    assert dependence(AutoModelForCausalLM.from_config(config).eval()) is None


def test_a_context_of_minus_one_is_none():
    config = XLNetConfig(vocab_size=61, d_model=24, n_layer=2, n_head=4, d_inner=48)
    assert config.max_position_embeddings == -1
    assert context_length(config) is None
    assert dependence(AutoModelForCausalLM.from_config(config).eval()) == "later tokens"


def test_a_model_without_finite_logits_is_not_called_otherwise():
    model = model_of("llama")
    model.model.norm.weight.data.fill_(torch.nan)
    assert dependence(model) is None
