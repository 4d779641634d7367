"""Settings of unlearning that contradict one another are refused by name; DeepSpeed is told what is left."""

import json

import peft
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from mrd_ray.cli import main as cli
from mrd_ray.config import ScoringSettings, UnlearnConfig
from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.unlearning import log
from mrd_ray.unlearning import model as trained
from mrd_ray.unlearning.batching import Batching
from mrd_ray.unlearning.engine import configuration

GA = {"unlearning__method": "ga"}
NPO = {"unlearning__method": "npo"}
PO = {"unlearning__method": "po", "unlearning__refusals": "r.txt"}
RETAIN = {"retain__path": "r.jsonl"}
STAGE_0 = {"deepspeed__zero_stage": 0}
STAGE_3 = {"deepspeed__zero_stage": 3}
OFFLOADED = {"deepspeed__offload_parameters": "cpu"}
STATES_OFFLOADED = {"deepspeed__offload_optimizer": "cpu"}
BFLOAT16 = {"model__dtype": "bfloat16"}
MONTE_CARLO = {"scoring__estimator": "monte_carlo"}


def config(settings: dict) -> UnlearnConfig:
    """Gradient ascent but for the settings, dotted keys with underscores."""
    tree: dict = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "run": {"dir": "r"}}
    for key, value in (GA | settings).items():
        group, name = key.split("__")
        tree.setdefault(group, {})[name] = value
    return UnlearnConfig.model_validate(tree)


def with_json(tmp_path, content, settings: dict) -> dict:
    """The DeepSpeed configuration where the user's JSON holds `content`."""
    file = tmp_path / "deepspeed.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return configuration(config(settings | {"deepspeed__config": str(file)}), 1)


def nested(key: str, value) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def without_empty(tree: dict) -> dict:
    return {key: without_empty(x) if isinstance(x, dict) else x for key, x in tree.items() if x != {}}


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "size", "count"),
    # 8 in threes: 3, 3 and 2
    [(8, None, 1, 8, 1), (8, None, 8, 1, 1), (8, 3, 1, 3, 3), (8, 2, 4, 2, 1), (8, 1, 4, 1, 2), (8, 100, 2, 4, 1)],
)
def test_batch_arithmetic(batch, micro, workers, size, count):
    """A step takes all micro-batches of the forget samples, and as many of the retain samples where they are used."""
    for settings, sets in [
        (GA | RETAIN, 1),  # gradient ascent uses them for its floor alone
        (NPO | RETAIN, 2),
        (PO | RETAIN, 2),
        (NPO | RETAIN | {"unlearning__retain_weight": 0.0}, 1),
    ]:
        one = config(settings | {"unlearning__batch_size": batch, "unlearning__micro_batch_size": micro})
        found = configuration(one, workers)
        assert found["train_micro_batch_size_per_gpu"] == size
        assert found["gradient_accumulation_steps"] == sets * count
        assert Batching.of(one, workers).with_retain == (sets == 2)


@pytest.mark.parametrize(("batch", "workers", "such_as"), [(2, 4, 4), (8, 3, 9), (10, 4, 12)])
def test_batch_that_workers_cannot_share(batch, workers, such_as):
    message = rf"unlearning\.batch_size: {batch} .* {workers} workers \(ray\.workers\).* for example {such_as}$"
    with pytest.raises(UserError, match=message):
        configuration(config({"unlearning__batch_size": batch}), workers)
    configuration(config({"unlearning__batch_size": such_as}), workers)


CPU = {"device": "cpu"}
GATHERED = {"stage": 3, "stage3_param_persistence_threshold": 0}  # a weight that stays gathered would take no noise


@pytest.mark.parametrize(
    ("settings", "zero", "more"),
    [
        *[({"deepspeed__zero_stage": stage}, {"stage": stage}, {}) for stage in (0, 1, 2)],
        (STAGE_3, GATHERED, {}),
        (STATES_OFFLOADED, {"offload_optimizer": CPU}, {}),
        (STAGE_3 | OFFLOADED, GATHERED | {"offload_param": CPU}, {}),
        (BFLOAT16, {}, {"bf16": {"enabled": True}}),
        ({"unlearning__max_grad_norm": 0.25}, {}, {"gradient_clipping": 0.25}),
    ],
)
def test_what_deepspeed_is_told(settings, zero, more):
    plain = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # our optimiser is torch's
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000} | zero,
        "bf16": {"enabled": False},
    }
    assert configuration(config(settings), 1) == plain | more


