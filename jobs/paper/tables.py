"""Tables 1, 4, 5, 6: does drawing forget samples by MRD improve each method, for what is forgotten and what is kept?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure

from jobs.paper import sweep, unlearned
from jobs.paper.config import Method, TablesConfig
from jobs.paper.findings import Cell, Findings
from jobs.paper.statistics import Interval, mean
from jobs.paper.subject import Subject, prepare
from mrd_ray.config import UnlearningSettings
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError
from mrd_ray.evaluation import judges, sets, zero_shot
from mrd_ray.evaluation.aggregate import title
from mrd_ray.models import load
from mrd_ray.models.files import content_digest
from mrd_ray.unlearning.stopping import TITLES

_CLAIM = (
    "Drawing forget samples by MRD improves each of SGA (which makes it CGA), GradDiff, PO and NPO: more is forgotten, "
    "and less of the other knowledge is lost."
)
_METHODS = {"ga": "SGA", "graddiff": "GradDiff", "po": "PO", "npo": "NPO"}
_KNOWLEDGE = (
    *("probability", "normalized_probability", "rouge_l", "accuracy", "embedding_accuracy", "memorization_accuracy"),
    "extraction_likelihood",
)
Figure = tuple[str | None, str]  # an evaluated set, or None, and a metric
Values = dict[Figure, list[float]]  # of all seeds


def experiment(config: TablesConfig) -> tuple[Findings, Subject]:
    """Run every method, weighting and seed; report each figure's mean over seeds, and the gain over uniform weights."""
    names = ("unlearning", "stopping", "scoring", "checkpoints", "deepspeed", "evaluation")
    own: dict[str, Any] = {name: getattr(config, name).model_dump(mode="json") for name in names}
    evaluated = bool(config.evaluation.sets or config.evaluation.zero_shot)
    subject = prepare(config, own | _contents(config) | {"methods": config.methods, "experiment": "tables"})
    cells = {"before": _before(config, subject)} if evaluated else {}
    for method in config.methods:
        for weighting in config.weightings:
            for seed in config.seeds:
                name = f"{method}-{weighting}-{seed}"
                unlearning = _unlearning(config, method, {"weighting": weighting, "seed": seed})
                evaluation = config.evaluation if evaluated else None
                cells[name] = unlearned.cell(config, subject, name, unlearning, config.data, evaluation)
    results = unlearned.work_off(config, subject, "Unlearning", cells)
    values: dict[tuple[str, str], Values] = {
        (method, weighting): _values([results[f"{method}-{weighting}-{seed}"] for seed in config.seeds])
        for method in config.methods
        for weighting in config.weightings
    }
    any_cell = results[f"{next(iter(config.methods))}-{config.weightings[0]}-{config.seeds[0]}"]  # of the same model
    before = _values([{"after": any_cell["before"], "figures": results.get("before", {}).get("figures", [])}])
    rows = [_row(figure, before, values) for figure in before]
    found = [*_gains(values, config.evaluation.forget), *unlearned.stopped_early(results), _setting(config, results)]
    heading = "Tables 1, 4, 5, 6: methods with uniform and with MRD weights"
    return Findings("tables", heading, _CLAIM, rows, found, _page(before, values)), subject


def _contents(config: TablesConfig) -> dict[str, Any]:
    """Digests of the files that the settings name."""
    tokenizer = load.load_tokenizer(config.model)
    limits = Limits.of(load.skeleton(config.model))
    evaluation = config.evaluation
    known: dict[str, str | None] = {
        name: sets.digest(rows) for name, rows in sets.build_all(evaluation, tokenizer, limits).items()
    }
    for name in ("embedding_model", "toxicity_model"):
        known[name] = judges.identity(getattr(evaluation, name))
    known["zero_shot_tasks"] = zero_shot.tasks_digest(evaluation.zero_shot_tasks)
    refusals = [Path(of["refusals"]).expanduser() for of in config.methods.values() if "refusals" in of]
    if missing := [file for file in refusals if not file.is_file()]:
        raise UserError(f"methods: refusals: there is no file {missing[0]}")
    return {f"content.{name}": value for name, value in known.items()} | {"content.refusals": content_digest(refusals)}


def _unlearning(config: TablesConfig, method: Method, more: dict[str, object]) -> UnlearningSettings:
    settings = config.unlearning.model_dump(exclude_unset=True, exclude={"method", "refusals"})
    try:
        return UnlearningSettings(**(settings | config.methods[method] | {"method": method} | more))
    except ValueError as problem:
        raise UserError(f"methods.{method}: {problem}") from None


def _before(config: TablesConfig, subject: Subject) -> unlearned.UnlearnedModel:
    evaluation = unlearned.evaluation_of(config, subject, subject.model.path, "before", config.evaluation)
    return unlearned.UnlearnedModel(None, evaluation)


def _values(results: Sequence[Mapping[str, Any]]) -> Values:
    """The values of each figure, one for each result; only figures that all results have."""
    by_figure: Values = {}
    for result in results:
        for name, value in result["after"].items():
            by_figure.setdefault((None, name), []).append(value)
        for of, metric, value in result.get("figures", ()):
            by_figure.setdefault((of, metric), []).append(value)
    return {figure: values for figure, values in by_figure.items() if len(values) == len(results)}


