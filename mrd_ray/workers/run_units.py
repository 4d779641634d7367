"""Runs work units on a pool of actors with Ray Data; knows nothing about scores."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import ray

from mrd_ray.config import RaySettings
from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.journal import Journal
from mrd_ray.runs.meter import Meter
from mrd_ray.workers.cluster import living_nodes
from mrd_ray.workers.lookout import Lookout, Noted
from mrd_ray.workers.pool import Pool


def pool_of(config: RaySettings, grows: bool, journal: Journal, all_at_once: bool = False, word: str = "actor") -> Pool:
    """The pool for the cluster as it is now; if the cluster may grow, waits for room for one actor, or for all.

    word: what the settings call an actor. Raises UserError if there is no room, and none appears within
    `ray.start_timeout` seconds.
    """
    nodes = living_nodes()
    pool = Pool.of(config, nodes, grows, word)
    room, wanted = pool.room(nodes), pool.actors if all_at_once else 1
    each = " and ".join(f"{amount:g} {name}" for name, amount in pool.resources.items())
    if room < pool.actors:
        rest = "waiting for room for all" if all_at_once else "the others start when nodes join"
        journal.event("room", f"room for {room} of {pool.actors} of {each} each so far; {rest}", room=room)
    if room < wanted:
        asked = ray.util.placement_group([pool.resources] * wanted)  # makes an autoscaler add nodes
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
    ray_config: RaySettings,
) -> Generator[pa.Table]:
    """Process units; yields one-row tables of their results, in the order in which they finish.

    Args:
        units: index of the block that each unit works on, by unit_id. Several units may share a block.
        blocks: each is stored once, however many units share it, and is sent to the actors that ask for it.
        actor: a callable class, constructed with `task` in each worker, that takes a unit_id and its block. Its
            constructor raises Unfit if the node must be set aside.

    Ray restarts actors that die, and runs their units again; actors for which there is no room start when nodes join.
    Close the generator, also after an error (`contextlib.closing`): one of its threads watches Ray.

    Raises:
        UserError: actors died again and again on one unit or while starting, and their nodes are still up; or all nodes
            are set aside, or more than ray.max_bad_nodes.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our Meter reports progress; a failed task still prints
    stored = ray.put([ray.put(block) for block in blocks])  # one reference, which actors get when they start
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
            # no prefetching: it would delay a finished unit until the next one is done
            yield from dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
        except Exception as problem:  # Ray Data wraps an actor's exception in one of several types of its own
            if (why := lookout.given_up()) is None:
                raise
            raise UserError(why) from problem


class Load(NamedTuple):
    """What a unit is to the driver.

    block: index of the block it works on. cost: in any measure that is proportional to time. items: what the rate
    counts, for example rows. tokens: those of its forwards; None means not counted.
    """

    block: int
    cost: float
    items: int
    tokens: int | None = None


def work_off(
    title: str,
    loads: Mapping[str, Load],
    blocks: Iterable[pa.Table],
    actor: type,
    task: Any,
    pool: Pool,
    run: RunDirectory,
    journal: Journal,
    ray_config: RaySettings,
    items: str,
    begun: Callable[[pa.Table], None] = lambda result: None,
) -> None:
    """Process units and report progress; each unit's result is on disk, in units/, before it counts as done.

    Args:
        loads: by unit_id.
        blocks, actor, task, pool: see `run_units`. Results have the columns unit_id, worker, seconds and fatal.
        items: what the rate counts, in words.
        begun: takes the first result, before it is written.

    Raises:
        UserError: an actor returned why it cannot process any unit, or see `run_units`.
    """
    pool = dataclasses.replace(pool, actors=min(pool.actors, len(loads)))
    blocks_of = {unit_id: load.block for unit_id, load in loads.items()}
    done, tokens = 0, 0
    journal.tell(units_done=0, units_left=len(loads))
    total = sum(load.cost for load in loads.values())
    with Meter(title, total, journal.console) as meter, contextlib.ExitStack() as closed:
        meter.advance(0, f"{len(loads)} unit(s) to do, starting {pool.actors} actor(s)")
        results = run_units(blocks_of, blocks, actor, task, pool, journal, ray_config)
        for count, result in enumerate(closed.enter_context(contextlib.closing(results)), 1):
            (row,) = result.select(["unit_id", "worker", "seconds", "fatal"]).to_pylist()
            if row["fatal"] is not None:
                raise UserError(row["fatal"])
            if count == 1:
                meter.working_since(row["seconds"])
                begun(result)
            run.write_table(f"units/{row['unit_id']}.parquet", result)
            load = loads[row["unit_id"]]
            done += load.items
            rate = done / meter.working_seconds
            meter.advance(load.cost, f"unit {count} of {len(loads)}, {rate:.3g} {items}/s")
            journal.event("unit_done", unit=row["unit_id"], worker=row["worker"], seconds=row["seconds"])
            journal.tell(units_done=count, units_left=len(loads) - count, samples_draws_per_second=rate)
            if load.tokens is not None:
                tokens += load.tokens
                journal.tell(tokens_per_second=tokens / meter.working_seconds)
