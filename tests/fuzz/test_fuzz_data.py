"""Whatever a data file holds, it is read, or refused by a UserError; no other exception, and no hang."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from mangled import TIMES, attempt, explore, of_bytes, of_json_file, of_parquet
from transformers import AutoTokenizer

from mrd_ray.config import DataSettings
from mrd_ray.data import samples
from mrd_ray.data.tokens import Limits

ROWS = [{"id": i, "prompt": "Who sells plums? é", "response": f"The baker, {i} a day.\n"} for i in range(5)]


def content(suffix: str) -> bytes:
    match suffix:
        case "jsonl":
            return "\n".join(map(json.dumps, ROWS)).encode()
        case "json":
            return json.dumps(ROWS).encode()
        case "csv":
            return (
                "id,prompt,response\r\n" + "".join(f'{r["id"]},{r["prompt"]},"{r["response"]}"\r\n' for r in ROWS)
            ).encode()
        case "parquet":
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(ROWS), sink)
            return sink.getvalue().to_pybytes()
    return "Plums and é, ".encode() * 50


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@TIMES
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "txt"])
def test_data_files(suffix, times, tokenizer, tmp_path):
    file = tmp_path / f"d.{suffix}"

    def check(mangled: bytes, columns: dict[str, str]) -> None:
        file.write_bytes(mangled)
        table, refusal = attempt(
            lambda: samples.build(DataSettings(path=str(file), window_tokens=64, **columns), tokenizer, Limits(128))
        )
        if table is None:
            assert str(file) in refusal
            return
        assert table.schema == samples.SCHEMA
        table.validate(full=True)
        for row in table.to_pylist():
            assert (row["error"] is None) == (row["token_ids"] is not None)

    good = content(suffix)
    mangle = {"parquet": of_parquet, "jsonl": of_json_file, "json": of_json_file}.get(suffix, of_bytes)
    named = st.sampled_from(
        [{}, {"text": "prompt"}, {"prompt": "prompt", "response": "response", "score_on": "response"}]
    )
    explore(check, 60 * times, mangle(good) | st.binary(max_size=200), named if suffix != "txt" else st.just({}))


def test_huge_lines(tokenizer, tmp_path):
    for suffix, line in {"jsonl": '{"text": "%s"}', "csv": 'text\n"%s"', "json": '[{"text": "%s"}]'}.items():
        (tmp_path / f"d.{suffix}").write_text(line % ("word " * 100_000))
        (row,) = samples.build(DataSettings(path=str(tmp_path / f"d.{suffix}")), tokenizer, Limits(128)).to_pylist()
        assert "tokens" in row["error"]
