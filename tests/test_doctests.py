"""The examples in docstrings show what the functions return."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITH_EXAMPLES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in sorted((ROOT / "mrd_ray").rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("mrd_ray.mrd.scores", "folded_normal_mean"),
        ("mrd_ray.mrd.monte_carlo", "exact_sum"),
        ("mrd_ray.scoring.units", "Unit.of_id"),
        ("mrd_ray.evaluation.metrics", "min_k"),
    ],
)
def test_a_reader_finds_an_example(module, function):
    assert module in WITH_EXAMPLES
    found = doctest.DocTestFinder().find(importlib.import_module(module))
    assert [one for one in found if one.name == f"{module}.{function}" and one.examples]
