"""Agreement of score tables against scipy, and refusals."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from mrd_ray import CompareConfig, UserError, compare
from mrd_ray.cli.main import main
from mrd_ray.mrd import eighths
from mrd_ray.mrd.monte_carlo import Moments
from mrd_ray.mrd.scores import monte_carlo_score

IDS = [f"s{i:03d}" for i in range(60)]


def write(path, mrd, se=None, ids=IDS, texts=None, tokens=9, score_on="all", by_eighth=None, **identity):
    path.mkdir()
    scores = pa.table(
        {
            "sample_id": ids,
            "mrd": pa.array(mrd, pa.float64()),
            "mrd_se": pa.array(se or [None] * len(ids), pa.float64()),
            "mean_abs": pa.array(mrd, pa.float64()),
            "estimator": ["monte_carlo"] * len(ids),
            "sigma": [1e-5] * len(ids),
            "num_draws": [200] * len(ids),
            "num_tokens": [tokens] * len(ids),
            "mrd_eighths": pa.array(by_eighth or [None] * len(ids), pa.list_(pa.float64())),
        }
    )
    pq.write_table(scores, path / "scores.parquet")
    texts = texts or [f"text of {i}" for i in ids]
    pq.write_table(pa.table({"sample_id": ids, "text": texts}), path / "samples.parquet")
    identity = {"tokenizer": "t", "data.score_on": score_on, "noise version": 1} | identity
    (path / "manifest.json").write_text(json.dumps({"identity": identity}))
    return str(path)


def of_draws(path, deltas, seed):
    """A run whose samples have these Delta: [samples, K]."""
    moments = [Moments.of([[delta] for delta in row]) for row in deltas.tolist()]
    scores = [monte_carlo_score(one) for one in moments]
    parts = [eighths.of_moments(*one, "mean_abs", None) for one in zip(moments, scores, strict=True)]
    mrd, se = [one.mean_abs for one in scores], [one.mean_abs_se for one in scores]
    return write(path, mrd, se, [f"s{i:04d}" for i in range(len(mrd))], by_eighth=parts, **{"scoring.seed": seed})


def test_figures_are_scipys(tmp_path, capsys):
    generator = np.random.default_rng(0)
    a = generator.uniform(1, 2, 60)
    b = a * 1.1 + generator.normal(0, 0.05, 60)
    b[7] = 5.0
    run_a = write(tmp_path / "a", a.tolist(), [0.05] * 60)
    run_b = write(tmp_path / "b", [*b[:-1].tolist(), None], [0.0] * 60)
    config = CompareConfig(run_a=run_a, run_b=run_b, out=str(tmp_path / "scatter.png"))
    found = compare(config)
    a, b = a[:-1], b[:-1]
    assert (found.compared, found.only_a, found.only_b) == (59, 1, 0)
    assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(a, b).statistic)
    assert found.median_ratio == pytest.approx(np.median(b / a))
    assert found.apart == pytest.approx((np.abs(b - a) > 0.15).mean())
    assert found.rows[0]["sample_id"] == "s007"
    assert found.rows[0]["z"] == pytest.approx((5 - a[7]) / 0.05)
    assert main(["compare", run_a, run_b, "--out", config.out]) == 0
    printed = capsys.readouterr().out
    assert "text of s007" in printed
    assert f"{found.spearman:.4f}" in printed
    assert (tmp_path / "scatter.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("draws", [(2, 2), (4, 4), (24, 24), (24, 50)])
@pytest.mark.parametrize("shared", [0.0, 0.8, 0.999])
def test_a_difference_is_within_two_standard_errors_whatever_the_runs_share(tmp_path, draws, shared):
    """Two models that give each sample the same score, shaken alike or not."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(2000, max(draws)))
    b = shared * a + np.sqrt(1 - shared**2) * rng.normal(size=a.shape)
    runs = [of_draws(tmp_path / name, x[:, :k], 7) for name, x, k in zip("ab", (a, b), draws, strict=True)]
    found = compare(CompareConfig(run_a=runs[0], run_b=runs[1]))
    assert found.paired == 2000
    z = np.abs([row["z"] for row in found.rows])
    assert 0.93 < (z < 2).mean() < 0.97
    assert found.apart == (z > 3).mean() < 0.035
    assert "what the runs share cancels" in found.draws
    bare = compare(CompareConfig(run_a=f"{runs[0]}/scores.parquet", run_b=f"{runs[1]}/scores.parquet"))
    assert (bare.paired, bare.apart) == (2000, found.apart)


def test_other_seeds_with_other_numbers_of_draws_are_independent(tmp_path):
    rng = np.random.default_rng(0)
    runs = [of_draws(tmp_path / name, rng.normal(size=(1000, k)), k) for name, k in (("a", 6), ("b", 200))]
    found = compare(CompareConfig(run_a=runs[0], run_b=runs[1]))
    assert (found.paired, found.draws) == (0, "of independent runs: different seeds, or different estimators")
    assert 0.93 < np.mean([abs(row["z"]) < 2 for row in found.rows]) < 0.985


def test_shared_draws_that_cannot_be_paired_are_told(tmp_path, capsys):
    rng = np.random.default_rng(0)
    runs = [of_draws(tmp_path / name, rng.normal(size=(100, k)), 7) for name, k in (("a", 4), ("b", 24))]
    assert main(["compare", *runs, "--out", str(tmp_path / "scatter.png")]) == 0
    assert "as if independent for 100 unpaired sample(s); too large because the runs" in capsys.readouterr().out


def test_a_run_agrees_with_itself(tmp_path):
    run = of_draws(tmp_path / "a", np.random.default_rng(0).normal(size=(20, 8)), 7)
    found = compare(CompareConfig(run_a=run, run_b=run))
    assert (found.apart, {row["z"] for row in found.rows}) == (0.0, {0.0})


