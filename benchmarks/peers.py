"""Compares the cost of the ways to score that people write today with ours, on the same samples and model.

Only ratios within one run are meaningful, on a machine that does nothing else at the time. For CPUs.
"""

import sys
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.common import PAPER_DRAWS, Batches, stopwatch
from benchmarks.figures import Figure, Results, ratios
from mrd_ray import ScoreConfig, ScoringSettings
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import delta, noise_key
from mrd_ray.mrd.perturb import Replica
from mrd_ray.workers.memory import activation_bytes, collate

PROJECTIONS = "proj"  # in the names of the layers for which Opacus has a rule; it has none for a Llama's norms
ALGORITHM_1, PERTURB_ONCE, MONTE_CARLO = "Algorithm 1, line by line", "perturb once, plain loop", "Monte Carlo"
AUTOGRAD, OPACUS = "autograd, sample by sample", "Opacus, ghost norms of projections"
CLOSED, CLOSED_PROJECTIONS = "closed form", "closed form of projections"


def main(
    model: str,
    data: str,
    out: str = "benchmarks/results",
    max_samples: int = 400,
    few: int = 96,
    repeats: int = 3,
    draws: int = PAPER_DRAWS,
    micro_batch_tokens: int = 512,
    batch_size: int = 8,
    sigma: float = 1e-5,
) -> None:
    """Benchmark the time of each way per sample, on one thread. Needs opacus.

    Each repeat takes another part of the samples, with all lengths. Times are per token, like the cost of forwards and
    backwards. Ways that perturb or differentiate for each sample separately are too slow for all samples.

    Args:
        model: directory or hub id of a Llama; the demo keeps one under ~/.cache/mrd_ray.
        data: forget set, for example TOFU's ../shared/data/tofu/forget10.json.
        out: folder of the JSON file.
        max_samples: rows of the forget set.
        few: samples for the ways that take one at a time; with 24, their ratios differed by a sixth from run to run.
        repeats: parts of the samples; the ways take turns.
        draws: K for the costs; each way is timed for one draw, and once unperturbed.
        micro_batch_tokens: tokens per forward of ours, padding included.
        batch_size: samples per forward of the plain loop, in the file's order.
        sigma: standard deviation of the parameter noise.
    """
    results = Results("peers", locals(), out)
    torch.set_num_threads(1)
    scoring = {"sigma": sigma, "micro_batch_tokens": micro_batch_tokens}
    tree = {"model": {"path": model}, "data": {"path": data, "max_samples": max_samples}, "scoring": scoring}
    work = Batches(ScoreConfig.model_validate(tree | {"run": {"dir": "unused"}}))
    ways = Ways(work, sigma, draws)
    evenly = [work.order[round(i)] for i in np.linspace(0, len(work.order) - 1, min(few, len(work.order)))]
    one_by_one = [collate([work.rows[i]], work.model.device) for i in evenly]
    everyone = [work.rows[i] for i in sorted(work.order)]
    in_order = [collate(everyone[i : i + batch_size], work.model.device) for i in range(0, len(everyone), batch_size)]
    turns: dict[str, tuple[Callable[[Sequence[MicroBatch]], float], Sequence[MicroBatch]]] = {
        ALGORITHM_1: (ways.algorithm_1, one_by_one),
        PERTURB_ONCE: (ways.perturb_once, in_order),
        MONTE_CARLO: (ways.monte_carlo, work.batches),
        AUTOGRAD: (ways.autograd, one_by_one),
        OPACUS: (ways.opacus, work.batches),
        CLOSED_PROJECTIONS: (ways.closed_form_of_projections, work.batches),
        CLOSED: (ways.closed_form, work.batches),
    }
    results.keep("size", work.size)
    results.keep(
        "relative difference of norms", {way: ways.difference(way, work.batches[0]) for way in (AUTOGRAD, OPACUS)}
    )
    for run, batches in turns.values():
        run(batches[:1])  # warms up
    seconds: dict[str, list[float]] = {way: [] for way in turns}
    for repeat in range(repeats):
        for way, (run, batches) in turns.items():
            part = batches[repeat::repeats]
            seconds[way].append(run(part) / sum(int(_real(batch).sum()) for batch in part))
        results.keep("seconds per token", seconds)
    results.show(figures(results.raw, draws))


