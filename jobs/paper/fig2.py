"""Figure 2: how much does the outcome of unlearning vary with the choice of the forget set?"""

import json
import random
from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np
import scipy.stats

from jobs.paper import sweep, unlearned
from jobs.paper.config import Fig2Config
from jobs.paper.findings import Cell, Findings
from jobs.paper.statistics import mean
from jobs.paper.subject import Subject, prepare
from mrd_ray.config import DataSettings
from mrd_ray.config.data import is_plain_text
from mrd_ray.data import read
from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.unlearning.stopping import TITLES, Measure

_CLAIM = (
    "With the same method and settings, what unlearning achieves varies a good deal with the samples selected to be "
    "forgotten, so that a comparison of methods may measure the selection."
)
_MANY_SHARE = 0.5


def experiment(config: Fig2Config) -> tuple[Findings, Subject]:
    """Unlearn several selections, each with several seeds; compare the spread between and within selections."""
    names = ("unlearning", "stopping", "scoring", "checkpoints", "deepspeed")
    own = {name: getattr(config, name).model_dump(mode="json") for name in names}
    subject = prepare(
        config, own | {"size": config.size, "selection_seed": config.selection_seed, "experiment": "fig2"}
    )
    cells = {}
    for i, data in enumerate(selections(config, subject.run)):
        for seed in config.seeds:
            name = f"selection-{i}-seed-{seed}"
            unlearning = config.unlearning.model_copy(update={"seed": seed})
            cells[name] = unlearned.cell(config, subject, name, unlearning, data)
    results = unlearned.work_off(config, subject, "Unlearning selections", cells)
    changes = {
        metric: [
            [change(results[f"selection-{i}-seed-{seed}"], metric) for seed in config.seeds]
            for i in range(config.selections)
        ]
        for metric in TITLES
        if all(metric in result["after"] for result in results.values())
    }
    rows: list[dict[str, Cell]] = [row(TITLES[metric], values) for metric, values in changes.items()]
    varied = [row for row in rows if isinstance(row["p"], float) and row["p"] < 0.05 / len(rows)]
    found = [
        f"{'Agrees' if varied else 'Undecided'}: the change of {len(varied)} of {len(rows)} figures differs more "
        f"between selections than between seeds (analysis of variance, p < 0.05 / {len(rows)}).",
        *unlearned.stopped_early(results),
    ]
    many = [str(row["change of"]) for row in rows if isinstance(row["share"], float) and row["share"] > _MANY_SHARE]
    if many:
        found.append(f"The selection causes over half of the variance in the change of: {'; '.join(many)}.")
    found.append(
        f"{config.selections} selections of {config.size} samples (selection seed {config.selection_seed}), each with "
        f"seeds {', '.join(map(str, config.seeds))}; {config.unlearning.method}, weighting "
        f"{config.unlearning.weighting}."
    )
    title = "Figure 2: variance of unlearning from the selection of samples"
    return Findings("fig2", title, _CLAIM, rows, found, _page(changes)), subject


def selections(config: Fig2Config, run: RunDirectory) -> list[DataSettings]:
    """Forget sets drawn from data, each a file of the run. Another selection more changes none of the others."""
    if is_plain_text(config.data.path):
        raise UserError("data.path: a selection needs rows; give a .jsonl file, not plain text")
    rows = [row.values for row in read.rows(config.data)]
    if config.size > len(rows):
        raise UserError(f"size: {config.size} is over the {len(rows)} samples of {config.data.path}")
    of_run = []
    for i in range(config.selections):
        chosen = random.Random(f"{config.selection_seed} {i}").sample(range(len(rows)), config.size)
        name = f"selections/{i}.jsonl"
        run.write(name, "".join(json.dumps(rows[j], default=str) + "\n" for j in sorted(chosen)).encode())
        update: dict[str, object] = {
            "path": run.path(name),
            "name": None,
            "split": "train",
            "where": {},
            "max_samples": None,
        }
        update["sample_seed"] = None
        of_run.append(config.data.model_copy(update=update))
    return of_run


def change(result: sweep.Result, metric: Measure) -> float:
    """What unlearning did to a figure: after it less before it, since selections are not alike before."""
    after, before = result["after"][metric], result["before"][metric]
    return float(after - before)


def row(title: str, values: list[list[float]]) -> dict[str, Cell]:
    """One-way analysis of variance, between selections and over seeds within them, with its variance components."""
    of_selections = [float(np.mean(one)) for one in values]
    within = float(np.mean([np.var(one, ddof=1) for one in values]))
    between = max(0.0, float(np.var(of_selections, ddof=1)) - within / len(values[0]))
    p = float(scipy.stats.f_oneway(*values).pvalue) if within else float(not between)  # seeds make no difference
    return {
        "change of": title,
        "mean over selections": mean(of_selections),
        "least": min(of_selections),
        "most": max(of_selections),
        "s.d. between": between**0.5,
        "s.d. of seeds": within**0.5,
        "share": between / (between + within) if between + within else float("nan"),
        "p": p,
    }


def _page(changes: Mapping[Measure, list[list[float]]]) -> matplotlib.figure.Figure:
    page = matplotlib.figure.Figure(figsize=(3.6 * len(changes), 4), layout="constrained")
    for axis, (metric, values) in zip(np.atleast_1d(page.subplots(1, len(changes))), changes.items(), strict=True):
        shown: Any = axis
        for i, of_seeds in enumerate(values):
            shown.plot([i + 1] * len(of_seeds), of_seeds, "o", color="#4878a8", alpha=0.7)
        shown.set(
            xlabel="selection",
            title="change of " + TITLES[metric].replace(": ", ":\n"),
            xticks=range(1, len(values) + 1),
        )
        shown.title.set_fontsize(9)
    return page
