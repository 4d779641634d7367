"""The closed form, adaptive draws, the precision guard and parameter selection through the whole main job."""

import json
import math
import re
import resource
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from runs_of import config, stamps
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CTRLConfig, JetMoeConfig, LlamaConfig

from mrd_ray import ScoringSettings, UserError, score
from mrd_ray.cli.main import main
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.likelihood import MicroBatch
from mrd_ray.workers.memory import activation_bytes

CLOSED = {"scoring__estimator": "closed_form"}


def events(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def directly(model_dir, samples, selected=None, dtype=torch.float32):
    """Gradient norms of a run's samples, one by one, without the engine."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
    norms = GradientNorms(model, selected)
    return [
        float(norms(MicroBatch.collate([s["token_ids"]], [s["scored"]], model.device))[1].sqrt())
        for s in samples.to_pylist()
    ]


def test_closed_form_through_the_main_job(tiny_model_dir, qa_file, tmp_path):
    measures = ["mean_log_prob", "entropy", "memorization_accuracy", "log_prob_gradient_norm"]
    settings = CLOSED | {"scoring__curvature_probes": 3, "scoring__measures": measures, "data__score_on": "response"}
    found = score(config(tiny_model_dir, qa_file, tmp_path / "run", **settings))
    rows = found.scores.to_pylist()
    expected = directly(tiny_model_dir, found.samples)
    for row, norm in zip(rows, expected, strict=True):
        assert row["delta_std"] == pytest.approx(1e-5 * norm, rel=1e-5)
        assert row["mrd"] == row["mean_abs"] == pytest.approx(row["delta_std"] * np.sqrt(2 / np.pi), rel=1e-3)
        assert 0 <= row["mrd_se"] < 1e-3 * row["mrd"]
        assert (row["num_draws"], row["estimator"], row["low_precision"]) == (3, "closed_form", False)
        assert row["nonlinearity"] == pytest.approx(row["abs_mean"] / row["delta_std"])
        assert row["mean_log_prob"] == pytest.approx(row["log_prob"] / row["num_tokens"])
        assert 0 < row["entropy"] < np.log(400)
        assert 0 <= row["memorization_accuracy"] <= 1
        assert row["log_prob_gradient_norm"] > 0
    before = stamps(tmp_path / "run")
    assert score(config(tiny_model_dir, qa_file, tmp_path / "run", **settings)).scores.equals(found.scores)
    assert stamps(tmp_path / "run") == before
    with pytest.raises(UserError, match=r"scoring\.estimator: closed_form there, monte_carlo now"):
        score(config(tiny_model_dir, qa_file, tmp_path / "run", data__score_on="response"))
    recomputing = settings | {"scoring__activation_gib": 1e-6}
    two = score(config(tiny_model_dir, qa_file, tmp_path / "two", **recomputing, ray__actors=2))
    assert two.scores.equals(found.scores)


def test_bytes_for_activations():
    with torch.device("meta"):
        llama, ctrl = (
            AutoModelForCausalLM.from_config(kind(vocab_size=16, num_hidden_layers=1, n_layer=1))
            for kind in (LlamaConfig, CTRLConfig)
        )
    unset, half = (ScoringSettings(estimator="closed_form", activation_gib=gib) for gib in (None, 0.5))
    assert activation_bytes(llama, unset) == activation_bytes(ctrl, unset) == 4 * 2**30
    assert activation_bytes(llama, half) == 2**29
    # ranks that gather layers together must not differ in what they recompute
    assert activation_bytes(llama, unset, sharded=True) == math.inf
    assert activation_bytes(llama, half, sharded=True) == 0
    with pytest.raises(UserError, match=r"scoring\.activation_gib: no layer of this model"):
        activation_bytes(ctrl, half)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings", [{}, CLOSED | {"scoring__curvature_probes": 3}], ids=["monte_carlo", "closed_form"]
)
@pytest.mark.parametrize(("dtype", "rounding"), [("float64", 1e-4), ("float32", 1e-2)])
def test_a_gpu_scores_as_a_cpu(tiny_model_dir, qa_file, tmp_path, settings, dtype, rounding):
    settings = settings | {"model__dtype": dtype, "scoring__sigma": 1e-4}
    on_cpu, on_gpu = (
        score(config(tiny_model_dir, qa_file, tmp_path / str(gpus), **settings, ray__gpus_per_actor=gpus)).scores
        for gpus in (0, 1)
    )
    for column in ("mrd", "delta_std", "log_prob"):
        np.testing.assert_allclose(on_gpu[column], on_cpu[column], rtol=rounding)


@pytest.mark.slow
def test_adaptive_draws_settle_every_sample(tiny_model_dir, qa_file, tmp_path):
    adaptive = {"scoring__num_draws": 16, "scoring__target_relative_se": 0.21, "scoring__max_draws": 32}
    adaptive |= {"scoring__control_variate": False}
    found = score(config(tiny_model_dir, qa_file, tmp_path, **adaptive, scoring__sigma=1e-3))
    rows = found.scores.to_pylist()
    assert {row["num_draws"] for row in rows} == {16, 32}
    for row in rows:
        assert row["mrd_se"] <= 0.21 * row["mrd"] or row["num_draws"] == 32
    victim = next((tmp_path / "units").glob("r01_*"))
    victim.unlink()  # as if the driver had been killed in the middle of the last round
    before = stamps(tmp_path)
    again = score(config(tiny_model_dir, qa_file, tmp_path, **adaptive, scoring__sigma=1e-3))
    assert again.scores.equals(found.scores)
    assert before.items() < stamps(tmp_path).items()
    with pytest.raises(UserError, match=r"scoring\.target_relative_se: 0\.21 there, 0\.1 now"):
        score(config(tiny_model_dir, qa_file, tmp_path, **adaptive | {"scoring__target_relative_se": 0.1}))


@pytest.mark.parametrize("antithetic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_control_variate_settles_every_sample_in_four_draws(tiny_model_dir, qa_file, tmp_path, antithetic):
    settings = {"scoring__num_draws": 4, "scoring__target_relative_se": 0.01, "scoring__antithetic": antithetic}
    settings |= {"scoring__allow_low_precision": antithetic}  # the even part drowns in float32, mean_abs does not
    found = score(config(tiny_model_dir, qa_file, tmp_path / "run", **settings))
    exact = score(config(tiny_model_dir, qa_file, tmp_path / "exact", **CLOSED))
    for row, other in zip(found.scores.to_pylist(), exact.scores.to_pylist(), strict=True):
        assert row["num_draws"] == 4
        assert row["mrd_se"] < 0.01 * row["mrd"]
        assert row["mrd"] == pytest.approx(other["mrd"], rel=0.02)
    two = score(config(tiny_model_dir, qa_file, tmp_path / "two", **settings, ray__actors=2))
    assert two.scores.equals(found.scores)
    plain = settings | {"scoring__control_variate": False, "scoring__num_draws": 16}
    with pytest.raises(UserError, match=r"scoring\.control_variate: True there, False now"):
        score(config(tiny_model_dir, qa_file, tmp_path / "run", **plain))


@pytest.mark.slow
def test_precision_guard(tiny_model_dir, qa_file, tmp_path):
    """bfloat16 at the paper's sigma: refused with the figures and the way out, or marked."""
    settings = {"model__dtype": "bfloat16", "scoring__num_draws": 2}
    with pytest.raises(UserError) as refusal:
        score(config(tiny_model_dir, qa_file, tmp_path, **settings))
    for part in ("of the weights", "cosine", "of the signal", "model.dtype: float32", "allow_low_precision"):
        assert part in str(refusal.value)
    assert stamps(tmp_path) == {}
    found = score(config(tiny_model_dir, qa_file, tmp_path, **settings, scoring__allow_low_precision=True))
    assert set(found.scores["low_precision"].to_pylist()) == {True}
    precision = json.loads((tmp_path / "manifest.json").read_text())["precision"]
    assert precision["share_moved"] < 0.5
    assert not precision["sufficient"]


def test_antithetic_draws_whose_even_part_is_rounding_are_refused(tiny_model_dir, qa_file, tmp_path):
    """In float32 at small sigma: rounding of the forward at theta is in every draw, and no draws average it out."""
    settings = {"scoring__antithetic": True, "scoring__num_draws": 2, "scoring__sigma": 1e-6}
    with pytest.raises(UserError, match=r"of the even part.*model\.dtype: float64.*curvature_probes"):
        score(config(tiny_model_dir, qa_file, tmp_path / "narrow", **settings))


def test_lora_adapter_and_its_factors(tiny_model_dir, qa_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    # the adapter comes without a tokenizer; its base has one
    settings = CLOSED | {"scoring__parameters": "lora", "model__base": str(tiny_model_dir)}
    found = score(config(tmp_path / "adapter", qa_file, tmp_path / "run", **settings))
    factors = [
        name
        for name, _ in AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").named_parameters()
        if "lora_" in name
    ]
    assert len(factors) == 8
    for row, norm in zip(found.scores.to_pylist(), directly(tmp_path / "adapter", found.samples, factors), strict=True):
        assert row["delta_std"] == pytest.approx(1e-5 * norm, rel=1e-5)
    drawn = {"scoring__parameters": "lora", "scoring__num_draws": 60, "scoring__sigma": 1e-4}
    drawn |= {"model__base": str(tiny_model_dir)}
    monte_carlo = score(config(tmp_path / "adapter", qa_file, tmp_path / "mc", **drawn))
    for exact, sampled in zip(found.scores.to_pylist(), monte_carlo.scores.to_pylist(), strict=True):
        assert abs(sampled["mrd"] - 10 * exact["mrd"]) < 5 * sampled["mrd_se"]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"base_model_name_or_path": None},
            "is not set. Name the adapter's model by --model.base",
        ),
        ({"use_dora": True}, "DoRA adapter, which is not supported; merge it"),
    ],
)
def test_adapters_that_cannot_be_scored(tiny_model_dir, qa_file, tmp_path, adapter, message):
    file = tmp_path / "adapter" / "adapter_config.json"
    peft.LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=str(tiny_model_dir)).save_pretrained(
        file.parent
    )
    file.write_text(json.dumps(json.loads(file.read_text()) | adapter))
    save_file({"lora": torch.zeros(1)}, file.with_name("adapter_model.safetensors"))
    given = {} if "base_model_name_or_path" in adapter else {"model__base": str(tiny_model_dir)}
    with pytest.raises(UserError, match=message):
        score(config(file.parent, qa_file, tmp_path / "run", **given))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scoring__parameters": "lora"}, "has no LoRA factors"),
        ({"scoring__parameters": "layers.7"}, r"'layers\.7' matches none of the model's \d+ parameter names"),
    ],
)
def test_parameters_that_are_not_there(tiny_model_dir, qa_file, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        score(config(tiny_model_dir, qa_file, tmp_path, **settings))


def changed(tiny_model_dir, folder, **settings):
    """The tiny model's directory with other settings in its config.json."""
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def test_quantised_weights_are_refused(tiny_model_dir, qa_file, tmp_path):
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(UserError, match=r"quantised weights \(gptq\).*before quantisation"):
        score(config(changed(tiny_model_dir, tmp_path / "model", **quantised), qa_file, tmp_path / "run"))


def test_unknown_architecture_is_refused(tiny_model_dir, qa_file, tmp_path):
    folder = changed(tiny_model_dir, tmp_path / "model", model_type="nonsense")
    with pytest.raises(UserError, match="not a model directory that transformers can read"):
        score(config(folder, qa_file, tmp_path / "run"))


def test_model_that_is_not_causal_is_refused(tiny_model_dir, qa_file, tmp_path):
    folder = changed(tiny_model_dir, tmp_path / "model", model_type="t5")
    with pytest.raises(UserError, match="not a causal language model"):
        score(config(folder, qa_file, tmp_path / "run"))


@pytest.mark.slow
def test_uncovered_parameters_are_listed_or_differentiated(tiny_model_dir, qa_file, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "kv_channels": 8}
    mixture = JetMoeConfig(vocab_size=len(tokenizer), num_key_value_heads=1, num_local_experts=2, **shape)
    AutoModelForCausalLM.from_config(mixture).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"no rule for 6 of.*mlp\.input_linear\.weight.*allow_slow_parameters"):
        score(config(tmp_path / "model", qa_file, tmp_path / "run", **CLOSED))
    found = score(config(tmp_path / "model", qa_file, tmp_path / "run", **CLOSED, scoring__allow_slow_parameters=True))
    for row, norm in zip(found.scores.to_pylist(), directly(tmp_path / "model", found.samples), strict=True):
        assert row["delta_std"] == pytest.approx(1e-5 * norm, rel=1e-5)
    draws = {"scoring__num_draws": 4, "scoring__max_draws": 4, "scoring__target_relative_se": 0.01}
    plain = score(config(tmp_path / "model", qa_file, tmp_path / "plain", **draws))
    (said,) = (event for event in events(tmp_path / "plain") if event["event"] == "control_variate")
    assert re.match(
        r"Draws are plain, without a control variate\. .* no rule covers model.layers.0.mlp", said["message"]
    )
    assert min(row["mrd_se"] / row["mrd"] for row in plain.scores.to_pylist()) > 0.01
    by_name = {"scoring__control_variate": True}
    with pytest.raises(UserError, match=r"scoring\.control_variate: no rule covers .*allow_slow_parameters"):
        score(config(tmp_path / "model", qa_file, tmp_path / "named", **draws | by_name))
    slow = draws | by_name | {"scoring__allow_slow_parameters": True}
    controlled = score(config(tmp_path / "model", qa_file, tmp_path / "slow", **slow))
    for row, other in zip(controlled.scores.to_pylist(), found.scores.to_pylist(), strict=True):
        assert row["mrd"] == pytest.approx(other["mrd"], rel=0.05)


