"""Digests that tell weights apart, and models that are refused."""

import shutil

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from mrd_ray import models
from mrd_ray.config import ModelConfig
from mrd_ray.errors import UserError


def test_directory_without_weights(tmp_path, tiny_model_dir):
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"model\.path: .* has no weights"):
        models.files_digest(tmp_path)


def test_neither_directory_nor_hub_id():
    with pytest.raises(UserError, match=r"model\.path: /no/such/place is neither"):
        models.directory(ModelConfig(path="/no/such/place"))
    with pytest.raises(UserError, match=r"model\.path: nobody/nothing is neither"):
        models.directory(ModelConfig(path="nobody/nothing"))


def test_directory_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"model\.path"):
        models.load_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.path: .*config\.json"):
        models.files_digest(tmp_path)


def test_files_digest_sees_one_bit(tmp_path, tiny_model_dir):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "m")
    assert models.files_digest(copy) == models.files_digest(tiny_model_dir)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert models.files_digest(copy) != models.files_digest(tiny_model_dir)


def test_damaged_weights(tmp_path, tiny_model_dir):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "m")
    (copy / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model\.path: cannot load"):
        models.load_model(copy, "float32", torch.device("cpu"))


def test_weights_digest_sees_names_and_bits():
    one = {"a": torch.tensor([0.0]), "b": torch.tensor([1.0])}
    assert models.weights_digest(one) == models.weights_digest(dict(reversed(one.items())))
    assert models.weights_digest(one) != models.weights_digest(one | {"a": torch.tensor([-0.0])})
    assert models.weights_digest(one) != models.weights_digest({"b": one["a"], "a": one["b"]})


def test_tokenizer_digest(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    before = models.tokenizer_digest(tokenizer)
    assert models.tokenizer_digest(AutoTokenizer.from_pretrained(tiny_model_dir)) == before
    tokenizer.chat_template = "x"
    assert models.tokenizer_digest(tokenizer) != before


def test_context_length(tiny_model_dir):
    assert models.context_length(AutoConfig.from_pretrained(tiny_model_dir)) == 128
