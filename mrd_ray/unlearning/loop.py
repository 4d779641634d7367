"""The unlearning loop that every worker runs: Algorithm 2 of arXiv 2504.06658, and its weighted GradDiff, PO and NPO.

Given a process group, it needs neither Ray nor a cluster. All ranks run it in step: every method is a collective.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypedDict

import numpy as np
import pyarrow as pa
import torch

from mrd_ray.config import UnlearnConfig
from mrd_ray.mrd.extraction import extraction_likelihoods
from mrd_ray.mrd.likelihood import MicroBatch
from mrd_ray.unlearning import losses, refresh
from mrd_ray.unlearning.batching import Batching
from mrd_ray.unlearning.engine import Engine
from mrd_ray.unlearning.log import Line
from mrd_ray.unlearning.sampling import ForgetStream, ShuffledStream, choices, sampling_probabilities
from mrd_ray.unlearning.state import State
from mrd_ray.unlearning.stopping import Knowledge, Measures, below_floor, forgotten
from mrd_ray.workers.memory import Tokenised, collate


@dataclass(frozen=True)
class Sets:
    """Tables of data.samples.SCHEMA without errors, sorted by sample_id.

    refusals: for po; several rows per forget sample, in the samples' order: its prompt with a refusal as response.
    watched: indices of the retain samples that the utility floor is measured on.
    """

    forget: pa.Table
    retain: pa.Table | None
    refusals: pa.Table | None
    watched: np.ndarray


Loss = Callable[[torch.Tensor, MicroBatch, np.ndarray], torch.Tensor]


@dataclass(frozen=True)
class Pass:
    """One forward and backward of a step.

    logged_as: forget_loss or retain_loss. loss: takes log p of the samples [B], their micro-batch and their rows;
    returns one loss per sample [B]. rows: int64 [B], of the samples in their set. weight: of the loss in the step's.
    """

    logged_as: str
    loss: Loss
    rows: np.ndarray
    samples: list[Tokenised]
    weight: float


class _Now(TypedDict):
    step: int
    of: int


class Kept(Measures):
    """What is reported with a checkpoint. retain_loss: nats, of the watched retain samples."""

    step: int
    retain_loss: float | None


class Loop:
    """Unlearn, step by step.

    Args:
        engine: the live model.
        state: a fresh one, or the state of the checkpoint that the engine has loaded.
        until: return before this step even if there is more to do, so that scores can be made elsewhere.
        log: takes each new line of the log; on rank 0 alone.
        keep_scores: takes (step, scores) of each refresh; on rank 0 alone.
        checkpoint: takes (metrics, a function that writes this rank's part of a checkpoint into a folder).
        measure: takes (step, engine) every `evaluation_every` steps, at the start and at the end; on all ranks.
    """

    def __init__(
        self,
        config: UnlearnConfig,
        sets: Sets,
        engine: Engine,
        state: State,
        *,
        until: int | None = None,
        log: Callable[[Line], None],
        keep_scores: Callable[[int, pa.Table], None],
        checkpoint: Callable[[Kept, Callable[[Path], None]], None],
        measure: Callable[[int, Engine], None] | None = None,
    ) -> None:
        self.config, self.sets, self.engine, self.state, self.until = config, sets, engine, state, until
        self._log, self._keep_scores, self._checkpoint, self._measure = log, keep_scores, checkpoint, measure
        unlearning = config.unlearning
        self.epoch = -(-len(sets.forget) // unlearning.batch_size)  # in steps
        self.last_step = last_step(config, len(sets.forget))
        self._batching = Batching.of(config, engine.ranks.size)
        self._retain = None
        if sets.retain is not None and self._batching.with_retain:
            self._retain = ShuffledStream(len(sets.retain), unlearning.seed)
        self._stream: tuple[int, ForgetStream] | None = None

    def run(self) -> str | None:
        """Why it stopped; None if it reached `until`."""
        reason = self.begin() if self.state.initial is None else self._forgotten()
        while reason is None:
            if self.state.step >= self.last_step:
                reason = f"the last of {self.last_step} steps"
            elif self.state.step == self.until:
                return None
            else:
                reason = self._round()
        self.measure_if_due(at_the_end=True)
        self._write({**self._now, "event": "stop", "reason": reason})
        return reason

    def _round(self) -> str | None:
        """Refresh the scores if due, take a step, evaluate if due. Returns the reason to stop, if any."""
        self.measure_if_due()
        if (diverged := self.refresh_if_due()) is not None:
            return diverged
        if (diverged := self.take_step()) is not None:
            return diverged
        return self.evaluate_if_due()

    def _due(self, every: int | None) -> bool:
        return self.state.step % (every or self.epoch) == 0

    def measure_if_due(self, at_the_end: bool = False) -> None:
        """Let the caller measure the live model."""
        every = self.config.evaluation_every
        if self._measure is not None and every is not None and (at_the_end or self.state.step % every == 0):
            self._measure(self.state.step, self.engine)

    def begin(self) -> str | None:
        """Look at the model before the first step."""
        self.refresh_if_due()
        self.state.initial = self.state.latest = self.evaluate()
        if not self.state.initial.finite():
            return "diverged before the first step: the model gives no finite probabilities"
        self._keep()
        return None

    def refresh_if_due(self) -> str | None:
        """Score the forget set under the live weights, and draw by the new scores from here on.

        Returns the reason to stop if the model in training has no finite scores any more.
        """
        state, unlearning = self.state, self.config.unlearning
        due = state.scored_at < 0 or (self._due(unlearning.refresh_every) and state.scored_at != state.step)
        if unlearning.weighting == "uniform" or unlearning.refresh != "in_place" or not due:
            return None
        started = time.monotonic()
        scores = refresh.score_in_place(self.engine, self.sets.forget, self.config.scoring)
        if state.step and not np.isfinite(scores["mrd"].to_numpy().astype(np.float64)).all():
            return f"diverged at step {state.step}: no finite scores; try a smaller unlearning.learning_rate"
        if self.engine.ranks.rank == 0:
            self._keep_scores(state.step, scores)
        self.adopt(scores, time.monotonic() - started)
        return None

    def adopt(self, scores: pa.Table, seconds: float) -> None:
        """Draw by these scores of this step's model from here on."""
        self.state.scores, self.state.scored_at = scores, self.state.step
        scored = scores["mrd"].drop_null().to_pylist()
        mrd_median, doubts = median(scored) if scored else None, len(scores["doubt"].drop_null())
        self._write({**self._now, "event": "refresh", "mrd_median": mrd_median, "doubts": doubts, "seconds": seconds})

    def _mrd(self) -> np.ndarray | None:
        return None if self.state.scores is None else self.state.scores["mrd"].to_numpy().astype(np.float64)

    def take_step(self) -> str | None:
        """One optimiser step on samples drawn by their MRD (Algorithm 2). Returns the reason to stop if it diverged."""
        started = time.monotonic()
        of_rank = dict.fromkeys(("forget_loss", "retain_loss", "tokens"), 0.0)
        for one in self._passes():
            batch = collate(one.samples, self.engine.model.device)
            log_prob = losses.log_probs(self.engine.logits(batch), batch)
            loss = one.loss(log_prob, batch, one.rows).sum() / self.config.unlearning.batch_size
            self.engine.backward(one.weight * loss)
            of_rank[one.logged_as] += float(loss.detach())
            of_rank["tokens"] += sum(len(sample["token_ids"]) for sample in one.samples)
        of_all = dict(zip(of_rank, self.engine.ranks.sum([*of_rank.values()], self.engine.model.device), strict=True))
        self.state.step += 1
        retain_loss, grad_norm = None if self._retain is None else of_all["retain_loss"], self.engine.grad_norm
        measured = {"forget_loss": of_all["forget_loss"], "retain_loss": retain_loss, "grad_norm": grad_norm}
        if not all(math.isfinite(value or 0.0) for value in measured.values()):
            found = ", ".join(f"{name} {value}" for name, value in measured.items())
            return f"diverged at step {self.state.step}: {found}; try a smaller unlearning.learning_rate"
        self._write(
            {
                **self._now,
                "event": "step",
                "forget_loss": of_all["forget_loss"],
                "retain_loss": retain_loss,
                "grad_norm": grad_norm,
                "tokens": int(of_all["tokens"]),
                "seconds": time.monotonic() - started,
            }
        )
        return None

    def _passes(self) -> list[Pass]:
        """This rank's micro-batches of this step: of the forget set or its refusals, then of the retain set."""
        unlearning, step = self.config.unlearning, self.state.step
        rows = self._forget_stream().at(step, unlearning.batch_size)
        table = self.sets.forget
        if self.sets.refusals is not None:
            table = self.sets.refusals
            each = len(table) // len(self.sets.forget)
            rows = rows * each + choices(unlearning.seed, step, len(rows), each)
        passes = self._cut("forget_loss", self._forget_loss, table, rows, 1.0)
        if self._retain is not None:
            assert self.sets.retain is not None
            rows = self._retain.at(step * unlearning.batch_size, unlearning.batch_size)
            passes += self._cut("retain_loss", _descent, self.sets.retain, rows, unlearning.retain_weight)
        return passes

    def _cut(self, logged_as: str, loss: Loss, table: pa.Table, rows: np.ndarray, weight: float) -> list[Pass]:
        """This rank's share of a step's rows, in micro-batches."""
        parts = self._batching.parts(rows, self.engine.ranks.rank)
        tokens = table.select(["token_ids", "scored"])
        return [Pass(logged_as, loss, part, tokens.take(part).to_pylist(), weight) for part in parts]

    def _forget_stream(self) -> ForgetStream:
        """The draws by the latest scores."""
        if self._stream is None or self._stream[0] != self.state.scored_at:
            unlearning, sample_ids = self.config.unlearning, self.sets.forget["sample_id"].to_pylist()
            probabilities = sampling_probabilities(sample_ids, self._mrd(), unlearning.weighting)
            self._stream = self.state.scored_at, ForgetStream(probabilities, unlearning.seed)
        return self._stream[1]

    def _forget_loss(self, log_prob: torch.Tensor, batch: MicroBatch, rows: np.ndarray) -> torch.Tensor:
        unlearning = self.config.unlearning
        if unlearning.method == "npo":
            assert self.state.initial is not None
            reference = torch.tensor([self.state.initial.log_prob[row] for row in rows.tolist()], dtype=torch.float64)
            return losses.npo(log_prob, reference.to(log_prob.device), unlearning.beta)
        return (_descent if unlearning.method == "po" else _ascent)(log_prob, batch, rows)

    def evaluate_if_due(self) -> str | None:
        """Evaluate, and leave a checkpoint of a state above the utility floor. Returns the reason to stop, if any."""
        if not (self._due(self.config.stopping.evaluate_every) or self.state.step in (self.last_step, self.until)):
            return None
        assert self.state.initial is not None
        self.state.latest = self.evaluate()
        if (problem := below_floor(self.config.stopping, self.state.initial, self.state.latest)) is not None:
            return problem
        self._keep()
        return self._forgotten()

    def _forgotten(self) -> str | None:
        stopping, initial, latest = self.config.stopping, self.state.initial, self.state.latest
        if self.state.step and initial and latest and forgotten(stopping, initial, latest):
            whose = "every forget sample" if stopping.forgotten == "every" else "the forget set's mean"
            return f"forgotten: MA{' and EL' if stopping.extraction_n else ''} of {whose} below the initial averages"
        return None

    def evaluate(self) -> Knowledge:
        """What the live model knows of the forget set and of the watched retain samples."""
        started, stopping, sets = time.monotonic(), self.config.stopping, self.sets
        found = refresh.likelihoods(self.engine, sets.forget, self.config.scoring.micro_batch_tokens)
        retain_loss = None
        if sets.retain is not None:
            watched = sets.retain.take(sets.watched)
            of_watched = refresh.likelihoods(self.engine, watched, self.config.scoring.micro_batch_tokens)
            tokens = sum(sum(scored[1:]) for scored in watched["scored"].to_pylist())
            retain_loss = -math.fsum(log_prob for log_prob, _ in of_watched) / tokens
        log_prob, accuracy = ([*column] for column in zip(*found, strict=True))
        now = Knowledge(log_prob, accuracy, self._extraction() if stopping.extraction_n else None, retain_loss)
        self._write({**self._now, "event": "evaluation", **now.means(), "seconds": time.monotonic() - started})
        return now

    def _extraction(self) -> list[float]:
        ranks, stopping = self.engine.ranks, self.config.stopping
        mine = list(range(ranks.rank, len(self.sets.forget), ranks.size))
        samples = self.sets.forget.take(mine)
        self.engine.settle()
        found = extraction_likelihoods(
            self.engine.model,
            samples["token_ids"].to_pylist(),
            stopping.extraction_n,
            stopping.extraction_stride,
            all_ranks=self.engine.stage == 3,
            scored=samples["scored"].to_pylist(),
        )
        self.engine.settle()
        return [el for _, el in sorted(ranks.gather(list(zip(mine, found, strict=True))))]

    def _keep(self) -> None:
        """A checkpoint: a Hugging Face model, and all that a run resumes from."""
        assert self.state.latest is not None

        def write(folder: Path) -> None:
            self.engine.save_model(folder / "model")
            self.engine.save(folder)
            if self.engine.ranks.rank == 0:
                self.state.save(folder)

        latest = self.state.latest
        self._checkpoint({"step": self.state.step, **latest.means(), "retain_loss": latest.retain_loss}, write)

    @property
    def _now(self) -> _Now:
        return {"step": self.state.step, "of": self.last_step}

    def _write(self, line: Line) -> None:
        self.state.log.append(line)
        if self.engine.ranks.rank == 0:
            self._log(line)


def last_step(config: UnlearnConfig, forget_samples: int) -> int:
    """The most optimiser steps of a run."""
    unlearning = config.unlearning
    return unlearning.steps or -(-unlearning.epochs * forget_samples // unlearning.batch_size)


def _ascent(log_prob: torch.Tensor, batch: MicroBatch, rows: np.ndarray) -> torch.Tensor:
    return losses.ascent(log_prob, batch.scored.sum(1))


def _descent(log_prob: torch.Tensor, batch: MicroBatch, rows: np.ndarray) -> torch.Tensor:
    return losses.descent(log_prob, batch.scored.sum(1))