def test_what_is_not_ours_is_kept(tmp_path):
    plain = configuration(config({}), 1)
    assert with_json(tmp_path, {}, {}) == plain
    more = {"wall_clock_breakdown": True, "comms_logger": {"enabled": True, "debug": False}, "steps_per_print": 7}
    zero = {"overlap_comm": False, "reduce_bucket_size": 1e6, "offload_param": None}
    found = with_json(tmp_path, more | {"zero_optimization": zero}, {})
    assert found == plain | more | {"zero_optimization": plain["zero_optimization"] | zero}
    pinned = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    found = with_json(tmp_path, {"zero_optimization": pinned}, STATES_OFFLOADED)
    assert found["zero_optimization"] == plain["zero_optimization"] | pinned


def test_a_secret_of_a_monitor_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(UserError, match=r"deepspeed\.config: .* holds a secret \(api_key\)") as refusal:
        with_json(tmp_path, {"comet": {"enabled": True, "api_key": "hunter2"}}, {})
    assert "hunter2" not in str(refusal.value)


def test_auto_leaves_buckets_to_us(tmp_path):
    content = nested("zero_optimization", {"reduce_bucket_size": "auto", "allgather_bucket_size": "auto"})
    assert with_json(tmp_path, content, {}) == configuration(config({}), 1)


BATCH = "unlearning.batch_size and unlearning.micro_batch_size set it"
OURS = {  # what contradicts, why, what says the same
    "train_batch_size": (16, BATCH, None),
    "train_micro_batch_size_per_gpu": (16, BATCH, 8),
    "gradient_accumulation_steps": (4, BATCH, 1),
    "gradient_clipping": (0.5, "unlearning.max_grad_norm sets it (to 1.0)", 1),
    "optimizer": ({"type": "Adam"}, "it is AdamW with unlearning.learning_rate and unlearning.weight_decay", None),
    "scheduler": ({"type": "WarmupLR"}, "unlearning.learning_rate is constant", None),
    "fp16.enabled": (True, "model.dtype sets it (to false)", False),
    "amp": ({"enabled": True}, "DeepSpeed no longer supports it", None),
    "bf16.enabled": (True, "model.dtype sets it (to false)", False),
    "zero_allow_untested_optimizer": (False, "it must be true for torch's AdamW", True),
    "zero_force_ds_cpu_optimizer": (True, "it must be false for torch's AdamW", False),
    "zero_optimization.stage": (2, "deepspeed.zero_stage sets it (to 3)", 3),
    "zero_optimization.offload_optimizer.device": ("cpu", 'deepspeed.offload_optimizer sets it (to "none")', "none"),
    "zero_optimization.offload_param.device": ("nvme", 'deepspeed.offload_parameters sets it (to "none")', "none"),
    "zero_optimization.cpu_offload": (True, "deepspeed.offload_optimizer sets it (to false)", False),
    "zero_optimization.cpu_offload_param": (True, "deepspeed.offload_parameters sets it (to false)", False),
    "zero_optimization.stage3_param_persistence_threshold": (10**5, "it must be 0 for refreshes in place", 0),
}


@pytest.mark.parametrize("key", OURS)
def test_what_is_ours_may_be_left_to_us_or_repeated(tmp_path, key):
    other, why, same = OURS[key]
    with pytest.raises(UserError) as refusal:
        with_json(tmp_path, nested(key, other) | {"wall_clock_breakdown": True}, STAGE_3)
    assert str(refusal.value) == f"deepspeed.config: {key} is {json.dumps(other)} there, but {why}; leave it out"
    plain = configuration(config(STAGE_3), 1)
    for value in ("auto", same):
        assert without_empty(with_json(tmp_path, nested(key, value), STAGE_3)) == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [("zero_optimization", value) for value in (0, None, False, "auto")]
    + [("bf16", True), ("fp16", True)]
    + [("zero_optimization.offload_optimizer", None), ("zero_optimization.offload_param", "cpu")],
)
def test_groups_that_are_no_objects(tmp_path, key, value):
    with pytest.raises(UserError) as refusal:
        with_json(tmp_path, nested(key, value), STATES_OFFLOADED)
    expected = f"deepspeed.config: {key} is {json.dumps(value)} there; expected an object, or leave it out"
    assert str(refusal.value) == expected


def test_files_that_cannot_serve(tmp_path):
    for content in (b'{"bf16": ', b"[1, 2]", b'"auto"', b"", b'{"a": "\xff"}'):
        with pytest.raises(UserError, match=r"^deepspeed\.config: .*deepspeed\.json is not a DeepSpeed JSON file: "):
            with_json(tmp_path, content, {})
    for path in ("/", "/absent/deepspeed.json", "~nobody-of-this-name/deepspeed.json"):
        with pytest.raises(UserError, match=rf"^deepspeed\.config: cannot read {path}: "):
            configuration(config({"deepspeed__config": path}), 1)


