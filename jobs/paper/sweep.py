"""A sweep: named cells, each a Ray task whose result is a file, so that finished cells are not computed again."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.meter import Meter

T = TypeVar("T")
Result = dict[str, Any]


def work_off(
    run: RunDirectory,
    title: str,
    function: Callable[[T], Result],
    cells: Mapping[str, T],
    *,
    cpus: float = 0.0,
    gpus: float = 0.0,
    at_once: int | None = None,
    tidy: Callable[[str], None] = lambda name: None,
) -> dict[str, Result]:
    """The results of all cells, by name, in their order. Those in RUN/cells are not computed again.

    Args:
        function: a cell -> its result, which must be valid JSON; Ray runs it wherever it has room.
        cpus, gpus: for each task; 0 if a task only starts others.
        at_once: the number of tasks at a time; None lets Ray decide.
        tidy: takes the name of a cell whose result is on disk.

    Raises:
        UserError: what a task raises, or a task whose worker died too often.
    """
    files = {name: f"cells/{name}.json" for name in cells}
    missing = {name: cell for name, cell in cells.items() if not run.exists(files[name])}
    if missing:
        _compute(run, title, function, missing, cpus, gpus, at_once or len(missing), tidy)
    return {name: json.loads(run.read(file)) for name, file in files.items()}


def _compute(
    run: RunDirectory,
    title: str,
    function: Callable[[T], Result],
    cells: Mapping[str, T],
    cpus: float,
    gpus: float,
    at_once: int,
    tidy: Callable[[str], None],
) -> None:
    task = ray.remote(function).options(num_cpus=cpus, num_gpus=gpus)
    waiting, running = list(cells.items()), dict[object, str]()
    with Meter(title, len(cells)) as meter:
        meter.advance(0, f"{len(cells)} task(s) to do")
        while waiting or running:
            while waiting and len(running) < at_once:
                name, cell = waiting.pop(0)
                running[task.remote(cell)] = name
            (done,), _ = ray.wait(list(running))
            name = running.pop(done)
            try:
                result = ray.get(done)
            except RayTaskError as problem:
                if isinstance(problem.cause, UserError):
                    raise UserError(f"{name}: {problem.cause}") from None
                raise
            except RayError as problem:  # its worker or node was lost more often than Ray retries
                raise UserError(f"{name}: {problem}. Finished tasks are kept; run the same command again") from None
            run.write(f"cells/{name}.json", json.dumps(result, indent=1).encode())
            tidy(name)
            meter.advance(1, f"{name} done")
