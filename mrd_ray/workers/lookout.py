"""Who works on which unit, and where, so that stalls, restarts, and nodes that join or leave are reported."""

import contextlib
import os
import threading
import time
from collections import Counter
from typing import Any

import psutil
import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mrd_ray.errors import Unfit, UserError
from mrd_ray.runs.journal import Journal
from mrd_ray.workers.pool import Pool

_LOOK_EVERY, _PATIENCE = 5.0, 5.0  # seconds
_ENDS = 5  # deaths on the same unit, or while starting; this many are not bad luck
_LOADING = "the start of an actor"


class Board:
    """A Ray actor without resources of its own, on which other actors note what they do.

    It tells them to give up if they die again and again, on one unit or while starting. Deaths together with the node
    do not count.
    """

    def __init__(self, pool: Pool | None = None, max_bad_nodes: int | None = None) -> None:
        self._pool, self._max_bad_nodes = pool or Pool(1, 1.0, 0.0), max_bad_nodes
        self._bad: dict[str, tuple[str, str]] = {}  # node's id -> name, why
        self._holders: dict[str, list[Any]] = {}  # by node's id
        self._at_work: dict[str, dict[str, Any]] = {}  # by actor
        self._started: dict[str, tuple[str, str]] = {}  # actor -> node's id, worker
        self._memory: dict[str, int] = {}  # by actor
        self._ends: Counter[str] = Counter()  # deaths by unit; by actor for deaths while starting
        self._restarts = self._lost = self._finished = 0
        self._given_up: str | None = None

    def started(self, actor: str, node_id: str, worker: str) -> str | None:
        """An actor's constructor has begun, in process `worker` ("node:pid"). Returns why it must give up, or None."""
        work = self._at_work.pop(actor, None)
        self._memory.pop(actor, None)
        if actor in self._started:
            self._restarts += 1
        if work is not None:
            self._lost += work["unit"] != _LOADING
            if self._started.get(actor, ("", ""))[0] in _alive():
                self._ends[actor if work["unit"] == _LOADING else work["unit"]] += 1
        self._started[actor] = node_id, worker
        return self.begins(actor, _LOADING)

    def begins(self, actor: str, unit: str) -> str | None:
        """An actor begins a unit, or its start. Returns why it must give up, or None."""
        _, worker = self._started.get(actor, ("", "?"))
        self._at_work[actor] = {"unit": unit, "worker": worker, "since": time.monotonic()}
        if (ends := self._ends[actor if unit == _LOADING else unit]) >= _ENDS:
            what = "an actor died" if unit == _LOADING else f"actors working on unit {unit} died"
            self._given_up = (
                f"{what} {ends} times{' while starting' if unit == _LOADING else ''} ({worker} would have been "
                "next), most likely out of memory. See Ray's logs. Finished units are kept"
            )
        return self._given_up

    def unfit(self, actor: str, node_id: str, node: str, why: str) -> str | None:
        """The actor's node cannot work on units, and is set aside. Returns why the actor must give up, or None.

        Set aside means that idle actors occupy the node's room, so that Ray starts this actor elsewhere.
        """
        self._at_work.pop(actor, None)
        nodes = {one["NodeID"]: one["Resources"] for one in ray.nodes() if one["Alive"]}
        if node_id not in self._holders and node_id in nodes:
            self._bad[node_id] = node, why
            there = NodeAffinitySchedulingStrategy(node_id, soft=False)
            holder = ray.remote(_Holder).options(
                num_cpus=self._pool.cpus, num_gpus=self._pool.gpus, scheduling_strategy=there
            )
            self._holders[node_id] = [holder.remote() for _ in range(self._pool.room([nodes[node_id]]))]
        left = [one for one in nodes.keys() - self._holders.keys() if self._pool.room([nodes[one]])]
        if not left or (self._max_bad_nodes is not None and len(self._holders) > self._max_bad_nodes):
            limit = "no node is left" if not left else f"more than ray.max_bad_nodes: {self._max_bad_nodes} set aside"
            self._given_up = f"{node}: {why}" + (f" ({limit})" if len(self._holders) > 1 or left else "")
        return self._given_up

    def ready(self, actor: str) -> None:
        """The actor's constructor is done."""
        self._at_work.pop(actor, None)
        self._ends.pop(actor, None)

    def ends(self, actor: str, memory: int) -> None:
        """The actor is done with its unit, and has used `memory` bytes."""
        self._at_work.pop(actor, None)
        self._memory[actor] = memory
        self._finished += 1

    def look(self) -> dict[str, Any]:
        """The current state, with the seconds that each unit in progress has taken so far."""
        now = time.monotonic()
        at_work = [{**work, "seconds": now - work["since"]} for work in self._at_work.values()]
        return {
            "actors": len(self._started), "restarts": self._restarts, "lost": self._lost,
            "finished": self._finished, "at_work": at_work, "given up": self._given_up, "bad": self._bad,
            "memory": {self._started[actor][1]: peak for actor, peak in self._memory.items() if actor in self._started},
        }  # fmt: skip


class _Holder:
    """Occupies room on a node."""


