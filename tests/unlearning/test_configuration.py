"""Settings of unlearning that contradict one another are refused by name; DeepSpeed is told what is left."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from mrd_ray import cli
from mrd_ray.config import UnlearnConfig
from mrd_ray.errors import UserError
from mrd_ray.unlearning.engine import configuration, with_retain

GA = {"unlearning": {"method": "ga"}}
RETAIN = {"retain": {"path": "r.jsonl"}}


def config(*trees: dict, **settings) -> UnlearnConfig:
    """Settings as trees, or as dotted keys with underscores: unlearning__method="npo"."""
    tree: dict = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "run": {"dir": "r"}}
    for group, values in (pair for one in trees for pair in one.items()):
        tree[group] = tree.get(group, {}) | values
    for key, value in settings.items():
        group, name = key.split("__")
        tree.setdefault(group, {})[name] = value
    return UnlearnConfig.model_validate(tree)


def with_json(tmp_path: Path, content, **settings):
    """The DeepSpeed configuration of gradient ascent where the user's JSON holds `content`."""
    file = tmp_path / "deepspeed.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return configuration(config(GA, deepspeed__config=str(file), **settings), 1)


# ours


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "expected"),
    [
        (8, None, 1, (8, 1)),
        (8, None, 2, (4, 1)),
        (8, None, 8, (1, 1)),
        (8, 2, 1, (2, 4)),
        (8, 3, 1, (3, 3)),  # 3, 3 and 2 samples
        (8, 2, 4, (2, 1)),
        (8, 1, 4, (1, 2)),
        (8, 100, 2, (4, 1)),
        (1, None, 1, (1, 1)),
    ],
)
def test_batch_arithmetic(batch, micro, workers, expected):
    """A step takes all micro-batches of the forget samples, and as many of the retain samples where they are used."""
    batches = {"unlearning__batch_size": batch, "unlearning__micro_batch_size": micro}
    size, count = expected
    for trees, settings, sets in [
        ((GA,), {}, 1),
        ((GA, RETAIN), {}, 1),  # gradient ascent uses them for its floor alone
        ((RETAIN,), {"unlearning__method": "npo"}, 2),
        ((RETAIN,), {"unlearning__method": "graddiff"}, 2),
        ((RETAIN,), {"unlearning__method": "po", "unlearning__refusals": "r.txt"}, 2),
        ((RETAIN,), {"unlearning__method": "npo", "unlearning__retain_weight": 0.0}, 1),
        ((), {"unlearning__method": "npo", "unlearning__retain_weight": 0.0}, 1),
    ]:
        one = config(*trees, **batches, **settings)
        found = configuration(one, workers)
        assert found["train_micro_batch_size_per_gpu"] == size
        assert found["gradient_accumulation_steps"] == sets * count
        assert with_retain(one) == (sets == 2)


@pytest.mark.parametrize(("batch", "workers", "such_as"), [(2, 4, 4), (1, 3, 3), (8, 3, 9), (10, 4, 12)])
def test_batch_that_workers_cannot_share(batch, workers, such_as):
    with pytest.raises(
        UserError, match=rf"unlearning\.batch_size: {batch} .* {workers} workers \(ray\.workers\).* such as {such_as}$"
    ):
        configuration(config(GA, unlearning__batch_size=batch), workers)
    configuration(config(GA, unlearning__batch_size=such_as), workers)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage(stage):
    zero = configuration(config(GA, deepspeed__zero_stage=stage), 1)["zero_optimization"]
    # a weight that stays gathered would take no noise
    assert zero == {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})


