"""What was run and on what: from manifests and settings, in the words of the page."""

import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from mrd_ray.report.read import About, Run, Scores


@dataclass(frozen=True)
class Facts:
    """A run's name, its command, (term, description) pairs, more of them that fewer ask for, settings as YAML."""

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
        **{"score": _scoring, "unlearn": _unlearning, "evaluate": _sets}[about.command](about),
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


def _ends(invocations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [invocations[0], invocations[-1]]


def _model(about: About) -> str:
    revision = about.setting("model.revision")
    return f"{about.setting('model.path')}{f' at {revision}' if revision else ''}, {about.setting('model.dtype')}"


def _data(about: About) -> str:
    return f"{about.setting('data.path')}, scored on {about.setting('data.score_on')}"


def _estimator(about: About) -> str:
    sigma = f"sigma {about.setting('scoring.sigma'):g}"
    if about.setting("scoring.estimator") == "closed_form":
        return f"closed form, {about.setting('scoring.curvature_probes')} curvature probes, {sigma}"
    antithetic = " antithetic" if about.setting("scoring.antithetic") else ""
    draws, seed = about.setting("scoring.num_draws"), about.setting("scoring.seed")
    return f"Monte Carlo, K = {draws}{antithetic} draws, seed {seed}, {sigma}"


def _scoring(about: About) -> dict[str, str]:
    statistic = {"mean_abs": "E|Δ| (mean_abs)", "abs_mean": "|E Δ| (abs_mean)"}
    return {
        "Data": _data(about),
        "Estimator": _estimator(about),
        "MRD is": statistic.get(about.setting("scoring.statistic"), ""),
        "Parameters": about.setting("scoring.parameters"),
    }


def _unlearning(about: About) -> dict[str, str]:
    rank, workers = about.setting("lora.rank"), about.setting("ray.workers")
    return {
        "Forget set": _data(about),
        "Retain set": about.setting("retain.path") or "none",
        "Method": f"{about.setting('unlearning.method')}, weighting {about.setting('unlearning.weighting')}, "
        f"learning rate {about.setting('unlearning.learning_rate'):g}, "
        f"batches of {about.setting('unlearning.batch_size')}",
        "Weights": f"LoRA of rank {rank}" if rank else "all",
        "Scores": _estimator(about),
        "Workers": f"{workers or 'one per GPU'}, ZeRO stage {about.setting('deepspeed.zero_stage')}",
    }


def _sets(about: About) -> dict[str, str]:
    sets = about.setting("evaluation.sets") or {}
    return {"Sets": "; ".join(f"{name}: {evaluated['path']}" for name, evaluated in sets.items())}
