"""Evaluated sets, from their source to what the model is asked, row by row. On the driver."""

import hashlib
import string
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from mrd_ray.config import EvaluatedSet, EvaluationSettings
from mrd_ray.config.evaluation import OF_ANSWERS, OF_RESPONSES
from mrd_ray.data import conversations, read
from mrd_ray.data import samples as samples_table
from mrd_ray.data.cells import Unscorable, cell, list_of_texts, response_text
from mrd_ray.data.columns import Columns
from mrd_ray.data.micro_batches import lay_out
from mrd_ray.data.read import Row
from mrd_ray.data.render import conversation, prompt_text, render, with_response
from mrd_ray.data.samples import PLACE
from mrd_ray.data.tokens import Encoder, Limits, Tokens, tokens_of
from mrd_ray.errors import UserError
from mrd_ray.evaluation import metrics
from mrd_ray.evaluation.choices import Scheme, choices_of, right_one, scheme

_UNIT_TOKENS = 8192  # read and generated: half a minute of a small model on a core
_SEQUENCE = pa.struct([("role", pa.string()), ("token_ids", pa.list_(pa.int32())), ("scored", pa.list_(pa.bool_()))])
EVALUATED_ROW = pa.struct(
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
        pa.field("asked", EVALUATED_ROW, metadata={"unit": "what the model is asked; null with an error"}),
        pa.field("error", pa.string(), metadata={"unit": "null, or why the row cannot be evaluated"}),
    ]
)


class Sequence(TypedDict):
    """A row of _SEQUENCE."""

    role: str
    token_ids: list[int]
    scored: list[bool]


class EvaluatedRow(TypedDict):
    """A row of EVALUATED_ROW."""

    sample_id: str
    sequences: list[Sequence]
    prompt_ids: list[int] | None
    new_tokens: int
    extract: bool
    alternatives: list[str] | None
    classify: bool


_NOTHING: dict[str, object] = {
    "prompt_ids": None,
    "new_tokens": 0,
    "extract": False,
    "alternatives": None,
    "classify": False,
}
# Roles of sequences. Those of several have a number after them.
ANSWER, PARAPHRASE, WRONG, CHOICE, WINDOW = "answer", "paraphrase", "wrong", "choice", "window"


def build_all(
    evaluation: EvaluationSettings, tokenizer: PreTrainedTokenizerBase, limits: Limits, console: Console | None = None
) -> dict[str, pa.Table]:
    """Every set, by its name. Raises UserError as `build` does, and for a `stop` that no answer can hold."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if held := [token for token in special if token in (evaluation.stop or "")]:
        raise UserError(
            f"evaluation.stop: {held[0]} is a special token, and no answer's text holds those; EOS ends answers anyway"
        )
    return {
        name: build(name, evaluated, evaluation, tokenizer, limits, console)
        for name, evaluated in evaluation.sets.items()
    }


def build(
    name: str,
    evaluated: EvaluatedSet,
    evaluation: EvaluationSettings,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    console: Console | None = None,
) -> pa.Table:
    """Rows of SCHEMA, sorted by sample_id. One that cannot be evaluated has its reason in `error`.

    Args:
        console: told what is read, which columns are used and which left.

    Raises:
        UserError: the set is missing, has other columns than its settings say, or holds an id twice.
    """
    console = console or Console(quiet=True)
    console.print(f"Reading {read.described(evaluated)} ({name})", markup=False, highlight=False, soft_wrap=True)
    try:
        reader = _Reader(evaluated, evaluation, tokenizer, limits, console)
        table = samples_table.with_unique_ids(evaluated, pa.Table.from_pylist(list(reader.rows()), SCHEMA))
        rows = table.to_pylist()
        for row in rows:
            if row["asked"] is not None:
                row["asked"]["sample_id"] = row["sample_id"]
        return pa.Table.from_pylist(rows, SCHEMA).sort_by("sample_id")
    except UserError as problem:
        raise UserError(
            f"evaluation.sets.{name}, read with its settings as data: {problem}", *problem.quotes
        ) from problem


def digest(table: pa.Table) -> str:
    """Digest of what is asked, whatever the order of the source's rows."""
    state = hashlib.sha256()
    for batch in table.select(["sample_id", "asked", "error"]).to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            state.update(repr(list(row.values())).encode())
    return state.hexdigest()


def units(name: str, table: pa.Table) -> list[tuple[str, list[EvaluatedRow]]]:
    """A set's rows in units of like length, each with its id. They depend only on the rows."""
    rows = [row for row in table["asked"].to_pylist() if row is not None]
    layout = lay_out(np.array([cost(row) for row in rows], np.int64), _UNIT_TOKENS)
    return [(f"{name}.{i:06d}", [rows[at] for at in layout.samples(i)]) for i in range(len(layout))]


