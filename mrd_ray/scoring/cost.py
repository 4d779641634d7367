"""What scoring costs, in forwards of one token and in FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from mrd_ray.config import ScoringSettings
from mrd_ray.data.micro_batches import Layout
from mrd_ray.models.load import rope_switch
from mrd_ray.scoring.units import DRAW_TOKENS, Unit
from mrd_ray.workers.pool import Pool

# Cautious sustained float32 rates. They only decide how work is cut, and never affect a score.
CPU_TFLOPS_PER_THREAD, GPU_TFLOPS = 0.03, 15.0


@dataclass(frozen=True)
class ModelCost:
    """What a model's architecture says about cost.

    parameters: number of weights. flops_per_token: of a forward, without attention over the context. rope_switch: see
    `models.load.rope_switch`.
    """

    parameters: int
    flops_per_token: int
    rope_switch: int | None = None

    @classmethod
    def of(cls, skeleton: PreTrainedModel) -> "ModelCost":
        """Count a model's parameters; its weights need not be loaded (`models.load.skeleton`)."""
        parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        tied = skeleton.config.get_text_config().tie_word_embeddings
        embedding: Any = skeleton.get_input_embeddings()
        looked_up = 0 if tied else embedding.weight.numel()
        return cls(parameters, 2 * (parameters - looked_up), rope_switch(skeleton.config))


def forwards_per_token(scoring: ScoringSettings) -> float:
    """The cost of a token in one draw, or in the closed form, in units of a plain forward."""
    if scoring.estimator == "monte_carlo":
        return (2.0 if scoring.paired else 1.0) + (4.0 if scoring.controlled else 0.0)
    passes = 2 if "log_prob_gradient_norm" in scoring.measures else 1
    return 3.0 * passes + 9.0 * scoring.curvature_probes


def assumed_tflops(pool: Pool) -> float:
    """A cautious rate of one actor, in TFLOP/s, if none was measured. Of several GPUs, only one works at a time."""
    return GPU_TFLOPS * min(1.0, pool.gpus) if pool.gpus else CPU_TFLOPS_PER_THREAD * pool.threads


def gpu_advice(pool: Pool, scoring: ScoringSettings) -> str | None:
    """A setting that a person may want to change on these devices, or None."""
    if not pool.gpus or scoring.micro_batch_tokens >= 4096:
        return None
    return (
        f"scoring.micro_batch_tokens: {scoring.micro_batch_tokens} leaves a GPU idle most of the time. Set 16384 for a "
        "GPU, with a new run.dir because this changes the last digits of scores"
    )


def token_forwards(layout: Layout, units: Sequence[Unit]) -> int:
    """Work of `units` in forwards of one token, with the cost of perturbations in the same measure."""
    return sum(
        (int(layout.padded_tokens[unit.first_micro_batch : unit.stop_micro_batch].sum()) + DRAW_TOKENS)
        * (unit.stop_draw - unit.first_draw)
        for unit in units
    )
