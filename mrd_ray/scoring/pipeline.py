"""Work units through a pool of actors: Ray Data, and nothing of what a score is."""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray

from mrd_ray.errors import UserError
from mrd_ray.scoring.pool import Pool


@contextlib.contextmanager
def cluster(log_to_driver: bool = True) -> Iterator[None]:
    """Join the running cluster (RAY_ADDRESS, or the job's), or start a local one that ends with this block.

    Args:
        log_to_driver: whether what workers print appears here too.
    """
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(log_to_driver=log_to_driver, include_dashboard=False, logging_level=logging.WARNING)
    except ConnectionError as problem:
        where = os.environ.get("RAY_ADDRESS", "the one that `ray start` was last used for here")
        raise UserError(f"cannot join the Ray cluster ({where}): {problem}; set RAY_ADDRESS, or unset it") from None
    try:
        yield
    finally:
        ray.shutdown()


def results(units: Iterable[pa.Table], actor: type, task: Any, pool: Pool) -> Iterator[pa.Table]:
    """One-row tables of units -> one-row tables of their results, in the order they finish.

    Args:
        actor: a callable class, made with `task` in each worker, that takes a unit and gives its result.

    Ray restarts actors that die and runs their units again.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our Meter reports; a failed task still prints
    dataset = ray.data.from_arrow(list(units)).map_batches(
        actor,
        fn_constructor_args=[task],
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=pool.actors),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    # no prefetching: it would hold a finished unit back until the next one is done
    yield from dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
