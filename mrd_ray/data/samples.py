"""The samples table: a forget set with stable ids, tokenised once before scoring."""

import contextlib
import gc
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from mrd_ray.config import DataSettings
from mrd_ray.data import columns as of_columns
from mrd_ray.data import conversations, read
from mrd_ray.data.cells import Unscorable, is_id, lookup
from mrd_ray.data.columns import Columns
from mrd_ray.data.conversations import is_conversation
from mrd_ray.data.files import Say
from mrd_ray.data.read import Row
from mrd_ray.data.render import Rendered, render
from mrd_ray.data.tokens import Encoder, Limits, Tokenized, tokenize
from mrd_ray.errors import UserError
from mrd_ray.runs.meter import Tally

T = TypeVar("T")
PEEKED = 1000  # rows may lack columns, so the first PEEKED rows together show which there are
_BATCH = 4096

PLACE = (
    "index",
    "file",
    "row",
)  # a sample's position in its source: people index data sets by position, not by our ids
SCHEMA = pa.schema(  # large types: a column may have more than 2^31 tokens or characters
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field(
            "index", pa.int64(), nullable=False, metadata={"unit": "place in the source, sliced by data.split, from 0"}
        ),
        pa.field("file", pa.string(), metadata={"unit": "the source file, null where there is only one"}),
        pa.field("row", pa.int64(), nullable=False, metadata={"unit": "line or record of that file, from 1"}),
        pa.field("text", pa.large_string(), metadata={"unit": "the sample as the model sees it"}),
        pa.field("token_ids", pa.large_list(pa.int32())),
        pa.field("scored", pa.large_list(pa.bool_()), metadata={"unit": "per token, whether it counts"}),
        pa.field("error", pa.string(), metadata={"unit": "null, or why the sample cannot be scored"}),
    ]
)


def build(
    data: DataSettings, tokenizer: PreTrainedTokenizerBase, limits: Limits, console: Console | None = None
) -> pa.Table:
    """Read, render and tokenise `data`: a table of SCHEMA, one row per sample, sorted by sample_id.

    A sample that cannot be scored keeps its row, with the reason in `error` and null tokens.

    Args:
        console: shows which columns are used and which are not, progress, and what is unusual about the samples.

    Raises:
        UserError: the source as a whole is unusable, or two rows have the same id.
    """
    if data.score_on == "response" and not tokenizer.is_fast:
        raise UserError(
            "data.score_on: response needs a fast tokenizer, which reports each token's position in the text"
        )
    console = console or Console(quiet=True)
    builder = _Builder(data, tokenizer, limits.with_context(data.max_tokens), console)
    console.print(f"Reading {read.described(data)}", markup=False, highlight=False, soft_wrap=True)
    with Tally("Reading", "samples", console) as tally, _garbage_of_samples_alone():
        table = pa.Table.from_batches(builder.batches(tally), SCHEMA)
    builder.say_what_is_odd()
    return with_unique_ids(data, table).sort_by("sample_id")


@contextlib.contextmanager
def _garbage_of_samples_alone() -> Iterator[None]:
    """Exclude existing objects from garbage collection, which otherwise takes a quarter of the reading time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def digest(table: pa.Table) -> str:
    """Digest of what is scored: ids, tokens, masks and errors. It does not depend on the order of the source's rows."""
    state = hashlib.sha256()
    for batch in table.select(["sample_id", "token_ids", "scored", "error"]).to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            state.update(repr(list(row.values())).encode())
    return state.hexdigest()


