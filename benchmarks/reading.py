"""From a file to micro-batches: reading, tokenising and cutting, before anything is scored."""

import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import resident, stopwatch
from benchmarks.figures import Figure, Results
from mrd_ray import ScoreConfig
from mrd_ray.data import samples as samples_table
from mrd_ray.data.micro_batches import lay_out, lengths
from mrd_ray.data.tokens import Limits
from mrd_ray.models import load
from mrd_ray.runs import meter

_WORDS = ["she", "he", "they", "found", "the", "red", "ball", "under", "an", "old", "tree", "and", "took", "it", "home"]
_CHARACTERS = 200  # of a line's text
_SECONDS = 90.0  # for a million lines


def main(model: str, lines: int = 1_000_000, out: str = "benchmarks/results") -> None:
    """Benchmark reading: JSON lines of 200 characters, no two alike.

    Args:
        model: directory of a model, for its tokenizer and its limits.
        lines: number of lines of the file.
        out: folder of the JSON file.
    """
    results = Results("reading", locals(), out)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "forget.jsonl"
        _write(file, lines)
        config = ScoreConfig.model_validate(
            {"model": {"path": model}, "data": {"path": str(file)}, "run": {"dir": folder}}
        )
        tokenizer, limits = load.load_tokenizer(config.model), Limits.of(load.skeleton(config.model))
        lap = stopwatch()
        table = samples_table.build(config.data, tokenizer, limits, meter.console())
        read = lap()
        layout = lay_out(lengths(table), config.scoring.micro_batch_tokens)
        laid_out = lap()
    tokens = int(lengths(table).sum())
    peak = resident("VmHWM")
    results.keep("found", {"lines": lines, "tokens": tokens, "micro-batches": len(layout), "seconds": [read, laid_out]})
    whole = read + laid_out
    results.show(
        [
            Figure("read and tokenised", read, "s", f"{tokens:,} tokens; {lines / read:,.0f} lines/s"),
            Figure("laid out", laid_out, "s", f"{len(layout):,} micro-batches"),
            Figure("whole", whole, "s", f"{lines:,} lines", at_most=_SECONDS * lines / 1_000_000),
            Figure("peak", peak / 1024, "GiB", f"{table.nbytes / 2**30:.2f} GiB of it are the samples' table"),
        ]
    )


def _write(file: Path, lines: int) -> None:
    rng = np.random.default_rng(0)
    with file.open("w", encoding="utf-8") as out:
        for number in range(lines):
            text = " ".join([str(number), *(_WORDS[i] for i in rng.integers(len(_WORDS), size=60))])
            out.write(json.dumps({"text": text[:_CHARACTERS].ljust(_CHARACTERS, ".")}) + "\n")
