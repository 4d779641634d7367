"""The samples table: a forget set with stable ids, tokenised once, before anything is scored."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from mrd_ray.config import DataConfig
from mrd_ray.data import read
from mrd_ray.data.tokens import Tokens, Unscorable, choose_columns, is_id, render, tokenize
from mrd_ray.errors import UserError

_PEEK = 1000  # JSON rows need not name the same columns: the first so many together say which are there

SCHEMA = pa.schema(  # large types: all tokens or characters of a column may be over 2^31
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False, metadata={"unit": "place in the whole source, from 0"}),
        pa.field("file", pa.string(), metadata={"unit": "the source file, null where there is only one"}),
        pa.field("row", pa.int64(), nullable=False, metadata={"unit": "line or record of that file, from 1"}),
        pa.field("text", pa.large_string(), metadata={"unit": "the sample as the model sees it"}),
        pa.field("token_ids", pa.large_list(pa.int32())),
        pa.field("scored", pa.large_list(pa.bool_()), metadata={"unit": "per token, whether it counts"}),
        pa.field("error", pa.string(), metadata={"unit": "null, or why the sample cannot be scored"}),
    ]
)


def build(data: DataConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None) -> pa.Table:
    """Read, render and tokenise `data`: one row per sample, sorted by sample_id, of SCHEMA.

    A sample that cannot be scored keeps its row, with the reason in `error` and null tokens.

    Raises:
        UserError: the source as a whole is unusable, or two rows carry the same id.
    """
    if data.score_on == "response" and not tokenizer.is_fast:
        raise UserError("data.score_on: response needs a fast tokenizer, which knows each token's place in the text")
    limits = [limit for limit in (data.max_tokens, context_length) if limit is not None]
    max_tokens = min(limits, default=None)
    if data.path.lower().endswith(".txt"):
        samples = _windows(data, tokenizer, max_tokens)
    else:
        samples = _rows(data, tokenizer, max_tokens)
    table = pa.Table.from_batches(_batches(samples), SCHEMA)
    _refuse_duplicates(data.path, table)
    return table.sort_by("sample_id")


def digest(table: pa.Table) -> str:
    """Digest of what is scored: ids, tokens, masks and errors, whatever the order of the source's rows."""
    state = hashlib.sha256()
    for batch in table.select(["sample_id", "token_ids", "scored", "error"]).to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            state.update(repr(list(row.values())).encode())
    return state.hexdigest()


def _batches(samples: Iterable[dict[str, Any]], size: int = 4096) -> Iterator[pa.RecordBatch]:
    pending: list[dict[str, Any]] = []
    for sample in samples:
        pending.append(sample)
        if len(pending) == size:
            yield pa.RecordBatch.from_pylist(pending, SCHEMA)
            pending = []
    yield pa.RecordBatch.from_pylist(pending, SCHEMA)


def _rows(data: DataConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> Iterator[dict[str, Any]]:
    rows = read.rows(data)
    peeked = list(itertools.islice(rows, _PEEK))
    present = dict.fromkeys(name for _, values in peeked for name in values)  # in order
    columns = choose_columns(data, list(present), data.path)
    if data.template == "chat" and columns.text is None and tokenizer.chat_template is None:
        raise UserError("data.template: chat, but the tokenizer has no chat template; give a format string")
    seen: Counter[str] = Counter()
    for index, (number, values) in enumerate(itertools.chain(peeked, rows)):
        if not values.keys() <= present.keys():
            present |= dict.fromkeys(values)
            where = f"{data.path}, row {number}, which names columns that the first {_PEEK} do not"
            if (late := choose_columns(data, list(present), where).id) != columns.id:
                raise UserError(f"{where}: among them {late!r}, an id; give every row one, or rename it")
        sample: dict[str, Any] = {"index": index, "row": number}
        try:
            rendered = render(values, columns, data, tokenizer)
            sample["text"] = rendered.text
            sample |= tokenize(rendered, data, tokenizer, max_tokens)._asdict()
        except Unscorable as problem:
            sample["error"] = str(problem)
        if columns.id is None:
            sample["sample_id"] = digest_id([values.get(column) for column in columns if column], seen)
        elif is_id(own := values.get(columns.id)):
            sample["sample_id"] = str(own)
        else:
            reason = f"column {columns.id!r}, the id, is {own!r:.40}; expected text or a whole number"
            sample |= {"sample_id": f"row-{number}", "token_ids": None, "scored": None, "error": reason}
        yield sample


def _windows(data: DataConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> Iterator[dict[str, Any]]:
    """A text file cut into windows of `window_tokens`, each with the special tokens a text starts with."""
    if data.score_on == "response":
        raise UserError(f"data.score_on: response, but {data.path} is plain text and has no responses")
    size = data.window_tokens
    if max_tokens is not None and size > max_tokens:
        raise UserError(f"data.window_tokens: {size} is over the model's limit of {max_tokens} tokens")
    stream = tokenizer(read.text(data.path), add_special_tokens=False, verbose=False)["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    step = size - len(bos)
    seen: Counter[str] = Counter()
    for number, begin in enumerate(range(0, len(stream), step), 1):
        if data.max_samples is not None and number > data.max_samples:
            return
        token_ids = bos + stream[begin : begin + step]
        sample: dict[str, Any] = {"index": number - 1, "row": number, "text": tokenizer.decode(token_ids, skip_special_tokens=True)}
        if len(token_ids) < 2:
            sample["error"] = "a last window of one token, which has no token before it"
        else:
            sample |= Tokens(token_ids, [False] + [True] * (len(token_ids) - 1))._asdict()
        sample["sample_id"] = digest_id([sample["text"]], seen)
        yield sample


def digest_id(cells: list[Any], seen: Counter[str]) -> str:
    """A digest of all that a sample is made of, numbered where samples repeat, so that ids survive reordering."""
    stem = hashlib.sha256(json.dumps(cells, default=repr).encode()).hexdigest()[:16]
    seen[stem] += 1
    return stem if seen[stem] == 1 else f"{stem}-{seen[stem]}"


def _refuse_duplicates(path: str, table: pa.Table) -> None:
    counts = pc.value_counts(table["sample_id"])
    repeated = (
        [entry["values"] for entry in counts.to_pylist() if entry["counts"] > 1] if len(counts) < len(table) else []
    )
    if not repeated:
        return
    first = repeated[0]
    where = table.filter(pc.equal(table["sample_id"], first))["row"].to_pylist()
    raise UserError(
        f"{path}: {len(repeated)} id(s) stand more than once; {first!r} in rows {', '.join(map(str, where))}. "
        "Make ids unique, or name another column with data.id"
    )
