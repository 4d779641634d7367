"""Models and adapters from the field, made beside the repository, that once gave wrong scores or none."""

import json
import re
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mrd_ray
from mrd_ray import UserError
from mrd_ray.config import ModelSettings
from mrd_ray.models import saving
from mrd_ray.models.load import load_model, load_tokenizer, skeleton, unused_weights

IDS = torch.tensor([[1, 403, 407, 261, 378, 432, 300, 400]])


@pytest.fixture(scope="session")
def made(shared, stories_dir, tmp_path_factory):
    """A folder of models, one of adapters, and the loss that PEFT gives for each adapter on IDS."""
    root = tmp_path_factory.mktemp("field")
    printed = {}
    for name in ("models", "adapters"):
        script = shared / "cases" / f"make_{name}.py"
        done = subprocess.run(
            [sys.executable, script, stories_dir, root / name], capture_output=True, text=True, check=True
        )
        printed[name] = done.stdout
    losses = {
        name: float(loss) for name, loss in re.findall(r"^(\S+) +reference loss (\S+)", printed["adapters"], re.M)
    }
    return root / "models", root / "adapters", losses


def of(path) -> ModelSettings:
    """The model there; of an adapter, its base model is the one that it names."""
    named = path / "adapter_config.json"
    base = json.loads(named.read_text())["base_model_name_or_path"] if named.is_file() else None
    return ModelSettings(path=str(path), base=base)


def load(path):
    model = of(path)
    loaded = load_model(model, torch.device("cpu"))
    rows = [len(one.get_input_embeddings().weight) for one in (loaded, skeleton(model))]
    assert rows[0] == rows[1]
    return loaded


@torch.no_grad()
def loss(model) -> float:
    return float(model(IDS, labels=IDS).loss)


@pytest.mark.parametrize(
    "name",
    ["plain", "rs-pattern", "mts", "mts-head", "ttok", "bias-all", "resized", "emb-lora", "all-linear", "ia3", "loha",
     "oft"],
)  # fmt: skip
def test_an_adapter_gives_what_peft_gives(made, name):
    _, adapters, losses = made
    assert loss(load(adapters / name)) == pytest.approx(losses[name], abs=2e-5)


@pytest.fixture
def trained_adapter(stories_dir, tmp_path):
    """Make an adapter of the small trained Llama as PEFT leaves it after training, and tell its folder and loss."""

    def make(**settings):
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(stories_dir)
        shape = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(base, peft.LoraConfig(**shape, **settings)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", loss(model)

    return make


@pytest.mark.parametrize("began", ["pissa", "olora"])
def test_an_adapter_that_took_a_part_of_its_base_model(trained_adapter, tmp_path, began):
    """When it is loaded PEFT takes that part from the base model again."""
    folder, expected = trained_adapter(init_lora_weights=began)
    model = of(folder)
    assert unused_weights(model) == []
    loaded = load(folder)
    assert loss(loaded) == pytest.approx(expected, abs=2e-5)
    factors = {name: 1.1 * value for name, value in loaded.state_dict().items() if "lora_" in name}
    saving.save(loaded, factors, model, tmp_path / "saved")
    loaded.load_state_dict(factors, strict=False)
    assert loss(load(tmp_path / "saved")) == pytest.approx(loss(loaded), abs=2e-5)
    assert loss(loaded) != pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("began", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_an_adapter_of_weights_that_cannot_be_found_again_is_refused(trained_adapter, began):
    """PEFT gives another loss each time it loads the first, and needs more than the files for the others."""
    folder, _ = trained_adapter()
    settings = json.loads((folder / "adapter_config.json").read_text())
    more = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}} if began == "loftq" else {}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": began} | more))
    for attempt in (
        unused_weights,
        skeleton,
        lambda model: load_model(model, torch.device("cpu")),
    ):
        with pytest.raises(
            UserError, match=rf"init_lora_weights: {began}, which changed the weights of the base model"
        ):
            attempt(of(folder))


def test_what_an_adapter_s_settings_leave_out_is_put_right_there(trained_adapter):
    folder, _ = trained_adapter()
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    with pytest.raises(
        UserError, match=r"names fewer layers .*\(target_modules.*Correct adapter_config\.json"
    ) as refused:
        unused_weights(of(folder))
    assert "attention_bias" not in str(refused.value)


def test_names_of_a_state_dict_in_an_adapter_s_file_are_told(trained_adapter):
    folder, _ = trained_adapter()
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"their names contain \.default\., as in .*save_pretrained"):
        unused_weights(of(folder))


