"""YAML as settings are written in, whoever wrote it."""

import re
from typing import Any

import yaml

_MOST = 100_000  # values, each alias counted as what it stands for


class _Loader(yaml.SafeLoader):
    """With numbers as people write them: in YAML 1.1, 1e-5 is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load(content: str) -> Any:
    """What a YAML document says.

    Raises ValueError if it is no YAML, or one that would take for ever to read.
    """
    try:
        if (root := yaml.compose(content, Loader=yaml.SafeLoader)) is not None:
            _size(root, {})
        return _Loader(content).get_single_data()
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{where}{problem.problem}") from None
    except (yaml.YAMLError, RecursionError) as problem:
        raise ValueError(str(problem)) from None


def _size(node: yaml.Node, known: dict[yaml.Node, int | None]) -> int:
    """Values in a node, aliases followed: nine lines of aliases of aliases can stand for millions."""
    if node not in known:
        known[node] = None
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[node] = 1 + sum(_size(part, known) for part in parts)
    if (size := known[node]) is None:
        raise ValueError("an anchor stands in what it is the anchor of; leave out the alias")
    if size > _MOST:
        raise ValueError(f"more than {_MOST:,} values, aliases counted as what they stand for; leave out some")
    return size
