"""MRDSampler gives every index of a data set the weight of its own sample, or refuses."""

import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from draws import EXPECTED, IDS, MRD, WEIGHTINGS, agrees
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from mrd_ray import ScoreConfig, score
from mrd_ray.errors import UserError
from mrd_ray.unlearning import sampler as module
from mrd_ray.unlearning.sampler import MRDSampler


def table(ids=IDS, mrd=MRD, **columns):
    """Scores in the source's order."""
    return pa.table({"sample_id": pa.array(ids), "index": pa.array(range(len(ids))), "mrd": pa.array(mrd)} | columns)


class Texts(Dataset):
    """Gives the ids of its samples, in an order unlike the table's; it lacks b."""

    ids = ("c", "a", "e", "d")

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return self.ids[index]


@WEIGHTINGS
@pytest.mark.parametrize("source", ["table", "path", "uri"])
def test_sampler_in_a_data_loader(tmp_path, weighting, source):
    scores = table(error=pa.nulls(5, pa.string()))
    if source != "table":
        pq.write_table(scores.sort_by("sample_id"), tmp_path / "scores.parquet")
        scores = tmp_path / "scores.parquet" if source == "path" else f"file://{tmp_path}/scores.parquet"
    sampler = MRDSampler(scores, Texts.ids, weighting, num_samples=40_000, seed=4)
    loader = DataLoader(Texts(), batch_size=1000, sampler=sampler)
    assert len(loader) == 40
    drawn = [sample for batch in loader for sample in batch]
    probabilities = np.array([EXPECTED[weighting][IDS.index(one)] for one in Texts.ids])
    assert agrees([Texts.ids.index(one) for one in drawn], probabilities / probabilities.sum())


def weights(sampler) -> np.ndarray:
    """What it draws by, exactly."""
    return np.diff(sampler._stream._cdf, prepend=0)


@WEIGHTINGS
def test_without_ids_an_index_is_a_place_in_the_source(weighting):
    sampler = MRDSampler(table().sort_by("sample_id"), weighting=weighting, num_samples=50_000)
    assert agrees(list(sampler), EXPECTED[weighting])
    by_ids = MRDSampler(table().sort_by("sample_id"), IDS, weighting, num_samples=50_000)
    assert list(sampler) == list(by_ids)


@settings(max_examples=100, derandomize=True, database=None)
@given(st.data())
def test_weights_stay_with_their_rows_in_whatever_order_the_file_has_them(data):
    """By index, by row and by id; with digests for ids, whose order says nothing; in several chunks."""
    mrd = np.array(data.draw(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)))
    n = len(mrd)
    ids = [f"{i * 2654435761 % 2**32:08x}" for i in range(n)]
    by = data.draw(st.sampled_from(["index", "row", "sample_ids"]))
    place = {"index": np.arange(n), "row": np.arange(n) + 1, "sample_ids": np.zeros(n)}[by]
    source = pa.table({"sample_id": ids, by: place, "mrd": mrd})
    permuted = source.take(pa.array(data.draw(st.permutations(range(n)))))
    cut = data.draw(st.integers(0, n))
    scores = pa.concat_tables([permuted[:cut], permuted[cut:]])
    length = data.draw(st.sampled_from([None, n]))
    sampler = MRDSampler(scores, ids if by == "sample_ids" else None, length=length)
    np.testing.assert_allclose(weights(sampler), mrd / mrd.sum(), rtol=1e-9, atol=1e-15)


def test_rows_of_several_files_are_told_apart_by_index():
    """Row 1 of two files: only their places in the whole tell which is which."""
    files = {"file": pa.array(["b", "b", "a", "a", "a"]), "row": pa.array([1, 2, 1, 2, 3])}
    sampler = MRDSampler(table(**files).sort_by("row"))
    np.testing.assert_allclose(weights(sampler), MRD / MRD.sum())
    with pytest.raises(UserError, match="numbered in each of several files, and it has no column index"):
        MRDSampler(table(**files).drop_columns("index"))
    one_file = table(file=pa.nulls(5, pa.string()), row=pa.array([5, 4, 3, 2, 1])).drop_columns("index")
    np.testing.assert_allclose(weights(MRDSampler(one_file)), MRD[::-1] / MRD.sum())


