"""Task files: those of the package are settings that every command takes, and a bad one is named."""

import pytest

from mrd_ray import EvaluateConfig, UnlearnConfig, UserError
from mrd_ray.data import tasks


@pytest.mark.parametrize("task", tasks.names())
def test_a_preset_makes_valid_settings(task):
    read = tasks.load(task, {})
    common = {"model": {"path": "m"}, "run": {"dir": "r"}}
    EvaluateConfig(**common, evaluation=read["evaluation"])
    UnlearnConfig(**common, data=read["data"], retain=read["retain"], unlearning=read["unlearning"])


@pytest.mark.parametrize(("method", "epochs"), [("npo", 4), ("po", 5), ("graddiff", 5)])
def test_a_method_brings_its_own_settings(method, epochs):
    unlearning = tasks.load("tofu", {}, method)["unlearning"]
    assert (unlearning["method"], unlearning["epochs"]) == (method, epochs)


def test_local_copies_are_read_instead_of_the_hub(tofu_dir):
    read = tasks.load("tofu", {"locuslab/TOFU": str(tofu_dir)})
    assert read["data"]["path"] == str(tofu_dir / "forget10.json")
    assert read["evaluation"]["sets"]["retain"]["path"] == str(tofu_dir / "retain_perturbed.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("evaluation: {sets: {a: {path: x.txt, metrics: [beauty]}}}", "sets.a.metrics: expected one of"),
        ("sets: {}", "sets: there is no such setting"),
        ("a: [", "cannot read"),
        ("[1]", "task.yaml: expected settings by name, not"),
        ("data: {path: 5}", "task.yaml: data: path is 5; expected text"),
        ("retain: {path: [a]}", r"task.yaml: retain: path is \['a'\]; expected text"),
        ("unlearning: {refusals: [a]}", "unlearning: refusals is"),
        ("methods: {po: {refusals: 1}}", "methods.po: refusals is 1; expected text"),
        ("copies: {a/b: '{lang}.json'}", "copies: '{lang}.json' is not a format string with only {name} and {split}"),
        ("copies: {a/b: '{'}", "copies: '{' is not a format string"),
    ],
)
def test_a_bad_task_file_is_named_with_its_setting(tmp_path, content, message):
    file = tmp_path / "task.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        tasks.load(str(file), {})


@pytest.mark.parametrize("content", ["data: {prompt: q, response: a}", "data: {path: null}\nretain: {max_samples: 9}"])
def test_a_set_without_a_path_waits_for_the_command_line(tmp_path, content):
    file = tmp_path / "task.yaml"
    file.write_text("copies: {a/b: '{name}.json'}\n" + content)
    assert "data" in tasks.load(str(file), {"a/b": "folder"})
    assert tasks.sources(str(file), {}) == ("", [])


def test_unknown_tasks_and_copies_are_refused():
    with pytest.raises(UserError, match=r"neither one of safe, tofu, whp, wmdp nor a file"):
        tasks.load("tofuu", {})
    with pytest.raises(UserError, match="the task does not read 'locuslab/TOFUU'; it reads locuslab/TOFU"):
        tasks.load("tofu", {"locuslab/TOFUU": "x"})
