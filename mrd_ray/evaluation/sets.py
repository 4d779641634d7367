"""Evaluated sets, from their source to what the model is asked, row by row. On the driver."""

import hashlib
import string
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from mrd_ray.config import EvaluatedSet, EvaluationConfig
from mrd_ray.config.evaluation import OF_ANSWERS, OF_RESPONSES
from mrd_ray.data import read
from mrd_ray.data import samples as samples_table
from mrd_ray.data.tokens import Columns, Tokens, Unscorable, cell, choose_columns, is_id, render, tokenize
from mrd_ray.errors import UserError
from mrd_ray.evaluation import metrics
from mrd_ray.scoring import plan
from mrd_ray.scoring.table import PLACE

_UNIT_TOKENS = 8192  # read and generated: half a minute of a small model on a core
_SEQUENCE = pa.struct([("role", pa.string()), ("token_ids", pa.list_(pa.int32())), ("scored", pa.list_(pa.bool_()))])
ROW = pa.struct(
    [
        ("sample_id", pa.string()),
        ("sequences", pa.list_(_SEQUENCE)),
        ("prompt_ids", pa.list_(pa.int32())),  # to be answered; null if no answer is wanted
        ("new_tokens", pa.int64()),  # the longest answer
        ("extract", pa.bool_()),  # whether EL_n of the first sequence is wanted
        ("alternatives", pa.list_(pa.string())),  # the truth and wrong answers, to be compared with; null if not wanted
        ("classify", pa.bool_()),  # whether the answer's toxicity is wanted
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        *(samples_table.SCHEMA.field(name) for name in PLACE),
        pa.field("prompt", pa.string()),
        pa.field("response", pa.string(), metadata={"unit": "the true answer, or the whole text"}),
        pa.field("subject", pa.string()),
        pa.field("right", pa.int64(), metadata={"unit": "multiple_choice: index of the right choice"}),
        pa.field("asked", ROW, metadata={"unit": "what the model is asked; null with an error"}),
        pa.field("error", pa.string(), metadata={"unit": "null, or why the row cannot be evaluated"}),
    ]
)
Row = dict[str, Any]  # of ROW
_NOTHING: Row = {"prompt_ids": None, "new_tokens": 0, "extract": False, "alternatives": None, "classify": False}
# Roles of sequences. Those of several have a number after them.
ANSWER, PARAPHRASE, WRONG, CHOICE, WINDOW = "answer", "paraphrase", "wrong", "choice", "window"


def build_all(
    evaluation: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None
) -> dict[str, pa.Table]:
    """Every set, by its name. Raises UserError as `build` does, and for a `stop` that no answer can hold."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if held := [token for token in special if token in (evaluation.stop or "")]:
        raise UserError(
            f"evaluation.stop: {held[0]} is a special token, and no answer's text holds those; EOS ends answers anyway"
        )
    tables = {}
    for name, evaluated in evaluation.sets.items():
        Console(stderr=True).print(f"Reading {evaluated.path} ({name})", markup=False)
        tables[name] = build(name, evaluated, evaluation, tokenizer, context_length)
    return tables


def build(
    name: str,
    evaluated: EvaluatedSet,
    evaluation: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int | None,
) -> pa.Table:
    """Rows of SCHEMA, sorted by sample_id. One that cannot be evaluated has its reason in `error`.

    Raises:
        UserError: the set is missing, has other columns than its settings say, or holds an id twice.
    """
    try:
        reader = _Reader(evaluated, evaluation, tokenizer, context_length)
        table = pa.Table.from_pylist(list(reader.rows()), SCHEMA).sort_by("sample_id")
    except UserError as problem:
        raise UserError(f"evaluation.sets.{name}, read with its settings as data: {problem}") from None
    counts = Counter(table["sample_id"].to_pylist())
    if repeated := [sample_id for sample_id, count in counts.items() if count > 1]:
        raise UserError(
            f"evaluation.sets.{name}: {len(repeated)} id(s) stand more than once in {evaluated.path}, first "
            f"{repeated[0]!r}; make them unique, or name another column with `id`"
        )
    return table


def digest(table: pa.Table) -> str:
    """Digest of what is asked, whatever the order of the source's rows."""
    state = hashlib.sha256()
    for batch in table.select(["sample_id", "asked", "error"]).to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            state.update(repr(list(row.values())).encode())
    return state.hexdigest()


def units(name: str, table: pa.Table) -> list[tuple[str, list[Row]]]:
    """A set's rows in units of like length, each with its id. The rows alone decide, whoever works them off."""
    rows = [row for row in table["asked"].to_pylist() if row is not None]
    layout = plan.layout(np.array([cost(row) for row in rows], np.int64), _UNIT_TOKENS)
    return [(f"{name}.{i:06d}", [rows[at] for at in layout.samples(i)]) for i in range(len(layout))]


def cost(row: Row) -> int:
    """What a row costs, in tokens read and generated."""
    return sum(len(sequence["token_ids"]) for sequence in row["sequences"]) + 2 * int(row["new_tokens"])