PART = r"5 scores are of a part of the source: column index goes from 0 to 9, expected 0 to 4\. Give sample_ids; or len"


@pytest.mark.parametrize(
    ("columns", "length", "message"),
    [
        ({}, 6, r"length: 6, but scores has scores of 5 samples\. Score the whole data set, cut it"),
        ({}, 4, r"length: 4, but scores has scores of 5 samples"),
        ({"index": [0, 1, 2, 3, 9]}, None, PART),
        ({"index": [1, 2, 3, 4, 5]}, None, r"column index goes from 1 to 5, expected 0 to 4"),
        ({"index": None, "row": [1, 2, 3, 4, 6]}, None, r"column row goes from 1 to 6, expected 1 to 5"),
        ({"index": [0, 1, 1, 3, 3]}, None, r"column index: 2 place\(s\) occur more than once: 1, 3\. Were"),
        ({"index": [0, 1, 1, 3, 3]}, 5, r"column index: 2 place\(s\) occur more than once: 1, 3\. Were"),
        ({"index": [0, 1, None, 3, 4]}, 5, r"column index: 1 of 5 are null"),
        ({"index": [0.5, 1, 2, 3, 4]}, 5, r"column index: expected whole numbers"),
        ({"index": ["a", "b", "c", "d", "e"]}, 5, r"column index: expected whole numbers"),
        ({"index": [[0], [1], [2], [3], [4]]}, 5, r"column index: expected whole numbers"),
        ({"index": None}, 5, r"no column index or row, .*run its score command again .*; or give sample_ids"),
    ],
)
def test_what_cannot_be_matched_without_ids(columns, length, message):
    replaced = {name: pa.array(values) for name, values in columns.items() if values is not None}
    scores = table(**replaced).drop_columns([name for name, values in columns.items() if values is None])
    for weighting in ("mrd", "uniform"):
        with pytest.raises(UserError, match=message):
            MRDSampler(scores, weighting=weighting, length=length)
    assert list(MRDSampler(scores, IDS, length=5)) == list(MRDSampler(table()))  # ids always do


def test_scores_of_a_part_fit_a_data_set_that_was_cut_alike():
    part = table(index=pa.array([30, 10, 7, 99, 12]))
    ordered = MRD[[2, 1, 4, 0, 3]]
    np.testing.assert_allclose(weights(MRDSampler(part, length=5)), ordered / ordered.sum())


def test_the_length_of_a_data_set_with_ids():
    assert list(MRDSampler(table(), ["e", "a"], length=2)) == list(MRDSampler(table(), ["e", "a"]))
    with pytest.raises(UserError, match="length: 5, but sample_ids holds 2 ids; expected one for each sample"):
        MRDSampler(table(), ["e", "a"], length=5)


# A data set as people have it: TOFU, with columns question and answer and no ids


@pytest.fixture(scope="module")
def scored_tofu(ray_cluster, stories_dir, tofu_dir, tmp_path_factory):
    """Closed-form scores of forget01, and the data set."""
    run = tmp_path_factory.mktemp("tofu")
    file = str(tofu_dir / "forget01.json")
    tree = {"model": {"path": str(stories_dir)}, "data": {"path": file}, "run": {"dir": str(run)}}
    score(ScoreConfig.model_validate(tree | {"scoring": {"estimator": "closed_form"}, "ray": {"actors": 1}}))
    cache = str(tmp_path_factory.mktemp("cache"))
    dataset = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)
    assert dataset.column_names == ["question", "answer"]
    return run, dataset


def own_mrd(run, questions) -> np.ndarray:
    """The MRD of each question, found by its text in samples.parquet."""
    mrd = {row["sample_id"]: row["mrd"] for row in pq.read_table(run / "scores.parquet").to_pylist()}
    samples = pq.read_table(run / "samples.parquet").to_pylist()
    of_text = {row["text"].split("\n")[0]: mrd[row["sample_id"]] for row in samples}
    return np.array([of_text[f"Question: {question}"] for question in questions])


