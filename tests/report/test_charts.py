"""Charts say in words what they show; numbers are as people read them."""

import re

import numpy as np
import pytest

from mrd_ray.report import charts
from mrd_ray.report.charts import Line
from mrd_ray.report.words import number
from mrd_ray.scoring import summary


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (float("nan"), "-"), (0, "0"), (1234, "1,234"), (0.0051437, "0.005144"), (1e-5, "1e-5"),
     (float("inf"), "∞"), (-8.4761, "-8.476"), (99999.5, "99,999.5"), (1.5e9 + 0.5, "1.5e9")],
)  # fmt: skip
def test_numbers_as_people_read_them(value, shown):
    assert number(value) in (shown, shown.replace("99,999.5", "100,000"))


def ticks(svg: str) -> tuple[list[tuple[float, float]], list[float]]:
    """(label, pixel) of the y axis, and labels of the x axis."""
    found = re.findall(r'class="number" x="[^"]+" y="([^"]+)" text-anchor="(end|middle)">([^<]+)<', svg)
    labels = [(float(label.replace(",", "")), float(y), anchor) for y, anchor, label in found]
    return [(label, y) for label, y, anchor in labels if anchor == "end"], [at[0] for at in labels if at[2] == "middle"]


@pytest.mark.parametrize(
    "scores", [[0.005] * 40, [0.005, float(np.nextafter(0.005, 1)), 0.005], [0.0, 0.0, 0.0], [0.005]],
    ids=["equal", "equal but for rounding", "zero", "one"],
)  # fmt: skip
def test_scores_that_are_the_same(scores):
    mrd = np.array(scores)
    drawn = charts.distribution(mrd, np.zeros(len(mrd)))
    assert f"The score of {len(mrd)} sample{'s' if len(mrd) > 1 else ''} is {number(scores[0])}." in drawn.says
    assert drawn.svg.count('class="bar') == 1
    low, high = summary.histogram_edges(mrd)
    assert 0 <= low <= mrd.min()
    assert mrd.max() <= high <= max(1.2 * low / 0.9, 1.0)
    assert all(count % 1 == 0 for count, _ in ticks(drawn.svg)[0])


@pytest.mark.parametrize("n", [1, 2, 3, 19, 20, 21, 100])
def test_no_sample_is_both_hard_and_easy(n):
    hardest, easiest = summary.ends(range(n))
    assert not set(hardest) & set(easiest)
    assert len(hardest) + len(easiest) == min(n, 20)
    assert list(easiest) == sorted(easiest, reverse=True)


def test_axes_of_one_value():
    chart = charts.over_steps("t", "u", [Line("loss", [0], [-8.2])], [], None)
    assert chart is not None
    up, steps = ticks(chart.svg)
    assert len(up) > 1
    assert up == sorted(up, key=lambda at: -at[1])
    assert up == sorted(up)
    assert steps == [0, 1]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.2, 148.4, 1.3], "Loss goes from 1.2 at step 0 to 1.3 at step 2, highest 148.4 at step 1."),
        ([3.0, 1.0, 9.0, 2.0], "to 2 at step 3, lowest 1 at step 1, highest 9 at step 2."),
        ([3.0, 1.0, 1.0], "Loss goes from 3 at step 0 to 1 at step 2."),
    ],
)
def test_extremes_between_first_and_last_step(values, says):
    chart = charts.over_steps("t", "u", [Line("loss", range(len(values)), values)], [], None)
    assert chart is not None
    assert says in chart.says


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("a", True, [(0.9, None), (0.8, None), (0.7, None)]), ("b", True, [(0.9, None), (0.1, None), None])],
         "2 figures, each a dot. From r1 to r2, b changes most: 0.9 to 0.1."),
        ([("a", True, [(0.9, None), (0.9, None), (0.9, None)])], "1 figure, each a dot."),
        ([("a", False, [(0.9, None), (0.1, None), (0.2, None)])], "1 figure, each a dot."),
    ],
)  # fmt: skip
def test_which_figure_changes_most(rows, says):
    chart = charts.dots(["r1", "r2", "r3"], rows)
    assert chart is not None
    assert chart.says == says


def test_runs_without_a_rank_correlation():
    scores = np.stack([np.full(4, 0.005), np.arange(1.0, 5.0)], 1)
    assert "have no rank correlation, since in one" in charts.two_runs("a", "b", scores, None, float("nan")).says
