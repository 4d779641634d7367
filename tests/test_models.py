"""Digests that tell weights apart, and models that are refused."""

import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mrd_ray import models
from mrd_ray.config import ModelConfig
from mrd_ray.errors import UserError

CPU = torch.device("cpu")


def of(folder, **settings) -> ModelConfig:
    return ModelConfig(path=str(folder), **settings)


def test_directory_without_weights(tmp_path, tiny_model_dir):
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"model\.path: .* has no weights"):
        models.files_digest(of(tmp_path))


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
        models.load_config(of(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.path: .*config\.json"):
        models.files_digest(of(tmp_path))


def test_files_digest_sees_one_bit(tmp_path, tiny_model_dir):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "m")
    assert models.files_digest(of(copy)) == models.files_digest(of(tiny_model_dir))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert models.files_digest(of(copy)) != models.files_digest(of(tiny_model_dir))


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:1000], lambda content: content[:-9]])
def test_damaged_weights(tmp_path, tiny_model_dir, damage):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "m")
    (copy / "model.safetensors").write_bytes(damage((copy / "model.safetensors").read_bytes()))
    with pytest.raises(UserError, match=r"model\.path: cannot load"):
        models.load_model(of(copy), CPU)


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
        models.load_model(of(copy), CPU)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "nosuch"}'])
def test_unreadable_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.path: .* is not a model directory that transformers reads"):
        models.load_config(of(tmp_path))


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_unreadable_tokenizer(tmp_path, tiny_model_dir, content):
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.tokenizer: .* holds no tokenizer"):
        models.load_tokenizer(ModelConfig(path=str(tiny_model_dir), tokenizer=str(tmp_path)))


def test_real_model(stories_dir):
    model = models.load_model(of(stories_dir), CPU)
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
    model = models.load_model(of(tiny_model_dir, dtype="bfloat16"), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact = models.load_model(of(tiny_model_dir), CPU)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


class Trap:
    """What a pickle can do to whoever reads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def pickled(tmp_path, tiny_model_dir):
    """The tiny model, with its weights in a pickle alone."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "pickled")
    weights = load_file(folder / "model.safetensors")
    torch.save(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_are_read_on_request_alone(pickled, tiny_model_dir):
    refused = r"model\.path: .*pytorch_model\.bin is a pickle.*model\.allow_pickle: true"
    for refuse in (models.files_digest, lambda model: models.load_model(model, CPU)):
        with pytest.raises(UserError, match=refused):
            refuse(of(pickled))
    allowed = of(pickled, allow_pickle=True)
    models.files_digest(allowed)
    expected = models.load_model(of(tiny_model_dir), CPU).state_dict()
    assert models.weights_digest(models.load_model(allowed, CPU).state_dict()) == models.weights_digest(expected)


def test_a_pickle_beside_safetensors_is_not_read(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    torch.save(Trap(tmp_path / "sprung"), folder / "pytorch_model.bin")
    for allow_pickle in (False, True):
        models.load_model(of(folder, allow_pickle=allow_pickle), CPU)
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def adapter(tmp_path, tiny_model_dir):
    """A LoRA adapter of the tiny model, which does something."""
    torch.manual_seed(0)
    shape = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), shape).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_safetensors_that_no_loader_looks_for_excuse_no_pickle(pickled, adapter):
    for folder, name in ((pickled, "other.safetensors"), (adapter, "adapter_model_other.safetensors")):
        if folder == adapter:
            torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
            (adapter / "adapter_model.safetensors").rename(adapter / name)
        else:
            save_file({"a": torch.zeros(1)}, folder / name)
        for refuse in (models.files_digest, lambda model: models.load_model(model, CPU)):
            with pytest.raises(UserError, match=r"model\.bin is a pickle"):
                refuse(of(folder))
    (pickled / "pytorch_model.bin").write_bytes(b"other weights")
    before = models.files_digest(of(pickled, allow_pickle=True))
    (pickled / "pytorch_model.bin").write_bytes(b"weights")
    assert models.files_digest(of(pickled, allow_pickle=True)) != before


def test_an_index_names_safetensors_that_are_there_or_is_refused(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    whole = models.load_model(of(folder), CPU)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    parts = models.weight_files(of(folder))
    assert len(parts) > 1
    assert models.weights_digest(models.load_model(of(folder), CPU).state_dict()) == models.weights_digest(
        whole.state_dict()
    )
    before = models.files_digest(of(folder))
    (folder / "other.safetensors").write_bytes(b"which nobody reads")
    assert models.files_digest(of(folder)) == before
    good = json.loads(index.read_text())
    for name in ("weights.bin", "absent.safetensors"):
        (folder / "weights.bin").write_bytes(b"x")
        index.write_text(json.dumps(good | {"weight_map": dict.fromkeys(good["weight_map"], name)}))
        with pytest.raises(UserError, match=f"names {name}"):
            models.load_model(of(folder), CPU)
    for content in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(content)
        with pytest.raises(UserError, match="is no index of safetensors"):
            models.files_digest(of(folder))


def test_weights_of_another_name_are_refused(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"transformers_weights": "adapter_model.bin"}))
    with pytest.raises(UserError, match=r"takes weights from adapter_model\.bin \(transformers_weights\)"):
        models.load_model(of(folder), CPU)