def test_exact_scores_have_no_standard_errors_to_go_by(tmp_path):
    runs = [write(tmp_path / name, (np.arange(60) + step).tolist(), [0.0] * 60) for name, step in (("a", 1), ("b", 2))]
    found = compare(CompareConfig(run_a=runs[0], run_b=f"{runs[1]}/scores.parquet"))
    assert found.apart is None
    assert found.spearman == pytest.approx(1)
    assert found.rows[0]["sample_id"] == "s000"  # 1 against 2, the largest relative difference


def test_a_score_without_a_standard_error_leaves_the_others_judged(tmp_path, capsys):
    a = np.arange(1.0, 61)
    errors = [None, *[0.05] * 59]
    runs = [write(tmp_path / name, (a + step).tolist(), errors) for name, step in (("a", 0.0), ("b", 1.0))]
    found = compare(CompareConfig(run_a=runs[0], run_b=runs[1]))
    assert (found.compared, found.judged, found.apart) == (60, 59, 1.0)
    assert (found.rows[0]["sample_id"], np.isnan(found.rows[0]["z"])) == ("s000", True)  # twice as large
    assert main(["compare", *runs, "--out", str(tmp_path / "scatter.png")]) == 0
    printed = capsys.readouterr().out
    assert "100.0% of 59 that have standard errors" in printed
    assert "+100.0%" in printed


def test_an_exact_score_is_judged_by_the_draws_of_the_other_run(tmp_path):
    a = np.arange(1.0, 61)
    runs = [write(tmp_path / "a", a.tolist(), [0.0] * 60), write(tmp_path / "b", (a + 0.2).tolist(), [0.1] * 60)]
    found = compare(CompareConfig(run_a=runs[0], run_b=runs[1]))
    assert (found.judged, found.apart) == (60, 0.0)
    assert "none" not in found.draws
    assert found.rows[0]["z"] == pytest.approx(2)


def test_other_samples_are_refused(tmp_path):
    scores = list(np.arange(60.0))
    a = write(tmp_path / "a", scores)
    other_ids = write(tmp_path / "b", scores, ids=["x", *IDS[1:]])
    with pytest.raises(UserError, match="2 id\\(s\\) are in only one of them, first 's000'"):
        compare(CompareConfig(run_a=a, run_b=other_ids))
    other_text = write(tmp_path / "c", scores, texts=["changed", *(f"text of {i}" for i in IDS[1:])])
    with pytest.raises(UserError, match="'s000', have different texts"):
        compare(CompareConfig(run_a=a, run_b=other_text))


def test_other_tokens_are_refused(tmp_path):
    scores = list(np.arange(60.0))
    a = write(tmp_path / "a", scores)
    shorter = write(tmp_path / "b", scores, tokens=7)
    with pytest.raises(UserError, match="different numbers of tokens in 60 samples, first 's000'"):
        compare(CompareConfig(run_a=a, run_b=shorter))
    in_part = write(tmp_path / "c", scores, score_on="response")
    with pytest.raises(UserError, match=r"data\.score_on: all, .* response"):
        compare(CompareConfig(run_a=a, run_b=in_part))


def test_other_statistics_are_refused(tmp_path):
    a = write(tmp_path / "a", list(np.arange(60.0)))
    b = write(tmp_path / "b", list(np.arange(60.0)))
    table = pq.read_table(f"{b}/scores.parquet")
    pq.write_table(table.rename_columns({"mean_abs": "abs_mean"}), f"{b}/scores.parquet")
    with pytest.raises(UserError, match=r"is mean_abs, the mrd of .* is abs_mean; run one again"):
        compare(CompareConfig(run_a=a, run_b=b))


def test_unknown_standard_errors_settle_nothing(tmp_path):
    runs = [write(tmp_path / "a", (np.arange(60) + 1.0).tolist()), write(tmp_path / "b", [2.0] * 60, [0.1] * 60)]
    assert compare(CompareConfig(run_a=runs[0], run_b=runs[1])).apart is None


def test_scores_in_doubt_stand_by_relative_size_among_the_others(tmp_path):
    """b has one without a standard error, which is halved; another is off by four of them, but by 0.4% only."""
    a, b = [1.0] * 60, [1.0] * 60
    b[3], b[7] = 0.5, 1.004
    runs = [write(tmp_path / "a", a, [1e-3] * 60), write(tmp_path / "b", b, [0.0] * 3 + [None] + [0.0] * 56)]
    found = compare(CompareConfig(run_a=runs[0], run_b=runs[1]))
    assert [row["sample_id"] for row in found.rows[:2]] == ["s003", "s007"]
    assert [found.how_far(row) for row in found.rows[:2]] == ["-50.0%", "+0.4%"]
    assert (found.judged, found.apart) == (59, 1 / 59)


def test_ids_that_stand_twice_are_refused(tmp_path):
    runs = [write(tmp_path / name, [1.0] * 60, ids=[*IDS[:-1], IDS[0]]) for name in "ab"]
    with pytest.raises(UserError, match="a: some sample ids appear more than once"):
        compare(CompareConfig(run_a=runs[0], run_b=runs[1]))


def test_what_is_no_table_of_scores_is_refused(tmp_path):
    a = write(tmp_path / "a", list(np.arange(60.0)))
    with pytest.raises(UserError, match="nowhere/scores"):
        compare(CompareConfig(run_a=a, run_b=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="no column mrd"):
        compare(CompareConfig(run_a=a, run_b=f"{a}/samples.parquet"))
    empty = write(tmp_path / "empty", [None] * 60)
    with pytest.raises(UserError, match="at least 3"):
        compare(CompareConfig(run_a=a, run_b=empty))
