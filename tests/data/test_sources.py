"""What data.path may name: files, patterns, lists, folders of every writer; each row knows its place."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrd_ray.config import DataSettings
from mrd_ray.data import read, tasks
from mrd_ray.errors import UserError

ROWS = [{"q": f"q{i}", "a": f"a{i}"} for i in range(12)]


def rows(path, **settings):
    given = [str(one) for one in path] if isinstance(path, list) else str(path)
    return list(read.rows(DataSettings(path=given, **settings)))


def values(path, **settings):
    return [row.values for row in rows(path, **settings)]


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def parts(tmp_path):
    for i in range(3):
        write_lines(tmp_path / "parts" / f"part-{i}.jsonl", ROWS[4 * i : 4 * i + 4])
    return tmp_path / "parts"


def test_patterns_lists_and_folders(parts):
    for path in (parts / "part-*.jsonl", parts / "part-[0-2].jsonl", parts, sorted(parts.iterdir())):
        found = rows(path)
        assert [row.values for row in found] == ROWS
        assert [row.index for row in found] == list(range(12))
        assert [(row.file, row.number) for row in found[3:5]] == [("part-0.jsonl", 4), ("part-1.jsonl", 1)]
    backwards = rows([parts / "part-2.jsonl", parts / "part-0.jsonl"])
    assert [row.values for row in backwards] == ROWS[8:] + ROWS[:4]
    assert backwards[4].index == 4
    assert rows(parts / "part-0.jsonl")[0].file is None


def test_a_file_with_brackets_in_its_name_is_no_pattern(tmp_path):
    write_lines(tmp_path / "a[1].jsonl", ROWS)
    assert values(tmp_path / "a[1].jsonl") == ROWS


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train[:4]", ROWS[:4]), ("train[:50%]", ROWS[:6]), ("train[10:]", ROWS[10:]), ("train[-2:]+train[:1]",
     ROWS[10:] + ROWS[:1])],
)  # fmt: skip
def test_slices(parts, split, expected):
    for path in (parts, parts / "*.jsonl"):
        assert values(path, split=split) == expected
    assert [row.index for row in rows(parts, split=split)] == list(range(len(expected)))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("validation", r"data\.split: validation, but .*has no splits"),
        ("train[:x]", r"data\.split: train\[:x\] is not a valid slice"),
    ],
)
def test_splits_that_a_file_does_not_have(parts, split, message):
    with pytest.raises(UserError, match=message):
        rows(parts / "part-0.jsonl", split=split)


def test_saved_by_datasets(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"forget": saved, "retain": saved.select(range(2))}).save_to_disk(tmp_path / "both")
    assert values(tmp_path / "one") == values(tmp_path / "both", split="forget") == ROWS
    assert values(tmp_path / "both", split="retain[1:]") == ROWS[1:2]
    with pytest.raises(UserError, match=r"data\.split: train, but .*both holds forget, retain; choose one"):
        rows(tmp_path / "both")


def test_folders_of_spark_and_ray(tmp_path):
    folder = tmp_path / "out.parquet"
    for year in ("2023", "__HIVE_DEFAULT_PARTITION__"):
        (folder / f"year={year}").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(ROWS[:2]), folder / f"year={year}" / "part-00000-7f.snappy.parquet")
        (folder / f"year={year}" / ".part-00000-7f.snappy.parquet.crc").write_bytes(b"crc")
    (folder / "_SUCCESS").touch()
    assert values(folder) == [{"year": year, **row} for year in ("2023", None) for row in ROWS[:2]]
    write_lines(tmp_path / "out.json" / "part-00000.json", ROWS)
    assert values(tmp_path / "out.json") == ROWS


def test_a_clone_of_a_hub_dataset(tmp_path):
    write_lines(tmp_path / "full.json", ROWS)
    write_lines(tmp_path / "forget.json", ROWS[:1])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: full\n  data_files: full.json\n- config_name: forget\n  data_files:\n"
        "  - split: train\n    path: forget.json\n  - split: test\n    path: full.json\n---\n# A set\n"
    )
    assert values(tmp_path, name="full") == ROWS
    assert values(tmp_path, name="forget") == ROWS[:1]
    assert values(tmp_path, name="forget", split="test[:2]") == ROWS[:2]
    with pytest.raises(UserError, match=r"cannot tell which files of .*full.*forget"):
        rows(tmp_path)
    with pytest.raises(UserError, match=r"data\.split: dev, but .* holds train, test"):
        rows(tmp_path, name="forget", split="dev")


def test_a_task_reads_a_clone_in_its_own_layout(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: forget10\n  data_files: data/f.json\n---\n")
    write_lines(tmp_path / "data" / "f.json", ROWS)
    data = tasks.load("tofu", {"locuslab/TOFU": str(tmp_path)})["data"]
    assert (data["path"], data["name"]) == (str(tmp_path), "forget10")
    assert values(data["path"], name=data["name"]) == ROWS


def test_what_is_beside_the_files_is_said_or_refused(parts):
    write_lines(parts / "test.jsonl", ROWS)
    said = []
    data = DataSettings(path=str(parts), split="test")
    assert [row.values for row in read.rows(data, said.append)] == ROWS
    assert len(said) == 1
    assert "part-0.jsonl" in said[0]
    (parts / "notes.csv").write_text("q,a\n1,2\n")
    with pytest.raises(UserError, match=r"holds several formats.*notes\.csv; give a pattern"):
        rows(parts, split="test")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("forget", r"data\.path: .*forget exists, but its name does not show its format; expected a file ending in"),
        ("forget.pdf", r"forget\.pdf exists, but its name does not show its format"),
        ("empty/", r"the folder .*empty.* holds no data: expected a file ending in"),
        ("no*.jsonl", r"no file matches .*no\*\.jsonl"),
        ("none.jsonl.gz", r"no such file or folder: .*none\.jsonl\.gz"),
        ("none", r"no such file or folder: .*none$"),
    ],
)
def test_what_exists_is_never_said_to_lack_on_the_hub(tmp_path, name, message):
    (tmp_path / "forget").write_text("a")
    (tmp_path / "forget.pdf").write_text("a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("a")
    with pytest.raises(UserError, match=message) as refused:
        rows(tmp_path / name)
    assert "Hugging Face" not in str(refused.value)


def test_texts_and_tables_do_not_mix(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    write_lines(tmp_path / "b.jsonl", ROWS)
    with pytest.raises(UserError, match=r"names both \.txt files and tables"):
        rows([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    (tmp_path / "b.txt").write_text("b")
    assert read.texts(DataSettings(path=str(tmp_path / "*.txt"))) == [("a.txt", "a"), ("b.txt", "b")]


def test_a_drawn_sample(parts):
    drawn = [tuple(row.index for row in rows(parts, max_samples=5, sample_seed=seed)) for seed in range(40)]
    assert rows(parts, max_samples=5, sample_seed=7) == rows(parts / "*.jsonl", max_samples=5, sample_seed=7)
    assert all(one == tuple(sorted(set(one))) and len(one) == 5 for one in drawn)
    assert len(set(drawn)) > 30
    assert {index for one in drawn for index in one} == set(range(12))
    assert len(rows(parts, max_samples=99, sample_seed=0)) == 12
    kept = [row.index for row in rows(parts, max_samples=2, sample_seed=3, where={"a": "a5"})]
    assert kept == [5]


def test_a_pattern_that_matches_folders_of_spark(tmp_path):
    for i, name in enumerate(("a.parquet", "b.parquet")):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(ROWS[6 * i : 6 * i + 6]), tmp_path / name / "part-0.parquet")
        (tmp_path / name / "_SUCCESS").touch()
    assert values(tmp_path / "*.parquet") == ROWS


def test_what_datasets_writes_beside_data_is_no_data(tmp_path):
    (tmp_path / "data").mkdir()
    for split, part in (("train", ROWS[:8]), ("test", ROWS[8:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    assert values(tmp_path) == ROWS[:8]
    assert values(tmp_path, split="test") == ROWS[8:]


@pytest.mark.parametrize("setting", ["field: rows", "column_names: [q, a]"])
def test_what_a_readme_says_of_files_is_followed_or_refused(tmp_path, setting):
    ending = "json" if setting.startswith("field") else "csv"
    (tmp_path / f"d.{ending}").write_text('{"rows": [{"q": "a", "a": "b"}]}' if ending == "json" else "a,b\nc,d\n")
    config = f"configs:\n- config_name: default\n  data_files: d.{ending}\n  {setting}\n"
    (tmp_path / "README.md").write_text(f"---\n{config}---\n")
    with pytest.raises(UserError, match=f"the README .* sets {setting.split(':')[0]}: .* which is not supported"):
        values(tmp_path)


def test_a_pattern_that_matches_a_saved_dataset_is_refused(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "a.arrow"))
    with pytest.raises(UserError, match=r"a\.arrow, a folder of save_to_disk; give only that folder"):
        values(tmp_path / "*.arrow")
