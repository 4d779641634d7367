"""Compression, encoding, separators and shapes of JSON, all found by the content."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrd_ray.config import DataSettings
from mrd_ray.data import read
from mrd_ray.errors import UserError

ROWS = [{"q": "Où est-il?", "a": 'Là, "là"; là\t|'}, {"q": "Wie heißt er?\nUnd sie?", "a": "Jürgen"}]
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


def values(path, **settings):
    return [row.values for row in read.rows(DataSettings(path=str(path), **settings))]


def separated(separator, end="\r\n"):
    quoted = [[cell.replace('"', '""') for cell in row.values()] for row in ROWS]
    lines = [separator.join(ROWS[0])] + [separator.join(f'"{cell}"' for cell in row) for row in quoted]
    return end.join([*lines, ""])


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet", ".arrow", ".txt"])
def test_compressed(tmp_path, kind, ending):
    path = tmp_path / f"d{kind}"
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == ".arrow":
        with pa.ipc.new_stream(path, pa.Table.from_pylist(ROWS).schema) as writer:
            writer.write_table(pa.Table.from_pylist(ROWS))
    else:
        lines = "\n".join(map(json.dumps, ROWS))
        path.write_text({".jsonl": lines, ".csv": separated(","), ".txt": "Là."}[kind], encoding="utf-8")
    packed = tmp_path / f"d{kind}{ending}"
    packed.write_bytes(COMPRESS[ending](path.read_bytes()))
    if kind == ".txt":
        assert read.texts(DataSettings(path=str(packed))) == [(None, "Là.")]
        return
    assert values(packed) == values(path)
    assert [row["q"] for row in values(path)] == [row["q"] for row in ROWS]
    path.write_bytes(packed.read_bytes())  # compressed, whatever it is called
    assert values(path) == values(packed)


def test_arrow_files(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(tmp_path / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    assert values(tmp_path / "d.arrow") == ROWS


@pytest.mark.parametrize(
    ("name", "separator"), [("d.csv", ","), ("d.csv", ";"), ("d.csv", "\t"), ("d.csv", "|"), ("d.tsv", "\t")]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_separators_and_encodings_are_found(tmp_path, name, separator, encoding):
    (tmp_path / name).write_bytes(separated(separator).encode(encoding))
    assert values(tmp_path / name) == ROWS


def test_cp1252_is_said(tmp_path):
    (tmp_path / "d.csv").write_bytes(separated(",").encode("cp1252"))
    said = []
    list(read.rows(DataSettings(path=str(tmp_path / "d.csv")), said.append))
    assert said == [f"{tmp_path / 'd.csv'} is not UTF-8; read as cp1252 (data.encoding sets another)"]


def test_the_first_line_of_excel(tmp_path):
    for separator in ";|":
        (tmp_path / "d.csv").write_text(f"sep={separator}\r\n" + separated(separator), encoding="utf-8-sig", newline="")
        assert values(tmp_path / "d.csv") == ROWS
    (tmp_path / "d.csv").write_text("sep=;\nq;a\n1;2\n1;2;3\n")
    with pytest.raises(UserError, match=r"row 2 \(line 4\): expected 2 fields.*quote fields that hold a semicolon"):
        values(tmp_path / "d.csv")


def test_settings_go_over_what_is_found(tmp_path):
    (tmp_path / "d.csv").write_bytes("q:a,b\nж:1,2\n".encode("koi8-r"))
    assert values(tmp_path / "d.csv", separator=":", encoding="koi8-r") == [{"q": "ж", "a,b": "1,2"}]
    (tmp_path / "d.jsonl").write_bytes('{"q": "é"}'.encode("cp1252"))
    with pytest.raises(UserError, match=r"not UTF-8 text; set data\.encoding"):
        values(tmp_path / "d.jsonl")
    assert values(tmp_path / "d.jsonl", encoding="cp1252") == [{"q": "é"}]


def test_a_single_column_has_commas_in_its_texts(tmp_path):
    (tmp_path / "d.csv").write_text('text\n"One, two; three"\nFour\n')
    assert values(tmp_path / "d.csv") == [{"text": "One, two; three"}, {"text": "Four"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_any_unicode(tmp_path, encoding):
    (tmp_path / "d.jsonl").write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(encoding))
    assert values(tmp_path / "d.jsonl") == ROWS


PAIR = [{"q": "a", "a": "b"}, {"q": "c", "a": "d"}]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.ndjson"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("document", "settings", "expected"),
    [
        (PAIR, {}, PAIR),
        (["x", "y"], {}, [{"text": "x"}, {"text": "y"}]),
        ({"q": ["a", "c"], "a": ["b", "d"]}, {}, PAIR),
        ({"q": {"0": "a", "1": "c"}, "a": {"0": "b", "1": "d"}}, {}, PAIR),
        ({"0": PAIR[0], "1": PAIR[1]}, {}, PAIR),
        ({"k1": PAIR[0], "k2": PAIR[1]}, {}, [{"id": "k1", **PAIR[0]}, {"id": "k2", **PAIR[1]}]),
        ({"columns": ["q", "a"], "index": [0, 1], "data": [["a", "b"], ["c", "d"]]}, {}, PAIR),
        ({"schema": {"fields": []}, "data": PAIR}, {}, PAIR),
        ({"version": "1.1", "data": PAIR}, {}, PAIR),
        ({"forget": PAIR, "retain": PAIR[:1]}, {"split": "forget"}, PAIR),
        ({"forget": PAIR, "retain": PAIR[:1]}, {"split": "retain[:1]"}, PAIR[:1]),
        ({"forget": ["x", "y"], "retain": ["z"]}, {"split": "forget"}, [{"text": "x"}, {"text": "y"}]),
        ([{"train": PAIR, "val": PAIR[:1]}], {}, PAIR),
        ({"q": "a", "a": ["b", "d"]}, {}, [{"q": "a", "a": ["b", "d"]}]),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, [{"messages": [{"role": "user", "content": "a"}]}]),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, [{"messages": [{"role": "user", "content": "a"}]}]),
    ],
)
def test_shapes_of_json(tmp_path, name, indent, document, settings, expected):
    (tmp_path / name).write_text(json.dumps(document, indent=indent))
    assert values(tmp_path / name, **settings) == expected


def test_an_object_of_several_lists_is_refused_with_their_names(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps({"forget": PAIR, "retain": PAIR[:1]}))
    with pytest.raises(
        UserError, match=r"several lists: forget \(2 rows\), retain \(1 rows\); choose one with data\.split"
    ):
        values(tmp_path / "d.json")


def test_lines_of_texts(tmp_path):
    (tmp_path / "d.jsonl").write_text('"x"\n\n"y"\n')
    assert values(tmp_path / "d.jsonl") == [{"text": "x"}, {"text": "y"}]


@pytest.mark.parametrize(
    ("document", "split", "found"),
    [
        ({"forget": [{"text": "a b"}], "retain": []}, "retain", "holds no rows"),
        ({"forget": [{"text": "a b"}]}, "retain", r"data\.split: retain, but .* holds forget \(1 rows\)"),
        ({"version": "1", "forget": [{"text": "a b"}]}, "retain", r"data\.split: retain, but .* holds forget"),
        ({"forget": ["a b", "c d"], "retain": ["e f", "g h"]}, "retain", ["e f", "g h"]),
        ({"train": {"text": ["a b", "c d"]}, "test": {"text": ["e f"]}}, "test", ["e f"]),
        ({"train": {"text": ["a b", "c d"]}, "test": {"text": ["e f"]}}, "train", ["a b", "c d"]),
        ({"question": {"text": "Who?"}, "answer": {"text": "Lily"}}, "test", "has no splits"),
    ],
)
def test_a_split_of_json_is_the_one_asked_for(tmp_path, document, split, found):
    (tmp_path / "d.json").write_text(json.dumps(document))
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            values(tmp_path / "d.json", split=split)
    else:
        assert [row["text"] for row in values(tmp_path / "d.json", split=split)] == found


def test_one_row_of_objects_is_one_row(tmp_path):
    row = {"question": {"text": "Who?"}, "answer": {"text": "Lily"}}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    assert values(tmp_path / "d.jsonl") == [row]


def test_lines_that_are_conversations(tmp_path):
    turns = [[{"role": "user", "content": f"Who is {name}?"}] for name in "ab"]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, turns)))
    assert values(tmp_path / "d.jsonl") == [{"messages": one} for one in turns]


@pytest.mark.parametrize("first", ["sep=\t", '"sep=\t"', "SEP=\t"])
def test_a_line_that_names_a_tab(tmp_path, first):
    (tmp_path / "d.csv").write_text(f"{first}\r\nq\ta\r\nx, y\tz\r\n")
    assert values(tmp_path / "d.csv") == [{"q": "x, y", "a": "z"}]


def test_quotation_marks_that_are_text(tmp_path):
    (tmp_path / "d.tsv").write_text('q\ta\n"Tis a q1\ta1\nhe said "\ta2\nq3\ta3\n')
    with pytest.raises(UserError, match=r"row 1 .*may be several rows; .*data\.quotes: false"):
        values(tmp_path / "d.tsv")
    found = values(tmp_path / "d.tsv", quotes=False)
    assert [row["q"] for row in found] == ['"Tis a q1', 'he said "', "q3"]


@pytest.mark.parametrize("ending", [".txt", ".csv"])
def test_utf_16_without_a_mark_is_not_taken_for_utf_8(tmp_path, ending):
    (tmp_path / f"d{ending}").write_bytes("кот и пёс\n".encode("utf-16-le"))
    read_it = read.texts if ending == ".txt" else read.rows
    with pytest.raises(UserError, match=r"line 1: holds control characters; set data\.encoding"):
        list(read_it(DataSettings(path=str(tmp_path / f"d{ending}"))))


def test_a_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "d.csv").write_bytes("\ufeffq,a\nx,y\n".encode("utf-16-le"))
    assert values(tmp_path / "d.csv", encoding="utf-16-le") == [{"q": "x", "a": "y"}]


@pytest.mark.parametrize("encoding", ["base64", "hex", "rot13", "nonsense"])
def test_what_is_no_encoding_of_text_is_refused(encoding):
    with pytest.raises(ValueError, match="is no encoding"):
        DataSettings(path="d", encoding=encoding)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"split": "train[:50%]"}, "has no rows to slice"), ({"split": "test"}, "has no rows to slice and no splits"),
     ({"where": {"a": 1}}, r"data\.where: .* has no columns"), ({"prompt": "a", "response": "b"}, "has no columns"),
     ({"name": "x"}, r"data\.name: .* is a file, which has none")],
)  # fmt: skip
def test_settings_that_mean_nothing_for_plain_text_are_refused(tmp_path, settings, named):
    (tmp_path / "d.txt").write_text("a b c d")
    with pytest.raises(UserError, match=named):
        read.texts(DataSettings(path=str(tmp_path / "d.txt"), **settings))


def test_an_empty_text_among_others(tmp_path):
    for name, text in (("a.txt", "a b"), ("b.txt", ""), ("c.txt", "c d")):
        (tmp_path / name).write_text(text)
    said = []
    found = read.texts(DataSettings(path=str(tmp_path / "*.txt")), said.append)
    assert [text for _, text in found] == ["a b", "c d"]
    assert said == ["Skipped empty files: b.txt"]


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt", "d.parquet", "d.csv.gz"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    read_it = read.texts if name.endswith(".txt") else read.rows
    with pytest.raises(UserError, match=r"d\..*git lfs pull"):
        list(read_it(DataSettings(path=str(tmp_path / name))))
