"""The forget, retain and refusal sets, tokenised once by the driver."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from mrd_ray.config import DataSettings, RetainSettings, UnlearnConfig
from mrd_ray.data import read
from mrd_ray.data import samples as samples_table
from mrd_ray.data.cells import Unscorable
from mrd_ray.data.render import render, with_response
from mrd_ray.data.samples import PLACE
from mrd_ray.data.tokens import Encoder, Limits, tokens_of
from mrd_ray.errors import UserError
from mrd_ray.unlearning.loop import Sets
from mrd_ray.unlearning.sampling import ShuffledStream

_REFUSALS = 8  # for each forget sample
_WATCHED_SEED = 1  # not the run's seed, so that runs with other seeds are measured on the same samples


def build(config: UnlearnConfig, tokenizer: PreTrainedTokenizerBase, limits: Limits, console: Console) -> Sets:
    """Read and tokenise. Says on the console what is left out of the retain set, and what is in both sets.

    Raises:
        UserError: a set is empty or unusable, a forget sample cannot be unlearned, or refusals do not fit.
    """
    forget = samples_table.build(config.data, tokenizer, limits, console)
    _refuse_unusable(read.described(config.data), forget)
    retain, watched = None, np.zeros(0, np.int64)
    if config.retain.path is not None:
        retain = _retain(config, tokenizer, limits, console)
        _warn_of_overlap(forget, retain, console)
        count = min(config.stopping.retain_samples, len(retain))
        watched = np.sort(ShuffledStream(len(retain), _WATCHED_SEED).at(0, count))
    refusals = None
    if config.unlearning.refusals is not None:
        refusals = _refusals(config, Path(config.unlearning.refusals), forget, tokenizer, limits)
    return Sets(forget, retain, refusals, watched)


def _refuse_unusable(path: str, forget: pa.Table) -> None:
    bad = forget.filter(pc.is_valid(forget["error"])).select(["sample_id", *PLACE, "error"]).to_pylist()
    if bad:
        reasons = [f": {row['error']}" for row in bad[:5]]
        named = "; ".join(f"{row['sample_id']}, {_where(row)}{why}" for row, why in zip(bad, reasons, strict=False))
        raise UserError(
            f"data.path: {len(bad)} of {len(forget)} samples of {path} cannot be unlearned ({named}"
            f"{'; ...' if len(bad) > 5 else ''}). Fix or remove them; data.truncate cuts long ones",
            *reasons,
        )


def _where(sample: dict[str, object]) -> str:
    of_file = "" if sample["file"] is None else f" of {sample['file']}"
    return f"row {sample['row']}{of_file}"


def retain_data(data: DataSettings, retain: RetainSettings) -> DataSettings:
    """Settings to read the retain set: like `data`, except for what `retain` sets."""
    own = retain.model_dump(exclude={"text", "messages"}) | {"where": {}}
    unlike = {"text": None, "prompt": None, "response": None, "messages": None, "id": "auto"}
    if retain.text is not None:
        own |= unlike | {"text": retain.text, "score_on": "all"}
    elif retain.messages is not None:
        own |= unlike | {"messages": retain.messages}
    return DataSettings(**(data.model_dump() | own))


def _retain(config: UnlearnConfig, tokenizer: PreTrainedTokenizerBase, limits: Limits, console: Console) -> pa.Table:
    data = retain_data(config.data, config.retain)
    try:
        retain = samples_table.build(data, tokenizer, limits, console)
    except UserError as problem:
        raise UserError(f"retain.path, read with the settings of data: {problem}", *problem.quotes) from None
    usable = retain.filter(pc.is_null(retain["error"]))
    if not len(usable):
        raise UserError(f"retain.path: {config.retain.path} holds no usable samples")
    if left_out := len(retain) - len(usable):
        reasons = retain["error"].drop_null().to_pylist()
        text = f"{left_out} of {len(retain)} retain samples are left out"
        text += f"; the first: {reasons[0]}" if config.output.texts else ""
        console.print(text, style="red", markup=False)
    return usable


def _warn_of_overlap(forget: pa.Table, retain: pa.Table, console: Console) -> None:
    shared = pc.sum(pc.is_in(forget["text"], value_set=retain["text"].combine_chunks())).as_py()
    if shared:
        console.print(
            f"{shared} of {len(forget)} forget samples are in the retain set too, which the model should still know",
            style="red",
        )


def _refusals(
    config: UnlearnConfig,
    path: Path,
    forget: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
) -> pa.Table:
    """Each forget sample's prompt with each of a few refusals as the response; only the response is scored."""
    lines = _lines(path)
    if read.texts(config.data) is not None:
        raise UserError(_NO_PROMPTS)
    if not tokenizer.is_fast:
        raise UserError("unlearning.method: po needs a fast tokenizer, which knows each token's place in the text")
    source = samples_table.Peeked(config.data)
    columns = source.columns
    if columns.response is None and columns.messages is None:
        raise UserError(_NO_PROMPTS)
    # a refusal is text, even if the responses are not
    on_response = config.data.model_copy(update={"score_on": "response", "response_index": None, "response_join": None})
    encoder, limits = Encoder(tokenizer), limits.with_context(config.data.max_tokens)
    each = min(_REFUSALS, len(lines))
    places = dict(zip(forget["index"].to_pylist(), range(len(forget)), strict=True))
    of_forget: dict[int, list[dict[str, object]]] = {}
    for row in source:
        if (i := places.get(row.index)) is None:
            continue
        of_forget[i] = []
        for j in np.sort(ShuffledStream(len(lines), config.unlearning.seed + i).at(0, each)).tolist():
            line, refusal = lines[j]
            try:
                rendered = render(with_response(row.values, columns, refusal), columns, on_response, tokenizer)
                tokens = tokens_of(rendered, on_response, encoder, limits)
            except Unscorable as problem:
                quote = f": {problem}"
                raise UserError(
                    f"unlearning.refusals: line {line} of {path}, with the prompt of {row.place}{quote}", quote
                ) from None
            sample = {"sample_id": f"{i}-{j}", "index": row.index, "file": row.file, "row": row.number}
            of_forget[i].append(sample | {"text": rendered.text, **tokens._asdict()})
    if len(of_forget) < len(forget):
        raise UserError(
            f"data.path: {read.described(config.data)} changed while it was read; run the same command again once "
            "nothing writes to it"
        )
    return pa.Table.from_pylist([row for i in range(len(forget)) for row in of_forget[i]], samples_table.SCHEMA)


_NO_PROMPTS = "unlearning.method: po needs prompts and responses, or conversations, not texts"


def _lines(path: Path) -> list[tuple[int, str]]:
    """The refusals with their line numbers."""
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError, UnicodeError) as problem:
        raise UserError(f"unlearning.refusals: cannot read {path}: {problem}") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"unlearning.refusals: {path} has no lines; expected a refusal on each")
    return lines
