"""Files that a model is read from, or not, and a digest that tells them apart."""

import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mrd_ray.config import ModelSettings
from mrd_ray.errors import UserError
from mrd_ray.models import load
from mrd_ray.models.files import directory, model_digest, safetensors_of, weight_files

CPU = torch.device("cpu")


def of(folder, **settings) -> ModelSettings:
    return ModelSettings(path=str(folder), **settings)


def test_directory_without_weights(tmp_path, tiny_model_dir):
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"model\.path: .* has no weights"):
        model_digest(of(tmp_path))


def test_neither_directory_nor_hub_id():
    with pytest.raises(UserError, match=r"model\.path: /no/such/place is neither"):
        directory(ModelSettings(path="/no/such/place"))
    with pytest.raises(UserError, match=r"model\.path: nobody/nothing is neither"):
        directory(ModelSettings(path="nobody/nothing"))


def test_home_directory(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    copy = shutil.copytree(tiny_model_dir, tmp_path / "m")
    assert directory(ModelSettings(path="~/m")) == copy
    assert load.load_tokenizer(ModelSettings(path="none", tokenizer="~/m")).eos_token == "</s>"


def test_files_digest_sees_one_bit(tmp_path, tiny_model_dir):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "m")
    assert model_digest(of(copy)) == model_digest(of(tiny_model_dir))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert model_digest(of(copy)) != model_digest(of(tiny_model_dir))


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
    for refuse in (model_digest, lambda model: load.load_model(model, CPU)):
        with pytest.raises(UserError, match=refused):
            refuse(of(pickled))
    allowed = of(pickled, allow_pickle=True)
    model_digest(allowed)
    expected = load.load_model(of(tiny_model_dir), CPU).state_dict()
    assert load.weights_digest(load.load_model(allowed, CPU).state_dict()) == load.weights_digest(expected)


def test_a_pickle_beside_safetensors_is_not_read(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    torch.save(Trap(tmp_path / "sprung"), folder / "pytorch_model.bin")
    for allow_pickle in (False, True):
        load.load_model(of(folder, allow_pickle=allow_pickle), CPU)
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def adapter(tmp_path, tiny_model_dir):
    """A LoRA adapter of the tiny model, which does something."""
    torch.manual_seed(0)
    shape = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), shape).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_safetensors_that_no_loader_looks_for_excuse_no_pickle(pickled, adapter, tiny_model_dir):
    for folder, name in ((pickled, "other.safetensors"), (adapter, "adapter_model_other.safetensors")):
        if folder == adapter:
            torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
            (adapter / "adapter_model.safetensors").rename(adapter / name)
        else:
            save_file({"a": torch.zeros(1)}, folder / name)
        base = str(tiny_model_dir) if folder == adapter else None
        for refuse in (model_digest, lambda model: load.load_model(model, CPU)):
            with pytest.raises(UserError, match=r"model\.bin is a pickle"):
                refuse(of(folder, base=base))
    (pickled / "pytorch_model.bin").write_bytes(b"other weights")
    before = model_digest(of(pickled, allow_pickle=True))
    (pickled / "pytorch_model.bin").write_bytes(b"weights")
    assert model_digest(of(pickled, allow_pickle=True)) != before


