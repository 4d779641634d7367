"""The house of the design: imports go one way, and the metric is pure torch."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# lowest first; a module may import its own layer and those before it
LAYERS = [
    "errors",
    "config",
    "progress",
    "storage",
    "runs",
    "journal",
    "models",
    "data",
    "fine_tune",
    "mrd",
    "scoring",
    "unlearning",
]
LAYERS += ["evaluation", "report", "stages", "demo", "command_line", "paper", "cli"]
FILES = [
    file for file in sorted((ROOT / "mrd_ray").rglob("*.py")) if file.parent != ROOT / "mrd_ray" or file.stem in LAYERS
]


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    layer = file.relative_to(ROOT / "mrd_ray").parts[0].removesuffix(".py")
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "mrd_ray":
            assert LAYERS.index(parts[1]) <= LAYERS.index(layer), f"{file} imports {name}"
        if layer == "mrd":
            assert parts[0] not in ("ray", "deepspeed")
            assert parts[:2] not in (["mrd_ray", "data"], ["mrd_ray", "config"])


def test_no_machine_paths():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    forbidden = "/" + "work/"
    assert [name for name in tracked if forbidden in (ROOT / name).read_text(errors="ignore")] == []