def test_where_an_adapter_is_is_decided_in_one_place(made, stories_dir, tmp_path):
    """With the config.json that trainers leave beside it, and beside a whole model."""
    _, adapters, losses = made
    assert loss(load(adapters / "with-config")) == pytest.approx(losses["plain"], abs=2e-5)
    for folder in (stories_dir, adapters / "plain"):
        for file in folder.iterdir():
            shutil.copyfile(file, tmp_path / file.name)
    assert loss(load(tmp_path)) == pytest.approx(losses["plain"], abs=2e-5)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("models", "unused-bias", r"hold 15 tensor\(s\) that it does not use.*model\.allow_unused_weights: true"),
        ("models", "no-head", r"lack 1 parameter\(s\) of its configuration, first lm_head\.weight"),
        ("models", "orig-mod", r"Every name begins with _orig_mod\., which torch\.compile adds"),
        ("models", "zero3-empty", r"holds 36 empty tensor\(s\).*ZeRO-3"),
        ("adapters", "zero3", r"holds 20 empty tensor\(s\).*ZeRO-3"),
        ("adapters", "prompt", r"holds a PROMPT_TUNING adapter"),
        ("adapters", "prefix", r"holds a PREFIX_TUNING adapter"),
        ("adapters", "vera", r"the VERA adapter in .* cannot be put on its model"),
        ("adapters", "base-bnb4", r"holds quantised weights \(bitsandbytes\)"),
        ("adapters", "base-gone", r"/models/llama-7b is neither a directory here nor a model"),
    ],
)
def test_what_cannot_be_loaded_is_named_before_ray_starts(made, kind, name, message):
    folder = made[0 if kind == "models" else 1] / name
    for attempt in (unused_weights, lambda model: load_model(model, torch.device("cpu"))):
        with pytest.raises(UserError, match=message):
            attempt(of(folder))


@pytest.mark.parametrize("name", ["pad-out", "pad-minus1", "nometa", "abs-index", "genconfig", "tok-trunc", "chat"])
def test_what_nothing_depends_on_changes_nothing(made, stories_dir, name):
    assert loss(load(made[0] / name)) == loss(load(stories_dir))


def test_a_head_of_its_own_is_used(made):
    tied, untied = (loss(load(made[0] / f"{name}-own-head")) for name in ("tied", "untied"))
    assert tied == untied


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_scores_are_of_all_weights_or_the_run_says_of_which(made, shared, tmp_path):
    """Biases that config.json leaves out changed scores by 1.95 and 1.58 times."""
    data = {"path": str(shared / "cases" / "20-weights-not-used" / "qa.jsonl")}

    def score(name, **model):
        config = mrd_ray.ScoreConfig(
            model={"path": str(made[0] / name), **model},
            data=data,
            run={"dir": str(tmp_path / f"{name}-{len(model)}")},
            scoring={"estimator": "closed_form"},
            ray={"actors": 1},
        )
        run = mrd_ray.score(config)
        return run.scores.sort_by("index")["mrd"].to_pylist(), run.run.manifest()

    assert score("used-bias")[0] == pytest.approx([0.0027967023, 0.0020733624], rel=1e-4)
    with pytest.raises(UserError, match="that it does not use"):
        score("unused-bias")
    without, manifest = score("unused-bias", allow_unused_weights=True)
    assert without == pytest.approx([0.0044190270, 0.0040382778], rel=1e-4)
    assert len(manifest["unused_weights"]) == 15
    assert "model.layers.0.self_attn.q_proj.bias" in manifest["unused_weights"]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4", "unused-bias"])
def test_training_changes_weights_and_nothing_else(made, shared, tmp_path, name):
    source = made[0] / name
    mrd_ray.unlearn(
        mrd_ray.UnlearnConfig(
            model={"path": str(source), "allow_unused_weights": name == "unused-bias"},
            data={"path": str(shared / "cases" / "30-result-in-transformers-4" / "qa.jsonl")},
            run={"dir": str(tmp_path / "run")},
            unlearning={"method": "ga", "steps": 1, "batch_size": 1, "learning_rate": 1e-4},
            stopping={"forgotten": "never", "extraction_n": 0},
            ray={"workers": 1},
        )
    )
    result = tmp_path / "run" / "model"
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            assert (result / file.name).read_bytes() == file.read_bytes(), file.name
    before, after = (
        load_model(ModelSettings(path=str(path), allow_unused_weights=True), torch.device("cpu"))
        for path in (source, result)
    )
    assert loss(before) != loss(after)
    kept = unused_weights(ModelSettings(path=str(result), allow_unused_weights=True))
    assert kept == unused_weights(ModelSettings(path=str(source), allow_unused_weights=True))


_OTHER = ["transformers==4.57.1", "huggingface_hub<1", "tokenizers>=0.22,<0.23"]
_LOSS = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([json.loads(sys.argv[2])])
with torch.no_grad():
    print(json.dumps([transformers.__version__, model(ids, labels=ids).loss.item(),
                      AutoTokenizer.from_pretrained(sys.argv[1])("Lily has a ball.")["input_ids"]]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_result_is_the_same_model_in_transformers_4(made, shared, tmp_path):
    other = tmp_path / "transformers-4"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(other), *_OTHER]
    subprocess.run(install, check=True)
    test_training_changes_weights_and_nothing_else(made, shared, tmp_path, "v4")
    result = tmp_path / "run" / "model"
    done = subprocess.run(
        [sys.executable, "-c", _LOSS, str(result), json.dumps(IDS[0].tolist())],
        env={"PYTHONPATH": str(other), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    version, found, tokens = json.loads(done.stdout.splitlines()[-1])
    assert version == "4.57.1"
    assert found == pytest.approx(loss(load(result)), abs=1e-5)
    assert tokens == load_tokenizer(ModelSettings(path=str(result)))("Lily has a ball.")["input_ids"]
