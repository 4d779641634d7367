"""Every experiment from its command line to what it publishes, on a small trained model; and jobs/paper."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats

from jobs.paper import fig2, table7, tables
from jobs.paper.main import LINE, main
from mrd_ray.runs.directory import RunDirectory

ROOT = Path(__file__).parents[2]
ALONE = ["--alone.learning_rate", "3e-4", "--alone.max_updates", "12", "--alone.extraction_n", "0"]
SWEEP = [
    *("--unlearning.steps", "2", "--unlearning.batch_size", "4", "--unlearning.learning_rate", "1e-4"),
    *("--stopping.extraction_n", "0", "--stopping.forgotten", "never", "--seeds", "[0, 1]"),
]


def found(tmp_path, name):
    """What was published, in the run directory and in the folder of results."""
    published = json.loads((tmp_path / "run" / "findings.json").read_text())
    assert json.loads((tmp_path / "results" / f"{name}.json").read_text()) == published
    assert (tmp_path / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return published


@pytest.mark.slow
def test_fig4(flags, tmp_path, capsys):
    line = ["fig4", *flags, *ALONE, "--ray.samples_per_task", "4"]
    assert main(line) == 0
    published = found(tmp_path, "fig4")
    cells = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "run" / "cells").iterdir()}
    assert len(cells) == 4  # three blocks of four, and the reference
    outcomes = {
        name: one for file in cells if "block" in file.name for name, one in json.loads(file.read_text()).items()
    }
    scores = pq.read_table(tmp_path / "run" / "scores" / "scores.parquet")
    updates = [outcomes[sample_id]["updates"] for sample_id in scores["sample_id"].to_pylist()]
    assert len(set(updates)) > 1
    of_mrd = published["rows"][0]["Spearman with updates"]
    assert of_mrd["value"] == pytest.approx(scipy.stats.spearmanr(scores["mrd"].to_numpy(), updates).statistic)
    assert of_mrd["low"] < of_mrd["value"] < of_mrd["high"]
    assert published["rows"][0]["measure"] == "MRD"
    assert "Figure 4" in capsys.readouterr().out
    assert main(line) == 0  # again: from what is there
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in cells} == cells
    assert main([*line, "--alone.learning_rate", "1e-3"]) == 1
    assert "alone.learning_rate: 0.0003 there, 0.001 now" in capsys.readouterr().err


@pytest.mark.slow
def test_fig3(flags, tmp_path, capsys):
    assert main(["fig3", *flags, *ALONE, "--size", "3", "--composites", "4"]) == 0
    rows = found(tmp_path, "fig3")["rows"]
    changes = [row["mean |change| of a weight"] for row in rows]
    assert len(rows) == 4
    assert changes == sorted(changes)
    assert main(["fig3", *flags, "--size", "4", "--composites", "4", "--run.dir", str(tmp_path / "other")]) == 1
    assert "composites: 4 of 4 samples each are 16" in capsys.readouterr().err


@pytest.mark.slow
def test_fig5(flags, tmp_path):
    more = ["--sigmas", "[1e-5, 1e-3]", "--sigma_draws", "6", "--draws", "[4, 8]", "--scored", "10"]
    assert main(["fig5", *flags, *more, "--ray.actors", "1"]) == 0
    rows = {row["run"]: row for row in found(tmp_path, "fig5")["rows"]}
    assert list(rows) == [
        *("closed-form-float32", "closed-form-bfloat16", "float32-sigma-1e-05", "float32-sigma-0.001"),
        *("bfloat16-sigma-1e-05", "bfloat16-sigma-0.001", "float32-draws-4", "float32-draws-8"),
    ]
    ratio = "MRD/sigma over the closed form's"
    assert rows["float32-sigma-1e-05"][ratio]["value"] == pytest.approx(1, abs=0.5)  # six draws
    assert rows["bfloat16-sigma-1e-05"][ratio]["value"] > 5  # rounding, not signal
    assert rows["bfloat16-sigma-1e-05"]["weights moved"] < 0.5 < rows["float32-sigma-1e-05"]["weights moved"]
    of_draws = pq.read_table(tmp_path / "run" / "runs" / "float32-draws" / "scores.parquet")
    assert of_draws["num_draws"].to_pylist() == [8] * 10


@pytest.mark.slow
def test_table7(flags, tmp_path):
    assert main(["table7", *flags]) == 0
    rows = found(tmp_path, "table7")["rows"]
    assert [row["characteristic"].split(":")[0].split(",")[0] for row in rows] == [
        *("semantic complexity", "frequency", "initial probability", "rare words"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_tables_and_fig2(flags, tmp_path, qa_file):
    evaluation = {"sets": {"asked": {"path": str(qa_file), "max_samples": 3, "metrics": ["probability"]}}}
    file = tmp_path / "tables.yaml"
    file.write_text(json.dumps({"methods": {"ga": {}, "npo": {"beta": 0.2}}, "evaluation": evaluation}))
    retain = ["--retain.path", str(qa_file)]
    assert main(["tables", *flags, *SWEEP, *retain, "--config", str(file)]) == 0
    rows = {row["figure"]: row for row in found(tmp_path, "tables")["rows"]}
    assert {"forget log-likelihood, nats per sample", "asked: answer probability, per token"} <= rows.keys()
    of_asked = rows["asked: answer probability, per token"]
    assert of_asked["SGA, mrd"]["value"] < of_asked["before"]
    cells = [json.loads((tmp_path / "run" / "cells" / f"ga-{of}-0.json").read_text()) for of in ("mrd", "uniform")]
    gain = rows["forget log-likelihood, nats per sample"]["SGA: mrd - uniform"]
    assert gain["low"] is None or gain["low"] < gain["value"] < gain["high"]
    assert cells[0]["before"] == cells[1]["before"]
    assert not list((tmp_path / "run" / "runs").glob("*/checkpoints"))

    where = ["--run.dir", str(tmp_path / "fig2"), "--results", str(tmp_path / "results")]
    assert main(["fig2", *flags, *SWEEP, *retain, "--selections", "2", "--size", "5", *where]) == 0
    published = json.loads((tmp_path / "results" / "fig2.json").read_text())
    assert len(list((tmp_path / "fig2" / "cells").iterdir())) == 4
    assert published["rows"][0]["change of"].startswith("forget MA")


def test_selections_do_not_depend_on_how_many_there_are(flags, tmp_path):
    config = LINE.settings(["fig2", *flags, "--size", "5", "--selections", "3"])

    run = RunDirectory(config.run.dir)
    three = [Path(data.path).read_text(encoding="utf-8") for data in fig2.selections(config, run)]
    two = [
        Path(data.path).read_text(encoding="utf-8")
        for data in fig2.selections(config.model_copy(update={"selections": 2}), run)
    ]
    assert two == three[:2]
    assert len(set(three)) == 3
    assert all(len(text.splitlines()) == 5 for text in three)


def test_variance_components_of_a_known_design():
    rng = np.random.default_rng(0)
    values = [(rng.normal(0, 3) + rng.normal(0, 1, size=40)).tolist() for _ in range(400)]
    row = fig2.row("x", values)
    assert row["s.d. between"] == pytest.approx(3, rel=0.1)
    assert row["s.d. of seeds"] == pytest.approx(1, rel=0.02)
    assert row["share"] == pytest.approx(0.9, abs=0.02)
    assert fig2.row("x", [[0.1, 0.1], [0.5, 0.5]])["p"] == 0
    assert fig2.row("x", [[0.1, 0.1], [0.1, 0.1]])["p"] == 1


def test_what_is_better_depends_on_the_set():
    assert tables.better(("kept", "rouge_l"), "gone") == 1
    assert tables.better(("gone", "rouge_l"), "gone") == tables.better((None, "retain_perplexity"), "gone") == -1
    assert tables.better(("gone", "RR"), "gone") == tables.better((None, "model_utility"), "gone") == 1
    assert tables.better(("gone", "perplexity"), "gone") == -tables.better(("kept", "perplexity"), "gone") == 1
    assert tables.better(("any", "multiple_choice"), "gone") == 0  # hazardous knowledge, or other
    assert tables.better(("any", "probability"), None) == 0  # maybe of what is to be forgotten


@pytest.mark.parametrize(
    ("mrd", "verdict"),
    [([0.1, 0.11, 0.12], "Agrees"), ([0.9, 0.91, 0.92], "Disagrees"), ([0.1, 0.5, 0.9], "Undecided")],
)
def test_verdict_of_a_method(mrd, verdict):
    figure = (None, "forget_memorization_accuracy")
    values = {("npo", "mrd"): {figure: mrd}, ("npo", "uniform"): {figure: [0.5, 0.5, 0.51]}}
    (found,) = tables._gains(values, None)
    assert found.startswith(f"NPO: {verdict}. ")


def test_characteristics_by_hand():
    assert table7.words("The cat's “hat”, the HAT: 2 cats!") == ["the", "cat's", "hat", "the", "hat", "2", "cats"]
    assert table7.complexity(["a", "b", "a", "c"]) == 3 / 2
    assert table7.rarity(["a", "b", "a", "c"], {"a"}) == 1 / 2
    texts = ["one two three four", "nine one two three", "a b"]
    assert table7.frequencies(texts, []) == [1 / 2, 1 / 2, 0]
    assert table7.frequencies(texts, ["two three four"]) == [1, 1 / 2, 0]


@pytest.mark.parametrize("name", LINE.commands)
def test_every_experiment_has_its_settings(name):
    configs = sorted((ROOT / "jobs" / "paper" / "configs").glob(f"{name}_*.yaml"))
    assert {file.stem.rsplit("_", 1)[1] for file in configs} == {"cpu", "paper"}
    for file in configs:
        task = file.stem.split("_")[1]
        line = [name, "--config", str(file), *(["--task", task] if name == "tables" and "paper" in file.stem else [])]
        config = LINE.settings(line)
        assert isinstance(config, LINE.commands[name])


def test_the_command_of_the_readme():
    line = [sys.executable, "-m", "jobs.paper", "fig2", "--help"]
    found = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0
    assert "Figure 2" in found.stdout
