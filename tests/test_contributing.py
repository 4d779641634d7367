"""What contributors are told is there, and what their changes must pass."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from test_architecture import LAYERS

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
PATHS = r"(?:mrd_ray|tests|jobs|benchmarks|cluster|docs|\.ci)(?:/[\w./-]*)?|[\w-]+\.(?:md|txt|toml)"
GITHUB = ROOT / ".github"


def test_paths_of_the_guide_exist():
    named = re.findall(rf"`({PATHS})`", GUIDE)
    assert len(set(named)) > 50
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_names_of_the_guide_are_in_their_files():
    """In every step of a list: what looks like a Python name is in one of the files that the step names."""
    checked = 0
    for step in re.split(r"\n(?=\d\. |#|\n)", GUIDE):
        files = [ROOT / name for name in re.findall(rf"`({PATHS})`", step) if name.endswith(".py")]
        if not re.match(r"\d\. ", step) or not files:
            continue
        code = "\n".join(file.read_text() for file in files)
        for name in re.findall(r"`(_\w+|[A-Z][A-Z_]+|[a-z]+_[a-z_]+|[A-Z]\w+)`", step):
            assert re.search(rf"\b{name}\b", code), f"{name} is in none of {[str(file) for file in files]}"
            checked += 1
    assert checked > 25


def test_layers_of_the_guide_are_those_that_imports_keep_to():
    rows = re.findall(r"^\| (\d+) \| `mrd_ray/(\w+)(?:\.py)?` \|", GUIDE, re.MULTILINE)
    layers = [{name for number, name in rows if int(number) == at} for at in range(1, int(rows[-1][0]) + 1)]
    assert layers == LAYERS
    packages = {one.parent.name for one in (ROOT / "mrd_ray").glob("*/__init__.py")}
    assert packages <= {name for _, name in rows}


@pytest.mark.parametrize("command", re.findall(r"^\| \w+ \| `make ([\w-]+)", GUIDE, re.MULTILINE))
def test_tiers_of_the_guide_are_in_the_makefile(command):
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "runs", "when"),
    [("ci", ".ci/run", {"push", "pull_request"}), ("nightly", ".ci/nightly", {"schedule", "workflow_dispatch"})],
)
def test_workflows_run_what_a_person_would(name, runs, when):
    workflow = yaml.safe_load((GITHUB / "workflows" / f"{name}.yml").read_text())
    assert set(workflow[True]) == when  # YAML 1.1 reads `on` as a truth value
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1]["run"] == runs
    assert (ROOT / runs).stat().st_mode & 0o111


def test_workflows_use_the_python_that_the_makefile_asks_for():
    (version,) = re.findall(r"^PYTHON \?= python([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for file in (GITHUB / "workflows").iterdir():
        (job,) = yaml.safe_load(file.read_text())["jobs"].values()
        assert [step["with"]["python-version"] for step in job["steps"] if "python" in step.get("uses", "")] == [
            version
        ]


@pytest.mark.parametrize("file", sorted((GITHUB / "ISSUE_TEMPLATE").iterdir()), ids=lambda file: file.stem)
def test_issue_forms(file):
    form = yaml.safe_load(file.read_text())
    assert form["name"]
    assert form["description"]
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked)
    assert all(field["attributes"]["label"] for field in asked)


def test_pre_commit_lints_as_make_does():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook.get("entry") for repo in repos for hook in repo["hooks"]}
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    made = [line.strip().removesuffix(" .").replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()[1:]]
    assert made == [entry for entry in hooks.values() if entry]
    assert "codespell" in hooks
    assert all(repo["repo"] == "local" or re.fullmatch(r"v[\d.]+", repo["rev"]) for repo in repos)


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [citation[name] for name in ("title", "version", "license")] == [
        "mrd_ray",
        project["version"],
        project["license"],
    ]
    assert citation["authors"] == project["authors"]
    assert citation["preferred-citation"]["url"] in (ROOT / "README.md").read_text()


def test_changelog_has_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
