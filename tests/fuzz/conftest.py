"""Real runs of each kind, to be mangled."""

from pathlib import Path

import pytest
from runs_of_fuzz import settings
from runs_of_report import LOG, unlearn_run

from mrd_ray import evaluate, score


@pytest.fixture(scope="session")
def asked_file(qa_file, tmp_path_factory) -> Path:
    """The pairs, with wrong answers."""
    file = tmp_path_factory.mktemp("asked") / "asked.jsonl"
    file.write_text(qa_file.read_text().replace("}\n", ', "wrong": ["Nothing.", "In Varga."]}\n'))
    return file


@pytest.fixture(scope="session")
def runs(ray_cluster, tiny_model_dir, asked_file, tmp_path_factory) -> dict[str, Path]:
    """A score, an evaluate and an unlearn run."""
    folder = tmp_path_factory.mktemp("runs")
    score(settings("score", tiny_model_dir, asked_file, folder / "score"))
    evaluate(settings("evaluate", tiny_model_dir, asked_file, folder / "evaluate"))
    refreshes = {0: folder / "score", 5: folder / "score"}
    unlearn_run(folder / "unlearn", refreshes, LOG, evaluations={0: folder / "evaluate", 10: folder / "evaluate"})
    return {name: folder / name for name in ("score", "evaluate", "unlearn")}
