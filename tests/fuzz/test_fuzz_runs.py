"""Whatever a file of a run directory holds, what reads it gives a UserError or goes on, and what resumes is right."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from mangled import TIMES, attempt, explore, of_bytes, of_json_file, of_parquet
from runs_of_fuzz import settings

from mrd_ray import CompareConfig, MRDSampler, ReportConfig, UserError, compare, evaluate, score, write_report
from mrd_ray.evaluation import zero_shot
from mrd_ray.evaluation.aggregate import Figure
from mrd_ray.runs import journal
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.status import rows, status
from mrd_ray.scoring.compare import figure
from mrd_ray.unlearning import log
from mrd_ray.unlearning.state import State
from mrd_ray.unlearning.stopping import Knowledge

pytestmark = pytest.mark.slow


def mangle(file: Path) -> st.SearchStrategy[bytes]:
    """The contents that a file of this kind may have."""
    return (of_parquet if file.suffix == ".parquet" else of_json_file)(file.read_bytes())


@pytest.fixture
def copy(runs, tmp_path):
    """A run that may be changed."""

    def copy(kind: str) -> Path:
        return shutil.copytree(runs[kind], tmp_path / kind)

    return copy


@TIMES
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("score", "manifest.json"),
        ("score", "scores.parquet"),
        ("score", "samples.parquet"),
        ("evaluate", "manifest.json"),
        ("evaluate", "evaluation.parquet"),
        ("evaluate", "answers.parquet"),
        ("evaluate", "figures.parquet"),
        ("unlearn", "manifest.json"),
        ("unlearn", "metrics.jsonl"),
        ("unlearn", "scores/step-000005.parquet"),
        ("unlearn", "evaluations/step-000010.parquet"),
    ],
)
def test_report(kind, name, times, copy, tmp_path):
    run = copy(kind)
    page = tmp_path / "page.html"

    def check(mangled: bytes) -> None:
        (run / name).write_bytes(mangled)
        page.unlink(missing_ok=True)
        done, _ = attempt(lambda: write_report(ReportConfig(runs=[str(run)], out=str(page))))
        assert page.exists() == (done is not None)

    mangled_contents = mangle(run / name)
    check((run / name).read_bytes())
    assert page.exists()
    explore(check, 40 * times, mangled_contents)


@TIMES
@pytest.mark.parametrize("name", ["manifest.json", "scores.parquet", "samples.parquet"])
def test_compare(name, times, copy, runs, tmp_path):
    run = copy("score")

    def check(mangled: bytes) -> None:
        (run / name).write_bytes(mangled)
        config = CompareConfig(run_a=str(runs["score"]), run_b=str(run))
        done, _ = attempt(lambda: figure(compare(config), config))
        assert mangled != good or done is not None

    good = (run / name).read_bytes()
    check(good)
    explore(check, 40 * times, mangle(run / name))


@TIMES
def test_sampler(times, copy):
    run = copy("score")

    def check(mangled: bytes) -> None:
        (run / "scores.parquet").write_bytes(mangled)
        sampler, _ = attempt(lambda: MRDSampler(run / "scores.parquet"))
        assert sampler is None or all(0 <= index < len(sampler) for index in sampler)

    explore(check, 60 * times, mangle(run / "scores.parquet"))


@TIMES
@pytest.mark.parametrize("kind", ["score", "evaluate"])
@pytest.mark.parametrize("name", ["manifest.json", "result", "unit's bytes"])
def test_resume(kind, name, times, copy, runs, tiny_model_dir, asked_file):
    """The whole of a run is there, so that nothing is computed: its results come out as they were, or not at all."""
    run = copy(kind)
    result = "scores.parquet" if kind == "score" else "evaluation.parquet"
    unit = next((run / "units").glob("*.parquet"))
    file = {"unit's bytes": unit, "result": run / result}.get(name, run / name)
    good = file.read_bytes()
    config = settings(kind, tiny_model_dir, asked_file, run)
    expected = pq.read_table(runs[kind] / result)

    def check(mangled: bytes) -> None:
        shutil.copy(runs[kind] / "manifest.json", run)
        file.write_bytes(mangled)
        done, refusal = attempt(lambda: (score if kind == "score" else evaluate)(config))
        assert mangled != good or done is not None, refusal
        if done is not None:
            assert pq.read_table(run / result).equals(expected)

    check(good)
    explore(check, 20 * times, of_bytes(good) if name == "unit's bytes" else mangle(file))


@TIMES
@pytest.mark.parametrize("name", ["manifest.json", journal.PROGRESS, journal.EVENTS])
def test_status(name, times, copy):
    run = copy("score")

    def check(mangled: bytes) -> None:
        (run / name).write_bytes(mangled)
        told, _ = attempt(lambda: [rows(found) for found in status(str(run))])
        assert mangled != good or told is not None
        assert told is None or all(word.isprintable() for row in told[0] for cell in row for word in cell.split("\n"))

    good = (run / name).read_bytes()
    check(good)
    explore(check, 60 * times, mangle(run / name))


@TIMES
@pytest.mark.parametrize("name", ["manifest.json", "evaluation.parquet"])
def test_reference(name, times, copy, runs, tiny_model_dir, asked_file, tmp_path):
    reference, run = copy("evaluate"), shutil.copytree(runs["evaluate"], tmp_path / "run")
    config = settings("evaluate", tiny_model_dir, asked_file, run)
    evaluation = config.evaluation.model_copy(update={"reference": str(reference)})
    config = config.model_copy(update={"evaluation": evaluation})

    def check(mangled: bytes) -> None:
        (reference / name).write_bytes(mangled)
        done, _ = attempt(lambda: evaluate(config))
        assert mangled != good or done is not None

    good = (reference / name).read_bytes()
    check(good)
    explore(check, 20 * times, mangle(reference / name))


def test_report_of_numbers_too_large_for_an_int64(copy, tmp_path):
    """Which JSON may hold."""
    run = copy("unlearn")
    content = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(content.replace('"forget_loss": 13.0', '"forget_loss": 1' + "0" * 30))
    write_report(ReportConfig(runs=[str(run)], out=str(tmp_path / "page.html")))


@pytest.mark.parametrize(("column", "value"), [("metric", None), ("tokens", None), ("value", -1.0)])
def test_report_of_evaluated_values_that_cannot_be(column, value, copy, tmp_path):
    run = copy("unlearn")
    file = run / "evaluations" / "step-000010.parquet"
    table = pq.read_table(file)
    lines = [line | {"metric": "perplexity", "value": 2.0, "tokens": 3} for line in table.to_pylist()]
    lines[1][column] = value
    pq.write_table(pa.Table.from_pylist(lines, table.schema), file)
    with pytest.raises(UserError, match=r"step-000010.parquet is damaged \("):
        write_report(ReportConfig(runs=[str(run)], out=str(tmp_path / "page.html")))


@TIMES
def test_log(times, copy):
    run = copy("unlearn")

    def check(mangled: bytes) -> None:
        (run / "metrics.jsonl").write_bytes(mangled)
        lines, refusal = attempt(lambda: log.read(log.RunDirectory(str(run))))
        assert "metrics.jsonl" in refusal if lines is None else all(type(line["step"]) is int for line in lines)

    explore(check, 60 * times, mangle(run / "metrics.jsonl"))


@TIMES
@pytest.mark.parametrize("name", ["state.json", "scores.parquet"])
def test_checkpoint(name, times, runs, tmp_path):
    """What a resumed unlearning resumes from."""
    evaluation = Knowledge([-3.0, -4.5], [0.5, 1.0], [float("nan"), 0.25], None)
    scores = pq.read_table(runs["score"] / "scores.parquet")
    State(3, evaluation, evaluation, scores, 2, [{"step": 1, "event": "step"}]).save(tmp_path)

    def check(mangled: bytes) -> None:
        (tmp_path / name).write_bytes(mangled)
        state, _ = attempt(lambda: State.load(tmp_path))
        assert mangled != good or (state.step, state.scores.equals(scores)) == (3, True)
        assert state is None or (
            state.step >= 0 and (state.latest is None or all(isinstance(p, int | float) for p in state.latest.log_prob))
        )

    good = (tmp_path / name).read_bytes()
    check(good)
    explore(check, 60 * times, mangle(tmp_path / name))


@TIMES
def test_zero_shot(times, copy, tiny_model_dir, asked_file, tmp_path):
    """A suite's figures that are there are taken."""
    run = RunDirectory(str(copy("evaluate")))
    config = settings("evaluate", tiny_model_dir, asked_file, tmp_path)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"zero_shot": ["arc_easy"]})})
    good = json.dumps([vars(Figure("arc_easy", "acc", 0.5, None, 10))]).encode()

    def check(mangled: bytes) -> None:
        run.write("units/zero-shot-arc_easy.json", mangled)
        found, _ = attempt(lambda: zero_shot.figures(config, run, "", None))
        assert mangled != good or found == [Figure("arc_easy", "acc", 0.5, None, 10)]

    check(good)
    explore(check, 60 * times, of_json_file(good))
