"""Digests that tell weights apart, and models that are refused."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mrd_ray.config import ModelSettings
from mrd_ray.errors import UserError
from mrd_ray.models.files import model_digest
from mrd_ray.models.load import (
    context_length,
    ending_ids,
    load_config,
    load_model,
    load_tokenizer,
    skeleton,
    tokenizer_digest,
    unused_weights,
    weights_digest,
)

CPU = torch.device("cpu")


def of(folder, **settings) -> ModelSettings:
    return ModelSettings(path=str(folder), **settings)


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
    config = ModelSettings(path=cached, revision=revision, tokenizer=cached if named else None)
    assert ("mill" in load_tokenizer(config).get_vocab()) == known


def test_revision_is_the_models_alone(cached, tiny_model_dir):
    config = ModelSettings(path=str(tiny_model_dir), revision="v2", tokenizer=cached)
    assert "mill" not in load_tokenizer(config).get_vocab()


def test_directory_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"model\.path"):
        load_config(of(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.path: .*config\.json"):
        model_digest(of(tmp_path))


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:1000], lambda content: content[:-9]])
def test_damaged_weights(tmp_path, tiny_model_dir, damage):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "m")
    (copy / "model.safetensors").write_bytes(damage((copy / "model.safetensors").read_bytes()))
    with pytest.raises(UserError, match=r"model\.path: cannot load"):
        load_model(of(copy), CPU)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(UP), rf"lack 1 parameter\(s\) of its configuration, first {UP}"),
        (
            lambda tensors: tensors.update({UP: tensors[UP][:3].clone()}),
            rf"cannot load .*: 1 tensor.* {UP} is 3 x 32 in the file and 64 x 32 in the model",
        ),
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
        load_model(of(copy), CPU)


def in_eight_bits(tensor):
    scale = tensor.abs().max() / 127
    return (tensor / scale).round().to(torch.int8), scale


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("name", [UP, "lora"])
def test_whole_numbers_for_weights_are_refused(tmp_path, tiny_model_dir, name, scales):
    """transformers makes numbers with fractions of them and ignores that they have a scale."""
    folder, file, base = shutil.copytree(tiny_model_dir, tmp_path / "m"), "model.safetensors", None
    if name == "lora":
        shape = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), shape)
        folder, file, base = tmp_path / "lora", "adapter_model.safetensors", str(tmp_path / "m")
        adapted.save_pretrained(folder)
        name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors = load_file(folder / file)
    tensors[name], scale = in_eight_bits(tensors[name])
    save_file(tensors | ({f"{name}_scale": scale} if scales else {}), folder / file, {"format": "pt"})
    for attempt in (unused_weights, lambda model: load_model(model, CPU)):
        with pytest.raises(UserError, match=rf"holds 1 quantised tensor\(s\), first {name} \(I8\)"):
            attempt(of(folder, allow_unused_weights=True, base=base))


def test_float8_is_refused_with_scales_alone(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_model(of(folder), CPU).state_dict()[UP], tensors[UP].float())
    save_file(tensors | {f"{UP}_scale_inv": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"quantised tensor\(s\), first {UP} \(F8_E4M3\)"):
        load_model(of(folder), CPU)


def test_whole_numbers_that_are_no_weights_are_allowed(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    steps = {"steps": torch.tensor([3]), "model.position_ids": torch.arange(8)[None]}
    save_file(tensors | steps, folder / "model.safetensors", {"format": "pt"})
    assert unused_weights(of(folder, allow_unused_weights=True)) == ["steps"]
    save_file({f"{name}.q": torch.ones(2).int() for name in tensors}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="quantised"):
        unused_weights(of(folder))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "nosuch"}'])
def test_unreadable_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    said = "is not a model directory that transformers can read|expected a JSON object|as JSON"
    with pytest.raises(UserError, match=rf"model\.path: .*({said})"):
        load_config(of(tmp_path))


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_unreadable_tokenizer(tmp_path, tiny_model_dir, content):
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.tokenizer: .* holds no tokenizer"):
        load_tokenizer(ModelSettings(path=str(tiny_model_dir), tokenizer=str(tmp_path)))


def test_real_model(stories_dir):
    model = load_model(of(stories_dir), CPU)
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    assert context_length(model.config) == 512


def test_weights_digest_sees_names_and_bits():
    one = {"a": torch.tensor([0.0]), "b": torch.tensor([1.0])}
    assert weights_digest(one) == weights_digest(dict(reversed(one.items())))
    assert weights_digest(one) != weights_digest(one | {"a": torch.tensor([-0.0])})
    assert weights_digest(one) != weights_digest({"b": one["a"], "a": one["b"]})
    assert weights_digest(one) != weights_digest({"a": one["a"], "c": one["b"]})
    assert weights_digest(one) != weights_digest(one | {"a": one["a"].view(1, 1)})
    assert weights_digest(one) != weights_digest(one | {"b": one["b"].view(torch.int32)})


def test_tokenizer_digest(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    before = tokenizer_digest(tokenizer)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tiny_model_dir)) == before
    tokenizer("what is it", truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.chat_template = "x"
    with_template = tokenizer_digest(tokenizer)
    tokenizer.add_tokens(["mill"])
    assert len({before, with_template, tokenizer_digest(tokenizer)}) == 3


def test_context_length(tiny_model_dir):
    assert context_length(AutoConfig.from_pretrained(tiny_model_dir)) == 128


def test_bfloat16_rounds_weights_and_not_rotary_angles(tiny_model_dir):
    """Rotary frequencies in bfloat16 would be another model: angles off by radians at long positions."""
    model = load_model(of(tiny_model_dir, dtype="bfloat16"), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact = load_model(of(tiny_model_dir), CPU)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


def test_weights_of_another_name_are_refused(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"transformers_weights": "adapter_model.bin"}))
    with pytest.raises(UserError, match=r"takes weights from adapter_model\.bin \(transformers_weights\)"):
        load_model(of(folder), CPU)


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
    uses = (load_config, skeleton, ending_ids, lambda model: load_model(model, CPU))
    for use in uses:
        with pytest.raises(
            UserError, match=r"model\.path: .*custom needs Python code .*model\.trust_remote_code: true"
        ):
            use(of(custom))
    assert load_tokenizer(of(custom)).eos_token == "</s>"
    assert not (tmp_path / "ran").exists()

    trusted = of(custom, trust_remote_code=True)
    for use in uses:
        use(trusted)
    ids = torch.arange(8)[None]
    plain, salted = (load_model(model, CPU)(ids).logits for model in (of(tiny_model_dir), trusted))
    torch.testing.assert_close(salted, 2 * plain)
    load_model(trusted, CPU).save_pretrained(tmp_path / "saved")  # as a run leaves its result
    again = load_model(of(tmp_path / "saved", trust_remote_code=True), CPU)(ids).logits
    torch.testing.assert_close(again, salted)


def test_digest_covers_code_that_may_run(custom):
    trusted = of(custom, trust_remote_code=True)
    before = model_digest(trusted), model_digest(of(custom))
    (custom / "salted.py").write_text(CODE.format(mark="", salt=3))
    after = model_digest(trusted), model_digest(of(custom))
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_code_of_another_repository_is_refused(custom):
    """The digest could not answer for it."""
    content = (custom / "config.json").read_text()
    (custom / "config.json").write_text(content.replace("salted.SaltedForCausalLM", "some/where--salted.Salted"))
    with pytest.raises(UserError, match=r"takes code from another repository \(some/where--salted\.Salted\)"):
        load_model(of(custom, trust_remote_code=True), CPU)


def test_code_of_a_tokenizer_runs_on_request_alone(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": [None, "odd.Odd"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    code = "from transformers import PreTrainedTokenizerFast\n\n\nclass Odd(PreTrainedTokenizerFast):\n    odd = True\n"
    (folder / "odd.py").write_text(code)
    (folder / "config.json").write_text(json.dumps({"model_type": "unknown"}))
    with pytest.raises(UserError, match=r"model\.tokenizer: .* needs Python code .*model\.trust_remote_code: true"):
        load_tokenizer(of(tiny_model_dir, tokenizer=str(folder)))
    assert load_tokenizer(of(tiny_model_dir, tokenizer=str(folder), trust_remote_code=True)).odd


def test_outputs_have_names_whatever_the_config_says(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"return_dict": False}))
    tokens = torch.tensor([[1, 2]])
    model = load_model(of(folder), CPU)
    assert model(tokens).logits.shape[:2] == model.base_model(tokens).last_hidden_state.shape[:2]


def test_factors_that_embedding_and_head_share_are_refused(tmp_path, tiny_model_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    shape = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), shape)
    adapted.save_pretrained(tmp_path / "lora")
    for attempt in (skeleton, lambda model: load_model(model, CPU)):
        with pytest.raises(UserError, match=r"ensure_weight_tying.*merge it first"):
            attempt(of(tmp_path / "lora", base=str(tmp_path / "base")))
