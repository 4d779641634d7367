"""Every format, and for every kind of bad file a message that names file, row and cause."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrd_ray.config import DataSettings
from mrd_ray.data import read
from mrd_ray.errors import UserError

ROWS = [{"q": "one, two", "a": 'say "yes"'}, {"q": "dré", "a": "line\nbreak"}]


def rows_of(path, **settings):
    return [row.values for row in read.rows(DataSettings(path=str(path), **settings))]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "lines.json", "d.csv", "d.parquet"])
def test_formats(tmp_path, name):
    path = tmp_path / name
    if name == "d.json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif name == "d.csv":
        path.write_bytes('\ufeffq,a\n"one, two","say ""yes"""\ndré,"line\nbreak"\n'.encode())
    elif name == "d.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_text("\n\n".join(map(json.dumps, ROWS)))
    assert rows_of(path) == ROWS
    assert rows_of(path, max_samples=1) == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"q": 1}\n\n{"q": \n', r"d\.jsonl, line 3: broken JSON: .* at column \d+"),
        ("d.jsonl", b'{"q": 1}\n[1]\n', r"d\.jsonl, row 2: expected a JSON object"),
        ("d.jsonl", b"", r"d\.jsonl holds no rows"),
        ("d.jsonl", b'{"q": "\xff\xfe"}\n', r"d\.jsonl, at or after line 1: not UTF-8"),
        ("d.json", b'[{"q": "\xff"}]', r"d\.json, at or after line 1: not UTF-8 text; set data\.encoding"),
        ("d.jsonl", b'{}\n{"q": 1, "a": 2, "q": 3}', r"d\.jsonl, at or after line 2: .* names q more than once"),
        ("d.json", b'[{"x": {"q": 1, "q": 2}}]', r"d\.json, at or after line 1: .* names q more than once"),
        ("d.jsonl", b'{}\n{"q": ' + b"9" * 5000 + b"}", r"d\.jsonl, at or after line 2: .*4300 digits"),
        ("d.jsonl", b'{}\n{"q": ' + b"[" * 10**5, r"d\.jsonl, at or after line 2: .* recursion depth"),
        ("d.json", b"[" * 10**5, r"d\.json, at or after line 1: .* recursion depth"),
        ("d.json", b'{\n "q": 1,\n}', r"d\.json, line 3: broken JSON: .*\(expected an object per line, or .* a list"),
        ("d.jsonl.gz", b"\x1f\x8b", r"cannot read .*d\.jsonl\.gz: Compressed file ended"),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfd", r"cannot read .*d\.jsonl\.zst: .*[Tt]runcated"),
        ("d.jsonl.xz", b"\xfd7zXZ\x00", r"cannot read .*d\.jsonl\.xz: Compressed file ended"),
        ("d.jsonl.bz2", b"BZh9", r"cannot read .*d\.jsonl\.bz2: Compressed file ended"),
        ("d.csv", b"q\n\xc3\xa9\n\xff\n", r"d\.csv, line 3: not UTF-8, though other parts of the file are"),
        ("d.csv", b"q\n\x81\n", r"d\.csv, at or after line 1: neither UTF-8 nor CP1252 text; set data\.encoding"),
        ("d.parquet", b"", r"cannot read .*d\.parquet: "),
        ("d.json", b"[{}, 3]", r"d\.json, row 2: expected a JSON object"),
        ("d.json", b'[{"q": 1},\n oops]', r"d\.json, line 2: broken JSON"),
        ("d.json", b"", r"d\.json holds no rows"),
        ("d.csv", b"q,a\n1,2\n1,2,3\n", r"d\.csv, row 2 \(line 3\): expected 2 fields"),
        ("d.csv", b"q,a\n1\n", r"d\.csv, row 1 \(line 2\): expected 2 fields"),
        ("d.csv", b"q,a\n", r"d\.csv holds no rows"),
        ("d.csv", b"q,a,q\n1,2,3\n", r"d\.csv, line 1: the header names q more than once"),
        ("d.csv", b"\n\nq,a\n1,2\n", r"d\.csv, line 1: blank, where the header should be"),
        ("d.csv", b'q,a\n"open,2\n', r"d\.csv, line \d+: broken CSV"),
        ("d.parquet", b"not parquet at all", r"cannot read .*d\.parquet: Parquet magic bytes not found"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        rows_of(path)


def test_parquet_that_cannot_become_rows(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["q", "q"]), path)
    with pytest.raises(UserError, match=r"d\.parquet: the schema names q more than once"):
        rows_of(path)
    latin1 = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"q": latin1}), path)
    with pytest.raises(UserError, match=r"d\.parquet, after row 0: cannot read it: 'utf-8' codec"):
        rows_of(path)


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends(tmp_path, end):
    (tmp_path / "d.jsonl").write_bytes((end * 2).join(map(json.dumps, ROWS)).encode())
    assert [row.number for row in read.rows(DataSettings(path=str(tmp_path / "d.jsonl")))] == [1, 3]
    (tmp_path / "d.csv").write_bytes(end.join(["q,a", "1,2", ""]).encode())
    assert rows_of(tmp_path / "d.csv") == [{"q": "1", "a": "2"}]


