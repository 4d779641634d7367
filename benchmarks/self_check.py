"""The closed form's self-check: what it costs, and whether it finds the samples whose experts sigma can change."""

import time

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from benchmarks.common import Batches
from benchmarks.figures import Figure, Results
from mrd_ray import ScoreConfig, ScoringSettings
from mrd_ray.mrd.choices import Choices, Gaps
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import delta, noise_key
from mrd_ray.mrd.perturb import Replica
from mrd_ray.scoring.estimators import estimator_of
from mrd_ray.workers.memory import Sample

_SIGMA = 1e-5
_JUMP, _FAR = 5.5, 4.0  # in s; in standard deviations of a gap's change by sigma


def main(
    model: str,
    data: str,
    max_samples: int = 400,
    repeats: int = 3,
    planted: int = 200,
    draws: int = 200,
    out: str = "benchmarks/results",
) -> None:
    """Benchmark the check of a smooth model before scoring, and the check of each sample of a mixture of experts.

    Args:
        model: directory of a model.
        data: forget set.
        max_samples: rows of the forget set; the check is compared with the cost of scoring them.
        repeats: of both, check and scoring.
        planted: number of random samples for which a small random Mixtral changes an expert in some of the draws.
        draws: number of draws to find these samples.
        out: folder of the JSON file.
    """
    results = Results("self_check", locals(), out)
    torch.set_num_threads(1)
    seconds = cost(model, data, max_samples, repeats)
    results.keep("seconds", seconds)
    counts = flips(planted, draws)
    results.keep("flips", counts)
    shares = [100 * check / whole for check, whole in zip(seconds["check"], seconds["scoring"], strict=True)]
    results.show(
        [
            Figure.of("cost of the check", shares, "%", f"of scoring {max_samples} samples, one thread", at_most=3.0),
            Figure("samples that flip an expert, and are not marked", counts["missed"], detail=f"of {counts['flip']}",
                   at_most=0.0),
            Figure("samples that no flip is near to, and are marked", 100 * counts["others marked"] / counts["others"],
                   "%", f"of {counts['others']}", at_most=5.0),
        ]
    )  # fmt: skip


def cost(model: str, data: str, max_samples: int, repeats: int) -> dict[str, list[float]]:
    """Seconds for making an estimator with the check, minus those without it; seconds for scoring."""
    tree: dict[str, object] = {"model": {"path": model}, "data": {"path": data, "max_samples": max_samples}}
    work = Batches(ScoreConfig.model_validate(tree | {"run": {"dir": "unused"}}))
    samples: list[Sample] = [
        {"micro_batch": i, "sample_id": f"{i}-{j}", "token_ids": tokens.tolist(), "scored": [False, *scored.tolist()]}
        for i, batch in enumerate(work.batches)
        for j, (tokens, scored) in enumerate(zip(batch.token_ids, batch.scored, strict=True))
    ]
    trial = samples[len(samples) // 4 :][:2]
    times: dict[str, list[float]] = {"check": [], "scoring": []}
    for _ in range(repeats):
        made = []
        for verify in (0, 2):
            began = time.perf_counter()
            scoring = ScoringSettings(estimator="closed_form", verify_draws=verify)
            estimator = estimator_of(work.model, scoring, trial)
            made.append(time.perf_counter() - began)
        times["check"].append(made[1] - made[0])
        began = time.perf_counter()
        estimator(samples, range(1))
        times["scoring"].append(time.perf_counter() - began)
    return times


def mixture() -> PreTrainedModel:
    """A small random Mixtral whose routers are sure of most tokens, and whose experts differ."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=61, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
        ),
        trust_remote_code=False,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(10.0 if "experts" in name else 30.0 if "gate" in name else 1.0)
    return model


def flips(planted: int, draws: int) -> dict[str, int]:
    """Counts samples that flip an expert in some draw, how many are missed; samples far from it, how many marked."""
    model, counts = mixture(), dict.fromkeys(("flip", "missed", "others", "others marked"), 0)
    samples = torch.randint(1, 61, (64 * planted, 60), generator=torch.Generator().manual_seed(1))
    for tokens in samples.split(64):
        batch = MicroBatch(tokens, torch.ones(len(tokens), tokens.shape[1] - 1, dtype=torch.bool))
        jumped, others = drawn(model, batch, draws)
        rows: list[Sample] = [
            {"micro_batch": 0, "sample_id": str(i), "token_ids": row, "scored": [False] + [True] * 59}
            for i, row in enumerate(tokens.tolist())
        ]
        scoring = ScoringSettings(estimator="closed_form", sigma=_SIGMA, allow_slow_parameters=True)
        results = estimator_of(model, scoring, rows[:2])(rows, range(1))
        marked = torch.tensor([result["doubt"] is not None for result in results])
        counts["flip"] += int(jumped.sum())
        counts["missed"] += int((jumped & ~marked).sum())
        counts["others"] += int(others.sum())
        counts["others marked"] += int((others & marked).sum())
        if counts["flip"] >= planted:
            break
    return counts


def drawn(model: PreTrainedModel, batch: MicroBatch, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether Delta jumped in some draw, and whether every gap is too large to flip: bool [B]."""
    likelihood, replica = Likelihood(model), Replica(model)
    theta, at_theta = heard(likelihood, batch)
    s = _SIGMA * GradientNorms(model)(batch)[1].sqrt()
    jumped = torch.zeros(len(s), dtype=torch.bool)
    squares = {turn: torch.zeros_like(gap) for turn, gap in at_theta.items()}
    for k in range(draws):
        replica.perturb(_SIGMA, noise_key(7, k))
        values, gaps = heard(likelihood, batch)
        jumped |= delta(theta, values, batch.scored).abs() > _JUMP * s
        for turn in squares:
            squares[turn] += (gaps[turn] - at_theta[turn]).square()
    replica.restore()
    near = [
        (gap <= _FAR * (squares[turn] / draws).sqrt()).view(len(s), batch.token_ids.shape[1], -1)[:, :-1].flatten(1)
        for turn, gap in at_theta.items()
    ]
    return jumped, ~torch.cat(near, 1).any(1)


def heard(likelihood: Likelihood, batch: MicroBatch) -> tuple[torch.Tensor, Gaps]:
    """log(-P_t), and the gaps of the routers' choices."""
    with Choices(positions=batch.token_ids.numel()) as choices:
        return likelihood.log_neg_log_probs(batch), choices.gaps()
