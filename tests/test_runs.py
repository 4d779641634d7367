"""Files whole or absent, one run at a time, one identity per directory."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from mrd_ray.config import RunSettings
from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory

CONFIG = RunSettings(dir="x")


def test_failed_write_names_the_file_and_keeps_the_old(tmp_path):
    run = RunDirectory(str(tmp_path))
    run.write("a.txt", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.txt: File too large"):
            run.write("a.txt", b"new and longer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.read("a.txt") == b"old"


@pytest.mark.parametrize("write", [lambda run: run.write("a", b"new"), lambda run: run.put("a", Path(__file__).parent)])
def test_a_link_at_the_temporary_name_is_not_followed(tmp_path, write):
    others, folder = tmp_path / "others", tmp_path / "run"
    others.mkdir()
    (others / "file").write_bytes(b"theirs")
    run = RunDirectory(str(folder))
    for target in (others, others / "file", others / "absent"):
        (folder / "a.tmp").symlink_to(target)
        write(run)
        assert run.exists("a")
        assert [(one.name, one.read_bytes()) for one in others.iterdir()] == [("file", b"theirs")]
        assert not (folder / "a.tmp").is_symlink()


def test_new_parents_are_the_owners_alone(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o755)
    RunDirectory(str(kept / "a" / "b" / "run"))
    modes = [folder.stat().st_mode & 0o777 for folder in (kept, kept / "a", kept / "a/b", kept / "a/b/run")]
    assert modes == [0o755, 0o700, 0o700, 0o700]


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    RunDirectory("~/r").write("a.txt", b"a")
    assert (tmp_path / "r" / "a.txt").read_bytes() == b"a"


def test_half_a_file_is_no_finished_one(tmp_path):
    """What a kill while writing leaves."""
    run = RunDirectory(str(tmp_path))
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "u.parquet.tmp").write_bytes(b"half")
    assert run.names("units") == []
    run.write("units/u.parquet", b"whole")
    assert run.names("units") == ["u.parquet"]


def test_store_that_knows_no_empty_folders():
    run = RunDirectory("memory://runs/empty")
    assert run.names("units") == []


def test_lock_ends_with_its_block_even_if_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), RunDirectory(str(tmp_path)).locked():
        raise ZeroDivisionError
    with RunDirectory(str(tmp_path)).locked():
        pass


def test_lock_holds_against_another_process_and_ends_with_it(tmp_path):
    code = f"""
import time
from mrd_ray.runs.directory import RunDirectory
with RunDirectory({str(tmp_path)!r}).locked():
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    run = RunDirectory(str(tmp_path))
    with pytest.raises(UserError, match="another run"), run.locked():
        pass
    holder.kill()
    holder.wait()
    with run.locked():
        pass


def test_other_identity_is_refused_with_what_differs(tmp_path):
    run = RunDirectory(str(tmp_path))
    run.claim({"scoring.sigma": 1e-5, "same": 1}, CONFIG)
    run.claim({"scoring.sigma": 1e-5, "same": 1}, CONFIG)
    with pytest.raises(UserError, match=r"scoring\.sigma: 1e-05 there, 0\.001 now") as refusal:
        run.claim({"scoring.sigma": 1e-3, "same": 1}, CONFIG)
    assert "same" not in str(refusal.value).replace("same command", "")
    assert len(json.loads(run.read("manifest.json"))["invocations"]) == 2


def test_damaged_manifest_is_named(tmp_path):
    run = RunDirectory(str(tmp_path))
    run.write("manifest.json", b'{"identity": ')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        run.claim({}, CONFIG)


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir: cannot write"):
        RunDirectory(str(tmp_path / "file" / "run"))
    with pytest.raises(UserError, match=r"run\.dir: cannot open nosuch"):
        RunDirectory("nosuch://bucket/run")


def test_damaged_table_is_named(tmp_path):
    run = RunDirectory(str(tmp_path))
    run.write("units/u.parquet", b"PAR1 half a file")
    with pytest.raises(UserError, match=r"u\.parquet is damaged"):
        run.read_table("units/u.parquet", pa.schema([]))


def test_a_flipped_bit_in_a_table_is_noticed(tmp_path):
    """Parquet would read on, with another number."""
    run = RunDirectory(str(tmp_path))
    run.write_table("t.parquet", table := pa.table({"a": [float(i) for i in range(100)]}))
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[200] ^= 1
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"t\.parquet is damaged .*CRC"):
        run.read_table("t.parquet", table.schema)