def test_an_index_names_safetensors_that_are_there_or_is_refused(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    whole = load.load_model(of(folder), CPU)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    parts = weight_files(of(folder))
    assert len(parts) > 1
    assert load.weights_digest(load.load_model(of(folder), CPU).state_dict()) == load.weights_digest(whole.state_dict())
    before = model_digest(of(folder))
    (folder / "other.safetensors").write_bytes(b"which nobody reads")
    assert model_digest(of(folder)) == before
    good = json.loads(index.read_text())
    for name in ("weights.bin", "absent.safetensors"):
        (folder / "weights.bin").write_bytes(b"x")
        index.write_text(json.dumps(good | {"weight_map": dict.fromkeys(good["weight_map"], name)}))
        with pytest.raises(UserError, match=f"names {name}"):
            load.load_model(of(folder), CPU)
    for content in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(content)
        with pytest.raises(UserError, match=r"is not an index of weights|JSON|expected text"):
            model_digest(of(folder))


@pytest.fixture
def sharded(tmp_path, tiny_model_dir):
    """The tiny model in several files with an index, without model.safetensors."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(folder, max_shard_size="20KB")
    return folder


def test_a_tensor_in_two_files_has_one_value_or_is_refused(sharded):
    """The index names one of them, and transformers takes the other: loss 4.40 became 0.76."""
    place = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    named = sharded / place[name]
    other = next(file for file in safetensors_of(sharded) if file != named)
    original = load.load_model(of(sharded), CPU).state_dict()
    tensors = load_file(other)
    save_file(tensors | {name: original[name].contiguous()}, other, {"format": "pt"})
    again = load.load_model(of(sharded), CPU).state_dict()
    assert load.weights_digest(again) == load.weights_digest(original)
    for changed in (3 * original[name], original[name][:3].clone(), original[name].to(torch.float16)):
        save_file(tensors | {name: changed}, other, {"format": "pt"})
        for attempt in (load.unused_weights, lambda model: load.load_model(model, CPU)):
            with pytest.raises(UserError, match=rf"both hold {name}, with different values") as refused:
                attempt(of(sharded))
            assert str(named) in str(refused.value)
            assert str(other) in str(refused.value)


def test_a_whole_model_beside_the_parts_of_one_is_refused(sharded, tiny_model_dir):
    """transformers would read the whole one, stale or not."""
    stale = {name: tensor + 1 for name, tensor in load_file(tiny_model_dir / "model.safetensors").items()}
    save_file(stale, sharded / "model.safetensors", {"format": "pt"})
    for refuse in (model_digest, load.unused_weights, lambda model: load.load_model(model, CPU)):
        with pytest.raises(
            UserError, match=r"holds a whole model twice: in model\.safetensors, and in model-00001-of-"
        ):
            refuse(of(sharded))
    for part in sharded.glob("model-*.safetensors"):  # an index without its files is of no model
        part.unlink()
    assert weight_files(of(sharded)) == [sharded / "model.safetensors"]
    assert not torch.equal(
        load.load_model(of(sharded), CPU).state_dict()[(name := "model.norm.weight")],
        load.load_model(of(tiny_model_dir), CPU).state_dict()[name],
    )


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 1056784\n".format("4d7a" * 16)


def pointed(folder, name, **settings):
    """Put a Git LFS pointer in the place of a file, and make sure that whoever reads the folder names both."""
    content = (folder / name).read_bytes() if (folder / name).is_file() else None
    (folder / name).write_text(POINTER)
    setting, uses = "model.path", [load.unused_weights, model_digest]
    if name.startswith("tokenizer"):
        setting, uses = "model.tokenizer", [load.load_tokenizer]
    for use in uses:
        with pytest.raises(UserError, match=rf"^{setting}: .*/{name} is a Git LFS pointer.*`git lfs pull`"):
            use(of(folder, **settings))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)


def test_git_lfs_pointers_are_named(tmp_path, tiny_model_dir, sharded, adapter):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        pointed(folder, name)
    pointed(sharded, "model.safetensors.index.json")
    pointed(sharded, safetensors_of(sharded)[-1].name)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        pointed(adapter, name, base=str(tiny_model_dir))
    (folder / "model.safetensors").unlink()
    for allow_pickle in (False, True):
        pointed(folder, "pytorch_model.bin", allow_pickle=allow_pickle)


def test_git_lfs_pointers_that_nobody_reads_do_no_harm(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    for name in ("pytorch_model.bin", "tokenizer.model", "model.gguf"):
        (folder / name).write_text(POINTER)
    assert load.unused_weights(of(folder)) == []
    assert load.load_tokenizer(of(folder)).eos_token == "</s>"


@pytest.mark.parametrize("beside", ["base", "config"])
def test_a_pickled_adapter_is_read_on_request_alone(adapter, beside, tiny_model_dir):
    """Also of an adapter that lies beside a whole model."""
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    if beside == "config":
        shutil.copytree(tiny_model_dir, adapter, dirs_exist_ok=True)
    settings = {"base": str(tiny_model_dir)}
    with pytest.raises(UserError, match=r"model\.path: .*adapter_model\.bin is a pickle"):
        load.load_model(of(adapter, **settings), CPU)
    with pytest.raises(UserError, match=r"model\.path: .*adapter_model\.bin is a pickle"):
        model_digest(of(adapter, **settings))
    if beside == "base":  # the other way round transformers finds safetensors alone
        model = load.load_model(of(adapter, allow_pickle=True, **settings), CPU)
        assert any("lora_" in name for name, _ in model.named_parameters())
