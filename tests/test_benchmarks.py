"""The suite's frame: names, help, result files and their comparison. What they measure takes an idle machine."""

import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.__main__ import NAMES, main
from benchmarks.figures import Figure, Results, read

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_takes(name):
    function = importlib.import_module(f"benchmarks.{name}").main
    explained = re.findall(r"^ {8}(\w+): ", inspect.getdoc(function).replace("\n    ", "\n        "), re.MULTILINE)
    assert sorted(explained) == sorted(inspect.signature(function).parameters)


def test_readme_names_them():
    listed = re.findall(
        r"^\| `(\w+)`(?: \(CPU or GPU\))? \|", (ROOT / "benchmarks" / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(set(NAMES) - {"compare"})


def test_a_name_that_is_none(capsys):
    assert main(["sieben"]) == 2
    assert "NAME is one of chaos, closed_form, compare" in capsys.readouterr().err


def written(folder: Path, name: str, *figures: Figure, **changes) -> str:
    results = Results("some", {"repeats": 3}, str(folder / name))
    results.keep("raw", [1.0])
    results.show(figures)
    content = json.loads(results.file.read_text())
    results.file.write_text(json.dumps(content | {"machine": content["machine"] | changes}))
    return str(results.file)


def test_result_files_say_what_was_found(tmp_path):
    figure = Figure.of("speed", [1.0, 3.0, 2.0], at_least=2.5)
    content, figures = read(written(tmp_path, "a", figure))
    assert (figure.value, figure.low, figure.high, figure.repetitions, figure.met) == (2.0, 1.0, 3.0, 3, False)
    assert figures == {"speed": figure}
    assert content["raw"] == {"raw": [1.0]}
    assert {"date", "settings", "machine"} <= content.keys()


SPEED, ERROR, SECONDS = Figure("speed", 2.0, at_least=1.0), Figure("error", 0.1, at_most=1.0), Figure("s", 5.0, "s")


@pytest.mark.parametrize(
    ("old", "new", "elsewhere", "code"),
    [
        (SPEED, SPEED, True, 0),
        (SPEED, dataclasses.replace(SPEED, value=1.85), True, 0),
        (SPEED, dataclasses.replace(SPEED, value=1.7), True, 1),
        (SPEED, dataclasses.replace(SPEED, value=9.0), True, 0),
        (ERROR, dataclasses.replace(ERROR, value=0.12), True, 1),
        (ERROR, dataclasses.replace(ERROR, value=0.05), True, 0),
        (SECONDS, dataclasses.replace(SECONDS, value=9.0), False, 0),  # has no target
        (dataclasses.replace(SECONDS, at_most=9.0), dataclasses.replace(SECONDS, value=8.0, at_most=9.0), False, 1),
        (dataclasses.replace(SECONDS, at_most=9.0), dataclasses.replace(SECONDS, value=8.0, at_most=9.0), True, 0),
        (SPEED, ERROR, True, 1),  # is missing
        (SECONDS, ERROR, True, 0),
    ],
)
def test_what_is_worse_is_found(tmp_path, old, new, elsewhere, code):
    files = written(tmp_path, "old", old), written(tmp_path, "new", new, **({"cpu": "another"} if elsewhere else {}))
    assert compare.main(*files) == code


def test_results_that_are_published_can_be_read():
    files = [file for file in (ROOT / "benchmarks" / "results").glob("*.json") if file.stem in NAMES]
    assert files
    for file in files:
        content, figures = read(str(file))
        assert content["benchmark"] == file.stem
        assert figures