def test_drawn_shares_are_each_questions_own_weight(scored_tofu):
    run, dataset = scored_tofu
    right = own_mrd(run, dataset["question"])
    assert len(set(right)) == len(dataset) == 40
    for more in ({}, {"length": len(dataset)}):
        sampler = MRDSampler(run / "scores.parquet", num_samples=400_000, **more)
        shares = np.bincount(list(sampler), minlength=40) / 400_000
        assert np.corrcoef(shares, right)[0, 1] > 0.99
        np.testing.assert_allclose(weights(sampler), right / right.sum(), rtol=1e-9)
    scores = pq.read_table(run / "scores.parquet").sort_by("index")
    assert scores["index"].to_pylist() == list(range(40))
    assert scores["row"].to_pylist() == list(range(1, 41))
    assert scores["sample_id"].to_pylist() != sorted(scores["sample_id"].to_pylist())


def test_ids_from_the_scores_go_with_a_data_set_that_is_shuffled_and_cut(scored_tofu):
    """As docs/guides/unlearning.md has it."""
    run, dataset = scored_tofu
    ids = pq.read_table(run / "scores.parquet").sort_by("index")["sample_id"].to_pylist()
    dataset = dataset.add_column("sample_id", ids).shuffle(seed=1).select(range(25))
    right = own_mrd(run, dataset["question"])
    for sample_ids in (dataset["sample_id"], list(dataset["sample_id"])):
        sampler = MRDSampler(run / "scores.parquet", sample_ids=sample_ids, length=len(dataset))
        np.testing.assert_allclose(weights(sampler), right / right.sum(), rtol=1e-9)
    with pytest.raises(UserError, match=r"length: 25, but .* has scores of 40 samples"):
        MRDSampler(run / "scores.parquet", length=len(dataset))


def test_a_data_set_that_is_cut_as_the_scores_are(scored_tofu):
    run, dataset = scored_tofu
    scores = pq.read_table(run / "scores.parquet")
    part = scores.filter(pc.greater(scores["mrd"], np.median(scores["mrd"])))
    dataset = dataset.select(sorted(part["index"].to_pylist()))
    right = own_mrd(run, dataset["question"])
    np.testing.assert_allclose(weights(MRDSampler(part, length=20)), right / right.sum(), rtol=1e-9)
    with pytest.raises(UserError, match="20 scores are of a part of the source: column index"):
        MRDSampler(part)


def test_epochs_of_a_sampler(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 8)
    sampler = MRDSampler(table(), num_samples=20)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert {type(index) for index in epochs[0]} == {int}
    assert [len(epoch) for epoch in epochs] == [20] * 3 == [len(sampler)] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    fresh = MRDSampler(table(), num_samples=12)
    fresh.set_epoch(1)
    assert list(fresh) == list(fresh) == epochs[1][:12]
    assert list(MRDSampler(table(), num_samples=20, seed=1)) != epochs[0]
    assert len(MRDSampler(table())) == 5


@pytest.mark.parametrize(
    "ids", [pa.array(IDS), pa.chunked_array([IDS[:2], IDS[2:]]), np.array(IDS), pa.array(IDS).dictionary_encode()]
)
def test_kinds_of_ids(ids):
    assert list(MRDSampler(table(), ids)) == list(MRDSampler(table(), IDS)) == list(MRDSampler(table(ids), IDS))


def test_whole_numbers_count_as_text():
    assert list(MRDSampler(table(["1", "10", "2"], [1.0, 2.0, 3.0]), [10, 2, 1])) == list(
        MRDSampler(table(["a", "b", "c"], [2.0, 3.0, 1.0]))
    )


