"""One Ray for all scoring tests, with more logical CPUs than the machine has, so that four actors fit anywhere."""

import logging
import os

import pytest
import ray
from runs_of import config

from mrd_ray import score


@pytest.fixture(scope="session", autouse=True)
def ray_cluster():
    context = ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    os.environ["RAY_ADDRESS"] = context.address_info["address"]  # drivers started as processes join it
    yield
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()


@pytest.fixture(scope="session")
def reference_dir(tiny_model_dir, qa_file, tmp_path_factory):
    """An uninterrupted run with one actor. Tests that go on from it copy it first."""
    run = tmp_path_factory.mktemp("reference")
    score(config(tiny_model_dir, qa_file, run))
    return run
