"""A package that is missing where the code runs, as one sentence. Imports the standard library only."""

import re
from collections.abc import Iterator

_WORDS = re.compile(r"No module named '(\w+)")


def missing_module(problem: BaseException) -> str | None:
    """The top module that could not be imported, here or where Ray quotes it from; None if it is another problem."""
    for one in _led_to(problem):
        if isinstance(one, ModuleNotFoundError) and one.name:
            return one.name.partition(".")[0]
        if type(one).__module__.startswith("ray.") and (found := _WORDS.search(str(one))):
            return found[1]
    return None


def what_to_do(module: str) -> str:
    """The sentence for people who submit jobs: what is missing, and what to do."""
    return (
        f"the Python module {module} is missing, on this machine or on a node of the cluster: run all nodes from the "
        "image of cluster/Dockerfile, or let Ray install what is missing with `ray job submit --runtime-env "
        "cluster/runtime_env.yaml` (cluster/README.md, Nodes without the image)"
    )


def _led_to(problem: BaseException) -> Iterator[BaseException]:
    waiting, seen = [problem], set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        others = (getattr(one, "cause", None), one.__cause__, one.__context__)
        waiting += [other for other in others if isinstance(other, BaseException)]