@pytest.mark.parametrize(
    ("scores", "ids", "message"),
    [
        (
            table(),
            ["a", *"uvwxyz"],
            r"6 of 7 sample ids .* no row in the scores: 'u', 'v', 'w', 'x', 'y', \.\.\.; score",
        ),
        (table(), ["a", "b", "a", "e", "e"], r"2 sample ids occur more than once in the data set: 'e', 'a'; remove"),
        (table(["b", "a", "b", "a", "a"]), ["a"], r"scores: 2 sample ids occur more than once: 'a', 'b'; keep"),
        (table(mrd=[1.0, None, -1.0, 2.0, 1.0]), None, r"2 of 5 samples have none: 'b' = nan, 'd' = -1\.0 "),
        (table(mrd=[1.0, None, -1.0, 2.0, 1.0]), ["e", "d", "a"], r"1 of 3 samples have none: 'd' = -1\.0 "),
        (table(mrd=pa.nulls(5)), ["e"], r"1 of 1 samples have none: 'e' = nan "),
        (table(["a", None, "b", "c", "d"]), None, "column sample_id: 1 of 5 ids are null"),
        (table(), ["a", None], "sample_ids: 1 of 2 ids are null"),
        (table(), ["a", 1], "sample_ids: expected ids that are text or whole numbers"),
        (table(), [["a"]], "sample_ids: expected ids that are text or whole numbers"),
        (table(mrd=["high"] * 5), None, "column mrd: expected numbers"),
        (table(), [], "the forget set is empty"),
        (table([], pa.array([], pa.float64())), None, "the forget set is empty"),
        (table().drop_columns("mrd"), None, "scores: not a table of scores; it has no column mrd"),
    ],
)
def test_what_a_sampler_cannot_use(scores, ids, message):
    with pytest.raises(UserError, match=message):
        MRDSampler(scores, ids)


def test_unscored_samples_may_stay_out_of_the_data_set():
    scores = table(mrd=[1.0, None, -1.0, 2.0, 1.0])
    assert set(MRDSampler(scores, ["e", "a"], num_samples=100)) == {0, 1}
    assert set(MRDSampler(scores, weighting="uniform", num_samples=100)) == {0, 1, 2, 3, 4}


def test_files_a_sampler_cannot_use(tmp_path):
    bad = tmp_path / "scores.parquet"
    for _ in range(2):
        with pytest.raises(UserError, match=r"scores\.parquet: cannot read it .*; expected a scores\.parquet"):
            MRDSampler(bad)
        bad.write_text("not parquet")
    with pytest.raises(UserError, match="cannot read it"):
        MRDSampler(str(tmp_path))
    with pytest.raises(UserError, match="cannot read it"):
        MRDSampler("nowhere://scores.parquet")
    pq.write_table(pa.table({"sample_id": ["a"], "score": [1.0]}), bad)
    with pytest.raises(UserError, match=r"scores\.parquet: not a table of scores; it has no column mrd"):
        MRDSampler(bad)


@pytest.mark.parametrize("setting", [{"num_samples": 0}, {"seed": -1}, {"seed": 2**64}, {"weighting": "x"}])
def test_settings_out_of_range(setting):
    with pytest.raises(UserError, match=rf"{next(iter(setting))}: .*; expected"):
        MRDSampler(table(), **setting)


LARGE = """
import resource, time
import numpy as np, pyarrow as pa
from mrd_ray.unlearning.sampler import MRDSampler

n = 10_000_000
ids = pa.array(np.arange(10**8, 10**8 + n)).cast(pa.string())
mrd = np.random.default_rng(0).lognormal(size=n)
order = np.random.default_rng(1).permutation(n)
places = pa.array(np.argsort(order))
scores, dataset = pa.table({"sample_id": ids, "index": places, "mrd": mrd}), ids.take(pa.array(order))
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
sampler = MRDSampler(scores, dataset)
drawn = np.fromiter(sampler, np.int64, n)
by_place = MRDSampler(scores, length=n)
assert (by_place._stream._cdf == sampler._stream._cdf).all()
seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(sampler) == n and drawn.max() < n
weighed = (mrd[order] ** 2).sum() / mrd.sum()
print(seconds, (peak - before) / 2**20, mrd[order][drawn].mean() / weighed)
"""


@pytest.mark.slow
def test_ten_million_samples():
    """In a fresh process, whose memory peak is its own; in CPU time, which the neighbours leave alone."""
    command = [sys.executable, "-c", LARGE]
    seconds, gigabytes, ratio = map(float, subprocess.check_output(command, env=os.environ, text=True).split())
    print(f"{seconds:.1f} s of CPU time, {gigabytes:.2f} GiB")
    assert seconds < 20
    assert gigabytes < 3
    assert ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("epoch", [-1, 2**32])
def test_an_epoch_out_of_range_is_refused_at_once(epoch):
    with pytest.raises(ValueError, match="epoch"):
        MRDSampler(table()).set_epoch(epoch)
