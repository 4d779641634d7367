"""The forget set under the live, possibly sharded weights: its MRD, its likelihoods. Each rank takes its share.

Micro-batches are those of `mrd-ray score`, so that the numbers are the same. All ranks must call these functions, and
make the same number of forwards in them.
"""

import numpy as np
import pyarrow as pa

from mrd_ray.config import ScoringSettings
from mrd_ray.data.micro_batches import Layout, lay_out, lengths
from mrd_ray.models.load import rope_switch
from mrd_ray.mrd.likelihood import Likelihood, TokenMeasures, sum_log_probs
from mrd_ray.scoring.estimators import estimator_of
from mrd_ray.scoring.result import RESULT_SCHEMA
from mrd_ray.scoring.table import scores_table
from mrd_ray.scoring.units import first_draws
from mrd_ray.unlearning.engine import Engine
from mrd_ray.workers.memory import Sample, collate


def score_in_place(engine: Engine, samples: pa.Table, scoring: ScoringSettings) -> pa.Table:
    """Scores of the samples, as `mrd-ray score` would give for a checkpoint of these weights, which stay as they are.

    Args:
        samples: of data.samples.SCHEMA, sorted by sample_id.

    Raises:
        UserError: on every rank; the weights' precision cannot carry sigma, or torch cannot differentiate the model.
    """
    layout = lay_out(lengths(samples), scoring.micro_batch_tokens, rope_switch(engine.model.config))
    trial = _rows(samples, layout, 0, few=4)
    shards = engine.shards if engine.stage == 3 else None
    engine.settle()
    estimator = engine.ranks.agree(lambda: estimator_of(engine.model, scoring, trial, shards))
    try:
        mine = [
            row for turn, i in enumerate(engine.ranks.deal(len(layout))) for row in _rows(samples, layout, i, turn=turn)
        ]
        found = engine.ranks.gather(estimator(mine, first_draws(scoring)))
    finally:
        estimator.restore()
        engine.settle()
    results = list({result["sample_id"]: result for result in found}.values())  # the last may have been dealt twice
    row = {"unit_id": "in place", "precision": estimator.precision, "checked": estimator.checked, "samples": results}
    return scores_table(samples, np.arange(len(samples)), [(0, pa.Table.from_pylist([row], RESULT_SCHEMA))], scoring)


def likelihoods(engine: Engine, samples: pa.Table, micro_batch_tokens: int) -> list[tuple[float, float]]:
    """log p of the scored tokens (nats), and the share of them that are the model's likeliest (MA), of each sample.

    MA(x) = sum_t 1{argmax p(. | x_<t) = x_t} / T  (Tirumala et al., 2022), over the scored tokens.
    """
    layout = lay_out(lengths(samples), micro_batch_tokens, rope_switch(engine.model.config))
    engine.settle()
    likelihood = Likelihood(engine.model)
    mine: list[tuple[str, float, float]] = []
    for i in engine.ranks.deal(len(layout)):
        rows = _rows(samples, layout, i)
        batch = collate(rows, engine.model.device)
        measures = TokenMeasures(batch)
        log_probs = sum_log_probs(likelihood.log_neg_log_probs(batch, measures), batch.scored).tolist()
        accuracy = measures.means()["memorization_accuracy"]
        mine += [(row["sample_id"], p, a) for row, p, a in zip(rows, log_probs, accuracy, strict=True)]
    engine.settle()
    found = {sample_id: (p, a) for sample_id, p, a in engine.ranks.gather(mine)}
    return [found[sample_id] for sample_id in samples["sample_id"].to_pylist()]


def _rows(samples: pa.Table, layout: Layout, i: int, turn: int = 0, few: int = 0) -> list[Sample]:
    """Samples of micro-batch i, said to be of micro-batch `turn`; or a few samples of all."""
    indices = layout.few(few) if few else layout.samples(i)
    rows = samples.select(["sample_id", "token_ids", "scored"]).take(indices)
    return rows.add_column(0, "micro_batch", pa.array([turn] * len(rows), pa.int64())).to_pylist()