def cost(row: EvaluatedRow) -> int:
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
        evaluation: EvaluationSettings,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        console: Console,
    ) -> None:
        self._set, self._evaluation, self._tokenizer, self._console = evaluated, evaluation, tokenizer, console
        self._metrics = set(evaluated.metrics)
        self._limits = limits.with_context(evaluated.max_tokens)
        self._max_tokens = self._limits.context
        if "perplexity" in self._metrics and self._max_tokens is not None and self._max_tokens < 2:
            raise UserError(
                f"max_tokens: windows of {self._max_tokens} token(s) leave perplexity nothing to score; the first of a "
                "window has none before it"
            )
        if not tokenizer.is_fast:
            raise UserError("model.tokenizer: evaluation needs a fast one, which knows each token's place in the text")
        self._encoder = Encoder(tokenizer)
        self._scheme: Scheme | None = None  # of choices

    def rows(self) -> Iterator[dict[str, Any]]:
        texts = read.texts(self._set, self._say)
        if texts is not None and "perplexity" not in self._metrics:
            yield from self._windows()
            return
        seen: Counter[str] = Counter()
        if texts is not None:
            whole = Columns("text", None, None, None, None, ("text",))
            for index, (file, text) in enumerate(texts):
                yield self._row(Row(index, file, 1, {"text": text}), whole, seen)
            return
        source = samples_table.Peeked(self._set, self._say)
        source.refuse_chat_without_template(self._tokenizer)
        columns = source.columns
        if columns.text is not None and (of := self._metrics & OF_RESPONSES):  # only the file says that it has texts
            raise UserError(f"metrics: {min(of)} needs prompts with responses, not texts (column {columns.text!r})")
        records = list(source)
        own = self._own_columns(source.present)
        source.say_columns(self._console, own)
        if self._set.choices is not None:
            if columns.prompt is None or columns.response is None:
                raise UserError("metrics: multiple_choice needs `prompt` and `response`, the right choice")
            self._scheme = scheme(records, columns.response, self._set, self._say)
        for record in records:
            yield self._row(record, columns, seen)

    def _own_columns(self, present: Collection[str]) -> list[str]:
        """The columns of evaluation alone. Raises UserError if one is not there."""
        names = {setting: getattr(self._set, setting) for setting in ("paraphrase", "wrong", "choices", "subject")}
        found = []
        for setting, value in names.items():
            for column in [value] if isinstance(value, str) else value or ():
                if column not in present and column.split(".")[0] not in present:
                    raise UserError(
                        f"{read.described(self._set)}: no column {column!r} ({setting}); its columns are "
                        f"{', '.join(present)}"
                    )
                found.append(column.split(".")[0] if column not in present else column)
        return found

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _windows(self) -> Iterator[dict[str, object]]:
        """A text file cut into samples, as scoring cuts it."""
        whole = self._set.model_copy(update={"score_on": "all"})
        for sample in samples_table.build(whole, self._tokenizer, self._limits).to_pylist():
            row = {name: sample[name] for name in ("sample_id", *PLACE)} | {"response": sample["text"]}
            if sample["error"] is not None:
                yield row | {"error": sample["error"]}
                continue
            sequence = {"role": f"{WINDOW}-0", "token_ids": sample["token_ids"], "scored": sample["scored"]}
            asked = {"sequences": [sequence], "extract": "extraction_likelihood" in self._metrics}
            yield row | {"asked": _NOTHING | {"sample_id": sample["sample_id"]} | asked}

    def _row(self, record: Row, columns: Columns, seen: Counter[str]) -> dict[str, Any]:
        row: dict[str, Any] = {"index": record.index, "file": record.file, "row": record.number}
        values = record.values
        samples_table.name_sample(row, record, columns, self._set, seen)
        if row.get("error") is not None:
            return {name: value for name, value in row.items() if name not in ("token_ids", "scored")}
        try:
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
        row["prompt"], row["response"] = self._asked_and_answered(values, columns)
        response_column = columns.response or columns.messages
        if self._set.subject is not None:
            row["subject"] = cell(values, self._set.subject)
        if "rouge_l" in self._metrics and not metrics.words(row["response"]):
            raise Unscorable(f"column {response_column!r} has no word, of which rouge_l is a share")

        def sequence(role: str, response: str) -> dict[str, Any]:
            try:
                rendered = render(with_response(values, columns, response), columns, self._plain, self._tokenizer)
                if len(rendered.spans) > 1:  # of a conversation the last turn is the response
                    rendered = rendered._replace(spans=rendered.spans[-1:])
                return {"role": role, **tokens_of(rendered, self._set, self._encoder, self._limits)._asdict()}
            except Unscorable as problem:
                raise Unscorable(f"its {role}: {problem}" if role != ANSWER else str(problem)) from None

        answer = sequence(ANSWER, row["response"])
        sequences, truth, wrong = [answer], row["response"], []
        if self._set.wrong is not None:
            if self._set.paraphrase is not None:
                truth = cell(values, self._set.paraphrase)
                sequences.append(sequence(PARAPHRASE, truth))
            wrong = list_of_texts(values, self._set.wrong, self._set)
            sequences += [sequence(f"{WRONG}-{i}", text) for i, text in enumerate(wrong)]
        asked: dict[str, Any] = {"sequences": sequences, "extract": "extraction_likelihood" in self._metrics}
        if self._metrics & OF_ANSWERS:
            asked |= self._prompt(with_response(values, columns, row["response"]), columns)
        if "embedding_accuracy" in self._metrics:
            asked["alternatives"] = [truth, *wrong]
        return asked | {"classify": "toxicity" in self._metrics}

    def _prompt(self, values: dict[str, object], columns: Columns) -> dict[str, object]:
        """The tokens that go before the response, as the model met them in a sample with this response."""
        on_response = self._plain.model_copy(update={"score_on": "response", "truncate": False})
        rendered = render(values, columns, on_response, self._tokenizer)
        rendered = rendered._replace(spans=rendered.spans[-1:])
        tokens = tokens_of(rendered, on_response, self._encoder, Limits(None, self._limits.vocabulary))
        prompt = tokens.token_ids[: tokens.scored.index(True)]
        room = self._evaluation.max_new_tokens
        if self._max_tokens is not None:
            room = min(room, self._max_tokens - len(prompt))
        if room < 1:
            raise Unscorable(f"its prompt has {len(prompt)} tokens, which leave no room for an answer")
        return {"prompt_ids": prompt, "new_tokens": room}

    def _choice(self, values: dict[str, object], columns: Columns, row: dict[str, object]) -> dict[str, object]:
        """One sequence for each choice; they differ only in the letter at their end, which is what counts."""
        assert columns.prompt is not None
        assert columns.response is not None
        assert self._scheme is not None
        choices = choices_of(values, self._set)
        right = right_one(values, columns.response, choices, self._scheme)
        lettered = zip(string.ascii_uppercase, choices.texts, strict=False)
        asked = prompt_text(values, columns, self._set)
        question = "\n".join([asked, *(f"{letter}. {choice}" for letter, choice in lettered)])
        row |= {"prompt": question, "response": string.ascii_uppercase[right], "right": right}
        if self._set.subject is not None:
            row["subject"] = cell(values, self._set.subject)
        sequences = []
        for i in range(len(choices.texts)):
            letter = values | {columns.prompt: question, columns.response: string.ascii_uppercase[i]}
            rendered = render(letter, columns, self._plain, self._tokenizer)
            tokens = tokens_of(rendered, self._set, self._encoder, self._limits)
            sequences.append({"role": f"{CHOICE}-{i}", **tokens._asdict()})
        return {"sequences": sequences}

    def _text(self, text: str) -> dict[str, object]:
        """A text whole, or for perplexity in windows that overlap, each token being scored in the first that has it."""
        token_ids = self._encoder.framed(text)
        if self._limits.vocabulary is not None and max(token_ids, default=0) >= self._limits.vocabulary:
            raise Unscorable(self._encoder.outside(max(token_ids), self._limits.vocabulary))
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

    @property
    def _plain(self) -> EvaluatedSet:
        """The settings for rows whose response is already text."""
        return self._set.model_copy(update={"response_index": None, "response_join": None})

    def _asked_and_answered(self, values: dict[str, object], columns: Columns) -> tuple[str, str]:
        """A row's prompt and response, for people and judges; of a conversation, what its last turn answers."""
        if (chat := conversation(values, columns, self._set)) is not None:
            at = conversations.last_answer(chat.messages)
            asked = [turn["content"] for turn in chat.messages[:at] if turn["role"] != "system"]
            if not (answer := chat.messages[at]["content"]).strip():
                raise Unscorable("its last assistant turn is empty")
            return "\n".join(asked), answer
        if columns.response is None:
            raise UserError("metrics: answers are compared with a response; say which column that is with `response`")
        prompt = "" if columns.prompt is None else prompt_text(values, columns, self._set)
        return prompt, response_text(values, columns.response, self._set)
