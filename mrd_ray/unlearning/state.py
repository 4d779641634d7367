"""What a resumed run starts from, besides the engine."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, JsonValue, NonNegativeInt

from mrd_ray.runs.directory import parsed_json, parsed_table
from mrd_ray.scoring.table import REQUIRED, SCHEMA
from mrd_ray.unlearning.log import Line, current
from mrd_ray.unlearning.stopping import Knowledge

_ELSEWHERE = "this checkpoint cannot be resumed from: start again in another run.dir"


class _Saved(BaseModel):
    """The content of state.json."""

    step: NonNegativeInt
    scored_at: int
    log: list[dict[str, JsonValue]]
    initial: Knowledge | None
    latest: Knowledge | None


@dataclass
class State:
    """What a resumed run starts from, besides the engine. Draws need no state: they are functions of the step.

    step: optimiser steps taken. initial: evaluation before the first step; its log-probabilities are NPO's reference.
    latest: evaluation at this step. scores: the latest, of step `scored_at`. log: all lines of metrics.jsonl so far.
    """

    step: int = 0
    initial: Knowledge | None = None
    latest: Knowledge | None = None
    scores: pa.Table | None = None
    scored_at: int = -1
    log: list[Line] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the state as state.json and scores.parquet."""
        content = {"step": self.step, "scored_at": self.scored_at, "log": self.log}
        for name, evaluation in {"initial": self.initial, "latest": self.latest}.items():
            content[name] = None if evaluation is None else asdict(evaluation)
        (folder / "state.json").write_text(json.dumps(content), encoding="utf-8")
        if self.scores is not None:
            pq.write_table(self.scores, folder / "scores.parquet")

    @classmethod
    def load(cls, folder: Path) -> "State":
        """Read what `save` wrote. Raises UserError if it is damaged."""
        file, table = folder / "state.json", folder / "scores.parquet"
        saved = _Saved.model_validate(parsed_json(str(file), file.read_bytes(), _Saved, _ELSEWHERE))
        scores = None
        if table.exists():
            scores = parsed_table(str(table), table.read_bytes(), SCHEMA, REQUIRED, _ELSEWHERE)
        return cls(saved.step, saved.initial, saved.latest, scores, saved.scored_at, [*map(current, saved.log)])
