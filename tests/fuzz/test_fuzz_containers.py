"""The same rows give the same samples, whatever file they are in: format x encoding x compression x shape."""

import bz2
import csv
import gzip
import io
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from mangled import TIMES, explore
from transformers import AutoTokenizer

from mrd_ray.config import DataSettings
from mrd_ray.data import samples
from mrd_ray.data.tokens import Limits

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}
UNICODE = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def documents(rows: list[dict[str, str]]) -> dict[str, str]:
    """The rows as text, by the name of a file."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    by_label = {name: {str(i): cell for i, cell in enumerate(cells)} for name, cells in columns.items()}
    lines = "\n".join(json.dumps(row) for row in rows)
    found = {
        "lines.jsonl": lines,
        "lines.json": lines,
        "raw.ndjson": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "list.json": json.dumps(rows),
        "pretty.json": json.dumps(rows, indent=2, ensure_ascii=False),
        "list.jsonl": json.dumps(rows),
        "columns.json": json.dumps(columns),
        "pandas.json": json.dumps(by_label),
        "split.json": json.dumps({"columns": list(columns), "data": [[row[name] for name in columns] for row in rows]}),
        "lists.json": json.dumps({"train": rows, "other": [{"question": "x", "answer": "y"}]}),
        "data.json": json.dumps({"version": 1, "data": rows}),
    }
    for name, separator in {
        "comma.csv": ",",
        "semicolon.csv": ";",
        "tab.csv": "\t",
        "bar.csv": "|",
        "tab.tsv": "\t",
    }.items():
        sink = io.StringIO()
        writer = csv.DictWriter(sink, list(columns), delimiter=separator, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        found[name] = sink.getvalue()
    return found


def tables(rows: list[dict[str, str]]) -> dict[str, bytes]:
    """The rows as Arrow holds them, by the name of a file."""
    table = pa.Table.from_pylist(rows)
    found = {}
    for name, write in {
        "d.parquet": lambda sink: pq.write_table(table, sink),
        "file.arrow": lambda sink: pa.ipc.new_file(sink, table.schema),
        "stream.arrow": lambda sink: pa.ipc.new_stream(sink, table.schema),
    }.items():
        sink = pa.BufferOutputStream()
        if (writer := write(sink)) is not None:
            writer.write_table(table)
            writer.close()
        found[name] = sink.getvalue().to_pybytes()
    return found


# no characters that JSON or CSV cannot hold, nor a line end that CSV makes another
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(str.strip)
ROWS = st.lists(st.fixed_dictionaries({"question": TEXT, "answer": TEXT}), min_size=2, max_size=5)


@TIMES
def test_the_same_samples_from_every_container(times, tokenizer, tmp_path):
    def read(path: object, **settings: object) -> list[dict[str, object]]:
        data = DataSettings(path=str(path), score_on="response", **settings)
        return samples.build(data, tokenizer, Limits(512)).drop_columns(["file", "row"]).to_pylist()

    def check(rows: list[dict[str, str]], encoding: str, ending: str) -> None:
        (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, rows)))
        expected = read(tmp_path / "plain.jsonl")
        assert [row["index"] for row in sorted(expected, key=lambda row: row["index"])] == list(range(len(rows)))
        files = {name: text.encode(encoding) for name, text in documents(rows).items()} | tables(rows)
        for name, content in files.items():
            path = tmp_path / f"{name}{ending}"
            path.write_bytes(COMPRESS[ending](content))
            assert read(path) == expected, path
        parts = tmp_path / "parts"
        parts.mkdir(exist_ok=True)
        for old in parts.iterdir():
            old.unlink()
        for i, part in enumerate((rows[:1], rows[1:])):
            content = "\n".join(map(json.dumps, part)).encode(encoding)
            (parts / f"part-{i}.jsonl{ending}").write_bytes(COMPRESS[ending](content))
        assert read(parts) == read(parts / "part-*") == expected
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        assert read(tmp_path / "saved") == expected

    explore(check, 15 * times, ROWS, st.sampled_from(UNICODE), st.sampled_from(list(COMPRESS)))


@TIMES
def test_the_same_conversations_from_every_container(times, tokenizer, tmp_path):
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    turn = st.tuples(TEXT, TEXT)

    def check(conversations: list[list[tuple[str, str]]]) -> None:
        rows = [
            {"messages": [{"role": role, "content": text} for pair in one
                          for role, text in zip(("user", "assistant"), pair, strict=True)]}
            for one in conversations
        ]  # fmt: skip
        shares = {"user": "human", "assistant": "gpt"}
        shared = [
            {"conversations": [{"from": shares[turn["role"]], "value": turn["content"]} for turn in row["messages"]]}
            for row in rows
        ]
        found = []
        for name, records in {"messages": rows, "shared": shared}.items():
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
            pq.write_table(pa.Table.from_pylist(records), tmp_path / f"{name}.parquet")
            with (tmp_path / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(records[0]))
                writer.writeheader()
                writer.writerows({column: json.dumps(cell) for column, cell in record.items()} for record in records)
            found += [tmp_path / f"{name}.{kind}" for kind in ("jsonl", "parquet", "csv")]
        expected, *others = (
            samples.build(DataSettings(path=str(file), score_on="response"), tokenizer, Limits(512)).to_pylist()
            for file in found
        )
        assert all(other == expected for other in others)

    explore(check, 15 * times, st.lists(st.lists(turn, min_size=1, max_size=3), min_size=1, max_size=3))