@pytest.mark.parametrize("beside", ["base", "config"])
def test_a_pickled_adapter_is_read_on_request_alone(adapter, beside, tiny_model_dir):
    """Also of an adapter that lies beside a whole model."""
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    if beside == "config":
        shutil.copytree(tiny_model_dir, adapter, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"model\.path: .*adapter_model\.bin is a pickle"):
        models.load_model(of(adapter), CPU)
    with pytest.raises(UserError, match=r"model\.path: .*adapter_model\.bin is a pickle"):
        models.files_digest(of(adapter))
    if beside == "base":  # the other way round transformers finds safetensors alone
        model = models.load_model(of(adapter, allow_pickle=True), CPU)
        assert any("lora_" in name for name, _ in model.named_parameters())


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

{mark}


class SaltedConfig(LlamaConfig):
    model_type = "salted"


class SaltedForCausalLM(LlamaForCausalLM):
    config_class = SaltedConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = {salt} * found.logits
        return found
"""


@pytest.fixture
def custom(tmp_path, tiny_model_dir):
    """A model with code of its own, which leaves a mark when it runs."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "custom")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "salted.SaltedConfig", "AutoModelForCausalLM": "salted.SaltedForCausalLM"}
    config |= {"model_type": "salted", "architectures": ["SaltedForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    mark = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    (folder / "salted.py").write_text(CODE.format(mark=mark, salt=2))
    return folder


def test_code_of_a_model_runs_on_request_alone(custom, tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked: {question}"))
    uses = (models.load_config, models.skeleton, models.ending_ids, lambda model: models.load_model(model, CPU))
    for use in uses:
        with pytest.raises(
            UserError, match=r"model\.path: .*custom needs Python code .*model\.trust_remote_code: true"
        ):
            use(of(custom))
    assert models.load_tokenizer(of(custom)).eos_token == "</s>"
    assert not (tmp_path / "ran").exists()

    trusted = of(custom, trust_remote_code=True)
    for use in uses:
        use(trusted)
    ids = torch.arange(8)[None]
    plain, salted = (models.load_model(model, CPU)(ids).logits for model in (of(tiny_model_dir), trusted))
    torch.testing.assert_close(salted, 2 * plain)
    models.load_model(trusted, CPU).save_pretrained(tmp_path / "saved")  # as a run leaves its result
    again = models.load_model(of(tmp_path / "saved", trust_remote_code=True), CPU)(ids).logits
    torch.testing.assert_close(again, salted)


def test_digest_covers_code_that_may_run(custom):
    trusted = of(custom, trust_remote_code=True)
    before = models.files_digest(trusted), models.files_digest(of(custom))
    (custom / "salted.py").write_text(CODE.format(mark="", salt=3))
    after = models.files_digest(trusted), models.files_digest(of(custom))
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_code_of_another_repository_is_refused(custom):
    """The digest could not answer for it."""
    content = (custom / "config.json").read_text()
    (custom / "config.json").write_text(content.replace("salted.SaltedForCausalLM", "some/where--salted.Salted"))
    with pytest.raises(UserError, match=r"takes code from another repository \(some/where--salted\.Salted\)"):
        models.load_model(of(custom, trust_remote_code=True), CPU)


def test_code_of_a_tokenizer_runs_on_request_alone(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": [None, "odd.Odd"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    code = "from transformers import PreTrainedTokenizerFast\n\n\nclass Odd(PreTrainedTokenizerFast):\n    odd = True\n"
    (folder / "odd.py").write_text(code)
    (folder / "config.json").write_text(json.dumps({"model_type": "unknown"}))
    with pytest.raises(UserError, match=r"model\.tokenizer: .* needs Python code .*model\.trust_remote_code: true"):
        models.load_tokenizer(of(tiny_model_dir, tokenizer=str(folder)))
    assert models.load_tokenizer(of(tiny_model_dir, tokenizer=str(folder), trust_remote_code=True)).odd
