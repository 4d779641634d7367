"""Throughput by the number of actors, on one node and on a node each, compared with the planner's simulation.

All nodes are on this machine, so the cost of a network is not included.

Only ratios within one run are meaningful, on a machine that does nothing else and has a core for each actor.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import matplotlib.figure
import numpy as np
from ray.cluster_utils import Cluster

from benchmarks.common import PAPER_DRAWS, Batches, Raw
from benchmarks.figures import Figure, Results
from benchmarks.scoring import costs, engine
from mrd_ray import ScoreConfig
from mrd_ray.data.micro_batches import lay_out
from mrd_ray.planning.estimate import FLEETS
from mrd_ray.planning.simulate import Fleet, Rates, simulate
from mrd_ray.scoring.summary import png
from mrd_ray.scoring.units import Unit, cut_units

ONE_NODE, NODES = "actors of one node", "a node each (on this machine)"


def main(
    model: str,
    data: str,
    out: str = "benchmarks/results",
    actors: tuple[int, ...] = (1, 2),
    max_samples: int = 80,
    draws: int = 4,
    micro_batch_tokens: int = 512,
    simulated_samples: int = 100_000,
    straggling: float = 0.2,
    losses_per_hour: float = 0.1,
) -> None:
    """Benchmark how Monte Carlo scales. Writes a JSON file and a plot.

    Args:
        model: directory or hub id; the demo keeps one under ~/.cache/mrd_ray.
        data: forget set, for example TOFU's ../shared/data/tofu/forget10.json.
        out: folder of the JSON file and the plot.
        actors: numbers of actors, with one CPU each; the others are compared with the first.
        max_samples: rows of the forget set.
        draws: K for each actor, so that all have the same work.
        micro_batch_tokens: tokens per forward, padding included.
        simulated_samples: samples of the simulated run, with the forget set's lengths, K = 200, and 1 to 1,000 actors
            at the rates of the first measured run.
        straggling: how far simulated actors differ in speed, as in `mrd-ray plan`.
        losses_per_hour: how often simulated actors are lost, as in `mrd-ray plan`.
    """
    results = Results("scaling", locals(), out)
    scoring = {"micro_batch_tokens": micro_batch_tokens}
    config: Raw = {"model": {"path": model}, "data": {"path": data, "max_samples": max_samples}, "scoring": scoring}
    checked = ScoreConfig.model_validate(config | {"run": {"dir": "unused"}})
    work = Batches(checked)
    results.keep("size", work.size)
    for count in actors:
        results.keep(f"{count}, {ONE_NODE}", _in_a_process(config, count, draws * count))
        with _nodes(count):
            results.keep(f"{count}, {NODES}", _in_a_process(config, count, draws * count))
    of_one = results.raw[f"{actors[0]}, {ONE_NODE}"]
    rates = Rates(of_one["wall"] - of_one["span"], *_per_token(of_one, work), source="measured")
    drawn = np.random.default_rng(0).choice([len(work.rows[i]["token_ids"]) for i in work.order], simulated_samples)
    large = lay_out(drawn, micro_batch_tokens)
    rectangle = Unit(0, 0, len(large), 0, PAPER_DRAWS)
    simulated = {}
    for count in FLEETS:
        fleet = Fleet(count, straggling, losses_per_hour) if count > 1 else Fleet(1)
        simulated[count] = simulate(
            cut_units(large, [rectangle], count, 1 / rates.forward), large, rates, fleet
        ).seconds
    results.keep("simulated seconds", simulated)
    results.file.with_suffix(".png").write_bytes(figure(results.raw, actors))
    results.show(figures(results.raw, actors))


def _in_a_process(config: Raw, actors: int, draws: int) -> Raw:
    """`costs` of a run whose driver is a process of its own: Ray Data keeps objects of the last cluster it used."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_run, config, actors, draws).result()


def _run(config: Raw, actors: int, draws: int) -> Raw:
    return costs(
        engine(config, Batches(ScoreConfig.model_validate(config | {"run": {"dir": "unused"}})), actors, draws)
    )


@contextmanager
def _nodes(count: int) -> Iterator[None]:
    """A cluster with an idle head and N nodes with one CPU each; runs in this block join it."""
    before = {name: os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    os.environ["RAY_AUTH_MODE"] = "disabled"
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(count):
            nodes.add_node(num_cpus=1)
        os.environ["RAY_ADDRESS"] = nodes.address
        yield
    finally:
        nodes.shutdown()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _per_token(cost: Raw, work: Batches) -> tuple[float, float, float]:
    """theta, perturb and forward of `Rates`: a draw's time counts as its forwards."""
    tokens = int(work.layout.padded_tokens.sum())
    return max(0.0, cost["theta"]) / tokens, 0.0, cost["draw"] / tokens


def figures(raw: Raw, actors: tuple[int, ...]) -> list[Figure]:
    """Throughput, compared with the same multiple of the first one's."""
    shown = []
    for way in (ONE_NODE, NODES):
        of_first = raw[f"{actors[0]}, {way}"]
        for count in actors:
            cost = raw[f"{count}, {way}"]
            rate = cost["draws"] * raw["size"]["samples"] / cost["span"]
            shown.append(Figure(f"{count}, {way}", rate, "samples x draws/s", f"{cost['wall']:.3g} s by the clock"))
            if count != actors[0]:
                ratio = (cost["draws"] / cost["span"]) / (of_first["draws"] / of_first["span"])
                share = ratio * actors[0] / count
                shown.append(
                    Figure(
                        f"{count} / {actors[0]}, {way}", ratio, detail=f"{share:.0%}", at_least=0.95 * count / actors[0]
                    )
                )
    seconds = raw["simulated seconds"]
    stops = next((count for count in seconds if seconds[FLEETS[0]] / (count * seconds[count]) < 0.5), None)
    detail = "more than half would wait" if stops else "not below a half"
    shown.append(Figure("simulated: scaling stops at", stops or FLEETS[-1], "actors", detail))
    return shown


def figure(raw: Raw, actors: tuple[int, ...]) -> bytes:
    """Speed against one actor's, both axes logarithmic: PNG."""
    page = matplotlib.figure.Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = page.add_subplot()
    seconds = raw["simulated seconds"]
    axis.plot(FLEETS, FLEETS, ":", color="#999999", label="ideal")
    speed = [seconds[FLEETS[0]] / seconds[count] for count in FLEETS]
    axis.plot(FLEETS, speed, ".--", color="#4878a8", label="simulated at one actor's rates, start-up included")
    for way, mark, color in ((ONE_NODE, "o", "#c44e52"), (NODES, "x", "#55a868")):
        of_first = raw[f"{actors[0]}, {way}"]
        measured = [
            actors[0]
            * (raw[f"{count}, {way}"]["draws"] / raw[f"{count}, {way}"]["span"])
            / (of_first["draws"] / of_first["span"])
            for count in actors
        ]
        axis.plot(actors, measured, mark, color=color, label=f"measured, {way}")
    axis.set(xscale="log", yscale="log", xlabel="actors", ylabel="times as fast as one")
    size = raw["size"]
    axis.set_title(f"{size['samples']} samples, {size['parameters'] / 1e6:.0f} M parameters")
    axis.legend()
    return png(page)