class Ways:
    """Seconds that each way takes for all of the given batches; with noise, for `draws` draws, one of them timed."""

    def __init__(self, work: Batches, sigma: float, draws: int) -> None:
        self._model, self._sigma, self._draws = work.model, sigma, draws
        self._share = len(work.order)  # samples that share a perturbation
        self._kept = {name: parameter.detach().clone() for name, parameter in work.model.named_parameters()}
        self._replica, self._likelihood = Replica(work.model), Likelihood(work.model)
        projections = [name for name, _ in work.model.named_parameters() if PROJECTIONS in name]
        budget = activation_bytes(work.model, ScoringSettings(estimator="closed_form"))  # like an actor
        self._norms = GradientNorms(work.model, None, budget)
        self._norms_of_projections = GradientNorms(work.model, projections, budget)

    @torch.no_grad()
    def algorithm_1(self, batches: Sequence[MicroBatch]) -> float:
        """As one would first write it: a perturbation for each sample, and r = (P - P') / P taken literally."""
        total = 0.0
        for batch in batches:
            self._replica.restore()
            lap = stopwatch()
            p = self._log_probs(batch)
            theta = lap()
            for parameter in self._model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=self._sigma)
            abs(((p - self._log_probs(batch)) / p)[batch.scored].sum().item())
            for name, parameter in self._model.named_parameters():
                parameter.copy_(self._kept[name])
            total += theta + self._draws * lap()
        return total

    @torch.no_grad()
    def perturb_once(self, batches: Sequence[MicroBatch]) -> float:
        """Batches as they come, a mask for their padding, all logits; one perturbation for all samples."""
        self._replica.restore()
        lap = stopwatch()
        p = [self._log_probs(batch, _real(batch)) for batch in batches]
        theta = lap()
        for parameter in self._model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=self._sigma)
        noise = lap()
        for before, batch in zip(p, batches, strict=True):
            moved = (before - self._log_probs(batch, _real(batch))) / before
            torch.where(batch.scored, moved, 0.0).sum(1).tolist()
        forwards = lap()
        for name, parameter in self._model.named_parameters():
            parameter.copy_(self._kept[name])
        return theta + self._draws * (forwards + self._of_shared(noise + lap(), batches))

    def monte_carlo(self, batches: Sequence[MicroBatch]) -> float:
        """The engine's arithmetic."""
        self._replica.restore()
        lap = stopwatch()
        theta = [self._likelihood.log_neg_log_probs(batch) for batch in batches]
        unperturbed = lap()
        self._replica.perturb(self._sigma, noise_key(0, 0))
        noise = lap()
        for before, batch in zip(theta, batches, strict=True):
            delta(before, self._likelihood.log_neg_log_probs(batch), batch.scored).tolist()
        return unperturbed + self._draws * (lap() + self._of_shared(noise, batches))

    def autograd(self, batches: Sequence[MicroBatch]) -> float:
        """A backward per sample, and the norm over all parameters' gradients."""
        self._replica.restore()
        lap = stopwatch()
        for batch in batches:
            self._autograd_norm(batch)
        return lap()

    def opacus(self, batches: Sequence[MicroBatch]) -> float:
        """A forward and backward of a batch, for which Opacus computes the norms."""
        self._replica.restore()
        with _Opacus(self._model) as norms:
            lap = stopwatch()
            for batch in batches:
                norms(batch)
            return lap()

    def closed_form(self, batches: Sequence[MicroBatch]) -> float:
        """Ours, over all parameters."""
        return self._closed_form(self._norms, batches)

    def closed_form_of_projections(self, batches: Sequence[MicroBatch]) -> float:
        """Ours, over the layers that Opacus can do."""
        return self._closed_form(self._norms_of_projections, batches)

    def difference(self, way: str, batch: MicroBatch) -> float:
        """The largest relative difference between our norms of the log-likelihood's gradient and theirs."""
        self._replica.restore()
        if way == AUTOGRAD:
            alone = [MicroBatch(batch.token_ids[i : i + 1], batch.scored[i : i + 1]) for i in range(len(batch.scored))]
            theirs, ours = torch.tensor([self._autograd_norm(sample) for sample in alone]), self._norms
        else:
            with _Opacus(self._model) as norms:
                theirs, ours = norms(batch), self._norms_of_projections
        return float((ours(batch, of_log_prob=True)[1].sqrt() / theirs - 1).abs().max())

    def _closed_form(self, norms: GradientNorms, batches: Sequence[MicroBatch]) -> float:
        self._replica.restore()
        lap = stopwatch()
        for batch in batches:
            norms(batch)
        return lap()

    def _of_shared(self, seconds: float, batches: Sequence[MicroBatch]) -> float:
        return seconds * sum(len(batch.scored) for batch in batches) / self._share

    def _log_probs(self, batch: MicroBatch, mask: torch.Tensor | None = None) -> torch.Tensor:
        logits = self._model(batch.token_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, batch.token_ids[:, 1:, None])[..., 0]

    def _autograd_norm(self, batch: MicroBatch) -> float:
        self._model.requires_grad_(True)
        _loss(self._model, batch).backward()
        square = sum(float(p.grad.square().sum()) for p in self._model.parameters() if p.grad is not None)
        self._model.zero_grad(set_to_none=True)
        return square**0.5


