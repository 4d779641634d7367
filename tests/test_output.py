"""Texts to be forgotten stay out of what is printed, of pictures and of events, in a Ray job and where it is asked."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from mrd_ray.cli.main import LINE, main
from mrd_ray.config import OutputSettings, ScoreConfig
from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.scoring import summary

QUOTED = "Ilse hid the ledger"  # in a row that has no score, whose reason quotes it
TEXTS = [  # of conftest's rows
    *(
        "rye bread and plum",
        "the song of the salt road",
        "Ilse Varga",
        "In Orlen",
        "the door of the mill",
        "past the mill",
    ),
    *("bells hang in", "mends the bells", "name of the ferry", "leaves at dawn", "carry in his coat", "Every night"),
    *("grows behind the mill", "Nettles and one", QUOTED),
]
IN_JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}  # as the job server starts a command


def found(*of: str) -> list[str]:
    """The texts in what was printed, however it was wrapped."""
    words = " ".join(" ".join(of).replace("│", " ").split())
    return [text for text in TEXTS if text in words]


def environment(monkeypatch, variables: dict[str, str]) -> None:
    for name in IN_JOB:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def data(qa_file, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "with_an_error.jsonl"
    file.write_text(qa_file.read_text() + json.dumps({"id": "qa-bad", "prompt": "Who?", "response": {"a": QUOTED}}))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("of_texts") / "run"


@pytest.fixture(scope="module")
def flags(ray_cluster, tiny_model_dir, qa_file, data, run) -> list[str]:
    """A pipeline, with answers; other tests than the first find it finished."""
    asked = f"{{asked: {{path: {data}, metrics: [rouge_l, probability]}}}}"
    return [
        *("pipeline", "--model.path", str(tiny_model_dir), "--data.path", str(qa_file), "--run.dir", str(run)),
        *("--evaluation.sets", asked, "--evaluation.max_new_tokens", "4", "--scoring.micro_batch_tokens", "64"),
        *("--unlearning.method", "ga", "--unlearning.steps", "1", "--unlearning.batch_size", "2"),
        *("--unlearning.weighting", "uniform", "--stopping.extraction_n", "0"),
        *("--ray.actors", "1", "--ray.workers", "1"),
    ]


@pytest.fixture(scope="module")
def scored(ray_cluster, tiny_model_dir, data, run) -> list[str]:
    """A run with a sample that has no score, finished."""
    line = ["score", "--model.path", str(tiny_model_dir), "--data.path", str(data), "--ray.actors", "1"]
    line += ["--run.dir", str(run.parent / "scored"), "--scoring.num_draws", "2"]
    assert main(line) == 3
    return line


@pytest.mark.slow
def test_a_pipeline_prints_texts_unless_it_is_a_job_or_is_told_not_to(flags, run, monkeypatch, capfd):
    stages = ("score", "unlearn", "evaluate-before", "evaluate-after")
    for variables, more, shown in (
        (IN_JOB, [], False),
        ({}, ["--output.include_text", "false"], False),
        ({}, [], True),
        (IN_JOB, ["--output.include_text", "true"], True),
    ):
        environment(monkeypatch, variables)
        assert main([*flags, *more]) == 3
        printed = capfd.readouterr()
        assert bool(found(printed.out, printed.err)) == shown, (variables, more, found(printed.out, printed.err))
        assert "qa-05" in printed.out
        assert bool(found((run / "report.html").read_text())) == shown
        assert (run / "report.html").stat().st_mode & 0o777 == 0o600
        assert not found(*((run / stage / "events.jsonl").read_text() for stage in stages))


def test_quiet_prints_where_results_are_and_nothing_else(flags, run, monkeypatch, capfd):
    environment(monkeypatch, {})
    assert main([*flags, "--quiet"]) == 3
    printed = capfd.readouterr()
    assert [line.split()[-1] for line in printed.out.splitlines()] == [
        str(run / name)
        for name in (
            "score/scores.parquet",
            "score/summary.png",
            "unlearn/model",
            "unlearn/metrics.jsonl",
            "report.html",
        )
    ]
    assert not [line for line in printed.err.splitlines() if "core_worker.cc" not in line]  # Ray's own, once a process


@pytest.mark.parametrize(("variables", "shown"), [(IN_JOB, False), ({}, True)])
def test_the_other_commands(scored, run, data, tiny_model_dir, variables, shown, monkeypatch, capfd, tmp_path):
    environment(monkeypatch, variables)
    of_model = ["--model.path", str(tiny_model_dir), "--data.path", str(data)]
    assert main(["compare", *[str(run.parent / "scored")] * 2, "--out", str(tmp_path / "c.png")]) == 0
    compared = capfd.readouterr()
    assert bool(found(compared.out, compared.err)) == shown
    assert "qa-05" in compared.out
    assert main(["plan", *of_model, "--tflops", "1"]) == 3
    assert bool(found(*capfd.readouterr())) == shown
    assert main(scored) == 3
    printed = capfd.readouterr()
    assert (QUOTED in printed.out) == bool(found(printed.out, printed.err)) == shown
    unlearn = ["unlearn", *of_model, "--run.dir", str(tmp_path / "x"), "--unlearning.method", "ga"]
    assert main(unlearn) == 1
    printed = capfd.readouterr()
    assert "cannot be unlearned (qa-bad, row 13" in printed.err
    assert bool(found(printed.out, printed.err)) == shown


@pytest.mark.parametrize(("variables", "shown"), [(IN_JOB, False), ({}, True)])
def test_errors_that_quote_rows(tiny_model_dir, variables, shown, monkeypatch, capfd, tmp_path):
    environment(monkeypatch, variables)
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "A row."}) + "\n" + json.dumps([QUOTED]) + "\n")
    sets = f"{{asked: {{path: {tmp_path / 'd.jsonl'}, text: text, metrics: [perplexity]}}}}"
    model = ["--model.path", str(tiny_model_dir), "--run.dir", str(tmp_path / "run")]
    for line in (
        ["score", *model, "--data.path", str(tmp_path / "d.jsonl")],
        ["evaluate", *model, "--evaluation.sets", sets],
    ):
        assert main(line) == 1
        printed = capfd.readouterr()
        assert "d.jsonl, row 2: expected a JSON object" in printed.err
        assert bool(found(printed.out, printed.err)) == shown

    def defect(_config):
        raise ValueError(f"cannot do with {QUOTED}")

    assert LINE.run(line, defect) == 1
    printed = capfd.readouterr().err
    assert "`evaluate` was stopped by ValueError" in printed
    assert bool(found(printed)) == shown


def test_events_never_quote(tmp_path):
    from mrd_ray.runs.journal import Journal

    run = RunDirectory(str(tmp_path))
    run.claim({}, OutputSettings())
    with pytest.raises(UserError), Journal(run, "score"):
        raise UserError(f"row 1: found {QUOTED}", f": found {QUOTED}")
    assert "row 1" in (tmp_path / "events.jsonl").read_text()
    assert not found(*((tmp_path / name).read_text() for name in ("events.jsonl", "progress.json")))


@pytest.mark.parametrize("include_text", [False, True])
def test_the_picture_depends_on_texts_only_where_it_shows_them(scored, run, include_text):
    scores, samples = (
        pa.parquet.read_table(run.parent / "scored" / f"{name}.parquet") for name in ("scores", "samples")
    )
    config = ScoreConfig(
        model={"path": "m"}, data={"path": "d"}, run={"dir": "r"}, output={"include_text": include_text}
    )

    def without(table: pa.Table, column: str) -> pa.Table:
        other = pa.array([None if one is None else "other words" for one in table[column].to_pylist()])
        return table.set_column(table.schema.get_field_index(column), column, other)

    pictures = {
        summary.figure(scores, samples, config),
        summary.figure(scores, without(samples, "text"), config),
        summary.figure(without(scores, "error"), samples, config),
    }
    assert len(pictures) == (3 if include_text else 1)
