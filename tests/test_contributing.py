"""What contributors are told is there, and what their changes must pass."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_paths_of_the_guide_exist():
    named = re.findall(r"`((?:mrd_ray|tests|jobs|\.ci)[\w./-]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_package_is_in_the_guide():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    for one in (ROOT / "mrd_ray").iterdir():
        if one.is_dir() and one.name != "__pycache__":
            assert f"`mrd_ray/{one.name}`" in guide


@pytest.mark.parametrize(("name", "runs"), [("ci", ".ci/run"), ("nightly", ".ci/nightly")])
def test_workflows_run_what_a_person_would(name, runs):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1]["run"] == runs
    assert (ROOT / runs).stat().st_mode & 0o111


@pytest.mark.parametrize("module", ["mrd_ray.mrd.monte_carlo", "mrd_ray.mrd.scores", "mrd_ray.scoring.units"])
def test_examples_of_docstrings(module):
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert (failed, tried > 0) == (0, True)
