"""A run's scores draw a data set as people have it: by position, without ids."""

import datasets
import numpy as np
import pytest

import mrd_ray


@pytest.mark.usefixtures("ray_cluster")
def test_each_row_is_drawn_by_its_own_score(stories_dir, tofu_dir, tmp_path):
    file = str(tofu_dir / "forget01.json")
    run = mrd_ray.score(
        mrd_ray.ScoreConfig(
            model={"path": str(stories_dir)},
            data={"path": file},
            run={"dir": str(tmp_path / "run")},
            scoring={"estimator": "closed_form"},
            ray={"actors": 1},
        )
    )
    dataset = datasets.load_dataset("json", data_files=file, split="train")
    for row in run.scores.to_pylist():
        text = run.samples["text"][run.samples["sample_id"].to_pylist().index(row["sample_id"])].as_py()
        assert text == f"Question: {dataset[row['index']]['question']}\nAnswer: {dataset[row['index']]['answer']}"
    weight = {row["index"]: row["mrd"] for row in run.scores.to_pylist()}
    sampler = mrd_ray.MRDSampler(f"{tmp_path}/run/scores.parquet", num_samples=400_000, length=len(dataset))
    drawn = np.bincount(list(sampler), minlength=len(dataset)) / 400_000
    own = np.array([weight[i] for i in range(len(dataset))])
    assert np.corrcoef(drawn, own)[0, 1] > 0.99
    np.testing.assert_allclose(drawn, own / own.sum(), atol=5e-3 * drawn.max() + 4 * np.sqrt(drawn.max() / 400_000))
    with pytest.raises(mrd_ray.UserError, match="the data set has 39 samples, the scores are of 40"):
        mrd_ray.MRDSampler(f"{tmp_path}/run/scores.parquet", length=39)