def test_offloads():
    zero = configuration(config(GA, deepspeed__offload_optimizer="cpu", deepspeed__zero_stage=1), 1)
    assert zero["zero_optimization"] == {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    both = {"offload_optimizer": "cpu", "offload_parameters": "cpu", "zero_stage": 3}
    found = configuration(config(GA, {"deepspeed": both}), 1)
    assert found["zero_optimization"] == {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
    assert found["zero_force_ds_cpu_optimizer"] is False  # our optimiser is torch's


@pytest.mark.parametrize(("dtype", "enabled"), [("float32", False), ("bfloat16", True)])
def test_precision_and_clipping(dtype, enabled):
    found = configuration(config(GA, model__dtype=dtype, unlearning__max_grad_norm=0.25), 1)
    assert found["bf16"] == {"enabled": enabled}
    assert found["gradient_clipping"] == 0.25
    assert not {"optimizer", "scheduler", "fp16"} & found.keys()


# a user's JSON


def test_what_is_not_ours_is_kept(tmp_path):
    plain = configuration(config(GA), 1)
    assert with_json(tmp_path, {}) == plain
    more = {"wall_clock_breakdown": True, "comms_logger": {"enabled": True, "debug": False}, "steps_per_print": 7}
    zero = {"overlap_comm": False, "reduce_bucket_size": 1e6}
    found = with_json(tmp_path, more | {"zero_optimization": zero})
    assert found == plain | more | {"zero_optimization": plain["zero_optimization"] | zero}
    pinned = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    found = with_json(tmp_path, pinned, deepspeed__offload_optimizer="cpu")
    assert found["zero_optimization"] == {"stage": 2, **pinned["zero_optimization"]}


def nested(key: str, value) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


OURS = {
    "train_batch_size": (16, "unlearning.batch_size"),
    "train_micro_batch_size_per_gpu": (16, "unlearning.micro_batch_size"),
    "gradient_accumulation_steps": (4, "unlearning.batch_size and unlearning.micro_batch_size"),
    "gradient_clipping": (0.5, "unlearning.max_grad_norm"),
    "optimizer": ({"type": "Adam", "params": {"lr": 1e-3}}, "unlearning.learning_rate and unlearning.weight_decay"),
    "scheduler": ({"type": "WarmupLR"}, "unlearning.learning_rate"),
    "fp16": ({"enabled": True}, "model.dtype"),
    "amp": ({"enabled": True}, "model.dtype"),
    "bf16.enabled": (True, "model.dtype"),
    "zero_optimization.stage": (3, "deepspeed.zero_stage"),
    "zero_optimization.offload_optimizer.device": ("cpu", "deepspeed.offload_optimizer"),
    "zero_optimization.offload_param.device": ("nvme", "deepspeed.offload_parameters"),
}


@pytest.mark.parametrize("key", OURS)
def test_contradictions_name_both_settings(tmp_path, key):
    value, setting = OURS[key]
    with pytest.raises(UserError) as refusal:
        with_json(tmp_path, nested(key, value) | {"wall_clock_breakdown": True})
    assert str(refusal.value).startswith(f"deepspeed.config: {key} is {json.dumps(value)} there, but {setting} decides")


@pytest.mark.parametrize("key", OURS)
def test_auto_leaves_it_to_us(tmp_path, key):
    found = with_json(tmp_path, nested(key, "auto"))
    found["zero_optimization"] = {name: value for name, value in found["zero_optimization"].items() if value != {}}
    assert found == configuration(config(GA), 1)


def test_agreement_is_no_contradiction(tmp_path):
    same = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1}
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}
    settings = {"unlearning__micro_batch_size": 4, "deepspeed__zero_stage": 3, "deepspeed__offload_parameters": "cpu"}
    found = with_json(tmp_path, same | {"zero_optimization": zero, "bf16": {"enabled": False}}, **settings)
    assert found == configuration(config(GA, **settings), 1)


def test_weights_that_would_stay_gathered(tmp_path):
    with pytest.raises(UserError, match=r"stage3_param_persistence_threshold is 100000 there.*\(0\)"):
        with_json(
            tmp_path, {"zero_optimization": {"stage3_param_persistence_threshold": 100_000}}, deepspeed__zero_stage=3
        )


