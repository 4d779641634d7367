"""The subject of an experiment: the model, after it learned the sets if needed, and the samples."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from jobs.paper.config import ExperimentConfig
from mrd_ray.config import ModelSettings, RunSettings, ScoreConfig
from mrd_ray.config.base import RaySettings
from mrd_ray.data import samples as samples_table
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError
from mrd_ray.models import fine_tune, load
from mrd_ray.models.files import model_digest
from mrd_ray.runs import meter
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.scoring.score import ScoreRun, score
from mrd_ray.unlearning.sets import retain_data

_MEASURES = ("mean_log_prob", "memorization_accuracy", "log_prob_gradient_norm")

_FEWEST = 10  # samples for a meaningful rank correlation


@dataclass(frozen=True)
class Subject:
    """samples, retained: of data.samples.SCHEMA. pretrained: the model before it learned them, None if it did not."""

    run: RunDirectory
    model: ModelSettings
    pretrained: ModelSettings | None
    tokenizer: PreTrainedTokenizerBase
    samples: pa.Table
    retained: pa.Table | None

    def score(self, config: ExperimentConfig, ray: RaySettings) -> ScoreRun:
        """Every sample's MRD and other measures, in RUN/scores."""
        scoring = config.scoring.model_copy(update={"measures": _MEASURES})
        run = RunSettings(dir=self.run.path("scores"))
        finished = score(ScoreConfig(model=self.model, data=config.data, run=run, scoring=scoring, ray=ray))
        finished.refuse_other_samples(self.samples)
        if errors := finished.scores["error"].drop_null().to_pylist():
            quote = f": {errors[0]}"
            raise UserError(f"data.path: {len(errors)} samples of {config.data.path} have no score{quote}", quote)
        return finished


def prepare(config: ExperimentConfig, identity: dict[str, Any]) -> Subject:
    """Read the sets, let the model learn them if asked, and claim the run directory.

    identity: the settings, besides the sets and the model, that results in RUN/cells depend on.

    Raises:
        UserError: bad input, a sample that cannot be scored, or a run directory of another run.
    """
    console = meter.console()
    run = RunDirectory(config.run.dir)
    tokenizer = load.load_tokenizer(config.model, console)
    limits = Limits.of(load.skeleton(config.model))
    samples = samples_table.build(config.data, tokenizer, limits, console)
    if errors := samples["error"].drop_null().to_pylist():
        quote = f": {errors[0]}"
        raise UserError(f"data.path: {len(errors)} samples of {config.data.path} cannot be scored{quote}", quote)
    if len(samples) < _FEWEST:
        raise UserError(f"data.path: {config.data.path} holds {len(samples)} samples; expected at least {_FEWEST}")
    retained = None
    if config.retain.path is not None:
        retained = samples_table.build(retain_data(config.data, config.retain), tokenizer, limits, console)
        retained = retained.filter(pc.is_null(retained["error"]))
    known = {"forget set": samples, "retain set": retained}
    sets = {name: samples_table.digest(table) for name, table in known.items() if table is not None}
    recipe = {"model": model_digest(config.model), **sets, **config.learn.model_dump(exclude={"cache"})}
    owns = ("cells", "scores", "selections", "findings.json", "findings.png")
    run.claim(recipe | {"model.dtype": config.model.dtype} | identity, config, owns)
    if not config.learn.epochs:
        return Subject(run, config.model, None, tokenizer, samples, retained)
    learned = _learned(config, [table for table in known.values() if table is not None], recipe)
    after = config.model.model_copy(update={"path": str(learned), "revision": None})
    return Subject(run, after, config.model, tokenizer, samples, retained)


def _learned(config: ExperimentConfig, tables: list[pa.Table], recipe: dict[str, object]) -> Path:
    token_ids = [ids for table in tables for ids in table["token_ids"].to_pylist()]
    learn = config.learn
    name = f"learned-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}"
    return fine_tune.cached(
        Path(learn.cache).expanduser().absolute(),
        name,
        lambda folder: fine_tune.memorise(
            config.model, folder, token_ids, "Learning the sets (once, cached)", learn.epochs, learn.batch_size,
            learn.learning_rate,
        ),
    )  # fmt: skip
