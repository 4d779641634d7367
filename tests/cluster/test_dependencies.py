"""Nodes without the dependencies, and what a submission takes along."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from drivers import driver, scoring
from ray._private.runtime_env.packaging import create_package
from ray.exceptions import ActorDiedError, RaySystemError
from ray.runtime_env import RuntimeEnv

from mrd_ray.cli.missing import missing_module

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

if any({process!r} in word for word in sys.orig_argv):
    sys.meta_path.insert(0, Missing())
"""


def without(folder: Path, module: str, process: str) -> str:
    """A PYTHONPATH with which processes whose command line has that word lack the module."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WITHOUT.format(module=module, process=process))
    return f"{folder}:{ROOT}"


@pytest.mark.parametrize(
    ("job", "module"),
    [*(("score", name) for name in ("pydantic", "yaml", "ray", "torch")), ("unlearn", "ray")],
)
def test_a_job_names_what_the_head_lacks(job, module, tiny_model_dir, qa_file, tmp_path):
    environment = os.environ | {"PYTHONPATH": without(tmp_path / "path", module, "jobs/")}
    flags = ["--model.path", str(tiny_model_dir), "--data.path", str(qa_file), "--run.dir", str(tmp_path / "run")]
    flags += ["--unlearning.method", "ga"] if job == "unlearn" else []
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / f"{job}.py", *flags], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"error: the Python module {module} is missing" in done.stderr
    assert "cluster/runtime_env.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_names_what_a_node_lacks(tiny_model_dir, qa_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", without(tmp_path / "path", "transformers", "default_worker.py"))
    flags = scoring(tiny_model_dir, qa_file, tmp_path / "run", "--ray.actors", "1", draws=8)
    with driver("score", flags, tmp_path / "log", "local") as job:
        job.ends(code=1)
        assert "error: the Python module transformers is missing" in job.said


def test_what_ray_quotes_is_found():
    quoted = "System error: No module named 'peft.tuners'\ntraceback: Traceback (most recent call last):"
    outer = RuntimeError()
    outer.__cause__ = RaySystemError(quoted)
    assert missing_module(outer) == "peft"
    assert missing_module(ActorDiedError()) is None
    assert missing_module(ValueError("No module named 'peft'")) is None  # of a user's file, for instance


def test_runtime_env_installs_what_the_image_has(monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed = RuntimeEnv(**yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text()))
    lines = (ROOT / "cluster" / "requirements.txt").read_text().splitlines()
    assert parsed["uv"]["packages"] == lines


@pytest.mark.parametrize("gitignore", [False, True])
def test_rayignore(tmp_path, gitignore):
    """What is left out, with Ray's own code, and without what newer versions of Ray leave out by themselves."""
    sent = [
        ".rayignore",
        "jobs/score.py",
        "jobs/configs/x.yaml",
        "mrd_ray/runs/directory.py",
        "mrd_ray/data/read.py",
        "my.parquet",
    ]
    kept = [".git/config", ".venv/bin/python", "venv/x", "runs/a/units/0.parquet", "mrd_ray/__pycache__/x.pyc"]
    kept += [
        ".mypy_cache/x",
        ".cache/huggingface/token",
        "mrd_ray.egg-info/PKG-INFO",
        "tests/test_cli.py",
        ".env",
        "k.pem",
    ]
    source, package = tmp_path / "source", tmp_path / "package.zip"
    for name in sent + kept:
        file = source / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    (source / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    create_package(str(source), package, include_gitignore=gitignore, excludes=[])
    with zipfile.ZipFile(package) as made:
        assert sorted(name for name in made.namelist() if not name.endswith("/")) == sorted(sent)
        assert not [name for name in made.namelist() if name.split("/")[0] in {"runs", ".venv", ".git", "tests"}]