@pytest.mark.parametrize("content", ['{"bf16": ', "[1, 2]", '"auto"', "null", "", "\xff"])
def test_files_that_are_no_deepspeed_json(tmp_path, content):
    with pytest.raises(UserError, match=r"^deepspeed\.config: .*deepspeed\.json is not a DeepSpeed JSON file: "):
        with_json(tmp_path, content)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(UserError, match=rf"^deepspeed\.config: {path} is not a DeepSpeed JSON file: "):
            configuration(config(GA, deepspeed__config=str(path)), 1)
    (tmp_path / "bytes.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="codec can't decode"):
        configuration(config(GA, deepspeed__config=str(tmp_path / "bytes.json")), 1)


@pytest.mark.xfail(strict=True, reason="compared with null, not with our none")
@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_none_is_what_we_have(tmp_path, key):
    with_json(tmp_path, {"zero_optimization": {key: {"device": "none"}}})


@pytest.mark.xfail(strict=True, reason="replaces our whole group")
@pytest.mark.parametrize(
    "content", [nested("zero_optimization", v) for v in (0, None, False, "auto")] + [{"bf16": True}]
)
def test_groups_that_are_no_objects(tmp_path, content):
    with pytest.raises(UserError, match=next(iter(content))):
        with_json(tmp_path, content)


@pytest.mark.xfail(strict=True, reason="replaces our whole group")
def test_offload_taken_back(tmp_path):
    with pytest.raises(UserError, match="offload_optimizer"):
        with_json(tmp_path, {"zero_optimization": {"offload_optimizer": None}}, deepspeed__offload_optimizer="cpu")


@pytest.mark.xfail(strict=True, reason="older names that DeepSpeed takes for ours go through")
@pytest.mark.parametrize("name", ["cpu_offload", "cpu_offload_param"])
def test_other_names_of_ours(tmp_path, name):
    with pytest.raises(UserError, match=name):
        with_json(tmp_path, {"zero_optimization": {name: True}}, deepspeed__zero_stage=3)


# settings that disagree

MONTE_CARLO = {"scoring__estimator": "monte_carlo"}
CLOSED_FORM = {"scoring__estimator": "closed_form"}
STAGE_3 = {"deepspeed__zero_stage": 3}
REFUSED = {
    "po without refusals": (
        {"unlearning__method": "po", "retain__path": "r"},
        "unlearning.method: po needs unlearning.refusals",
    ),
    "refusals without po": (
        {"unlearning__refusals": "x.txt"},
        "unlearning.refusals has no meaning with unlearning.method: ga",
    ),
    "npo": ({"unlearning__method": "npo"}, "retain.path: unlearning.method: npo needs a retain set"),
    "graddiff": ({"unlearning__method": "graddiff"}, "retain.path: unlearning.method: graddiff needs a retain set"),
    "po": (
        {"unlearning__method": "po", "unlearning__refusals": "x.txt"},
        "retain.path: unlearning.method: po needs a retain set",
    ),
    "best by retain loss": (
        {"checkpoints__best_by": "retain_loss"},
        "checkpoints.best_by: retain_loss needs retain.path",
    ),
    "float64": ({"model__dtype": "float64"}, "model.dtype: float64 is for scoring"),
    "weights offloaded": (
        {"deepspeed__offload_parameters": "cpu"},
        "deepspeed.offload_parameters needs deepspeed.zero_stage: 3",
    ),
    "states offloaded": (
        {"deepspeed__offload_optimizer": "cpu", "deepspeed__zero_stage": 0},
        "deepspeed.offload_optimizer needs deepspeed.zero_stage: 1, 2 or 3",
    ),
}
REFUSED_IN_PLACE = {
    "rounding": (
        {**MONTE_CARLO, "model__dtype": "bfloat16"},
        "scoring.estimator: monte_carlo in bfloat16 rounds sigma away",
    ),
    "noise on offloaded weights": (
        {**MONTE_CARLO, **STAGE_3, "deepspeed__offload_parameters": "cpu"},
        "scoring.estimator: monte_carlo cannot shake offloaded weights in place (deepspeed.offload_parameters)",
    ),
    "more draws": (
        {**MONTE_CARLO, "scoring__target_relative_se": 0.05},
        "scoring.target_relative_se is not for refreshes in place; use unlearning.refresh: actors",
    ),
    "curvature": (
        {**CLOSED_FORM, **STAGE_3, "scoring__curvature_probes": 16},
        "scoring.curvature_probes needs whole weights, not deepspeed.zero_stage: 3; use unlearning.refresh: actors",
    ),
    "slow parameters": (
        {**CLOSED_FORM, **STAGE_3, "scoring__allow_slow_parameters": True},
        "scoring.allow_slow_parameters needs whole weights, not deepspeed.zero_stage: 3; use unlearning.refresh: actor",
    ),
}


@pytest.mark.parametrize("case", REFUSED | REFUSED_IN_PLACE)
def test_refusals(case):
    settings, message = (REFUSED | REFUSED_IN_PLACE)[case]
    with pytest.raises(ValidationError) as refusal:
        config(GA, **settings)
    (error,) = refusal.value.errors()
    assert error["msg"].startswith(f"Value error, {message}")


@pytest.mark.parametrize("case", REFUSED_IN_PLACE)
@pytest.mark.parametrize("way_out", [{"unlearning__refresh": "actors"}, {"unlearning__weighting": "uniform"}], ids=str)
def test_elsewhere_it_may_be(case, way_out):
    """Scored by actors, or not at all."""
    config(GA, **REFUSED_IN_PLACE[case][0], **way_out)


@pytest.mark.parametrize(
    "settings",
    [
        {"unlearning__method": "npo", "unlearning__retain_weight": 0.0},
        {"unlearning__method": "po", "unlearning__refusals": "x.txt", "retain__path": "r"},
        {"checkpoints__best_by": "retain_loss", "retain__path": "r"},
        {"model__dtype": "bfloat16", **CLOSED_FORM},
        {"model__dtype": "bfloat16", **MONTE_CARLO, "scoring__allow_low_precision": True},
        {**STAGE_3, "deepspeed__offload_parameters": "cpu", **CLOSED_FORM},
        {**STAGE_3, **MONTE_CARLO},
        {**CLOSED_FORM, "scoring__curvature_probes": 16, "scoring__allow_slow_parameters": True},
        {"deepspeed__offload_optimizer": "cpu", "deepspeed__zero_stage": 1},
    ],
    ids=str,
)
def test_what_goes_together(settings):
    config(GA, **settings)


def test_defaults():
    assert config(GA).scoring.estimator == "closed_form"
    with pytest.raises(ValidationError, match="retain set"):  # of npo, the default method
        config()


# the command line

COMMAND = ["unlearn", "--model.path", "m", "--data.path", "d.jsonl", "--run.dir", "r", "--unlearning.method", "ga"]
CASES = ["po without refusals", "refusals without po", "npo", "float64", "weights offloaded", "more draws", "curvature"]


def flags(settings: dict) -> list[str]:
    return [text for key, value in settings.items() for text in (f"--{key.replace('__', '.')}", str(value))]


def error(capsys, *arguments) -> str:
    """What is printed after the usage, with which the command ends with 2."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err.split("error:")[-1]


@pytest.mark.parametrize("case", CASES)
def test_refusals_on_the_command_line(capsys, case):
    settings, message = (REFUSED | REFUSED_IN_PLACE)[case]
    assert error(capsys, *COMMAND, *flags(settings)).strip().startswith(message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unlearning.method", "dpo"), ("unlearning.beta", "0"), ("unlearning.retain_weight", "-1"),
        ("unlearning.batch_size", "0"), ("unlearning.seed", "4294967296"), ("unlearning.refresh", "never"),
        ("stopping.forgotten", "some"), ("stopping.max_retain_loss_ratio", "1"), ("deepspeed.zero_stage", "4"),
        ("deepspeed.offload_optimizer", "nvme"), ("ray.workers", "0"), ("checkpoints.keep", "0"),
    ],
)  # fmt: skip
def test_flags_out_of_range(capsys, key, value):
    assert key in error(capsys, *COMMAND, f"--{key}", value)


def of_flags(*arguments) -> UnlearnConfig:
    line = cli.parser()
    settings = line.instantiate(line.parse_args([*COMMAND, *arguments]))["unlearn"].as_dict()
    return UnlearnConfig(**{key: value for key, value in settings.items() if key not in ("config", "__path__")})


def test_flags_are_the_settings():
    arguments = [*flags(CLOSED_FORM), *flags(STAGE_3), "--retain.path", "r", "--stopping.max_retain_loss_ratio", "null"]
    expected = config(GA, **CLOSED_FORM, **STAGE_3, retain__path="r", stopping__max_retain_loss_ratio=None)
    assert of_flags(*arguments) == expected


@pytest.mark.xfail(strict=True, reason="from Python, naming any setting of scoring turns the estimator to monte_carlo")
def test_the_default_estimator_is_one():
    assert config(GA, scoring__sigma=1e-6) == of_flags("--scoring.sigma", "1e-6")
