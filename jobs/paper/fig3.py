"""Figure 3: how far do parameters move until a composite sample is forgotten, and is this the same for all?"""

import random
from collections.abc import Iterable

import matplotlib.figure

from jobs.paper import alone
from jobs.paper.config import Fig3Config
from jobs.paper.findings import Findings
from jobs.paper.statistics import spearman, variation
from jobs.paper.subject import Subject, prepare
from mrd_ray.config import RaySettings
from mrd_ray.errors import UserError

_CLAIM = (
    "The change of the parameters that unlearning takes differs from one composite sample (a few samples unlearned "
    "together) to the next: samples are not equally hard."
)


def experiment(config: Fig3Config) -> tuple[Findings, Subject]:
    """Unlearn composite samples, each from the initial model, and measure how far the parameters move."""
    own = {name: getattr(config, name) for name in ("size", "composites", "seed")}
    subject = prepare(config, alone.identity(config.model, config.alone, config.ray) | own | {"experiment": "fig3"})
    members = _members(config, subject)
    rows_by_id = {row["sample_id"]: row for row in subject.samples.to_pylist()}
    groups = {name: [rows_by_id[sample_id] for sample_id in ids] for name, ids in members.items()}
    scores = subject.score(config, RaySettings(gpus_per_actor=config.ray.gpus_per_task or None)).scores
    mrd = dict(zip(scores["sample_id"].to_pylist(), scores["mrd"].to_pylist(), strict=True))
    limits, outcomes = alone.unlearn_each(subject, groups, config.alone, config.ray, "Unlearning composite samples")
    rows = [
        {
            "composite sample": name,
            "mean |change| of a weight": outcome.mean_change,
            "norm of the change": outcome.change_norm,
            "updates": outcome.updates,
            "forgotten": "yes" if outcome.forgotten else "no",
            "MRD, mean": sum(mrd[sample_id] for sample_id in members[name]) / config.size,
        }
        for name, outcome in outcomes.items()
    ]
    rows.sort(key=lambda row: row["mean |change| of a weight"])
    changes = [row["mean |change| of a weight"] for row in rows]
    updates = [outcome.updates for outcome in outcomes.values()]
    spread = variation(changes)
    with_mrd = spearman([row["MRD, mean"] for row in rows], changes)
    kept = sum(not outcome.forgotten for outcome in outcomes.values())
    found = [
        f"{_verdict(outcomes.values())}: updates from {min(updates)} to {max(updates)}; the mean change of a "
        f"weight from {min(changes):.3g} to {max(changes):.3g}, with a coefficient of variation of {spread}.",
        f"Spearman's correlation of the change with the composite samples' mean MRD is {with_mrd}.",
        f"{len(rows)} composite samples of {config.size}, combined with seed {config.seed}; a forgotten one has, "
        f"on average, {limits}"
        + (f"; {kept} were not forgotten within {config.alone.max_updates} updates." if kept else "."),
    ]
    title = "Figure 3: change of the parameters for each composite sample"
    return Findings("fig3", title, _CLAIM, rows, found, _page(changes, [row["updates"] for row in rows])), subject


def _verdict(outcomes: Iterable[alone.Outcome]) -> str:
    updates = [outcome.updates for outcome in outcomes if outcome.forgotten]
    # samples differ only if their updates differ by more than one: forgetting is not measured more finely
    return "Agrees" if updates and max(updates) - min(updates) > 1 else "Undecided"


def _members(config: Fig3Config, subject: Subject) -> dict[str, list[str]]:
    """sample_ids of each composite sample."""
    ids = subject.samples["sample_id"].to_pylist()
    if (needed := config.composites * config.size) > len(ids):
        raise UserError(
            f"composites: {config.composites} of {config.size} samples each are {needed}, but {config.data.path} "
            f"holds {len(ids)}"
        )
    random.Random(config.seed).shuffle(ids)
    return {f"composite-{i:03d}": ids[i * config.size : (i + 1) * config.size] for i in range(config.composites)}


def _page(changes: list[float], updates: list[int]) -> matplotlib.figure.Figure:
    page = matplotlib.figure.Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = page.add_subplot()
    bars = axis.bar(range(1, len(changes) + 1), changes, color="#4878a8")
    axis.bar_label(bars, [str(count) for count in updates], fontsize=8)
    axis.set(xlabel="composite sample", ylabel="mean |change| of a weight", title="Above the bars: updates")
    return page
