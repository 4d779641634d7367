"""Sphinx's settings: `make docs`."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "mrd_ray"
author = "The mrd_ray developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "mrd_ray"
html_copy_source = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"


def _name_files_outside(_app: Any, _page: str, source: list[str]) -> None:
    """Files that are no pages of the site are named instead of linked; on the repository's pages the links work."""
    outside = r"\[([^\]]*)\]\((?:\.\./)+((?:benchmarks|cluster|jobs)/[\w/.-]+\.md)\)"
    source[0] = re.sub(outside, r"\1 (`\2` in the repository)", source[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _name_files_outside)
