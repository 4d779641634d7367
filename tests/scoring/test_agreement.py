"""The closed form is what Algorithm 1 estimates: real models, real text."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mrd_ray import DataSettings, ModelSettings
from mrd_ray.data import samples as samples_table
from mrd_ray.data.micro_batches import lay_out, lengths
from mrd_ray.data.tokens import Limits
from mrd_ray.models import load
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.curvature import TraceEstimator
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import Moments, draw_deltas, noise_key
from mrd_ray.mrd.perturb import Replica
from mrd_ray.mrd.scores import closed_form_score, monte_carlo_score


class Scored:
    """A model and the first samples of a forget set, in the engine's micro-batches."""

    def __init__(self, model_dir: Path, data: Path, count: int, dtype: str = "float32") -> None:
        data_config = DataSettings(path=str(data), max_samples=count)
        table = samples_table.build(data_config, load.load_tokenizer(ModelSettings(path=str(model_dir))), Limits(512))
        layout = lay_out(lengths(table), 1024)
        rows = table.to_pylist()
        self.model = load.load_model(ModelSettings(path=str(model_dir), dtype=dtype), torch.device("cpu"))
        self.batches = [
            MicroBatch.collate([r["token_ids"] for r in batch], [r["scored"] for r in batch], self.model.device)
            for batch in ([rows[j] for j in layout.samples(i)] for i in range(len(layout)))
        ]

    def gradient_norms(self) -> np.ndarray:
        norms = GradientNorms(self.model)
        return torch.cat([norms(batch)[1] for batch in self.batches]).sqrt().numpy()

    def probes(self, count: int) -> list[list[float]]:
        traces = TraceEstimator(self.model)
        drawn = []
        for k in range(count):
            traces.aim(noise_key(9, k))
            drawn.append(torch.cat([traces.probe(batch) for batch in self.batches]))
        return torch.stack(drawn, 1).tolist()

    def monte_carlo(self, sigma: float, num_draws: int):
        replica, likelihood = Replica(self.model), Likelihood(self.model)
        theta = [likelihood.log_neg_log_probs(batch) for batch in self.batches]
        deltas = draw_deltas(replica, likelihood, self.batches, theta, sigma, 0, range(num_draws))
        replica.restore()
        return [monte_carlo_score(Moments.of(of_sample)) for of_sample in torch.cat(deltas).tolist()]


@pytest.fixture(scope="module")
def stories(stories_dir, tofu_dir):
    return Scored(stories_dir, tofu_dir / "forget10.json", 40)


def within(exact: list[float], sampled) -> np.ndarray:
    """Which samples' Monte Carlo scores are within three of their standard errors of the exact ones."""
    return np.array([abs(s.mean_abs - e) <= 3 * s.mean_abs_se for e, s in zip(exact, sampled, strict=True)])


def test_small_sigma(stories_dir, tofu_dir):
    few = Scored(stories_dir, tofu_dir / "forget10.json", 10)
    exact = [closed_form_score(1e-5, norm, []).mean_abs for norm in few.gradient_norms()]
    assert within(exact, few.monte_carlo(1e-5, 200)).mean() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [1e-6, 1e-5, 1e-4])
def test_every_small_sigma(stories, sigma):
    exact = [closed_form_score(sigma, norm, []).mean_abs for norm in stories.gradient_norms()]
    assert within(exact, stories.monte_carlo(sigma, 200)).mean() >= 0.95


@pytest.mark.slow
def test_large_sigma_needs_the_curvature_and_nonlinearity_says_so(stories):
    norms, probes = stories.gradient_norms(), stories.probes(32)
    sampled = stories.monte_carlo(1e-3, 200)
    bent = [closed_form_score(1e-3, norm, own) for norm, own in zip(norms, probes, strict=True)]
    flat = [closed_form_score(1e-3, norm, []).mean_abs for norm in norms]
    assert within([score.mean_abs for score in bent], sampled).mean() >= 0.95
    wrong = ~within(flat, sampled)
    nonlinearity = np.array([score.nonlinearity for score in bent])
    assert wrong.any()
    assert (nonlinearity[wrong] > 0.3).all()


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The demo's base model, which `make demo` unpacks into its cache."""
    folder = Path(os.environ.get("MRD_RAY_CACHE", "~/.cache/mrd_ray")).expanduser() / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; run `make demo` once")
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Eight of the demo's samples."""
    from mrd_ray.demo import demo

    file = tmp_path_factory.mktemp("few") / "few.jsonl"
    rows = [json.loads(line) for line in demo.FORGET.read_text().splitlines()]
    file.write_text("\n".join(json.dumps(row) for row in rows[:40:5]) + "\n")
    return file


@pytest.mark.slow
def test_smollm2(smollm2, few):
    scored = Scored(smollm2, few, 8)
    norms = scored.gradient_norms()
    exact = [closed_form_score(1e-5, norm, []).mean_abs for norm in norms]
    assert within(exact, scored.monte_carlo(1e-5, 32)).all()


@pytest.mark.slow
def test_bfloat16_ranks_as_float32(smollm2, tofu_dir):
    from scipy import stats

    wide = Scored(smollm2, tofu_dir / "forget10.json", 100).gradient_norms()
    narrow = Scored(smollm2, tofu_dir / "forget10.json", 100, "bfloat16").gradient_norms()
    assert stats.spearmanr(wide, narrow).statistic >= 0.99
