"""Settings that name files and folders are known by their type, wherever they stand."""

import inspect
import re

import pytest

from jobs.paper import config as paper
from mrd_ray import UserError, config
from mrd_ray.config import PipelineConfig, UnlearnConfig
from mrd_ray.config.base import Frozen
from mrd_ray.config.paths import path_mark, with_absolute_paths
from mrd_ray.data import tasks

# read by the command itself in its own working directory, never by a worker or from a task file
OF_THE_COMMAND_ONLY = {
    "CompareConfig.run_a", "CompareConfig.run_b", "CompareConfig.out", "ReportConfig.runs", "ReportConfig.out",
    "StatusConfig.run", "TasksConfig.tasks", "DemoConfig.model", "DemoConfig.data", "DemoConfig.cache",
    "LearnSettings.cache", "ExperimentConfig.results", "TasksConfig.task_data",
}  # fmt: skip
# their descriptions speak of files, but they name none
NAME_NO_FILE = {f"DataSettings.{name}" for name in ("split", "encoding", "separator", "prompt")}
SPEAKS_OF_FILES = re.compile(r"director|folder|\bfiles?\b|\.txt|\.json|\.parquet|hub id\b(?! model)", re.IGNORECASE)


def own_fields():
    """Class and name of every setting, with what it is annotated with, where it is first defined."""
    for module in (config, paper, config.base, config.pipeline):
        for of in {kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, Frozen)}:
            for name, annotation in inspect.get_annotations(of).items():
                if name in of.model_fields:
                    yield f"{of.__name__}.{name}", annotation, of.model_fields[name].description or ""


def test_a_setting_that_names_a_file_has_the_type():
    marked = {name for name, annotation, _ in own_fields() if path_mark(annotation)}
    speaking = {name for name, annotation, said in own_fields() if "str" in str(annotation) and _speaks(said)}
    assert {"ModelSettings.path", "DataSettings.path", "DeepSpeedSettings.config", "Table7Config.corpus"} <= marked
    assert speaking - marked <= OF_THE_COMMAND_ONLY | NAME_NO_FILE
    assert not marked & (OF_THE_COMMAND_ONLY | NAME_NO_FILE)


def _speaks(description: str) -> bool:
    return SPEAKS_OF_FILES.search(description) is not None


def test_files_that_exist_become_absolute_wherever_they_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "d.jsonl", "e.jsonl", "r.txt", "path"):
        (tmp_path / name).touch()
    settings = {
        "model": {"path": "m", "tokenizer": "not-here", "base": "s3://b/m"},
        "data": {"path": ["d.jsonl", "absent-*.jsonl"], "prompt": "m", "response": "path", "where": {"path": "m"}},
        "run": {"dir": "new"},
        "unlearning": {"method": "po", "refusals": "r.txt", "retain_weight": 0},
        "evaluation": {"sets": {"path": {"path": "e.jsonl", "metrics": ["rouge_l"]}}},
    }
    for kind in (UnlearnConfig, PipelineConfig):
        there = with_absolute_paths(kind(**settings))
        assert (there.model.path, there.model.tokenizer, there.model.base) == (f"{tmp_path}/m", "not-here", "s3://b/m")
        assert there.data.path == (f"{tmp_path}/d.jsonl", "absent-*.jsonl")
        assert (there.data.prompt, there.data.where) == ("m", {"path": "m"})
        assert there.run.dir == f"{tmp_path}/new"
        assert there.unlearning.refusals == f"{tmp_path}/r.txt"
        assert there.evaluation.sets["path"].path == f"{tmp_path}/e.jsonl"


def test_methods_of_an_experiment_name_files_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.txt").touch()
    there = with_absolute_paths(
        paper.TablesConfig(
            model={"path": "m"}, data={"path": "d"}, run={"dir": "r"}, methods={"po": {"refusals": "r.txt"}}
        )
    )
    assert there.methods["po"]["refusals"] == f"{tmp_path}/r.txt"


def test_files_of_a_task_are_beside_it(tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text(
        "data: {path: d.jsonl, where: {path: ../x}}\nmethods: {po: {refusals: r.txt}}\n"
        "evaluation: {sets: {a: {path: e.jsonl, metrics: [rouge_l]}}, toxicity_model: some/model}\n"
    )
    read = tasks.load(str(file), {}, "po")
    assert read["data"] == {"path": f"{tmp_path}/d.jsonl", "where": {"path": "../x"}}
    assert read["methods"]["po"]["refusals"] == read["unlearning"]["refusals"] == f"{tmp_path}/r.txt"
    assert read["evaluation"]["sets"]["a"]["path"] == f"{tmp_path}/e.jsonl"
    assert read["evaluation"]["toxicity_model"] == "some/model"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("methods: {po: {refusals: ../r.txt}}", "refusals, is '../r.txt', which is not below"),
        ("evaluation: {sets: {a: {path: /etc/passwd, metrics: [rouge_l]}}}", "path, is '/etc/passwd'"),
        ("evaluation: {zero_shot_tasks: here}", "whose files can run code"),
    ],
)
def test_a_task_names_no_file_elsewhere(tmp_path, content, message):
    (tmp_path / "task.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        tasks.load(str(tmp_path / "task.yaml"), {}, "po")
