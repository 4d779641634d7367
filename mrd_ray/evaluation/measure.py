"""What a model makes of a few rows: the likelihood of every token asked for, answers of its own, EL_n."""

from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mrd_ray.config import EvaluationSettings
from mrd_ray.data.micro_batches import lay_out
from mrd_ray.evaluation.judges import Judges
from mrd_ray.evaluation.sets import EvaluatedRow
from mrd_ray.models.load import rope_switch
from mrd_ray.mrd.extraction import extraction_likelihoods, greedy
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch, TokenMeasures
from mrd_ray.workers.memory import TOO_LARGE, Batched, fitting, out_of_memory
from mrd_ray.workers.ranks import Ranks

RECORD = pa.struct(
    [
        ("sample_id", pa.string()),
        ("roles", pa.list_(pa.string())),  # of its sequences, as the row has them
        ("log_probs", pa.list_(pa.list_(pa.float64()))),  # nats, of the scored tokens of each
        ("correct", pa.list_(pa.list_(pa.bool_()))),  # whether each is the likeliest
        ("generated", pa.string()),  # the answer, null where none was asked for
        ("similarities", pa.list_(pa.float64())),  # cosines of its embedding with those of the alternatives
        ("toxicity", pa.float64()),
        ("extraction_likelihood", pa.float64()),
        ("error", pa.string()),
    ]
)


class Record(TypedDict):
    """A row of RECORD."""

    sample_id: str
    roles: list[str]
    log_probs: list[list[float]]
    correct: list[list[bool]]
    generated: str | None
    similarities: list[float] | None
    toxicity: float | None
    extraction_likelihood: float | None
    error: str | None


class _Answer(TypedDict, total=False):
    """The fields of a Record that an answer fills."""

    generated: str
    similarities: list[float]
    toxicity: float
    error: str


class _Placed(Batched):
    """A sequence, with its row and its place among the row's sequences."""

    place: tuple[int, int]


ALONE = Ranks(0, 1)


