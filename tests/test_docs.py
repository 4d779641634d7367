"""The documentation is of this code: generated pages, links, names of files and functions, the README's Python."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import mrd_ray

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [file for file in DOCS if "_build" not in file.parts]
READ = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date():
    module = generator()
    assert {file.name for file in (ROOT / "docs" / "reference").iterdir()} == module.PAGES.keys()
    stale = [name for name, make in module.PAGES.items() if (module.FOLDER / name).read_text() != module.NOTE + make()]
    assert stale == [], "run `make reference` and commit it"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def anchors(file):
    """Of headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", READ, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", file.read_text(), flags=re.DOTALL)
    for target in re.findall(r"(?<!\\)\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_in_the_site():
    index = (ROOT / "docs" / "index.md").read_text().splitlines()
    names = {str(file.relative_to(ROOT / "docs").with_suffix("")) for file in PAGES} - {"index"}
    assert names - {*index} == set()


def defined(file):
    """Functions, classes, methods and constants of a module, methods as Class.method."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_what_the_architecture_names_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:mrd_ray|tests|jobs)/[\w/.]+\.py)(?::([\w.]+))?`", text)
    assert len(named) > 30
    for path, name in named:
        assert (ROOT / path).exists(), path
        assert not name or name in defined(ROOT / path), f"{path}:{name}"


def test_the_architecture_has_the_layers_of_the_test():
    layers = ast.parse((ROOT / "tests" / "test_architecture.py").read_text())
    (value,) = [n.value for n in layers.body if isinstance(n, ast.Assign) and n.targets[0].id == "LAYERS"]
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| \d+ \| ([^|]+) \|", text, re.MULTILINE)
    assert [{*re.findall(r"`(\w+)`", row)} for row in rows] == ast.literal_eval(value)


def test_settings_in_the_readme_are_valid():
    """Its Python up to the call that needs a model."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    setup, call, rest = code.partition("scores = ")
    names = {}
    exec(setup, names)
    assert names["config"].scoring.estimator == "closed_form"
    assert rest.startswith("mrd_ray.score(config).scores")
    assert call
    assert callable(mrd_ray.score)
