"""Metrics of one row, computed from log-probabilities (nats) of its scored tokens, or from texts.

Means are over the tokens of a response, so that exp(mean(log p)) = P(a | q)^(1 / |a|) for any length.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from statistics import fmean
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

LogProbs = Sequence[float]
# Thai, Lao, Myanmar, Khmer, kana and Han: written without spaces between words
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
_SPACELESS += "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\s{_SPACELESS}]+")


def probability(answer: LogProbs) -> float:
    """P(a | q)^(1 / |a|) of TOFU (Maini et al., 2024, section 2.2.1), in (0, 1].

    >>> round(probability([math.log(0.5), math.log(0.125)]), 6)  # the geometric mean of 0.5 and 0.125
    0.25
    """
    return math.exp(fmean(answer))


def normalized_probability(answer: LogProbs, wrong: Sequence[LogProbs]) -> float:
    """TOFU's probability for choices: the answer's `probability` divided by the sum over all choices."""
    alternatives = [fmean(log_probs) for log_probs in [answer, *wrong]]
    highest = max(alternatives)  # a ratio of exponentials; each one might be too small for floats
    return math.exp(alternatives[0] - highest) / math.fsum(math.exp(x - highest) for x in alternatives)


def truth_ratio(paraphrase: LogProbs, wrong: Sequence[LogProbs]) -> float:
    """TOFU's R_truth: the probability of wrong answers relative to a paraphrase of the right one; over 1, higher.

    R = prod_i P(wrong_i | q)^(1 / |wrong_i| n) / P(paraphrase | q)^(1 / |paraphrase|)

    with a geometric mean over the n wrong answers, as in TOFU's code and published figures. (The formula in the
    article has an arithmetic mean.)
    """
    # far over any ratio that matters, and small enough that sums of squares, for standard errors, do not overflow
    return math.exp(min(fmean(map(fmean, wrong)) - fmean(paraphrase), 300.0))


def accuracy(paraphrase: LogProbs, wrong: Sequence[LogProbs]) -> float:
    """1 if the paraphrase of the right answer has a higher mean log-probability than every wrong one, else 0.

    Forget accuracy of arXiv 2504.06658 is the mean over the forget set; unlearning accuracy UA = 1 - forget accuracy.
    """
    return float(all(fmean(paraphrase) > fmean(log_probs) for log_probs in wrong))


def embedding_accuracy(similarities: Sequence[float]) -> float:
    """1 if the model's own answer is closer to the truth (the first) than to every wrong answer, else 0.

    Like `accuracy`, but for what the model says, not what it prefers. similarities: cosines of sentence embeddings.
    """
    return float(all(similarities[0] > other for other in similarities[1:]))


def multiple_choice(choices: Sequence[LogProbs], right: int) -> float:
    """1 if the letter of the right choice is the likeliest of the letters, else 0; the first wins a tie.

    >>> multiple_choice([[-3.0], [-0.5], [-2.0]], right=1)
    1.0
    """
    means = [fmean(log_probs) for log_probs in choices]
    return float(means.index(max(means)) == right)


def memorization_accuracy(correct: Sequence[bool]) -> float:
    """MA = sum_t 1{argmax p(. | x_<t) = x_t} / T (Tirumala et al., 2022), over the scored tokens."""
    return fmean(correct)


def min_k(log_probs: LogProbs, percent: float) -> float:
    """Min-k% Prob (Shi et al., 2024): mean log p of the k% least likely tokens (at least one). Higher: a member.

    >>> min_k([-1.0, -4.0, -0.5, -2.0], percent=50)
    -3.0
    """
    count = max(1, int(len(log_probs) * percent / 100))
    return fmean(sorted(log_probs)[:count])


def rouge_l(generated: str, answer: str) -> float:
    """ROUGE-L recall of a generated answer (Lin, 2004; stemmed, as in TOFU). RR of arXiv 2504.06658 is 1 - this.

    answer: must have at least one of `words`.
    """
    return float(_rouge().score(answer, generated)["rougeL"].recall)


def words(text: str) -> list[str]:
    """The words of a text that ROUGE-L counts, in lower case; characters, in scripts without spaces between words.

    ASCII words are split and stemmed by rouge_score, which would drop all characters but a-z and 0-9 from others.

    >>> words("He sold plum cakes.")
    ['he', 'sold', 'plum', 'cake']
    """
    text = unicodedata.normalize("NFC", text.lower())
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)  # letters, their marks, numbers
    split = _WORD.findall(kept)
    return [token for word in split for token in (_ascii().tokenize(word) if word.isascii() else [word])]


class _Words:
    tokenize = staticmethod(words)


@cache
def _ascii() -> Any:
    return DefaultTokenizer(use_stemmer=True)


@cache
def _rouge() -> Any:
    return RougeScorer(["rougeL"], tokenizer=_Words())
