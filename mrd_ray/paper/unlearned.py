"""A cell that unlearns a set as a whole and asks what is left; Figure 2 and the tables are sweeps of it."""

import math
from dataclasses import dataclass

from mrd_ray.config import DataConfig, EvaluateConfig, EvaluationConfig, RunConfig, UnlearnConfig, UnlearningConfig
from mrd_ray.config.base import RayConfig
from mrd_ray.config.paper import UnlearningSweep
from mrd_ray.evaluation.evaluate import evaluate
from mrd_ray.paper import sweep
from mrd_ray.paper.subject import Subject
from mrd_ray.unlearning.stopping import TITLES
from mrd_ray.unlearning.unlearn import unlearn

WATCHED = tuple(TITLES)  # of the log's evaluations


@dataclass(frozen=True)
class Cell:
    """unlearning: None to evaluate the model as it is. evaluation: None to go by the log alone."""

    unlearning: UnlearnConfig | None
    evaluation: EvaluateConfig | None


def cell(
    config: UnlearningSweep,
    subject: Subject,
    name: str,
    unlearning: UnlearningConfig,
    data: DataConfig,
    evaluation: EvaluationConfig | None = None,
) -> Cell:
    """Unlearn `data` so, in RUN/runs/NAME, and evaluate the result."""
    where = subject.run.path(f"runs/{name}")
    unlearn_it = UnlearnConfig(
        model=subject.model, data=data, retain=config.retain, run=RunConfig(dir=where), unlearning=unlearning,
        scoring=config.scoring, stopping=config.stopping, checkpoints=config.checkpoints, deepspeed=config.deepspeed,
        ray=config.ray,
    )  # fmt: skip
    result = None if evaluation is None else evaluation_of(config, subject, f"{where}/model", name, evaluation)
    return Cell(unlearn_it, result)


def evaluation_of(
    config: UnlearningSweep, subject: Subject, model: str, name: str, evaluation: EvaluationConfig
) -> EvaluateConfig:
    """The evaluation of a model, in RUN/evaluations/NAME."""
    return EvaluateConfig(
        model=subject.model.model_copy(update={"path": model}),
        evaluation=evaluation,
        run=RunConfig(dir=subject.run.path(f"evaluations/{name}")),
        ray=RayConfig(cpus_per_actor=config.ray.cpus_per_worker, gpus_per_actor=config.ray.gpus_per_worker),
    )


def work(one: Cell) -> sweep.Result:
    """Figures by name, of the log and of the evaluation. The model is not kept: the cell can make it again."""
    found: sweep.Result = {}
    if one.unlearning is not None:
        finished = unlearn(one.unlearning)
        evaluations = [line for line in finished.log if line["event"] == "evaluation"]
        for when, line in {"before": evaluations[0], "after": evaluations[-1]}.items():
            found[when] = {name: line[name] for name in WATCHED if line[name] is not None}
            if "retain_loss" in found[when]:
                found[when]["retain_loss"] = math.exp(min(found[when]["retain_loss"], 700.0))
        found |= {"reason": finished.reason, "steps": finished.log[-1]["step"]}
    if one.evaluation is not None:
        figures = evaluate(one.evaluation).figures
        found["figures"] = [[figure.set, figure.metric, figure.value] for figure in figures]
    if one.unlearning is not None:
        for folder in ("model", "checkpoints"):
            finished.run.remove(folder)
    return found