@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        (pa.table({"b": [1]}), "no column a"),
        (pa.table({"a": ["1"]}), "column a is string, not int64"),
        (pa.table({"a": pa.array([None], pa.int64())}), "column a has nulls"),
        (pa.table([pa.array([1]), pa.array([2])], ["a", "a"]), "2 columns a"),
    ],
)
def test_a_table_of_another_shape_is_damaged(tmp_path, table, wrong):
    run = RunDirectory(str(tmp_path))
    run.write_table("t.parquet", table)
    with pytest.raises(UserError, match=rf"t\.parquet is damaged \({wrong}\)"):
        run.read_table("t.parquet", pa.schema([pa.field("a", pa.int64(), nullable=False)]))


def test_narrow_offsets_are_read_where_wide_ones_are_written(tmp_path):
    """As in run directories from before samples had wide ones."""
    run = RunDirectory(str(tmp_path))
    run.write_table("t.parquet", narrow := pa.table({"text": ["a"], "ids": pa.array([[1]], pa.list_(pa.int32()))}))
    wide = pa.schema([("text", pa.large_string()), ("ids", pa.large_list(pa.int32()))])
    assert run.read_table("t.parquet", wide).equals(narrow)
    with pytest.raises(UserError, match="column ids is list"):
        run.read_table("t.parquet", pa.schema([("ids", pa.large_list(pa.int64()))]))


def test_any_fsspec_uri():
    run = RunDirectory("memory://runs/one")
    with run.locked():
        run.write_table("units/u.parquet", table := pa.table({"a": [1, 2]}))
        assert run.names("units") == ["u.parquet"]
        assert run.read_table("units/u.parquet", table.schema).equals(table)


@pytest.mark.parametrize("name", ["units/u.parquet", "samples.parquet", "progress.json", "events.jsonl"])
def test_files_without_a_manifest_are_nobodys(tmp_path, name):
    run = RunDirectory(str(tmp_path))
    run.write(name, b"made with who knows what")
    with pytest.raises(UserError, match=f"{name.partition('/')[0]} but no manifest"):
        run.claim({"a": 1}, CONFIG, ("units", "samples.parquet"))
    assert run.read(name) == b"made with who knows what"


@pytest.mark.parametrize("uri", ["s3://bucket/run?region=eu-west-1", "memory://run#1"])
def test_a_uri_whose_files_would_be_elsewhere_is_refused(uri):
    with pytest.raises(UserError, match=r"run\.dir: .* has a part after \? or #"):
        RunDirectory(uri)


def test_a_directory_that_a_job_throws_away_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match=r"run\.dir: runs/one would be in the job's copy of the working directory"):
        RunDirectory("runs/one")
    with pytest.raises(UserError, match="which Ray deletes"):  # as unlearn has made it absolute
        RunDirectory(str(Path("one").absolute()))
    RunDirectory(str(tmp_path / "one"))
    RunDirectory("memory://one")


@pytest.mark.parametrize("content", ["[]", "{}", '{"identity": 3}', "{"])
def test_manifest_of_another_shape_is_damaged(tmp_path, content):
    run = RunDirectory(str(tmp_path))
    run.write("manifest.json", content.encode())
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        run.claim({"a": 1}, CONFIG)


@pytest.mark.parametrize("where", ["{}/a[1]", "memory://runs/a[1]"])
def test_brackets_in_a_directorys_name_are_no_pattern(tmp_path, where):
    """A neighbour that the pattern would find has the same files."""
    uri = where.format(tmp_path)
    for name, of in {"a1": "neighbour", "a[1]": "own"}.items():
        (tmp_path / "from" / name / "model").mkdir(parents=True)
        (tmp_path / "from" / name / "model" / "weights").write_text(of)
    run = RunDirectory(uri)
    for _ in range(2):
        run.put("model", tmp_path / "from" / "a[1]" / "model")
    assert run.read("model/weights") == b"own"


def test_settings_of_the_users_own_are_not_written_over(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"holds config\.yaml but no manifest"):
        RunDirectory(str(tmp_path)).claim({}, CONFIG)
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "run").write_text("text")
    with pytest.raises(UserError, match="is a file; expected a directory"):
        RunDirectory(str(tmp_path / "run"))
