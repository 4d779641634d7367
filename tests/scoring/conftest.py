"""One Ray for all scoring tests, with more logical CPUs than the machine has, so that four actors fit anywhere."""

import logging
import os

import pytest
import ray


@pytest.fixture(scope="session", autouse=True)
def ray_cluster():
    context = ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    os.environ["RAY_ADDRESS"] = context.address_info["address"]  # drivers started as processes join it
    yield
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()
