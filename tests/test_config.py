"""Settings: documented defaults, refusals that name the key, the command line and the shipped YAML files."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from mrd_ray.cli.main import LINE, main
from mrd_ray.config import DataSettings, RaySettings, ScoreConfig

REQUIRED = ["score", "--model.path", "m", "--data.path", "d.jsonl", "--run.dir", "r"]
CONFIGS = sorted((Path(__file__).parents[1] / "jobs" / "configs").glob("*.yaml"))


def test_defaults_are_the_documented_ones():
    config = ScoreConfig.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, "run": {"dir": "r"}})
    scoring = config.scoring
    assert (scoring.sigma, scoring.num_draws, scoring.statistic, scoring.seed) == (1e-5, 200, "mean_abs", 0)
    assert config.model.dtype == "float32"
    with pytest.raises(ValidationError):
        config.scoring.sigma = 1.0


@pytest.mark.parametrize(
    "setting",
    [
        {"template": "{prompt}"},
        {"template": "{response} {other} {response}"},
        {"template": "{% if %}"},
        {"template": "{other:>10}"},
        {"sample_seed": 1},
        {"path": []},
        {"encoding": "klingon"},
        {"response_index": 0, "response_join": ", "},
        {"template": "{prompt!r} {response}"},
        {"template": "{prompt"},
        {"prompt": "q"},
        {"text": "t", "prompt": "q", "response": "a"},
        {"text": "t", "score_on": "response"},
        {"max_tokens": 0},
        {"colour": "red"},
    ],
)
def test_data_settings_refused(setting):
    with pytest.raises(ValidationError):
        DataSettings(**{"path": "d"} | setting)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--scoring.sigma", "-1"], "scoring.sigma"),
        (["--scoring.num_draws", "0"], "scoring.num_draws"),
        (["--scoring.statistic", "median"], "scoring.statistic"),
        (["--scoring.seed", str(2**32)], "scoring.seed"),
        (["--scoring.sigmaa", "1"], "scoring.sigmaa"),
        (["--scoring.sigm", "1"], "scoring.sigm"),
        (["--ray.actors", "0"], "ray.actors"),
        (["--model.dtype", "float16"], "model.dtype"),
    ],
)
def test_bad_flags_are_refused_by_name(flags, named, capsys):
    assert main([*REQUIRED, *flags]) == 2
    assert named in capsys.readouterr().err


def test_several_gpus_are_whole(capsys):
    assert RaySettings(gpus_per_actor=2).gpus_per_actor == 2
    assert main([*REQUIRED, "--ray.gpus_per_actor", "1.5"]) == 2
    assert "ray.gpus_per_actor" in capsys.readouterr().err


def test_unknown_key_in_yaml_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("scoring:\n  sigmaa: 1.0e-4\n")
    assert main(["score", "--config", str(tmp_path / "c.yaml"), *REQUIRED[1:]]) == 2
    assert "scoring.sigmaa" in capsys.readouterr().err


def test_flags_go_over_yaml_and_print_config_replays(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("scoring:\n  sigma: 1.0e-4\n  num_draws: 7\n")
    line = ["score", "--config", str(tmp_path / "c.yaml"), *REQUIRED[1:], "--scoring.num_draws", "9"]
    parsed = LINE.settings(line)
    assert (parsed.scoring.sigma, parsed.scoring.num_draws) == (1e-4, 9)
    assert main([*line, "--print_config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert LINE.settings(["score", "--config", str(tmp_path / "printed.yaml")]) == parsed


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_parse(file):
    command = file.stem.split("_")[0]
    parsed = LINE.settings([command, "--config", str(file)]).model_dump()
    for key, value in yaml.safe_load(file.read_text()).items():
        for name, setting in value.items() if isinstance(value, dict) else []:
            found = parsed[key][name]
            assert (list(found) if isinstance(found, tuple) else found) == setting
    assert CONFIGS
