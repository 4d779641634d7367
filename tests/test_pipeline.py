"""The stages in a row: what each gives, and going on in the one that was interrupted."""

import shutil
from pathlib import Path

import pytest

from mrd_ray.cli.main import main

STAGES = ("score", "unlearn", "evaluate-before", "evaluate-after")


@pytest.fixture
def flags(ray_cluster, tiny_model_dir, qa_file, tmp_path):
    sets = "{asked: {path: " + str(qa_file) + ", metrics: [probability]}}"
    return [
        *("pipeline", "--model.path", str(tiny_model_dir), "--data.path", str(qa_file)),
        *("--run.dir", str(tmp_path / "run"), "--evaluation.sets", sets, "--evaluation.forget", "asked"),
        *("--unlearning.method", "ga", "--unlearning.steps", "2", "--unlearning.batch_size", "4"),
        *("--stopping.extraction_n", "0", "--ray.actors", "1", "--ray.workers", "1"),
    ]


def files(run: Path) -> dict[str, int]:
    """What the stages are finished by, and when each was written."""
    names = [f"{stage}/{name}" for stage in ("evaluate-before", "evaluate-after") for name in ("units",)]
    found = [file for name in names for file in (run / name).iterdir()]
    found += [*(run / "score" / "units").iterdir(), run / "unlearn" / "model" / "model.safetensors"]
    return {str(file.relative_to(run)): file.stat().st_mtime_ns for file in found}


@pytest.mark.slow
def test_stages_go_on_where_they_stopped(flags, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "12 of 12 samples scored" in said
    assert f"Report: {run / 'report.html'}" in said
    whole, first = (run / "report.html").read_text(), files(run)
    assert all((run / stage / "manifest.json").is_file() for stage in STAGES)
    assert whole.count("forget MA") >= 1

    shutil.rmtree(run / "evaluate-after")  # as if the pipeline had been killed before its last stage
    assert main(flags) == 0
    again = files(run)
    assert {name: when for name, when in again.items() if not name.startswith("evaluate-after")} == {
        name: when for name, when in first.items() if not name.startswith("evaluate-after")
    }
    assert again.keys() == first.keys()
    figures = [(run / stage / "figures.json").read_bytes() for stage in ("evaluate-before", "evaluate-after")]
    assert figures[0] != figures[1]


@pytest.mark.slow
def test_a_report_without_text(flags, tmp_path):
    assert main([*flags, "--output.include_text", "false"]) == 0
    assert "baker of Orlen" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_nothing_to_evaluate(flags, tmp_path):
    """The two evaluations are left out; scores and unlearning are reported."""
    at = flags.index("--evaluation.sets")
    assert main([*flags[:at], *flags[at + 4 :]]) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.html", "score", "unlearn"]
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


def test_contradictions_are_refused_before_the_first_stage(flags, tmp_path):
    assert main([*flags, "--unlearning.method", "npo"]) == 2
    assert not (tmp_path / "run").exists()
