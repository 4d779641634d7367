"""Shows a run on the console and in its journal, from the log that rank 0 writes."""

import threading
import time
from types import TracebackType

import ray

from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.journal import Journal
from mrd_ray.runs.meter import Meter
from mrd_ray.unlearning import log
from mrd_ray.unlearning.log import Line
from mrd_ray.workers.lookout import Nodes


class Watch:
    """Shows the log on the console as rank 0 writes it, and says when the workers restart, stall, or lose a node.

    Args:
        stall_after: seconds without a line after which training is called stalled.
    """

    def __init__(self, run: RunDirectory, steps: int, journal: Journal, stall_after: float) -> None:
        self._run, self._journal, self._meter = run, journal, Meter("Unlearning", steps, journal.console)
        journal.tell(steps=steps)
        journal.gauges.tell("unlearning_step", 0)
        self._start, self._goes_on = log.start(run), run.exists(log.NAME)
        self._began, self._seen, self._step = False, 0, 0
        self._losses = self._knows = ""
        self._nodes, self._stall_after = Nodes(journal), stall_after
        self._news, self._warned = time.monotonic(), False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._meter.__enter__()
        self._meter.advance(0, "starting the workers")
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._meter.__exit__(kind, problem, trace)

    def _watch(self) -> None:
        over = False
        while not over:
            over = self._over.wait(1.0)
            try:
                self._look()
                self._nodes.look()
            except (UserError, ray.exceptions.RayError):  # storage or Ray's head may be away for a moment; look again
                continue

    def _look(self) -> None:
        start = log.start(self._run)  # before the lines: rank 0 writes those first, then start.json
        lines = log.read(self._run)
        if start != self._start:
            if self._goes_on:
                self._go_on(lines)
            self._start, self._began, self._goes_on = start, True, True
        if not self._began:
            lines = []  # these are of an earlier run; the workers have not started
        for line in lines[self._seen :]:
            self._show(line)
            self._news, self._warned = time.monotonic(), False
        self._seen = len(lines)
        if (silent := time.monotonic() - self._news) > self._stall_after and not self._warned:
            self._warned = True
            node = log.node_of(start if self._began else b"")
            say = f"Unlearning: nothing since step {self._step} for {silent:.0f} s (rank 0 is on {node}): stalled?"
            self._journal.event("stall", say, seconds=silent, node=node)

    def _go_on(self, lines: list[Line]) -> None:
        step = lines[-1]["step"] if lines else 0
        self._journal.event(
            "going_on", f"Unlearning: the workers have restarted and resume from step {step}", step=step
        )
        if not self._step:  # the steps of an earlier start
            self._meter.working_since(0)
            self._step = step
            self._meter.skip(self._step)
        self._seen = len(lines)

    def _show(self, line: Line) -> None:
        if line["event"] == "stop":
            return
        if line["event"] == "step":
            forget_loss = line["forget_loss"]
            self._losses = f", forget loss {'not finite' if forget_loss is None else f'{forget_loss:.3g}'}"
            if line["retain_loss"] is not None:
                self._losses += f", retain loss {line['retain_loss']:.3g}"
        elif line["event"] == "evaluation":
            self._knows = f", forget MA {line['forget_memorization_accuracy']:.3f}"
            if line["retain_perplexity"] is not None:
                self._knows += f", retain perplexity {line['retain_perplexity']:.4g}"
        self._tell(line)
        advanced = max(0, line["step"] - self._step)
        self._step += advanced
        self._meter.advance(advanced, f"step {line['step']} of {line['of']}{self._losses}{self._knows}")

    def _tell(self, line: Line) -> None:
        self._journal.tell(step=line["step"])
        gauges = self._journal.gauges
        gauges.tell("unlearning_step", line["step"])
        if line["event"] == "refresh":
            gauges.tell("unlearning_refresh_seconds", line["seconds"])
        if line["event"] == "step":
            losses = {"forget": line["forget_loss"], "retain": line["retain_loss"]}
            gauges.tell("unlearning_loss", {name: loss for name, loss in losses.items() if loss is not None})
