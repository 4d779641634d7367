"""Table 7: which characteristics do samples have that are hard to unlearn?"""

import re
from collections import Counter
from collections.abc import Iterable

import matplotlib.figure
import numpy as np

from jobs.paper.config import Table7Config
from jobs.paper.findings import Cell, Findings
from jobs.paper.statistics import spearman
from jobs.paper.subject import Subject, prepare
from mrd_ray.config import DataSettings
from mrd_ray.config.data import is_plain_text
from mrd_ray.data import read
from mrd_ray.errors import UserError

_CLAIM = (
    "MRD correlates with a sample's characteristics: its semantic complexity, its frequency, its initial probability, "
    "and whether it has rare words."
)


def experiment(config: Table7Config) -> tuple[Findings, Subject]:
    """Compare MRD of samples with less and with more of each characteristic."""
    subject = prepare(config, {"experiment": "table7"})
    scores = subject.score(config, config.ray).scores
    mrd, tokens = (scores[name].to_pylist() for name in ("mrd", "num_tokens"))
    texts = subject.samples["text"].to_pylist()
    others = [] if subject.retained is None else subject.retained["text"].to_pylist()
    common = _common(config, [*texts, *others])
    characteristics = {
        "semantic complexity: different words / sqrt(words)": [complexity(words(text)) for text in texts],
        "frequency: share of 3-grams that other samples have": frequencies(texts, others),
        "initial probability, per token": np.exp(scores["mean_log_prob"].to_numpy()).tolist(),
        "rare words: share of words that are not common": [rarity(words(text), common) for text in texts],
    }
    rows = [_row(name, values, mrd, tokens) for name, values in characteristics.items()]
    tests = {name: spearman(values, mrd, tokens, comparisons=len(rows)) for name, values in characteristics.items()}
    held = {name: of for name, of in tests.items() if of.decided}
    verdict = "Agrees" if len(held) == len(tests) else "Agrees in part" if held else "Undecided"
    found = [
        f"{verdict}: {len(held)} of {len(tests)} characteristics correlate with MRD at equal length, beyond chance for "
        "all of them together."
    ]
    for name, of in held.items():
        found.append(f"The more {name.split(':')[0]}, the {_easier(of.value)} to unlearn by its MRD.")
    known = "both sets" if config.corpus is None else config.corpus
    found.append(
        f"{len(texts)} samples, and {len(others)} of the retain set. Common are the {config.common_words} most "
        f"frequent words of {known}. MRD sums over tokens, so length must be held fixed."
    )
    title = "Table 7: characteristics of samples and their MRD"
    return Findings("table7", title, _CLAIM, rows, found, _page(characteristics, mrd)), subject


def words(text: str) -> list[str]:
    """Words of a text, in lower case."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def complexity(of: list[str]) -> float:
    """Guiraud's index of lexical diversity: different words divided by the square root of all words."""
    return len(set(of)) / len(of) ** 0.5 if of else 0.0


def rarity(of: list[str], common: set[str]) -> float:
    """Share of words that are not common."""
    return sum(word not in common for word in of) / len(of) if of else 0.0


def frequencies(texts: list[str], others: list[str], n: int = 3) -> list[float]:
    """For each text, the share of its word n-grams that also occur in another of the texts, or in one of `others`."""
    grams = [_grams(text, n) for text in texts]
    count = Counter(gram for one in (*grams, *(_grams(text, n) for text in others)) for gram in one)
    return [sum(count[gram] > 1 for gram in one) / len(one) if one else 0.0 for one in grams]


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    of = words(text)
    return {tuple(of[i : i + n]) for i in range(len(of) - n + 1)}


def _common(config: Table7Config, texts: Iterable[str]) -> set[str]:
    """The most frequent words of the corpus."""
    corpus = texts
    if config.corpus is not None:
        if not is_plain_text(config.corpus):
            raise UserError(f"corpus: {config.corpus} is no .txt file")
        corpus = [text for _, text in read.texts(DataSettings(path=config.corpus)) or []]
    count = Counter(word for text in corpus for word in words(text))
    return {word for word, _ in count.most_common(config.common_words)}


def _row(name: str, values: list[float], mrd: list[float], tokens: list[int]) -> dict[str, Cell]:
    middle = float(np.median(values))
    less = [m for m, value in zip(mrd, values, strict=True) if value <= middle]
    more = [m for m, value in zip(mrd, values, strict=True) if value > middle]
    return {
        "characteristic": name,
        "median": middle,
        "MRD, with less": float(np.mean(less)),
        "MRD, with more": float(np.mean(more)) if more else None,
        "Spearman with MRD": spearman(values, mrd),
        "at equal length": spearman(values, mrd, tokens),
    }


def _easier(of: float) -> str:
    return "easier" if of > 0 else "harder"


def _page(characteristics: dict[str, list[float]], mrd: list[float]) -> matplotlib.figure.Figure:
    page = matplotlib.figure.Figure(figsize=(13, 3.6), layout="constrained")
    for axis, (name, values) in zip(page.subplots(1, len(characteristics)), characteristics.items(), strict=True):
        axis.plot(values, mrd, "o", color="#4878a8", alpha=0.7)
        axis.set(xlabel=name.replace(": ", ":\n"), ylabel="MRD")
        axis.xaxis.label.set_fontsize(8)
    return page