def test_line_separators_within_a_text_do_not_split_it(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"q": "a\u2028b\x85c"}, ensure_ascii=False))
    assert rows_of(tmp_path / "d.jsonl") == [{"q": "a\u2028b\x85c"}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_missing_file(tmp_path, suffix):
    path = tmp_path / f"none.{suffix}"
    with pytest.raises(UserError, match=re.escape(f"data.path: no such file or folder: {path}")):
        rows_of(path)


def test_path_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"no such file or folder: .*/file/d\.jsonl"):
        rows_of(tmp_path / "file" / "d.jsonl")


@pytest.mark.parametrize(("name", "content"), [("d.jsonl", json.dumps(ROWS[0])), ("d.json", json.dumps(ROWS[:1]))])
def test_byte_order_mark(tmp_path, name, content):
    (tmp_path / name).write_text("\ufeff" + content)
    assert rows_of(tmp_path / name) == ROWS[:1]


def test_csv_field_beyond_the_modules_default_limit(tmp_path):
    (tmp_path / "d.csv").write_text("q\n" + "a" * 200_000 + "\n")
    assert [len(row["q"]) for row in rows_of(tmp_path / "d.csv")] == [200_000]


def test_unknown_protocol():
    with pytest.raises(UserError, match="nosuch"):
        rows_of("nosuch://bucket/d.jsonl")


def test_hub_id_that_cannot_be_loaded():
    with pytest.raises(UserError, match=r"nobody/nothing.*could not be loaded as a Hugging Face dataset"):
        rows_of("nobody/nothing")


def test_dataset_folder_through_datasets(tmp_path):
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "set" / "train-0.parquet")
    assert rows_of(tmp_path / "set") == ROWS
    with pytest.raises(UserError, match=r"data\.split: test, but .*set holds train"):
        rows_of(tmp_path / "set", split="test")


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "set" / "train-0.parquet")
    (tmp_path / "t.txt").write_text("a")
    assert rows_of("~/set") == rows_of("~/set/train-0.parquet") == ROWS
    assert read.texts(DataSettings(path="~/t.txt")) == [(None, "a")]


def test_text_file(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffa\r\nb é".encode())
    assert read.texts(DataSettings(path=str(tmp_path / "t.txt"))) == [(None, "a\r\nb é")]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b" \n", "t.txt is empty"), (b"\xc3\xa9\xe9", "t.txt, line 1: not UTF-8"), (None, "no such file or folder: ")],
)
def test_bad_text_file(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read.texts(DataSettings(path=str(tmp_path / "t.txt")))


def test_where_takes_rows_by_the_values_of_columns(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"row {i}", "safe": i % 2 == 0}) for i in range(6)))
    found = list(read.rows(DataSettings(path=str(file), where={"safe": False}, max_samples=2)))
    assert [row.number for row in found] == [2, 4]
    with pytest.raises(UserError, match=r"no column 'sound' \(data.where\); its columns are text, safe"):
        list(read.rows(DataSettings(path=str(file), where={"sound": True})))
    with pytest.raises(UserError, match=r"data\.where: no row"):
        list(read.rows(DataSettings(path=str(file), where={"safe": "no"})))
