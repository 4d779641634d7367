"""Figure 4: does MRD predict the number of updates that unlearning a single sample takes?"""

import matplotlib.figure
import numpy as np

from jobs.paper import alone
from jobs.paper.config import Fig4Config
from jobs.paper.findings import Cell, Findings
from jobs.paper.statistics import Interval, excess, spearman
from jobs.paper.subject import Subject, prepare
from mrd_ray.config import RaySettings

_CLAIM = "MRD ranks samples by the number of updates that unlearning each one takes: the larger MRD, the fewer."
# by column of scores.parquet; the others are compared with the first
_MEASURES = {
    "mrd": "MRD",
    "num_tokens": "length, tokens",
    "log_prob": "log p of the sample",
    "mean_log_prob": "log p per token",
    "log_prob_gradient_norm": "norm of the gradient of log p",
}


def experiment(config: Fig4Config) -> tuple[Findings, Subject]:
    """Score the set, unlearn every sample separately, and correlate scores with updates."""
    subject = prepare(config, alone.identity(config.model, config.alone, config.ray) | {"experiment": "fig4"})
    scores = subject.score(config, RaySettings(gpus_per_actor=config.ray.gpus_per_task or None)).scores
    groups: alone.Groups = {row["sample_id"]: [row] for row in subject.samples.to_pylist()}
    limits, outcomes = alone.unlearn_each(subject, groups, config.alone, config.ray, "Unlearning each sample alone")
    updates = [outcomes[sample_id].updates for sample_id in scores["sample_id"].to_pylist()]
    measures = {name: scores[name].to_pylist() for name in _MEASURES}
    lengths = measures["num_tokens"]
    rows: list[dict[str, Cell]] = []
    for name, title in _MEASURES.items():
        better = None if name == "mrd" else excess(measures["mrd"], measures[name], updates)
        rows.append({
            "measure": title,
            "Spearman with updates": spearman(measures[name], updates),
            "at equal length": None if name == "num_tokens" else spearman(measures[name], updates, lengths),
            "|MRD's| - |this one's|": better,
        })  # fmt: skip
    kept = sum(not outcome.forgotten for outcome in outcomes.values())
    of_mrd = rows[0]["Spearman with updates"]
    assert isinstance(of_mrd, Interval)
    found = [_verdict(of_mrd), *_beside(rows[1:])]
    found.append(
        f"{len(updates)} samples; updates from {min(updates)} to {max(updates)}, median {np.median(updates):g}. "
        f"A forgotten sample has {limits}"
        + (f"; {kept} were not forgotten, and count as {config.alone.max_updates} updates." if kept else ".")
    )
    title = "Figure 4: MRD and the updates that unlearning a single sample takes"
    page = _page(measures["mrd"], updates, of_mrd)
    return Findings("fig4", title, _CLAIM, rows, found, page), subject


def _verdict(of_mrd: Interval) -> str:
    if not of_mrd.decided:
        return f"Undecided: Spearman's correlation of MRD with the updates is {of_mrd}, which has zero in it."
    agrees = of_mrd.value < 0
    return (
        f"{'Agrees' if agrees else 'Disagrees'}: Spearman's correlation of MRD with the updates is {of_mrd}; samples "
        f"with a larger MRD take {'fewer' if agrees else 'more'}."
    )


def _beside(rows: list[dict[str, Cell]]) -> list[str]:
    """How MRD compares with each baseline, if the difference is beyond chance."""
    by = {True: [], False: []}  # type: dict[bool, list[str]]
    for row in rows:
        better = row["|MRD's| - |this one's|"]
        assert isinstance(better, Interval)
        if better.decided:
            by[better.value > 0].append(str(row["measure"]))
    words = {True: "MRD ranks updates better than", False: "MRD ranks updates worse than"}
    sentences = [f"{words[which]}: {', '.join(names)}." for which, names in by.items() if names]
    return sentences or ["No other measure is better or worse than MRD beyond chance."]


def _page(mrd: list[float], updates: list[int], of_mrd: Interval) -> matplotlib.figure.Figure:
    page = matplotlib.figure.Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = page.add_subplot()
    axis.plot(mrd, updates, "o", color="#4878a8", alpha=0.7)
    axis.set(xlabel="MRD", ylabel="updates until forgotten", title=f"Spearman {of_mrd}")
    axis.set_ylim(bottom=0)
    return page