WHOLE = "needs whole weights, not deepspeed.zero_stage: 3; use unlearning.refresh: actors"
MORE_DRAWS = MONTE_CARLO | {"scoring__target_relative_se": 0.05}
REFUSED = {
    "unlearning.method: po needs unlearning.refusals": RETAIN | {"unlearning__method": "po"},
    "unlearning.refusals has no meaning with unlearning.method: ga": {"unlearning__refusals": "x.txt"},
    "retain.path: unlearning.method: npo needs a retain set": NPO,
    "retain.path: unlearning.method: graddiff needs a retain set": {"unlearning__method": "graddiff"},
    "retain.path: unlearning.method: po needs a retain set": PO,
    "checkpoints.best_by: retain_loss needs retain.path": {"checkpoints__best_by": "retain_loss"},
    "model.dtype: float64 is for scoring": {"model__dtype": "float64"},
    "deepspeed.offload_parameters needs deepspeed.zero_stage: 3": OFFLOADED,
    "deepspeed.offload_optimizer needs deepspeed.zero_stage: 1, 2 or 3": STATES_OFFLOADED | STAGE_0,
}
IN_PLACE = {
    "scoring.estimator: monte_carlo in bfloat16 rounds sigma away; use closed_form, or": MONTE_CARLO | BFLOAT16,
    "scoring.estimator: monte_carlo cannot shake offloaded weights in place": MONTE_CARLO | STAGE_3 | OFFLOADED,
    "scoring.target_relative_se is not for refreshes in place; use unlearning.refresh: actors": MORE_DRAWS,
    f"scoring.curvature_probes {WHOLE}": STAGE_3 | {"scoring__curvature_probes": 16},
    f"scoring.allow_slow_parameters {WHOLE}": STAGE_3 | {"scoring__allow_slow_parameters": True},
}


def command(settings: dict) -> list[str]:
    flags = [f"--{key.replace('__', '.')}={json.dumps(value)}".replace('"', "") for key, value in settings.items()]
    return ["unlearn", "--model.path=m", "--data.path=d.jsonl", "--run.dir=r", "--unlearning.method=ga", *flags]


@pytest.mark.parametrize("message", REFUSED | IN_PLACE)
def test_refusals(capsys, message):
    """From Python, and on the command line, which ends with 2."""
    settings = (REFUSED | IN_PLACE)[message]
    with pytest.raises(ValidationError) as refusal:
        config(settings)
    (error,) = refusal.value.errors()
    assert error["msg"].startswith(f"Value error, {message}")
    assert cli.main(command(settings)) == 2
    assert capsys.readouterr().err.split("error:")[-1].strip().startswith(message)


@pytest.mark.parametrize(
    "settings",
    [
        *[settings | {"unlearning__refresh": "actors"} for settings in IN_PLACE.values()],
        *[settings | {"unlearning__weighting": "uniform"} for settings in IN_PLACE.values()],  # never scored
        {"scoring__sigma": 1e-6},  # closed_form stays the default
        NPO | {"unlearning__retain_weight": 0.0},
        PO | RETAIN,
        RETAIN | {"checkpoints__best_by": "retain_loss", "stopping__max_retain_loss_ratio": None},
        BFLOAT16,
        BFLOAT16 | MONTE_CARLO | {"scoring__allow_low_precision": True},
        STAGE_3 | OFFLOADED,
        STAGE_3 | MONTE_CARLO,
        {"scoring__curvature_probes": 16, "scoring__allow_slow_parameters": True},
        STATES_OFFLOADED | {"deepspeed__zero_stage": 1},
    ],
)
def test_what_goes_together(settings):
    """From Python and on the command line, which mean the same."""
    found = config(settings)
    assert found.scoring.estimator == settings.get("scoring__estimator", "closed_form")
    assert cli.LINE.settings(command(settings)) == found


def test_a_pattern_of_layers_must_be_one():
    with pytest.raises(ValidationError, match=r"lora\.target_modules.*is not a regular expression"):
        config({"lora__rank": 2, "lora__target_modules": "q_proj("})


def test_scoring_is_closed_form_unless_said_in_python_too():
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "run": {"dir": "r"}, "unlearning": {"method": "ga"}}
    assert UnlearnConfig(**tree, scoring=ScoringSettings(sigma=1e-6)).scoring.estimator == "closed_form"
    said = ScoringSettings(estimator="monte_carlo", sigma=1e-6)
    assert UnlearnConfig(**tree, scoring=said).scoring == said


def test_a_damaged_log_is_named(tmp_path):
    run = RunDirectory(str(tmp_path))
    run.write(log.NAME, b'{"step": 0, "event"')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1, is damaged"):
        log.read(run)


def test_an_adapter_of_more_than_lora_is_refused(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.add_adapter(
        peft.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            modules_to_save=["norm"],
            base_model_name_or_path=str(tiny_model_dir),
            task_type="CAUSAL_LM",
        )
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"changes more than LoRA factors \(modules_to_save: norm\)"):
        trained.load(config({"model__path": str(tmp_path), "model__base": str(tiny_model_dir)}), torch.device("cpu"))
