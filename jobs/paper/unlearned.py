"""A cell that unlearns a whole set and measures what is left; Figure 2 and the tables are sweeps of such cells."""

from collections.abc import Mapping
from dataclasses import dataclass

from jobs.paper import sweep
from jobs.paper.config import UnlearningSweep
from jobs.paper.subject import Subject
from mrd_ray.config import (
    DataSettings,
    EvaluateConfig,
    EvaluationSettings,
    RunSettings,
    UnlearnConfig,
    UnlearningSettings,
)
from mrd_ray.config.base import RaySettings
from mrd_ray.evaluation.evaluate import evaluate
from mrd_ray.unlearning import log
from mrd_ray.unlearning.stopping import TITLES
from mrd_ray.unlearning.unlearn import unlearn


@dataclass(frozen=True)
class UnlearnedModel:
    """unlearning: None to evaluate the model as it is. evaluation: None to go by the log alone."""

    unlearning: UnlearnConfig | None
    evaluation: EvaluateConfig | None


def cell(
    config: UnlearningSweep,
    subject: Subject,
    name: str,
    unlearning: UnlearningSettings,
    data: DataSettings,
    evaluation: EvaluationSettings | None = None,
) -> UnlearnedModel:
    """Unlearn `data` so, in RUN/runs/NAME, and evaluate the result."""
    where = subject.run.path(f"runs/{name}")
    unlearn_it = UnlearnConfig(
        model=subject.model, data=data, retain=config.retain, run=RunSettings(dir=where), unlearning=unlearning,
        scoring=config.scoring, stopping=config.stopping, checkpoints=config.checkpoints, deepspeed=config.deepspeed,
        ray=config.ray,
    )  # fmt: skip
    result = None if evaluation is None else evaluation_of(config, subject, f"{where}/model", name, evaluation)
    return UnlearnedModel(unlearn_it, result)


def evaluation_of(
    config: UnlearningSweep, subject: Subject, model: str, name: str, evaluation: EvaluationSettings
) -> EvaluateConfig:
    """The evaluation of a model, in RUN/evaluations/NAME."""
    return EvaluateConfig(
        model=subject.model.model_copy(update={"path": model}),
        evaluation=evaluation,
        run=RunSettings(dir=subject.run.path(f"evaluations/{name}")),
        ray=RaySettings(cpus_per_process=config.ray.cpus_per_process, gpus_per_actor=config.ray.gpus_per_worker),
    )


def work(one: UnlearnedModel) -> sweep.Result:
    """Figures by name, of the log and of the evaluation."""
    result: sweep.Result = {}
    if one.unlearning is not None:
        finished = unlearn(one.unlearning)
        evaluations = log.evaluations(finished.log)
        # of the model that results: a state that diverged, or fell below the floor, is logged too
        after = next(line for line in reversed(evaluations) if line["step"] == finished.step)
        for when, line in {"before": evaluations[0], "after": after}.items():
            result[when] = {name: line[name] for name in TITLES if line[name] is not None}
        result |= {"failed": finished.failed, "steps": finished.step}
    if one.evaluation is not None:
        figures = evaluate(one.evaluation).figures
        result["figures"] = [[figure.set, figure.metric, figure.value] for figure in figures]
    return result


def work_off(
    config: UnlearningSweep, subject: Subject, title: str, cells: Mapping[str, UnlearnedModel]
) -> dict[str, sweep.Result]:
    """The results of all cells. Models are deleted; a cell can make its model again."""

    def tidy(name: str) -> None:
        for folder in ("model", "checkpoints"):
            subject.run.remove(f"runs/{name}/{folder}")

    results = sweep.work_off(subject.run, title, work, cells, at_once=config.at_once, tidy=tidy)
    for measures in (result[when] for result in results.values() for when in ("before", "after") if when in result):
        if "retain_loss" in measures:  # as earlier versions called it
            measures["retain_perplexity"] = measures.pop("retain_loss")
    return results


def stopped_early(results: Mapping[str, sweep.Result]) -> list[str]:
    """A sentence about runs that diverged or fell below the utility floor, if there are any."""
    failed = [name for name, result in results.items() if result.get("failed")]
    if not failed:
        return []
    return [
        f"{len(failed)} of {len(results)} runs diverged or fell below the utility floor, and count with the last good "
        f"state, which may be the initial model: {', '.join(failed)}."
    ]
