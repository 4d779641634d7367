"""Digests that tell weights apart, and models that are refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
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


def test_home_directory(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    copy = shutil.copytree(tiny_model_dir, tmp_path / "m")
    assert models.directory(ModelConfig(path="~/m")) == copy
    assert models.load_tokenizer(ModelConfig(path="none", tokenizer="~/m")).eos_token == "</s>"


@pytest.fixture
def cached(tmp_path, tiny_model_dir, monkeypatch):
    """A hub id in the local cache; its revision v2 has another tokenizer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    for revision, commit in (("main", "0" * 40), ("v2", "1" * 40)):
        (repo / "refs" / revision).write_text(commit)
        shutil.copytree(tiny_model_dir, repo / "snapshots" / commit)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["mill"])
    tokenizer.save_pretrained(repo / "snapshots" / ("1" * 40))
    return "some/model"


@pytest.mark.parametrize(("revision", "known"), [(None, False), ("main", False), ("v2", True)])
@pytest.mark.parametrize("named", [False, True])
def test_tokenizer_of_the_models_revision(cached, revision, known, named):
    config = ModelConfig(path=cached, revision=revision, tokenizer=cached if named else None)
    assert ("mill" in models.load_tokenizer(config).get_vocab()) == known


def test_revision_is_the_models_alone(cached, tiny_model_dir):
    config = ModelConfig(path=str(tiny_model_dir), revision="v2", tokenizer=cached)
    assert "mill" not in models.load_tokenizer(config).get_vocab()


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


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:1000], lambda content: content[:-9]])
def test_damaged_weights(tmp_path, tiny_model_dir, damage):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "m")
    (copy / "model.safetensors").write_bytes(damage((copy / "model.safetensors").read_bytes()))
    with pytest.raises(UserError, match=r"model\.path: cannot load"):
        models.load_model(copy, "float32", torch.device("cpu"))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(UP), rf"lack 1 parameter\(s\) of its configuration, first {UP}"),
        (lambda tensors: tensors.update({UP: tensors[UP][:3].clone()}), "cannot load"),
        (lambda tensors: tensors[UP][3].fill_(torch.nan), rf"NaN or infinite weights in 1 .*, first in {UP}"),
        (lambda tensors: tensors[UP][3].fill_(torch.inf), rf"NaN or infinite weights in 1 .*, first in {UP}"),
    ],
    ids=["missing", "other shape", "nan", "inf"],
)
def test_wrong_weights(tmp_path, tiny_model_dir, change, message):
    """Above all: transformers fills missing weights at random and goes on."""
    copy = shutil.copytree(tiny_model_dir, tmp_path / "m")
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        models.load_model(copy, "float32", torch.device("cpu"))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "nosuch"}'])
def test_unreadable_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.path: .* is not a model directory that transformers reads"):
        models.load_config(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_unreadable_tokenizer(tmp_path, tiny_model_dir, content):
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.tokenizer: .* holds no tokenizer"):
        models.load_tokenizer(ModelConfig(path=str(tiny_model_dir), tokenizer=str(tmp_path)))


def test_real_model(stories_dir):
    model = models.load_model(stories_dir, "float32", torch.device("cpu"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    assert models.context_length(model.config) == 512


def test_weights_digest_sees_names_and_bits():
    one = {"a": torch.tensor([0.0]), "b": torch.tensor([1.0])}
    assert models.weights_digest(one) == models.weights_digest(dict(reversed(one.items())))
    assert models.weights_digest(one) != models.weights_digest(one | {"a": torch.tensor([-0.0])})
    assert models.weights_digest(one) != models.weights_digest({"b": one["a"], "a": one["b"]})
    assert models.weights_digest(one) != models.weights_digest({"a": one["a"], "c": one["b"]})
    assert models.weights_digest(one) != models.weights_digest(one | {"a": one["a"].view(1, 1)})
    assert models.weights_digest(one) != models.weights_digest(one | {"b": one["b"].view(torch.int32)})


def test_tokenizer_digest(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    before = models.tokenizer_digest(tokenizer)
    assert models.tokenizer_digest(AutoTokenizer.from_pretrained(tiny_model_dir)) == before
    tokenizer("what is it", truncation=True, max_length=2)
    assert models.tokenizer_digest(tokenizer) == before
    tokenizer.chat_template = "x"
    with_template = models.tokenizer_digest(tokenizer)
    tokenizer.add_tokens(["mill"])
    assert len({before, with_template, models.tokenizer_digest(tokenizer)}) == 3


def test_context_length(tiny_model_dir):
    assert models.context_length(AutoConfig.from_pretrained(tiny_model_dir)) == 128


def test_bfloat16_rounds_weights_and_not_rotary_angles(tiny_model_dir):
    """Rotary frequencies in bfloat16 would be another model: angles off by radians at long positions."""
    model = models.load_model(tiny_model_dir, "bfloat16", torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact = models.load_model(tiny_model_dir, "float32", torch.device("cpu"))
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)