class Noted:
    """A callable class for Ray Data: passes a unit (unit_id and block) to an `actor`, and notes it on the board.

    Args:
        actor: a class, constructed with `task`, that takes a unit_id and the table that is its block.
        blocks: reference to a list of references to tables.
    """

    def __init__(self, actor: type, task: Any, blocks: ray.ObjectRef, board: Any) -> None:
        self._blocks: list[ray.ObjectRef] = ray.get(blocks)
        context, node = ray.get_runtime_context(), os.uname().nodename
        self._board, self._id = board, context.get_actor_id()
        self._given_up = _told(board.started.remote(self._id, context.get_node_id(), f"{node}:{os.getpid()}"))
        if self._given_up is not None:
            return
        try:
            self._actor = actor(task)
        except Unfit as problem:
            self._given_up = _told(board.unfit.remote(self._id, context.get_node_id(), node, str(problem)))
            if self._given_up is None:
                os._exit(1)  # Ray restarts it elsewhere
            return
        board.ready.remote(self._id)

    def __call__(self, units: pa.Table) -> pa.Table:
        """Process a unit. Raises UserError if the board says to give up."""
        (unit,) = units.to_pylist()
        if why := self._given_up or _told(self._board.begins.remote(self._id, unit["unit_id"])):
            raise UserError(why)
        result = self._actor(unit["unit_id"], ray.get(self._blocks[unit["block"]]))
        self._board.ends.remote(self._id, _peak_memory())
        return result


def _peak_memory() -> int:
    """Bytes: the peak of this process's GPUs, or its resident memory if it uses none."""
    import torch  # here: the board's process imports this module, and starts sooner without torch

    if not torch.cuda.is_initialized():
        return psutil.Process().memory_info().rss
    return sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))


def _told(answer: ray.ObjectRef) -> Any:
    """The board's answer; None if it cannot be reached."""
    try:
        return ray.get(answer, timeout=_PATIENCE)
    except (ray.exceptions.RayError, TimeoutError):
        return None


class Lookout:
    """A thread of the driver that watches the board and the nodes, and reports to the journal.

    Args:
        stall_after: seconds that a unit may take, or that may pass without any actor, before a stall is reported.
        pool: the resources of an actor, used to fill a node that is set aside.
        max_bad_nodes: see RaySettings.
    """

    def __init__(
        self, journal: Journal, stall_after: float, pool: Pool | None = None, max_bad_nodes: int | None = None
    ) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self.board = (
            ray.remote(Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote(pool, max_bad_nodes)
        )
        self._journal, self._stall_after = journal, stall_after
        self._nodes = Nodes(journal)
        self._since, self._said = time.monotonic(), set[tuple[str, str]]()
        self._restarts = self._actors = 0
        self._bad: dict[str, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Lookout":
        self._thread.start()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._over.set()
        if problem[0] is None:  # Ray is still up, and a short run may not have been checked yet
            self._thread.join()
            self._look()
        ray.kill(self.board)  # the thread may be waiting for it
        self._thread.join()

    def given_up(self) -> str | None:
        """Why actors were told to give up, or None."""
        state: dict[str, Any] = _told(self.board.look.remote()) or {}
        return state.get("given up")

    def _watch(self) -> None:
        while not self._over.wait(min(_LOOK_EVERY, self._stall_after)):
            self._look()

    def _look(self) -> None:
        # the board's node may be gone, or the driver's node busy; the next look may succeed
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            self._nodes.look()
            self._report(ray.get(self.board.look.remote(), timeout=_PATIENCE))

    def _report(self, state: dict[str, Any]) -> None:
        self._journal.tell(actor_restarts=state["restarts"], units_failed=state["lost"])
        self._journal.gauges.tell("actor_device_memory_bytes", state["memory"])
        for node_id, (node, why) in state["bad"].items():
            if node_id not in self._bad:
                self._bad[node_id] = node
                say = f"node {node} is set aside, and its units run elsewhere: {why}"
                self._journal.event("node_set_aside", say, node=node, reason=why)
                self._journal.tell(nodes_set_aside=list(self._bad.values()))
        if state["restarts"] > self._restarts:
            self._restarts = state["restarts"]
            self._journal.event("actor_restarted", f"an actor died and was restarted ({self._restarts} so far)")
        for work in state["at_work"]:
            if work["seconds"] > self._stall_after and (key := (work["unit"], work["worker"])) not in self._said:
                self._said.add(key)
                what = work["unit"] if work["unit"] == _LOADING else f"unit {work['unit']}"
                say = f"{what} has been running on {work['worker']} for {work['seconds']:.0f} s: stalled?"
                self._journal.event("stall", say, unit=work["unit"], worker=work["worker"], seconds=work["seconds"])
        waited = time.monotonic() - self._since
        self._actors = max(self._actors, state["actors"])  # a board that was lost and restarted counts from 0
        if not self._actors and waited > self._stall_after and ("", "") not in self._said:
            self._said.add(("", ""))
            self._journal.event("stall", f"no actor has started for {waited:.0f} s: is there room for one?")


class Nodes:
    """The cluster's nodes; reports to the journal which ones join and leave."""

    def __init__(self, journal: Journal) -> None:
        self._journal, self._nodes = journal, _alive()

    def look(self) -> None:
        """Compare with the last look."""
        now = _alive()
        for node in now.keys() - self._nodes.keys():
            self._journal.event("node_joined", f"node {now[node]} has joined and is used", node=now[node])
        for node in self._nodes.keys() - now.keys():
            name, why = self._nodes[node], _why_gone(node)
            self._journal.event(
                "node_lost", f"node {name} is gone ({why}); its unfinished work runs again", node=name, reason=why
            )
        self._nodes = now


def _alive() -> dict[str, str]:
    """Names of the living nodes, keyed by id."""
    return {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}


def _why_gone(node_id: str) -> str:
    """What Ray knows about the node's end, for example that a preemption was announced."""
    node: dict[str, Any] = next((node for node in ray.nodes() if node["NodeID"] == node_id), {})
    return str(node.get("DeathReasonMessage") or node.get("DeathReason") or "unknown")
