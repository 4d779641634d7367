"""Work units through a pool of actors: Ray Data, and nothing of what a score is."""

import logging
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import pyarrow as pa
import ray

from mrd_ray.config import RayConfig
from mrd_ray.errors import UserError
from mrd_ray.runs.journal import Journal
from mrd_ray.workers.cluster import living_nodes
from mrd_ray.workers.lookout import Lookout, Noted
from mrd_ray.workers.pool import Pool


def pool_of(config: RayConfig, grows: bool, journal: Journal, all_at_once: bool = False) -> Pool:
    """The pool for the cluster as it is; where it grows, waits until one actor has room, or all.

    Raises UserError if there is no room, and none comes within `ray.start_timeout` seconds.
    """
    nodes = living_nodes()
    pool = Pool.of(config, nodes, grows)
    room, wanted = pool.room(nodes), pool.actors if all_at_once else 1
    each = " and ".join(f"{amount:g} {name}" for name, amount in pool.resources.items())
    if room < pool.actors:
        rest = "all are waited for" if all_at_once else "the others start when nodes join"
        journal.event("room", f"room for {room} of {pool.actors} of {each} each by now; {rest}", room=room)
    if room < wanted:
        asked = ray.util.placement_group([pool.resources] * wanted)  # what an autoscaler brings nodes for
        try:
            if not asked.wait(config.start_timeout):
                raise UserError(
                    f"ray.start_timeout: no room for {wanted} of {each} each within {config.start_timeout:g} s; the "
                    "cluster needs more or larger nodes"
                )
        finally:
            ray.util.remove_placement_group(asked)
    return pool


def run_units(
    units: Mapping[str, int],
    blocks: Iterable[pa.Table],
    actor: type,
    task: Any,
    pool: Pool,
    journal: Journal,
    ray_config: RayConfig,
) -> Generator[pa.Table]:
    """Work off units; one-row tables of their results, in the order they finish.

    Args:
        units: which of the blocks each works on, by unit_id. Several may share one.
        blocks: each is stored once, however many units share it, and goes to the actors that ask for it.
        actor: a callable class, made with `task` in each worker, that takes a unit_id and its block. Its constructor
            raises Unfit where the node is to be set aside.

    Ray restarts actors that die and runs their units again; actors for which there is no room start when nodes join.
    To be closed, also after an error (`contextlib.closing`): a thread of it asks Ray how things stand.

    Raises:
        UserError: actors have ended again and again, though not with their nodes, at one unit or before their first, or
            no node is left to be set aside.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our Meter reports; a failed task still prints
    stored = ray.put([ray.put(block) for block in blocks])  # one reference, for actors to begin with
    with Lookout(journal, ray_config.stall_after, pool, ray_config.max_bad_nodes) as lookout:
        rows = [pa.table({"unit_id": [unit_id], "block": [block]}) for unit_id, block in units.items()]
        dataset = ray.data.from_arrow(rows).map_batches(
            Noted,
            fn_constructor_args=[actor, task, stored, lookout.board],
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=pool.actors),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
        )
        try:
            # no prefetching: it would hold a finished unit back until the next one is done
            yield from dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
        except Exception as problem:  # Ray Data wraps that of an actor in one or another of its own
            if (why := lookout.given_up()) is None:
                raise
            raise UserError(why) from problem
