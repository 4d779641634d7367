"""Zero-shot suites of the LM Evaluation Harness (Gao et al., 2024), which does all the work."""

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from pydantic import TypeAdapter

from mrd_ray.config import EvaluateConfig
from mrd_ray.errors import Unfit, UserError
from mrd_ray.evaluation.aggregate import Figure
from mrd_ray.models import load
from mrd_ray.models.files import content_digest
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.journal import Journal
from mrd_ray.workers.cluster import cluster
from mrd_ray.workers.replica import attempt, replica
from mrd_ray.workers.run_units import pool_of


def require(config: EvaluateConfig) -> None:
    """Raises UserError if suites are wanted and the harness is not installed, or does not know one of them."""
    if not config.evaluation.zero_shot:
        return
    try:
        tasks = importlib.import_module("lm_eval.tasks")
    except ImportError:
        raise UserError("evaluation.zero_shot needs lm-eval: pip install 'mrd-ray[zero-shot]'") from None
    known = tasks.TaskManager(include_path=config.evaluation.zero_shot_tasks).all_tasks
    if unknown := [name for name in config.evaluation.zero_shot if name not in known]:
        raise UserError(
            f"evaluation.zero_shot: the harness does not know {unknown[0]!r}; `lm-eval ls tasks` lists what it knows. "
            "For tasks of your own, set evaluation.zero_shot_tasks to a folder with their YAML files"
        )


def tasks_digest(folder: str | None) -> str | None:
    """Digest of the tasks in a folder: YAML files, and Python files with functions that those may name."""
    if folder is None:
        return None
    files = sorted(file for pattern in ("*yaml", "*.py") for file in Path(folder).rglob(pattern))
    files = [file for file in files if not (file.parent / "manifest.json").exists()]  # a run's config.yaml is no task
    return content_digest(filter(Path.is_file, files))


def figures(config: EvaluateConfig, run: RunDirectory, files_digest: str, journal: Journal) -> list[Figure]:
    """Figures of each suite. Suites that an earlier start has not finished run as one Ray task each."""
    names = {name: f"units/zero-shot-{name}.json" for name in config.evaluation.zero_shot}
    missing = [name for name, file in names.items() if not run.exists(file)]
    if missing:
        grows = journal.within(cluster(log_to_driver=not config.output.quiet))
        pool = pool_of(config.ray, grows, journal)
        work = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_retries=3)(_suite)
        waiting = {work.remote(config, name, files_digest, pool.threads, pool.gpus > 0): name for name in missing}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            of_suite, fatal = ray.get(done)
            name = waiting.pop(done)
            if fatal is not None:
                raise UserError(f"evaluation.zero_shot: {name}: {fatal}")
            run.write(names[name], json.dumps(of_suite).encode())
            journal.console.print(f"Zero-shot: {name} done, {len(waiting)} to do", highlight=False)
    of_all = [figure for file in names.values() for figure in run.read_json(file, list[Figure])]
    return TypeAdapter(list[Figure]).validate_python(of_all)


def _suite(
    config: EvaluateConfig, name: str, files_digest: str, threads: int, on_gpu: bool
) -> tuple[list[dict[str, object]] | None, str | None]:
    """On a worker: the figures of one suite, subtasks included, or why there are none."""
    torch.set_num_threads(threads)
    try:
        return attempt(lambda: _evaluated(config, name, files_digest, on_gpu))
    except Unfit as problem:
        return None, f"{os.uname().nodename}: {problem}"


def _evaluated(config: EvaluateConfig, name: str, files_digest: str, on_gpu: bool) -> list[dict[str, object]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    evaluation = config.evaluation
    model, weights = replica(config.model, files_digest, on_gpu)
    wrapped = HFLM(
        pretrained=model, tokenizer=load.load_tokenizer(config.model), batch_size=evaluation.generation_batch
    )
    results = simple_evaluate(
        model=wrapped,
        tasks=[name],
        num_fewshot=0,
        limit=evaluation.zero_shot_limit,
        log_samples=False,
        task_manager=TaskManager(include_path=evaluation.zero_shot_tasks),
    )
    weights.check()
    return figures_of(results)


def figures_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Figures of all tasks and groups of tasks in the harness's results."""
    figures = []
    for task, values in found["results"].items():
        samples = found["n-samples"].get(task, {"effective": values.get("sample_len", 0)})  # it has no groups
        for key, value in values.items():
            metric, _, its_filter = key.partition(",")
            if not its_filter or metric.endswith("_stderr"):
                continue
            se = values.get(f"{metric}_stderr,{its_filter}")
            figures.append(
                {
                    "set": task,
                    "metric": metric if its_filter == "none" else f"{metric} ({its_filter})",
                    "value": float(value),
                    "se": float(se) if isinstance(se, float) else None,
                    "rows": int(samples["effective"]),
                }
            )
    return figures
