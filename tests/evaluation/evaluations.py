"""Settings and values of runs, and a ROUGE of our own to hold the library against."""

from itertools import product
from pathlib import Path

import numpy as np
from nltk.stem import PorterStemmer

from mrd_ray import EvaluateConfig
from mrd_ray.evaluation.evaluate import EvaluateRun


def config(model: Path, settings: dict, run: Path, actors: int = 1, **evaluation: object) -> EvaluateConfig:
    """Settings of a run."""
    return EvaluateConfig(
        model={"path": str(model)},
        evaluation=settings | evaluation,
        run={"dir": str(run)},
        ray={"actors": actors, "cpus_per_process": 1},
    )


def values(run: EvaluateRun, name: str, metric: str) -> dict[str, float]:
    """Of a metric on a set, by row."""
    return {
        line["sample_id"]: line["value"]
        for line in run.lines.to_pylist()
        if (line["set"], line["metric"]) == (name, metric)
    }


def rouge_l_recall(generated: str, answer: str) -> float:
    """Longest common subsequence over the answer's length, by the textbook table."""
    stem = PorterStemmer().stem

    def words(text):
        kept = "".join(character if character.isalnum() else " " for character in text.lower())
        return [stem(word) if len(word) > 3 and word.isascii() else word for word in kept.split()]

    a, b = words(generated), words(answer)
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, j in product(range(len(a)), range(len(b))):
        table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1] / len(b) if b else 0.0