def _title(figure: Figure) -> str:
    of, metric = figure
    words = next((words for name, words in TITLES.items() if name == metric), None) or title(metric)
    return words if of is None else f"{of}: {words}"


def better(figure: Figure, forget: str | None) -> int:
    """Whether unlearning should raise a figure (1) or lower it (-1); 0 if that depends on the task."""
    of, metric = figure
    if metric in TITLES or metric == "toxicity":
        return -1
    if metric in ("model_utility", "forget_quality", "UA", "UA_by_embedding", "RR"):
        return 1
    if of is None or forget is None:
        return 0
    known = {"perplexity": -1} | dict.fromkeys(_KNOWLEDGE, 1)  # for sets that should stay known
    return known.get(metric, 0) * (-1 if of == forget else 1)


def _row(figure: Figure, before: Values, values: Mapping[tuple[str, str], Values]) -> dict[str, Cell]:
    row: dict[str, Cell] = {"figure": _title(figure), "before": before[figure][0]}
    for (method, weighting), own in values.items():
        row[f"{_METHODS[method]}, {weighting}"] = mean(own[figure]) if figure in own else None
    for method in dict.fromkeys(method for method, _ in values):
        if (gain := _gain(figure, method, values)) is not None:
            row[f"{_METHODS[method]}: mrd - uniform"] = gain
    return row


def _gain(
    figure: Figure, method: str, values: Mapping[tuple[str, str], Values], comparisons: int = 1
) -> Interval | None:
    """The gain of MRD over uniform weights, seed by seed; None if one of them is missing."""
    pair = [values.get((method, weighting), {}).get(figure) for weighting in ("mrd", "uniform")]
    if pair[0] is None or pair[1] is None:
        return None
    return mean([a - b for a, b in zip(pair[0], pair[1], strict=True)], comparisons)


def _gains(values: Mapping[tuple[str, str], Values], forget: str | None) -> list[str]:
    """For each method, the figures that MRD weights make better or worse beyond chance."""
    judged: dict[str, Values] = {}  # by method, the figures that both weightings have and that can be better or worse
    for method in dict.fromkeys(method for method, _ in values):
        own = values.get((method, "mrd"), {})
        judged[method] = {
            figure: of for figure, of in own.items() if better(figure, forget) and _gain(figure, method, values)
        }
    comparisons = sum(map(len, judged.values()))
    sentences = []
    for method, figures in judged.items():
        if not figures:
            continue
        gains = {figure: gain for figure in figures if (gain := _gain(figure, method, values, comparisons)) is not None}
        decided = {figure: gain.value * better(figure, forget) for figure, gain in gains.items() if gain.decided}
        good, bad = ([_title(figure) for figure, gain in decided.items() if gain * sign > 0] for sign in (1, -1))
        verdict = "Undecided" if not decided else "Agrees" if not bad else "Disagrees" if not good else "Mixed"
        parts = [
            f"{word} in {len(of)} of {len(gains)} figures ({'; '.join(of)})"
            for word, of in {"better": good, "worse": bad}.items()
            if of
        ]
        words = ", and ".join(parts) or f"neither better nor worse in any of {len(gains)} figures"
        sentences.append(
            f"{_METHODS[method]}: {verdict}. MRD weights are {words}, beyond chance in {comparisons} comparisons."
        )
    return sentences


def _setting(config: TablesConfig, results: Mapping[str, sweep.Result]) -> str:
    steps = [result["steps"] for result in results.values() if "steps" in result]
    seeds, size = ", ".join(map(str, config.seeds)), config.unlearning.batch_size
    taken = " to ".join(map(str, sorted({min(steps), max(steps)})))
    return f"Seeds {seeds}; {taken} steps of {size} forget samples."


def _page(before: Values, values: Mapping[tuple[str, str], Values]) -> matplotlib.figure.Figure:
    """Plot what is forgotten against what is kept: forget MA and retain perplexity, a point for each seed."""
    page = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axis = page.add_subplot()
    forget, retain = (None, "forget_memorization_accuracy"), (None, "retain_perplexity")
    colours = dict(zip(_METHODS, ("#4878a8", "#c44e52", "#55a868", "#8172b2"), strict=True))
    for (method, weighting), own in values.items():
        if retain in own:
            marker = {"mrd": "o", "uniform": "x"}.get(weighting, "+")
            label = f"{_METHODS[method]}, {weighting}"
            axis.plot(own[forget], own[retain], marker, color=colours[method], label=label)
    if retain in before:
        axis.plot(before[forget], before[retain], "k*", label="before")
        page.legend(fontsize=8, loc="outside right upper")
        every = [*before[retain], *(value for own in values.values() for value in own.get(retain, ()))]
        if max(every) > 10 * min(every):
            axis.set_yscale("log")
    axis.set(xlabel=_title(forget), ylabel=_title(retain), title="Further left: more forgotten; lower: more kept")
    return page
