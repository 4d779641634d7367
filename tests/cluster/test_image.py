"""What the image is made of, and its Dockerfile's steps as far as they go without docker."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
PINS = {canonicalize_name(name): version for name, version in PINS.items()}
BLOCK = re.compile(r"^([\w.-]+)==(\S+)((?: \\\n +--hash=sha256:[0-9a-f]{64})+)\n", re.MULTILINE)
OF_TORCH = re.compile("torch|triton|nvidia-|cuda-")  # with what its build for GPUs brings


def steps(instruction: str) -> list[str]:
    """Of the Dockerfile, without comments and continuations."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return re.findall(rf"^{instruction} (.+)$", text, re.MULTILINE)


def locked(name: str) -> dict[str, str]:
    """The versions of a file of requirements, of which every line must have been read."""
    text = (CLUSTER / name).read_text()
    assert re.fullmatch(r"(#.*\n)*", BLOCK.sub("", text)), "a requirement without version or hash"
    return {canonicalize_name(found[1]): found[2] for found in BLOCK.finditer(text)}


@pytest.mark.parametrize("name", ["build.txt", "requirements.txt"])
def test_all_that_the_image_has_is_pinned(name):
    versions = locked(name)
    assert versions.items() <= PINS.items()


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    beside = [line.partition("#")[0].strip() for line in (CLUSTER / "requirements.in").read_text().splitlines()]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["lora"], *filter(None, beside)]
    versions = locked("requirements.txt")
    for one in map(Requirement, wanted):
        assert one.specifier.contains(versions[canonicalize_name(one.name)]), one


def test_the_base_is_named_by_digest():
    (base,) = steps("FROM")
    assert re.fullmatch(r"[\w./-]+:[\w.-]+@(sha256:[0-9a-f]{64}|\$\{BASE_DIGEST\})", base)
    if "$" in base:  # and has no default, so that a build without one fails
        assert "BASE_DIGEST" in steps("ARG")
        assert "--build-arg BASE_DIGEST=" in (CLUSTER / "README.md").read_text()


def test_apt_asks_nothing():
    assert "DEBIAN_FRONTEND=noninteractive" in steps("ARG")  # no ENV, which containers would inherit
    assert DOCKERFILE.index("DEBIAN_FRONTEND=noninteractive") < DOCKERFILE.index("RUN apt-get")
    for command in re.findall(r"(?:apt-get install|add-apt-repository) [^&]+", DOCKERFILE):
        assert "--yes" in command


def test_pip_takes_nothing_without_a_hash():
    commands = re.findall(r"pip install ([^&]+)", " && ".join(steps("RUN")))
    assert len(commands) == 3
    for command in map(shlex.split, commands):
        assert "--require-hashes" in command or {"--no-deps", "--no-build-isolation", "."} == set(command)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_steps_of_pip(tmp_path):
    """The same commands in a fresh environment, but torch from its pin alone: its build for GPUs is 3 GB."""
    context, virtual = tmp_path / "context", tmp_path / "venv"
    context.mkdir()
    for step in (step.split() for step in steps("COPY")):
        for name in step[:-1]:
            target = context / (name if (ROOT / name).is_dir() else Path(name).name)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    requirements = context / "requirements.txt"
    text = BLOCK.sub(lambda found: "" if OF_TORCH.match(found[1]) else found[0], requirements.read_text())
    requirements.write_text(text)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{virtual}/bin:{os.environ['PATH']}", "PIP_NO_CACHE_DIR": "1"}
    commands = [step for step in steps("RUN") if "pip" in step]
    assert len(commands) == 3
    commands[0] = commands[0].replace(" && pip", f" && pip install torch=={PINS['torch']} && pip", 1)
    for command in commands:
        here = command.replace("python3.11", sys.executable).replace("/opt/venv", str(virtual))
        done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", here], cwd=context, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, f"{here}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert f"version {PINS['ray']}" in done.stdout