def test_contradicting_settings_end_with_the_keys_named(tiny_model_dir, qa_file, tmp_path, capsys):
    base = ["score", "--model.path", str(tiny_model_dir), "--data.path", str(qa_file), "--run.dir", str(tmp_path)]
    for flags, named in (
        (["--scoring.curvature_probes", "4"], "scoring.curvature_probes"),
        (["--scoring.estimator", "closed_form", "--scoring.antithetic", "true"], "scoring.antithetic"),
        (["--scoring.estimator", "closed_form", "--scoring.statistic", "abs_mean"], "curvature_probes"),
        (["--scoring.measures", "[log_prob_gradient_norm]"], "log_prob_gradient_norm"),
        (["--scoring.target_relative_se", "0.1", "--scoring.max_draws", "9"], "scoring.max_draws"),
        (["--scoring.target_relative_se", "0.1", "--scoring.num_draws", "3"], "scoring.num_draws"),
        (
            ["--scoring.target_relative_se", "0.1", "--scoring.num_draws", "5", "--scoring.control_variate", "false"],
            "scoring.num_draws",
        ),
        (["--scoring.estimator", "closed_form", "--scoring.control_variate", "true"], "scoring.control_variate"),
        (["--scoring.parameters", "["], "not a regular expression"),
        (["--scoring.parameters", ""], "scoring.parameters"),
        (["--scoring.sigma", "inf"], "scoring.sigma"),
        (["--scoring.estimator", "closed_form", "--scoring.sigma", "1e-3"], "curvature_probes"),
        (["--scoring.estimator", "closed_form", "--scoring.sigma", "0.1"], "too large for closed_form"),
    ):
        assert main(base + flags) == 2
        assert named in capsys.readouterr().err


