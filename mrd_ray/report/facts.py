"""What was run, and on what: from manifests and settings, in words for the page."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml

from mrd_ray.report.read import About, Run, Scores, Unlearning


@dataclass(frozen=True)
class Facts:
    """A run's name and command, (term, description) pairs, more pairs that fewer people need, and settings as YAML."""

    name: str
    command: str
    pairs: list[tuple[str, str]]
    more: list[tuple[str, str]]
    config: str


def facts(run: Run) -> Facts:
    """The facts of a run."""
    about = run.about
    invocation = about.manifest["invocations"][-1]
    pairs = {
        "Model": _model(about),
        **_particulars(run),
        "Started": ", ".join(dict.fromkeys(one["time"] for one in _ends(about.manifest["invocations"]))),
        "Command": shlex.join(map(str, invocation["command"])),
        "Machine": ", ".join(f"{key} {value}" for key, value in invocation["hardware"].items()),
        "Directory": about.uri,
    }
    more = {
        "Versions": ", ".join(f"{package} {version}" for package, version in invocation["versions"].items() if version),
        "Digests": ", ".join(
            f"{name} {digest[:12]}"
            for name, digest in about.manifest["identity"].items()
            if isinstance(digest, str) and len(digest) == 64
        ),
    }
    if isinstance(run, Scores) and run.scores.num_rows:
        pairs = {"Samples": f"{run.scores.num_rows:,}"} | pairs
    config = yaml.safe_dump(about.config, sort_keys=False, allow_unicode=True)
    known, less_asked = ([(term, said) for term, said in of.items() if said] for of in (pairs, more))
    return Facts(about.name, about.command, known, less_asked, config)


def _particulars(run: Run) -> dict[str, str]:
    if isinstance(run, Scores):
        return _scoring(run.about, _draws(run.about, [run.scores]))
    if isinstance(run, Unlearning):
        return _unlearning(run.about, _draws(run.about, run.refreshes.values()))
    return _sets(run.about)


def _draws(about: About, scores: Iterable[pa.Table]) -> str:
    """Draws per sample, as made; with adaptive scoring, these may be more than the settings' number."""
    made = [draws for table in scores for draws in table["num_draws"].to_pylist() if draws]
    counts = sorted({min(made), max(made)}) if made else [about.setting("scoring.num_draws")]
    return " to ".join(map(str, counts))


def _ends(invocations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [invocations[0], invocations[-1]]


def _model(about: About) -> str:
    revision = about.setting("model.revision")
    return f"{about.setting('model.path')}{f' at {revision}' if revision else ''}, {about.setting('model.dtype')}"


def _data(about: About) -> str:
    return f"{about.setting('data.path')}, scored on {about.setting('data.score_on')}"


def _estimator(about: About, draws: str) -> str:
    sigma = f"sigma {about.setting('scoring.sigma'):g}"
    if about.setting("scoring.estimator") == "closed_form":
        return f"closed form, {about.setting('scoring.curvature_probes')} curvature probes, {sigma}"
    antithetic = " antithetic" if about.setting("scoring.antithetic") else ""
    return f"Monte Carlo, K = {draws}{antithetic} draws, seed {about.setting('scoring.seed')}, {sigma}"


def _scoring(about: About, draws: str) -> dict[str, str]:
    statistic = {"mean_abs": "E|Δ| (mean_abs)", "abs_mean": "|E Δ| (abs_mean)"}
    return {
        "Data": _data(about),
        "Estimator": _estimator(about, draws),
        "MRD is": statistic.get(about.setting("scoring.statistic"), ""),
        "Parameters": about.setting("scoring.parameters"),
    }


def _unlearning(about: About, draws: str) -> dict[str, str]:
    rank, workers = about.setting("lora.rank"), about.setting("ray.workers")
    return {
        "Forget set": _data(about),
        "Retain set": about.setting("retain.path") or "none",
        "Method": f"{about.setting('unlearning.method')}, weighting {about.setting('unlearning.weighting')}, "
        f"learning rate {about.setting('unlearning.learning_rate'):g}, "
        f"batches of {about.setting('unlearning.batch_size')}",
        "Weights": f"LoRA of rank {rank}" if rank else "all",
        "Scores": "" if about.setting("unlearning.weighting") == "uniform" else _estimator(about, draws),
        "Workers": f"{workers or 'one per GPU'}, ZeRO stage {about.setting('deepspeed.zero_stage')}",
    }


def _sets(about: About) -> dict[str, str]:
    sets = about.setting("evaluation.sets") or {}
    return {"Sets": "; ".join(f"{name}: {evaluated['path']}" for name, evaluated in sets.items())}
