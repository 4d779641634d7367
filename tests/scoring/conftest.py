"""What the scoring tests share."""

import pytest
from runs_of import config

from mrd_ray import score


@pytest.fixture(scope="session", autouse=True)
def ray_for_all(ray_cluster):
    """Every scoring test."""


@pytest.fixture(scope="session")
def reference_dir(tiny_model_dir, qa_file, tmp_path_factory):
    """An uninterrupted run with one actor. Tests that resume from it copy it first."""
    run = tmp_path_factory.mktemp("reference")
    score(config(tiny_model_dir, qa_file, run))
    return run
