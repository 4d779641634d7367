"""Metrics and figures against definitions written out, other libraries, and cases known beforehand."""

import json
import math
import random
import re
from itertools import product
from pathlib import Path
from statistics import harmonic_mean
from typing import get_args

import numpy as np
import pytest
import scipy.stats
from evaluations import rouge_l_recall
from rouge_score.rouge_scorer import RougeScorer

from mrd_ray.config import Metric
from mrd_ray.evaluation import aggregate, metrics, zero_shot

ANSWER, WRONG = [-0.1, -2.0, -0.3], [[-1.0, -3.0], [-0.5, -0.5, -4.0, -1.0]]


def test_probability_is_the_geometric_mean_of_token_probabilities():
    assert metrics.probability(ANSWER) == pytest.approx((math.exp(-0.1) * math.exp(-2) * math.exp(-0.3)) ** (1 / 3))


def test_normalized_probability_is_a_share_of_the_alternatives():
    alternatives = [math.exp(np.mean(x)) for x in [ANSWER, *WRONG]]
    assert metrics.normalized_probability(ANSWER, WRONG) == pytest.approx(alternatives[0] / sum(alternatives))
    assert metrics.normalized_probability([-2000.0], [[-2000.0]]) == 0.5  # which exp alone would make 0 / 0


def test_truth_ratio_is_the_geometric_mean_of_wrong_answers_over_the_truth():
    wrong = [math.exp(np.mean(x)) for x in WRONG]
    expected = math.sqrt(wrong[0] * wrong[1]) / math.exp(np.mean(ANSWER))
    assert metrics.truth_ratio(ANSWER, WRONG) == pytest.approx(expected)


def test_accuracy_wants_the_truth_before_every_wrong_answer_and_ties_lose():
    assert metrics.accuracy(ANSWER, WRONG) == 1
    assert metrics.accuracy(ANSWER, [*WRONG, [-0.2]]) == 0
    assert metrics.accuracy([-1.0], [[-1.0]]) == 0


def test_multiple_choice():
    choices = [[-3.0], [-0.5], [-2.0], [-0.7]]
    assert [metrics.multiple_choice(choices, right) for right in range(4)] == [0, 1, 0, 0]


@pytest.mark.parametrize(("percent", "expected"), [(20, -5.0), (40, -4.5), (60, -4.0), (1, -5.0), (100, -3.0)])
def test_min_k_is_the_mean_of_the_least_likely(percent, expected):
    assert metrics.min_k([-1.0, -5.0, -3.0, -2.0, -4.0], percent) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("generated", "answer"),
    [
        ("The cat sat on the mat.", "A cat is sitting on the mats!"),
        ("", "Something"),
        ("Nothing alike", "bells ring"),
        ("bells bells bells ring", "ring the bells"),
        ("Ils ont mangé à l'été 1994", "été 1994"),
        ("Это Париж, столица", "Париж — столица Франции"),
    ],
)
def test_rouge_l_is_recall_of_the_longest_common_subsequence(generated, answer):
    assert metrics.rouge_l(generated, answer) == pytest.approx(rouge_l_recall(generated, answer))


def test_rouge_l_of_ascii_text_is_that_of_rouge_score(tofu_dir):
    lines = (tofu_dir / "retain_perturbed.json").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if (row["answer"] + row["paraphrased_answer"]).isascii()]
    assert len(rows) > 300
    plain = RougeScorer(["rougeL"], use_stemmer=True)
    for row in rows:
        expected = plain.score(row["answer"], row["paraphrased_answer"])["rougeL"].recall
        assert metrics.rouge_l(row["paraphrased_answer"], row["answer"]) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Running, o'er_all", ["run", "o", "er", "all"]),
        ("Cafe\u0301s и Франции", ["cafés", "и", "франции"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("東京は big", ["東", "京", "は", "big"]),
        ("... — !", []),
    ],
)
def test_words_are_of_any_script(text, words):
    assert metrics.words(text) == words


def test_membership_auc_counts_pairs():
    draw = random.Random(0)
    members, others = [draw.choice([1, 2, 3, 4]) for _ in range(30)], [draw.choice([0, 1, 2, 3]) for _ in range(40)]
    won = sum((a > b) + 0.5 * (a == b) for a, b in product(members, others)) / (30 * 40)
    found = aggregate.membership_auc("auc", members, others)
    assert found.value == pytest.approx(won)
    assert won > 0.5  # the direction: members have the higher values
    resampled = [
        scipy.stats.mannwhitneyu(draw.choices(members, k=30), draw.choices(others, k=40)).statistic / (30 * 40)
        for _ in range(2000)
    ]
    assert found.se == pytest.approx(np.std(resampled), rel=0.2)


def test_forget_quality_is_high_for_the_same_distribution_and_low_for_another():
    draw = np.random.default_rng(0)
    same, other = (
        aggregate.forget_quality(draw.normal(size=200), draw.normal(size=200)),
        aggregate.forget_quality(draw.normal(size=200), draw.normal(size=200) + 1),
    )
    assert same.value > 0.05 > other.value


def test_model_utility_is_a_harmonic_mean_and_zero_where_a_part_is():
    assert aggregate.model_utility([0.2, 0.5, 0.9]) == pytest.approx(harmonic_mean([0.2, 0.5, 0.9]))
    assert aggregate.model_utility([0.2, 0.0, 0.9]) == 0


def test_mean_has_the_standard_error_of_a_mean():
    values = [0.0, 1.0, 1.0, 0.5]
    found = aggregate.mean("set", "metric", values)
    assert (found.value, found.rows) == (0.625, 4)
    assert found.se == pytest.approx(scipy.stats.sem(values))
    assert aggregate.mean("set", "metric", [1.0]).se is None


def test_truth_ratios_of_any_model_have_a_mean_and_a_standard_error():
    ratios = [metrics.truth_ratio([-9e5], [[-1.0]])] * 20_000
    found = aggregate.mean("set", "truth_ratio", [*ratios, 0.5])
    assert math.isfinite(found.value)
    assert math.isfinite(found.se)


def test_figures_of_the_harness_have_the_rows_of_groups_and_null_for_what_is_no_number():
    group = {"alias": "mmlu", "sample_len": 12, "acc,none": math.nan, "acc_stderr,none": math.nan}
    task = {"sample_len": 4, "acc,strict": 0.5, "acc_stderr,strict": "N/A"}
    given = {"results": {"mmlu": group, "anatomy": task}, "n-samples": {"anatomy": {"original": 9, "effective": 4}}}
    assert [aggregate.Figure(**figure).plain() for figure in zero_shot.figures_of(given)] == [
        {"set": "mmlu", "metric": "acc", "value": None, "se": None, "rows": 12},
        {"set": "anatomy", "metric": "acc (strict)", "value": 0.5, "se": None, "rows": 4},
    ]


def test_the_reference_defines_every_metric():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [*get_args(Metric)]
