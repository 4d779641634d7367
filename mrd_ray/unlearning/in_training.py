"""Evaluation of the live model during unlearning, on its possibly sharded weights."""

from dataclasses import dataclass

import pyarrow as pa

from mrd_ray.config import UnlearnConfig
from mrd_ray.evaluation import sets, table
from mrd_ray.evaluation.measure import Measurer
from mrd_ray.models import load
from mrd_ray.unlearning.engine import Engine


@dataclass(frozen=True)
class InTraining:
    """Lines of all sets (table.SCHEMA), from the live weights of a training run, which it does not change."""

    config: UnlearnConfig
    tables: dict[str, pa.Table]

    def __call__(self, engine: Engine) -> pa.Table:
        """All ranks must call this. `mrd-ray evaluate` returns the same numbers, from the same batches."""
        evaluation = self.config.evaluation
        engine.settle()
        measurer = Measurer(
            engine.model, load.load_tokenizer(self.config.model), evaluation, engine.ranks, synced=engine.stage == 3
        )
        lines = []
        for name, rows in self.tables.items():
            records = {record["sample_id"]: record for _, unit in sets.units(name, rows) for record in measurer(unit)}
            lines.append(table.lines(name, evaluation.sets[name], evaluation, rows, records))
        engine.settle()
        return pa.concat_tables(lines)
