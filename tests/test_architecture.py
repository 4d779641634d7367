"""The house of the design: imports go one way, and the metric is pure torch."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lowest first; a module may import its own package and those of lower layers.
LAYERS = [
    {"errors"},
    {"mrd", "config"},  # the metric in pure torch; the settings
    {"runs"},  # run directories
    {"models"},
    {"data", "workers"},
    {"scoring"},
    {"planning", "evaluation"},
    {"unlearning"},
    {"report", "demo"},
    {"api"},
    {"cli"},
]
FILES = sorted(
    file
    for file in (ROOT / "mrd_ray").rglob("*.py")
    if file.stem not in ("__init__", "__main__") or file.parent != ROOT / "mrd_ray"
)


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    package = file.relative_to(ROOT / "mrd_ray").parts[0].removesuffix(".py")
    own = next(i for i, layer in enumerate(LAYERS) if package in layer)
    below = {package}.union(*LAYERS[:own])
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "mrd_ray":
            assert parts[1] in below, f"{file} imports {name}"
        assert parts[0] not in ("jobs", "benchmarks", "tests"), f"{file} imports {name}"
        if package == "mrd":
            assert parts[0] not in ("ray", "deepspeed")


def test_no_machine_paths():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    forbidden = "/" + "work/"
    assert [name for name in tracked if forbidden in (ROOT / name).read_text(errors="ignore")] == []


def reaches_out(tree: ast.AST) -> list[str]:
    """Calls by which what a user gives, or a file holds, could be run: "line: name"."""
    names = {}  # as bound here: name as defined
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        name = names.get(first, first) + dot + rest
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        runs = name in {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
        pickles = r"(pickle|dill|cloudpickle|marshal|shelve|joblib)\.(load|loads|open|Unpickler)"
        runs |= re.fullmatch(rf"{pickles}|yaml\.(full|unsafe)_load(_all)?", name) is not None
        runs |= keywords.get("shell", "False") != "False" or keywords.get("allow_pickle", "False") != "False"
        runs |= name == "torch.load" and keywords.get("weights_only") != "True"
        if name in ("yaml.load", "yaml.load_all"):
            loader = keywords.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
            runs |= loader.split(".")[-1] not in ("SafeLoader", "CSafeLoader")
        if re.search(r"Auto\w+\.from_(pretrained|config)$", name):
            runs |= not {"trust_remote_code", None} & keywords.keys()
        if runs:
            found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize("folder", ["mrd_ray", "jobs", "benchmarks"])
def test_nothing_that_users_give_is_run(folder):
    """No shell, no pickle, no YAML tags, no model's code unless the settings say so."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert {str(file): found for file in files if (found := reaches_out(ast.parse(file.read_text())))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.system(x)",
        "from os import system as s; s(x)",
        "import subprocess; subprocess.run(x, shell=True)",
        "from subprocess import getoutput; getoutput(x)",
        "eval(x)",
        "exec(x)",
        "import pickle; pickle.loads(x)",
        "import pickle as p; p.load(x)",
        "from torch import load; load(x)",
        "import torch; torch.load(x, weights_only=False)",
        "import yaml; yaml.load(x)",
        "import yaml; yaml.load(x, Loader=yaml.Loader)",
        "import yaml; yaml.unsafe_load(x)",
        "import numpy; numpy.load(x, allow_pickle=True)",
        "import transformers; transformers.AutoModel.from_pretrained(x)",
    ],
)
def test_what_would_be_found(code):
    assert len(reaches_out(ast.parse(code))) == 1