def shared_rows(forget: pa.Table, other: pa.Table) -> int:
    """How many rows of the forget set stand in another set, prompt and response alike."""

    def texts(table: pa.Table) -> pa.ChunkedArray:
        parts = [pc.fill_null(table["prompt"], ""), pc.fill_null(table["response"], "")]
        return pc.binary_join_element_wise(*parts, "\0")

    return int(pc.sum(pc.is_in(texts(forget), value_set=texts(other).combine_chunks())).as_py() or 0)


class _Reader:
    def __init__(
        self,
        evaluated: EvaluatedSet,
        evaluation: EvaluationConfig,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int | None,
    ) -> None:
        self._set, self._evaluation, self._tokenizer, self._context = evaluated, evaluation, tokenizer, context_length
        self._metrics = set(evaluated.metrics)
        self._max_tokens = min((x for x in (evaluated.max_tokens, context_length) if x is not None), default=None)
        if "perplexity" in self._metrics and self._max_tokens is not None and self._max_tokens < 2:
            raise UserError(
                f"max_tokens: windows of {self._max_tokens} token(s) leave perplexity nothing to score; the first of a "
                "window has none before it"
            )
        if evaluated.template == "chat" and evaluated.text is None and tokenizer.chat_template is None:
            raise UserError("data.template: chat, but the tokenizer has no chat template; give a format string")
        if not tokenizer.is_fast:
            raise UserError("model.tokenizer: evaluation needs a fast one, which knows each token's place in the text")

    def rows(self) -> Iterator[dict[str, Any]]:
        if self._set.path.lower().endswith(".txt") and "perplexity" not in self._metrics:
            yield from self._windows()
            return
        if self._set.path.lower().endswith(".txt"):
            text = read.text(self._set.path)
            yield self._row(0, 1, {"text": text}, Columns("text", None, None, None), Counter())
            return
        rows = list(read.rows(self._set))
        present = list(dict.fromkeys(name for _, values in rows for name in values))
        columns = choose_columns(self._set, present, self._set.path)
        if columns.text is not None and (of := self._metrics & OF_RESPONSES):  # the file alone says that it has texts
            raise UserError(f"metrics: {min(of)} needs prompts with responses, not texts (column {columns.text!r})")
        for setting in ("paraphrase", "wrong", "choices", "subject"):
            if (column := getattr(self._set, setting)) is not None and column not in present:
                raise UserError(
                    f"{self._set.path}: no column {column!r} ({setting}); its columns are {', '.join(present)}"
                )
        seen: Counter[str] = Counter()
        for index, (number, values) in enumerate(rows):
            yield self._row(index, number, values, columns, seen)

    def _windows(self) -> Iterator[dict[str, Any]]:
        """A text file cut into samples, as scoring cuts it."""
        whole = self._set.model_copy(update={"score_on": "all"})
        for sample in samples_table.build(whole, self._tokenizer, self._context).to_pylist():
            row = {name: sample[name] for name in ("sample_id", *PLACE)} | {"response": sample["text"]}
            if sample["error"] is not None:
                yield row | {"error": sample["error"]}
                continue
            sequence = {"role": f"{WINDOW}-0", "token_ids": sample["token_ids"], "scored": sample["scored"]}
            asked = {"sequences": [sequence], "extract": "extraction_likelihood" in self._metrics}
            yield row | {"asked": _NOTHING | {"sample_id": sample["sample_id"]} | asked}

    def _row(
        self, index: int, number: int, values: dict[str, Any], columns: Columns, seen: Counter[str]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"index": index, "row": number}
        own = None if columns.id is None else values.get(columns.id)
        if columns.id is None:
            made_of = [columns.text, columns.prompt, columns.response]
            row["sample_id"] = samples_table.digest_id([values.get(column) for column in made_of if column], seen)
        else:
            row["sample_id"] = str(own) if is_id(own) else f"row-{number}"
        try:
            if columns.id is not None and not is_id(own):
                raise Unscorable(f"column {columns.id!r}, the id, is {own!r:.40}; expected text or a whole number")
            if columns.text is not None:
                row["response"] = cell(values, columns.text)
                asked = self._text(row["response"])
            elif self._set.choices is not None:
                asked = self._choice(values, columns, row)
            else:
                asked = self._question(values, columns, row)
            row["asked"] = _NOTHING | {"sample_id": row["sample_id"]} | asked
        except Unscorable as problem:
            row["error"] = str(problem)
        return row

    def _question(self, values: dict[str, Any], columns: Columns, row: dict[str, Any]) -> dict[str, Any]:
        assert columns.prompt is not None
        assert columns.response is not None
        response_column = columns.response
        row["prompt"], row["response"] = cell(values, columns.prompt), cell(values, response_column)
        if self._set.subject is not None:
            row["subject"] = cell(values, self._set.subject)
        if "rouge_l" in self._metrics and not metrics.words(row["response"]):
            raise Unscorable(f"column {response_column!r} has no word, of which rouge_l is a share")

        def sequence(role: str, response: str) -> dict[str, Any]:
            try:
                rendered = render(values | {response_column: response}, columns, self._set, self._tokenizer)
                return {"role": role, **tokenize(rendered, self._set, self._tokenizer, self._max_tokens)._asdict()}
            except Unscorable as problem:
                raise Unscorable(f"its {role}: {problem}" if role != ANSWER else str(problem)) from None

        answer = sequence(ANSWER, row["response"])
        sequences, truth, wrong = [answer], row["response"], []
        if self._set.wrong is not None:
            if self._set.paraphrase is not None:
                truth = cell(values, self._set.paraphrase)
                sequences.append(sequence(PARAPHRASE, truth))
            wrong = _texts(values, self._set.wrong)
            sequences += [sequence(f"{WRONG}-{i}", text) for i, text in enumerate(wrong)]
        asked: dict[str, Any] = {"sequences": sequences, "extract": "extraction_likelihood" in self._metrics}
        if self._metrics & OF_ANSWERS:
            asked |= self._prompt(values, columns)
        if "embedding_accuracy" in self._metrics:
            asked["alternatives"] = [truth, *wrong]
        return asked | {"classify": "toxicity" in self._metrics}

    def _prompt(self, values: dict[str, Any], columns: Columns) -> dict[str, Any]:
        """The tokens that go before the response, as the model met them in a sample with this response."""
        on_response = self._set.model_copy(update={"score_on": "response", "truncate": False})
        rendered = render(values, columns, self._set, self._tokenizer)
        tokens = tokenize(rendered, on_response, self._tokenizer, None)
        prompt = tokens.token_ids[: tokens.scored.index(True)]
        room = self._evaluation.max_new_tokens
        if self._max_tokens is not None:
            room = min(room, self._max_tokens - len(prompt))
        if room < 1:
            raise Unscorable(f"its prompt has {len(prompt)} tokens, which leave no room for an answer")
        return {"prompt_ids": prompt, "new_tokens": room}

    def _choice(self, values: dict[str, Any], columns: Columns, row: dict[str, Any]) -> dict[str, Any]:
        """One sequence for each choice; they differ in the letter at their end alone, which is what counts."""
        assert columns.prompt is not None
        assert columns.response is not None
        assert self._set.choices is not None
        choices = _texts(values, self._set.choices)
        right = values.get(columns.response)
        if type(right) is not int or not 0 <= right < len(choices) or len(choices) > len(string.ascii_uppercase):
            raise Unscorable(f"column {columns.response!r} is {right!r:.40}; expected the index of one of its choices")
        lettered = zip(string.ascii_uppercase, choices, strict=False)
        question = "\n".join([cell(values, columns.prompt), *(f"{letter}. {choice}" for letter, choice in lettered)])
        row |= {"prompt": question, "response": string.ascii_uppercase[right], "right": right}
        if self._set.subject is not None:
            row["subject"] = cell(values, self._set.subject)
        sequences = []
        for i in range(len(choices)):
            letter = {columns.prompt: question, columns.response: string.ascii_uppercase[i]}
            rendered = render(letter, columns, self._set, self._tokenizer)
            tokens = tokenize(rendered, self._set, self._tokenizer, self._max_tokens)
            sequences.append({"role": f"{CHOICE}-{i}", **tokens._asdict()})
        return {"sequences": sequences}

    def _text(self, text: str) -> dict[str, Any]:
        """A text whole, or for perplexity in windows that overlap, each token being scored in the first that has it."""
        token_ids = list(self._tokenizer(text, verbose=False)["input_ids"])
        if "perplexity" not in self._metrics:
            if self._max_tokens is not None and len(token_ids) > self._max_tokens:
                if not self._set.truncate:
                    raise Unscorable(
                        f"{len(token_ids)} tokens, over the limit of {self._max_tokens}; shorten it or set truncate"
                    )
                token_ids = token_ids[: self._max_tokens]
            windows = [(0, len(token_ids))]
        else:
            size = min(x for x in (self._evaluation.perplexity_window, self._max_tokens) if x is not None)
            step = min(self._evaluation.perplexity_stride, size - 1)  # a window's first token has none before it
            windows = [(0, min(size, len(token_ids)))]
            while windows[-1][1] < len(token_ids):
                stop = min(windows[-1][1] + step, len(token_ids))
                windows.append((max(0, stop - size), stop))
        if len(token_ids) < 2:
            raise Unscorable(f"{len(token_ids)} token(s), none of which can be scored: each needs one before it")
        sequences, reached = [], 1  # the first token has none before it
        for i, (start, stop) in enumerate(windows):
            tokens = Tokens(token_ids[start:stop], [at >= reached for at in range(start, stop)])
            sequences.append({"role": f"{WINDOW}-{i}", **tokens._asdict()})
            reached = stop
        return {"sequences": sequences, "extract": "extraction_likelihood" in self._metrics}


def _texts(values: dict[str, Any], column: str) -> list[str]:
    found = values.get(column)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise Unscorable(f"column {column!r} is {found!r:.60}; expected a list of texts")
    return [cell({column: text}, column) for text in found]