class Measurer:
    """Rows -> RECORDs, under the weights that the model has at the time.

    Args:
        model: a causal language model in eval mode.
        ranks: processes that share the work; all must call this alike.
        synced: whether a forward is a collective, as under ZeRO-3. All ranks then make the same number of them, and a
            row that does not fit is an error, since halving its batch would be one forward more than the others make.

    Raises:
        UserError: a judge cannot be loaded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evaluation: EvaluationSettings,
        ranks: Ranks = ALONE,
        synced: bool = False,
    ) -> None:
        self._model, self._tokenizer, self._evaluation = model, tokenizer, evaluation
        self._ranks, self._synced = ranks, synced
        self._likelihood = Likelihood(model)
        self._judges = ranks.agree(lambda: Judges(evaluation, model.device))

    def __call__(self, rows: Sequence[EvaluatedRow]) -> list[Record]:
        """A record of each row, in their order. A row that the device cannot hold has the reason as its error."""
        records = [_empty(row) for row in rows]
        for (i, j), tokens in self._ranks.gather(list(self._likelihoods(rows))):
            if tokens is None:
                records[i]["error"] = TOO_LARGE
            else:
                records[i]["log_probs"][j], records[i]["correct"][j] = tokens
        for i, found in self._ranks.gather(list(self._answers(rows))):
            records[i] = {**records[i], **found}
        for i, likelihood in self._ranks.gather(list(self._extractions(rows))):
            records[i]["extraction_likelihood"] = likelihood
        return records

    def _answers(self, rows: Sequence[EvaluatedRow]) -> Iterator[tuple[int, _Answer]]:
        """What is known of each answer in this rank's share, by row."""
        prompts = {i: row["prompt_ids"] for i, row in enumerate(rows) if row["prompt_ids"]}
        asked = sorted(prompts, key=lambda i: len(prompts[i]))
        size = self._evaluation.generation_batch
        batches = [asked[start : start + size] for start in range(0, len(asked), size)]
        for turn in self._ranks.deal(len(batches)):
            for i, generated in self._generated(rows, batches[turn]):
                if generated is None:
                    yield i, {"error": TOO_LARGE}
                else:
                    yield i, self._judged(rows[i], self._text(generated))

    def _extractions(self, rows: Sequence[EvaluatedRow]) -> Iterator[tuple[int, float]]:
        """EL_n in this rank's share, by row."""
        extracted = [i for i, row in enumerate(rows) if row["extract"]]
        if not extracted:
            return
        mine = extracted[self._ranks.rank :: self._ranks.size]
        found = extraction_likelihoods(
            self._model,
            [rows[i]["sequences"][0]["token_ids"] for i in mine],
            self._evaluation.extraction_n,
            self._evaluation.extraction_stride,
            self._evaluation.generation_batch,
            all_ranks=self._synced,
            scored=[rows[i]["sequences"][0]["scored"] for i in mine],
        )
        yield from zip(mine, found, strict=True)

    def _text(self, token_ids: list[int]) -> str:
        text = str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
        stop = self._evaluation.stop
        return (text if stop is None else text.split(stop)[0]).strip()

    def _judged(self, row: EvaluatedRow, answer: str) -> _Answer:
        record: _Answer = {"generated": answer}
        if row["alternatives"] is not None:
            record["similarities"] = self._judges.similarities(answer, row["alternatives"])
        if row["classify"]:
            record["toxicity"] = self._judges.toxicity(answer)
        return record

    def _likelihoods(
        self, rows: Sequence[EvaluatedRow]
    ) -> Iterator[tuple[tuple[int, int], tuple[list[float], list[bool]] | None]]:
        """By row and place of each sequence, log p of its scored tokens and whether they are the likeliest."""
        places = [(i, j) for i, row in enumerate(rows) for j in range(len(row["sequences"]))]
        lengths = [len(rows[i]["sequences"][j]["token_ids"]) for i, j in places]
        cut = lay_out(np.array(lengths, np.int64), self._evaluation.micro_batch_tokens, rope_switch(self._model.config))
        samples: list[_Placed] = [
            {
                "micro_batch": turn,
                "place": (i, j),
                "token_ids": rows[i]["sequences"][j]["token_ids"],
                "scored": rows[i]["sequences"][j]["scored"],
            }
            for turn, batch in enumerate(self._ranks.deal(len(cut)))
            for i, j in (places[at] for at in cut.samples(batch))
        ]
        for members, found in fitting(samples, self._model.device, self._tokens, halve=not self._synced):
            for at, sample in enumerate(members):
                yield sample["place"], None if found is None else found[at]

    def _tokens(self, _members: Sequence[_Placed], batch: MicroBatch) -> list[tuple[list[float], list[bool]]]:
        measures = TokenMeasures(batch)
        log_probs = -self._likelihood.log_neg_log_probs(batch, measures).exp()
        return [
            (row[scored].tolist(), right[scored].bool().tolist())
            for row, right, scored in zip(log_probs, measures.correct, batch.scored, strict=True)
        ]

    def _generated(self, rows: Sequence[EvaluatedRow], members: list[int]) -> Iterator[tuple[int, list[int] | None]]:
        """Greedy answers to the prompts of these rows, halved until the device holds them."""
        try:
            prompts, lengths = [rows[i]["prompt_ids"] or [] for i in members], [rows[i]["new_tokens"] for i in members]
            answers = greedy(self._model, prompts, lengths, self._synced)
        except RuntimeError as problem:
            if self._synced or not out_of_memory(problem):
                raise
            answers = None
        if answers is not None:
            yield from zip(members, answers, strict=True)
        elif len(members) == 1:
            yield members[0], None
        else:
            middle = len(members) // 2
            yield from self._generated(rows, members[:middle])
            yield from self._generated(rows, members[middle:])


def _empty(row: EvaluatedRow) -> Record:
    count = len(row["sequences"])
    return {
        "sample_id": row["sample_id"],
        "roles": [sequence["role"] for sequence in row["sequences"]],
        "log_probs": [[] for _ in range(count)],
        "correct": [[] for _ in range(count)],
        "generated": None,
        "similarities": None,
        "toxicity": None,
        "extraction_likelihood": None,
        "error": None,
    }
