"""What `pip install mrd-ray` may resolve to, by the metadata."""

import os
import subprocess
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = {one.name: one for one in map(Requirement, PROJECT["dependencies"])}
OPTIONAL = [Requirement(one) for group in PROJECT["optional-dependencies"].values() for one in group]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)

# the last version with a known hole that reaches what we use it for, and the first without it
HOLES = {
    "fsspec": ("2026.5.0", "2026.6.0"),  # templates of reference file systems run code
    "jinja2": ("3.1.5", "3.1.6"),  # chat templates leave their sandbox
    "filelock": ("3.20.0", "3.20.1"),  # follows a link at a lock's name
    "torch": ("2.5.1", "2.8.0"),  # torch.load with weights_only runs code
    "datasets": ("5.0.0", "5.0.1"),  # permits no safe fsspec
}


@pytest.mark.parametrize("name", HOLES)
def test_no_version_with_a_known_hole_is_permitted(name):
    last, first = HOLES[name]
    assert not NEEDED[name].specifier.contains(last)
    assert NEEDED[name].specifier.contains(first)


def test_versions_that_permit_each_other():
    """What the installed packages say of fsspec leaves ours."""
    for package in ("datasets", "huggingface_hub", "ray", "torch"):
        for requirement in map(Requirement, requires(package) or []):
            if requirement.name == "fsspec" and requirement.marker is None:
                assert requirement.specifier.contains(PINS["fsspec"])


def test_pins_are_permitted():
    for one in [*NEEDED.values(), *OPTIONAL]:
        if one.name in PINS:
            assert one.specifier.contains(Version(PINS[one.name].split("+")[0]))


def test_everything_that_is_needed_is_pinned():
    names = {name.lower().replace("_", "-") for name in PINS}
    assert {name.lower().replace("_", "-") for name in NEEDED} <= names


def test_slow_tests_run_every_night():
    alone = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")
    }  # of an outer make
    said = subprocess.run(
        ["make", "--dry-run", "test-slow"], cwd=ROOT, capture_output=True, text=True, check=True, env=alone
    ).stdout
    assert said.splitlines()[-1].endswith(" -m slow")
    nightly = ROOT / ".ci" / "nightly"
    assert nightly.stat().st_mode & 0o111
    assert "\nmake test-slow\n" in nightly.read_text()
