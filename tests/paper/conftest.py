"""What the tests of the experiments share: one Ray, and a set that takes seconds."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def ray_for_all(ray_cluster):
    """Every test of an experiment."""


@pytest.fixture
def flags(stories_dir, qa_file, tmp_path) -> list[str]:
    """Of any experiment: a small trained model and twelve samples."""
    return [
        *("--model.path", str(stories_dir)),
        *("--data.path", str(qa_file)),
        *("--run.dir", str(tmp_path / "run")),
        *("--results", str(tmp_path / "results")),
    ]
