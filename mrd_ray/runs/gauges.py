"""A run in Ray's metrics. One thread of the driver sets every gauge again and again: Ray drops one after 20 s."""

import threading
from collections.abc import Mapping

import ray
import ray.util.metrics

BEAT = 5.0  # seconds; Ray sends what was set every 10 s
_RUN = ("run",)
_START = ("run", "state", "start")  # start: seconds since 1970, which tells one start of a run from another
GAUGES = {  # name: (description, tags)
    "run_heartbeat": ("1 while the driver lives, and once more with the state at its end", _START),
    "units_done": ("Work units whose results are on disk", _RUN),
    "units_left": ("Work units still to do", _RUN),
    "units_failed": ("Attempts at work units that were lost with their actor, and are made again", _RUN),
    "samples_draws_per_second": ("Samples times draws scored per second, or rows evaluated", _RUN),
    "tokens_per_second": ("Tokens through forwards per second, draws and padding included", _RUN),
    "actor_restarts": ("Actors that were started anew after their end", _RUN),
    "actor_device_memory_bytes": (
        "Peak memory of an actor on its GPUs, or memory in the host where it has none", ("run", "worker")
    ),
    "unlearning_step": ("Optimiser steps taken, as the driver sees them", _RUN),
    "unlearning_loss": ("Losses of the last step", ("run", "loss")),
    "unlearning_refresh_seconds": ("Duration of the last refresh", _RUN),
}  # fmt: skip
ENDED = "run_ended_total"  # a counter, which Ray never drops: the state at the end is scraped however late


class Gauges:
    """What a run last told of itself, set in Ray's metrics every BEAT seconds while there is a Ray.

    Storage that hangs does not stop it, as it stops the signs of life in progress.json.
    """

    def __init__(self, run_id: str, start: float) -> None:
        self._tags = {"run": run_id, "start": str(int(start))}
        self._values: dict[str, dict[str, float]] = {}  # by name, and by the value of the tag beside the run's id
        self._metrics: dict[str, ray.util.metrics.Gauge] = {}
        self._over, self._setting = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.tell("run_heartbeat", {"running": 1.0})

    def tell(self, name: str, values: float | Mapping[str, float]) -> None:
        """A gauge has this value from now on, or one for each value of its tag ("state", "loss", "worker")."""
        with self._setting:
            self._values[name] = dict(values) if isinstance(values, Mapping) else {"": values}

    def start(self) -> None:
        """Begin to set them."""
        self._thread.start()

    def stop(self, state: str) -> None:
        """Set them once more, with the state at the end; Ray sends that as it shuts down."""
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
        """Whether there is a Ray."""
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