class Peeked:
    """The rows of a source, and the columns used: the first rows decide which, and later rows are checked."""

    def __init__(self, data: DataSettings, say: Say = read.quiet) -> None:
        self._data = data
        rows = read.rows(data, say)
        first = list(itertools.islice(rows, PEEKED))
        self.present = of_columns.kinds(row.values for row in first)
        self.columns = of_columns.choose(data, self.present, read.described(data))
        self._rows = itertools.chain(first, rows)

    def __iter__(self) -> Iterator[Row]:
        """Raises UserError if a later row fills a column that would have been chosen had it been filled earlier."""
        blank = self._blank()
        for row in self._rows:
            new = row.values.keys() - self.present.keys()
            if new or any(of_columns.kind(row.values.get(name)) != "nothing" for name in blank):
                self._look_again(row, new)
                blank = self._blank()
            yield row

    def _blank(self) -> list[str]:
        return [name for name, kind in self.present.items() if kind == "nothing"]

    def _look_again(self, row: Row, new: Collection[str]) -> None:
        """Raises UserError if other columns would be chosen now."""
        found = of_columns.kinds([row.values])
        filled = {name: found[name] for name in self._blank() if found.get(name, "nothing") != "nothing"}
        self.present |= filled | {name: found[name] for name in new}
        what = ", ".join([*sorted(new), *filled])
        where = (
            f"{read.described(self._data)}, {row.place}, which fills columns that the first {PEEKED} do not ({what})"
        )
        chosen = of_columns.choose(self._data, self.present, where)
        if chosen.id != self.columns.id:
            raise UserError(f"{where}: one of them is {chosen.id!r}, an id; give every row one, or rename it")
        if chosen != self.columns:
            raise UserError(
                f"{where}: from here on samples would be made of {chosen}, not of {self.columns}; "
                "name the columns to use (data.text, data.messages, or data.prompt and data.response)"
            )

    def refuse_chat_without_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError if all samples need a chat template and the tokenizer has none."""
        columns = self.columns
        named = columns.messages or ", ".join(columns.chats)
        chat = bool(named) or (self._data.template == "chat" and columns.text is None)
        if chat and tokenizer.chat_template is None:
            of_turns = self._data.template != "chat"
            cause = f"column {named} holds conversations" if of_turns else "data.template: chat"
            raise UserError(
                f"{cause}, but the tokenizer has no chat template; set model.tokenizer to one that has"
                + ("" if of_turns else ", or give a format string in data.template")
            )

    def say_columns(self, console: Console, more: Collection[str] = ()) -> None:
        """Print which columns are used and which are not. more: columns with other uses than samples."""
        left = [name for name in of_columns.unused(self.columns, self.present) if name not in more]
        text = f"Columns: {self.columns}" + (f"; not used: {', '.join(left)}" if left else "")
        console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Builder:
    def __init__(
        self, data: DataSettings, tokenizer: PreTrainedTokenizerBase, limits: Limits, console: Console
    ) -> None:
        self._data, self._tokenizer, self._limits, self._console = data, tokenizer, limits, console
        self._encoder = Encoder(tokenizer)
        self._seen: Counter[str] = Counter()
        self._own_special: Counter[tuple[int, ...]] = Counter()
        self._within: Counter[int] = Counter()

    def batches(self, tally: Tally) -> Iterator[pa.RecordBatch]:
        texts = read.texts(self._data, self._say)
        for batch in self._of_rows() if texts is None else _by_batch(self._windows(texts)):
            yield pa.RecordBatch.from_pylist(batch, SCHEMA)
            tally.advance(len(batch))

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say_what_is_odd(self) -> None:
        """Print notices about special tokens in the text of samples."""
        for own, count in self._own_special.items():
            names = " and ".join(map(str, self._tokenizer.convert_ids_to_tokens(list(own))))
            self._say(f"{count} sample(s) already have {names} in their text; it is not added again")
        for token_id, count in self._within.items():
            name = self._tokenizer.convert_ids_to_tokens(token_id)
            self._say(f"{count} sample(s) have {name} within their text, where it is scored like any token; check this")

    def _of_rows(self) -> Iterator[list[dict[str, object]]]:
        source = Peeked(self._data, self._say)
        source.refuse_chat_without_template(self._tokenizer)
        source.say_columns(self._console)
        for batch in _by_batch(source):
            yield self._samples(batch, source.columns)

    def _samples(self, rows: Sequence[Row], columns: Columns) -> list[dict[str, object]]:
        rendered: list[Rendered | Unscorable] = []
        for row in rows:
            try:
                rendered.append(render(row.values, columns, self._data, self._tokenizer))
            except Unscorable as problem:
                rendered.append(problem)
        good = [one for one in rendered if isinstance(one, Rendered)]
        tokenized = iter(tokenize(good, self._data, self._encoder, self._limits))
        samples = []
        for row, one in zip(rows, rendered, strict=True):
            sample: dict[str, object] = {"index": row.index, "file": row.file, "row": row.number}
            found: Tokenized | Unscorable
            if isinstance(one, Rendered):
                sample["text"] = one.text
                found = next(tokenized)
            else:
                found = one
            if isinstance(found, Unscorable):
                sample["error"] = str(found)
            else:
                sample |= found.tokens._asdict()
                if found.own_special:
                    self._own_special[found.own_special] += 1
                self._within.update(found.within)
            name_sample(sample, row, columns, self._data, self._seen)
            samples.append(sample)
        return samples

    def _windows(self, texts: Sequence[tuple[str | None, str]]) -> Iterator[dict[str, Any]]:
        """Windows of `window_tokens` of the text files, each with the special tokens that a text starts with."""
        data = self._data
        if data.score_on == "response":
            raise UserError(f"data.score_on: response, but {read.described(data)} is plain text and has no responses")
        size = data.window_tokens
        if self._limits.context is not None and size > self._limits.context:
            raise UserError(f"data.window_tokens: {size} is over the model's limit of {self._limits.context} tokens")
        return read.drawn(data, self._all_windows(texts, size), lambda window: int(window["index"]))

    def _all_windows(self, texts: Sequence[tuple[str | None, str]], size: int) -> Iterator[dict[str, Any]]:
        before, index = self._encoder.before, 0
        step = size - len(before)
        for file, text in texts:
            ((stream, _),) = self._encoder.encode([text], offsets=False)
            if before and stream[: len(before)] == before:  # added to each window instead
                stream = stream[len(before) :]
            for number, begin in enumerate(range(0, len(stream), step), 1):
                token_ids = before + stream[begin : begin + step]
                sample: dict[str, object] = {"index": index, "file": file, "row": number}
                sample["text"] = self._tokenizer.decode(token_ids, skip_special_tokens=True)
                top = max(token_ids)
                if len(token_ids) < 2:
                    sample["error"] = "a last window of one token, which has no token before it"
                elif self._limits.vocabulary is not None and top >= self._limits.vocabulary:
                    sample["error"] = self._encoder.outside(top, self._limits.vocabulary)
                else:
                    sample |= {"token_ids": token_ids, "scored": [False] + [True] * (len(token_ids) - 1)}
                sample["sample_id"] = digest_id([sample["text"]], self._seen)
                self._within.update(self._encoder.special & set(token_ids[len(before) :]))
                index += 1
                yield sample


def _by_batch(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield batch


def name_sample(sample: dict[str, object], row: Row, columns: Columns, data: DataSettings, seen: Counter[str]) -> None:
    """Set a sample's id. If the id column's value cannot be one, the sample gets an error.

    seen: how often each digest has occurred so far.
    """
    if columns.id is None:
        made_of = [_canonical(lookup(row.values, column)) for column in columns.used]
        sample["sample_id"] = digest_id(made_of, seen)
        return
    own = lookup(row.values, columns.id)
    if is_id(own):
        sample["sample_id"] = str(own)
        return
    reason = f"column {columns.id!r}, the id, is {own!r:.40}; expected text or a whole number"
    reason += "" if data.id == columns.id else ", or data.id: null for digests of the samples"
    place = f"row-{row.number}" if row.file is None else f"{row.file}-row-{row.number}"
    sample |= {"sample_id": place, "token_ids": None, "scored": None, "error": reason}


def digest_id(cells: list[object], seen: Counter[str]) -> str:
    """A digest of all that a sample is made of, numbered if samples repeat. Such ids survive reordering."""
    stem = hashlib.sha256(json.dumps(cells, default=repr).encode()).hexdigest()[:16]
    seen[stem] += 1
    return stem if seen[stem] == 1 else f"{stem}-{seen[stem]}"


def _canonical(value: object) -> object:
    """A cell in a form that does not depend on the file format: CSV has no numbers, nulls or lists."""
    if value is None:
        return ""
    if is_conversation(value):
        try:
            return conversations.messages(value, "")
        except Unscorable:
            return value
    return str(value) if type(value) in (int, float) else value


def with_unique_ids(data: DataSettings, table: pa.Table) -> pa.Table:
    """The table; with data.id_with_row, repeated ids are made unique.

    Args:
        table: with columns sample_id, file and row.

    Raises:
        UserError: ids repeat, and the settings do not say what to do about it.
    """
    if not (repeated := _repeated(table)):
        return table
    if data.id_with_row:
        places = zip(*(table[name].to_pylist() for name in ("sample_id", "file", "row")), strict=True)
        numbered = [
            name if name not in repeated else f"{name}#{row}" if file is None else f"{name}#{file}#{row}"
            for name, file, row in places
        ]
        table = table.set_column(0, table.schema.field("sample_id"), pa.array(numbered, pa.string()))
        if not (repeated := _repeated(table)):
            return table
        raise UserError(
            f"{read.described(data)}: {min(repeated)!r}, an id made unique by its row, is also the id of another row; "
            "set data.id: null for digests of the samples, or name another column with data.id"
        )
    first = min(repeated)
    where = table.filter(pc.equal(table["sample_id"], first))["row"].to_pylist()
    rows = ", ".join(map(str, where[:5])) + (", ..." if len(where) > 5 else "")
    raise UserError(
        f"{read.described(data)}: {len(repeated)} id(s) appear more than once, for example {first!r} in rows {rows}. "
        f"If ids are of documents, set data.id_with_row: true for ids like {first}#{where[0]}, or data.id: null for "
        "digests of the samples; otherwise make ids unique, or name another column with data.id"
    )


def _repeated(table: pa.Table) -> set[str]:
    counts = pc.value_counts(table["sample_id"])
    if len(counts) == len(table):
        return set()
    return {entry["values"] for entry in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist()}
