"""What the tests of the report share: runs of each kind, on texts that mean harm."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from runs_of_report import HOSTILE, LOG, QUOTED, unlearn_run
from transformers import AutoModelForCausalLM

from mrd_ray import EvaluateConfig, ReportConfig, ScoreConfig, evaluate, score, write_report


@pytest.fixture(scope="session")
def pairs(qa_file) -> list[tuple[str, str]]:
    """Prompts and responses."""
    rows = map(json.loads, qa_file.read_text().splitlines())
    return [(row["prompt"], row["response"]) for row in rows]


@pytest.fixture(scope="session")
def hostile_file(tmp_path_factory, pairs) -> Path:
    """Texts that mean harm, prompts with their responses, and two rows that cannot be scored."""
    file = tmp_path_factory.mktemp("hostile") / "hostile.jsonl"
    rows = [{"id": name, "text": text} for name, text in HOSTILE.items()]
    rows += [{"id": f"qa-{i:02d}", "text": f"{prompt} {response}"} for i, (prompt, response) in enumerate(pairs)]
    rows += [{"id": "empty", "text": ""}, {"id": "listed", "text": [QUOTED]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="session")
def runs(tmp_path_factory, ray_cluster, tiny_model_dir, hostile_file, qa_file) -> dict[str, Path]:
    """Real score and evaluate runs, two of each, and an unlearn run. Tests that change one copy it first."""
    folder = tmp_path_factory.mktemp("runs")
    data = {"path": str(hostile_file), "truncate": True, "max_tokens": 64}
    for name, scoring in {
        "exact": {"estimator": "closed_form", "measures": ["mean_log_prob", "entropy", "memorization_accuracy"]},
        "drawn": {"num_draws": 6},
    }.items():
        run = {"dir": str(folder / name)}
        score(ScoreConfig(model={"path": str(tiny_model_dir)}, data=data, run=run, scoring=scoring, ray={"actors": 1}))
    unlearn_run(folder / "unlearned", {0: folder / "exact", 5: folder / "drawn"}, LOG)
    other = folder / "other-model"
    shutil.copytree(tiny_model_dir, other)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(other)
    AutoModelForCausalLM.from_config(model.config).save_pretrained(other)
    metrics = ["probability", "rouge_l", "memorization_accuracy"]
    sets = {"forget": {"path": str(qa_file), "metrics": metrics, "max_samples": 6}}
    sets["kept"] = {"path": str(qa_file), "metrics": metrics}
    for name, path in {"before": tiny_model_dir, "after": other}.items():
        evaluation = {"sets": sets, "forget": "forget", "max_new_tokens": 8}
        run = {"dir": str(folder / name)}
        evaluate(EvaluateConfig(model={"path": str(path)}, evaluation=evaluation, run=run, ray={"actors": 1}))
    return {name: folder / name for name in ("exact", "drawn", "unlearned", "before", "after")}


@pytest.fixture(scope="session")
def report(runs, tmp_path_factory) -> Path:
    """A page of all runs."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    write_report(ReportConfig(runs=[str(run) for run in runs.values()], out=str(out)))
    return out


@pytest.fixture(scope="module")
def chromium(runs):
    """A headless browser. MRD_RAY_REQUIRE_BROWSER makes its absence a failure.

    Its driver holds this thread's event loop: Ray has done its work before (runs), and no other module sees it.
    """
    binary = shutil.which("chromium")
    if binary is None:
        (pytest.fail if os.environ.get("MRD_RAY_REQUIRE_BROWSER") else pytest.skip)("chromium is not installed")
    from playwright.sync_api import sync_playwright

    quiet = ["background-networking", "component-update", "sync", "gpu", "quic"]
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{feature}" for feature in quiet)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=flags)
        yield browser
        browser.close()
