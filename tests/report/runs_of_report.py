"""Run directories to report on, where making them for real would take too long: the real formats, other numbers."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mrd_ray import UnlearnConfig
from mrd_ray.data import samples
from mrd_ray.scoring import table

HOSTILE = {
    "closing": "</script><img src=x onerror=alert(1)><!-- <script>",
    "control": "nul \x00 bell \x07 escape \x1b[31m",
    "emoji": "family 👨‍👩‍👧‍👦 flag 🏴‍☠️ zalgo z̶̢a̷l̵g̸o",
    "long": "unbroken" * 12_500,
    "quotes": 'She said "it\'s `$5` & \\n more" &amp; &lt;b&gt;',
    "right-to-left": "\u202eevil \u05e9\u05dc\u05d5\u05dd \u061c \u2067 isolate without end",
    "script": "<script>document.title = 'hacked'</script>",
    "template": "{{ 7 * 7 }} {% raw %} {{ config }}",
}
QUOTED = "a value that an error quotes"
LOG = [
    {"event": "refresh", "step": 0, "mrd_median": 0.0066, "seconds": 8.2},
    {"event": "evaluation", "step": 0, "forget_log_prob": -8.1736, "forget_memorization_accuracy": 0.9222,
     "forget_extraction_likelihood": 0.7392, "retain_perplexity": 1.2386, "seconds": 30.5},
    *({"event": "step", "step": step, "forget_loss": 14.0 - step, "retain_loss": 0.2 + step / 40,
       "grad_norm": 60.0, "tokens": 570, "seconds": 7.0} for step in range(1, 6)),
    {"event": "refresh", "step": 5, "mrd_median": 0.0068, "seconds": 7.6},
    *({"event": "step", "step": step, "forget_loss": 14.0 - step, "retain_loss": 0.2 + step / 40,
       "grad_norm": 60.0, "tokens": 570, "seconds": 7.0} for step in range(6, 11)),
    {"event": "evaluation", "step": 10, "forget_log_prob": -44.457, "forget_memorization_accuracy": 0.8594,
     "forget_extraction_likelihood": None, "retain_perplexity": 1.5233, "seconds": 32.3},
    {"event": "stop", "step": 10, "reason": "the last of 10 steps"},
]  # fmt: skip


def manifest(run: Path, like: Path, config: dict | None = None, **more: object) -> None:
    """A manifest as that of another run."""
    found = json.loads((like / "manifest.json").read_text()) | more
    if config is not None:
        found["invocations"][-1]["config"] = config
    run.mkdir(parents=True, exist_ok=True)
    (run / "manifest.json").write_text(json.dumps(found))


def unlearn_run(
    run: Path,
    refreshes: dict[int, Path],
    log: list[dict],
    *,
    ended: bool = True,
    evaluations: dict[int, Path] | None = None,
) -> None:
    """An unlearn run whose refreshes found the scores of these score runs."""
    first = next(iter(refreshes.values()))
    data = json.loads((first / "manifest.json").read_text())["invocations"][-1]["config"]["data"]
    settings = UnlearnConfig(model={"path": "m"}, data=data, run={"dir": str(run)}, retain={"path": "r.jsonl"})
    config = settings.model_dump(mode="json")
    outcome = {"outcome": {"reason": log[-1].get("reason"), "step": log[-1]["step"], "config": config}} if ended else {}
    manifest(run, first, config, **outcome)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"of": 10, **line}) + "\n" for line in log))
    (run / "scores").mkdir()
    for step, scored in refreshes.items():
        (run / "scores" / f"step-{step:06d}.parquet").write_bytes((scored / "scores.parquet").read_bytes())
    (run / "evaluations").mkdir()
    for step, evaluated in (evaluations or {}).items():
        (run / "evaluations" / f"step-{step:06d}.parquet").write_bytes((evaluated / "evaluation.parquet").read_bytes())


def score_run(run: Path, like: Path, n: int, words: int) -> None:
    """A finished Monte Carlo run of n samples with so many words each; every 1000th has no score."""
    manifest(run, like)
    rng = np.random.default_rng(0)
    failed = np.arange(n) % 1000 == 999
    mrd = np.where(failed, np.nan, rng.lognormal(-5, 0.5, n))
    columns = {
        "sample_id": [f"s-{i:06d}" for i in range(n)],
        "index": np.arange(n), "file": [None] * n, "row": np.arange(1, n + 1),
        "mrd": mrd, "mrd_se": mrd * 0.05, "mean_abs": mrd, "abs_mean": mrd / 9,
        "delta_mean": mrd / 9, "delta_std": mrd * 1.25, "nonlinearity": np.full(n, np.nan),
        "num_draws": np.where(failed, 0, 200), "sigma": np.full(n, 1e-5), "estimator": ["monte_carlo"] * n,
        "low_precision": np.zeros(n, bool), "num_tokens": rng.integers(5, 90, n),
        "log_prob": np.where(failed, np.nan, -rng.gamma(3, 4, n)), "weight": mrd / np.nansum(mrd),
        "error": np.where(failed, "column 'text' is empty", None), "mrd_eighths": [None] * n,
    }  # fmt: skip
    arrays = [pa.array(columns[field.name], field.type, from_pandas=True) for field in table.SCHEMA]
    pq.write_table(pa.Table.from_arrays(arrays, schema=table.SCHEMA), run / "scores.parquet")
    vocabulary = np.array([f"word{i}" for i in range(5000)])
    columns["text"] = [" ".join(vocabulary[row]) for row in rng.integers(0, 5000, (n, words))]
    arrays = [pa.array(columns.get(field.name, [None] * n), field.type) for field in samples.SCHEMA]
    pq.write_table(pa.Table.from_arrays(arrays, schema=samples.SCHEMA), run / "samples.parquet")