STARVED = """
import resource, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from mrd_ray import ScoringSettings
from mrd_ray.scoring.estimators import ClosedForm, MonteCarlo
torch.set_num_threads(1)
shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=1 << 16)
model = AutoModelForCausalLM.from_config(LlamaConfig(intermediate_size=16384, **shape)).eval()
def sample(i, n):
    return dict(micro_batch=0, sample_id=str(i), token_ids=[5] * n, scored=[False] + [True] * (n - 1))
samples = [sample(i, 512) for i in range(8)] + [sample(8, 8192)]
made = [kind(model, ScoringSettings(estimator=name, sigma=1e-4), samples[:1])
        for kind, name in ((MonteCarlo, "monte_carlo"), (ClosedForm, "closed_form"))]
def leave(mib):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (mib << 20), -1))
leave(600)
for estimator in made:
    found = estimator(samples, range(2))
    print(sorted(result["sample_id"] for result in found), [r["error"] for r in found if r["error"]])
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
ample = sorted(made[0](samples[:8], range(2)), key=lambda result: result["sample_id"])
leave(300)
scarce = made[0](samples[:8], range(2))
print(all(abs(sum(a["sum_abs"]) / sum(b["sum_abs"]) - 1) < 1e-3 and a["num_draws"] == b["num_draws"] == 2
          for a, b in zip(ample, sorted(scarce, key=lambda result: result["sample_id"]), strict=True)))
"""


@pytest.mark.slow
def test_a_sample_too_large_for_memory_gets_an_error_row():
    """A real allocation failure: the batch is halved until what fits has its score, and what does not its reason."""
    assert resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY
    ran = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines.pop() == "True"  # and where theta was at hand, but a draw lacks memory, scores are as they were
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(str([str(i) for i in range(9)]))
        assert line.count("does not fit") == 1
