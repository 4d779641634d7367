"""A run in Ray's metrics. A thread of the driver keeps setting every gauge, since Ray drops gauges after 20 s."""

import threading
from collections.abc import Mapping

import ray
import ray.util.metrics

BEAT = 5.0  # seconds; Ray sends the values every 10 s
_RUN = ("run",)
_START = ("run", "state", "start")  # start: seconds since 1970; it distinguishes the starts of a run
GAUGES = {  # name: (description, tags)
    "run_heartbeat": ("1 while the driver is alive, and once more with the final state when it ends", _START),
    "units_done": ("Work units whose results are on disk", _RUN),
    "units_left": ("Work units still to do", _RUN),
    "units_failed": ("Attempts at work units that were lost because their actor died, and are repeated", _RUN),
    "samples_draws_per_second": ("Samples times draws scored per second, or rows evaluated", _RUN),
    "tokens_per_second": ("Tokens in forward passes per second, including draws and padding", _RUN),
    "actor_restarts": ("Actors that were restarted after they died", _RUN),
    "actor_device_memory_bytes": (
        "Peak memory of an actor on its GPUs, or its host memory if it has none", ("run", "worker")
    ),
    "unlearning_step": ("Optimiser steps taken, as known to the driver", _RUN),
    "unlearning_loss": ("Losses of the last step", ("run", "loss")),
    "unlearning_refresh_seconds": ("Duration of the last refresh", _RUN),
}  # fmt: skip
ENDED = "run_ended_total"  # a counter, which Ray never drops, so the final state is scraped however late


class Gauges:
    """The latest figures of a run, set in Ray's metrics every BEAT seconds while Ray is running.

    Unlike the sign of life in progress.json, they do not stop when the storage hangs.
    """

    def __init__(self, run_id: str, start: float) -> None:
        self._tags = {"run": run_id, "start": str(int(start))}
        self._values: dict[str, dict[str, float]] = {}  # by gauge, then by the value of its tag other than the run's id
        self._metrics: dict[str, ray.util.metrics.Gauge] = {}
        self._over, self._setting = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.tell("run_heartbeat", {"running": 1.0})

    def tell(self, name: str, values: float | Mapping[str, float]) -> None:
        """Set a gauge's value from now on, or one value for each value of its tag ("state", "loss", "worker")."""
        with self._setting:
            self._values[name] = dict(values) if isinstance(values, Mapping) else {"": values}

    def start(self) -> None:
        """Start setting the gauges."""
        self._thread.start()

    def stop(self, state: str) -> None:
        """Set the gauges once more, with the final state. Ray sends them as it shuts down."""
        self._over.set()
        self._thread.join()
        self.tell("run_heartbeat", {state: 1.0})
        if self._set():
            ended = ray.util.metrics.Counter(f"mrd_ray_{ENDED}", "Starts of a run that have ended, by state", _START)
            ended.inc(1, self._tags | {"state": state})

    def _beat(self) -> None:
        self._set()
        while not self._over.wait(BEAT):
            self._set()

    def _set(self) -> bool:
        """Set all gauges. Returns whether Ray is running."""
        if not ray.is_initialized():
            return False
        with self._setting:
            for name, values in self._values.items():
                about, tags = GAUGES[name]
                if name not in self._metrics:
                    self._metrics[name] = ray.util.metrics.Gauge(f"mrd_ray_{name}", about, tags)
                for value in values:
                    of = self._tags | {tag: value for tag in tags if tag not in self._tags}
                    self._metrics[name].set(values[value], {tag: of[tag] for tag in tags})
        return True