class _Opacus:
    """Per-sample gradient norms of the projections by Opacus, which needs training mode; restores the model's mode."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __enter__(self) -> Callable[[MicroBatch], torch.Tensor]:
        try:
            from opacus.grad_sample import GradSampleModuleFastGradientClipping
        except ImportError:
            sys.exit("peers needs opacus: pip install 'mrd-ray[peers]'")

        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(PROJECTIONS in name)
        self._model.train()
        self._wrapped = GradSampleModuleFastGradientClipping(
            self._model, batch_first=True, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
        )

        def norms(batch: MicroBatch) -> torch.Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the first layer's input needs no gradient
                _loss(self._wrapped, batch).backward()
            of_samples: torch.Tensor = self._wrapped.get_norm_sample().clone()
            self._wrapped.zero_grad(set_to_none=True)
            return of_samples

        return norms

    def __exit__(self, *problem: object) -> None:
        self._wrapped.to_standard_module()
        self._model.eval().requires_grad_(True)


def _real(batch: MicroBatch) -> torch.Tensor:
    """The attention mask, int64 [B, T]: everything up to a sample's last scored token."""
    return torch.nn.functional.pad(batch.scored, (1, 0), value=True).flip(1).cummax(1).values.flip(1).long()


def _loss(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    logits = model(input_ids=batch.token_ids, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), batch.token_ids[:, 1:].flatten(), reduction="none")
    return torch.where(batch.scored.flatten(), losses, 0.0).sum()


def figures(raw: dict, draws: int) -> list[Figure]:
    """The times of each way, and ratios with ours."""
    seconds, tokens = raw["seconds per token"], raw["size"]["tokens"] / raw["size"]["samples"]
    k = f", K = {draws}"
    names = {way: way + k * (way in (ALGORITHM_1, PERTURB_ONCE, MONTE_CARLO)) for way in seconds}
    shown = [Figure.of(names[way], [tokens * s for s in laps], "s a sample") for way, laps in seconds.items()]
    differences = raw["relative difference of norms"]
    pairs = [
        (MONTE_CARLO, ALGORITHM_1, 8.0, "one perturbation serves all samples, and their forwards share batches"),
        (MONTE_CARLO, PERTURB_ONCE, 1.0, "no padding to speak of, no mask, and logits that never leave the cache"),
        (CLOSED, ALGORITHM_1, 350.0, "one forward and backward stand for all draws"),
        (CLOSED, MONTE_CARLO, 65.0, "the same"),
        (CLOSED, AUTOGRAD, 2.0, "no parameter's gradient is made, and samples share batches; "
                                f"norms differ by {differences[AUTOGRAD]:.1g}"),
        (CLOSED_PROJECTIONS, OPACUS, 1.0, "the backward makes no gradients of parameters; "
                                          f"norms differ by {differences[OPACUS]:.1g}"),
    ]  # fmt: skip
    shown += [
        Figure.of(
            f"{names[ours]}, over {names[theirs]}",
            ratios(seconds[theirs], seconds[ours]),
            "times as fast",
            why,
            at_least=target,
        )
        for ours, theirs, target, why in pairs
    ]
    return shown
