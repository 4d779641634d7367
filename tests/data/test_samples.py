"""Rows become tokens: which count, under which id, and with which reason if none."""

import io
import json
import random

import pytest
from rich.console import Console
from scored import scored_text
from transformers import AutoTokenizer

from mrd_ray.config import DataSettings
from mrd_ray.data import samples
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"text": "what is it"}], "what is it"),
        ([{"prompt": "a b", "response": "c d"}], "Question: a b\nAnswer: c d"),
        ([{"question": "a b", "answer": "c d", "x": 1}], "Question: a b\nAnswer: c d"),
    ],
)
def test_columns_are_found(build, rows, text):
    assert build(rows)["text"].to_pylist() == [text]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"foo": "a"}, {}, r"cannot tell which columns.*foo"),
        ({"text": "a", "prompt": "b", "response": "c"}, {}, "cannot tell which columns"),
        ({"foo": "a"}, {"text": "bar"}, r"d\.jsonl: no column 'bar' \(data\.text\); its columns are foo"),
        ({"text": "a"}, {"id": "key"}, r"no column 'key' \(data\.id\)"),
        ({"prompt": "a", "response": "b"}, {"template": "chat"}, "no chat template"),
    ],
)
def test_columns_that_cannot_be_used(build, row, settings, message):
    with pytest.raises(UserError, match=message):
        build([row], **settings)


def test_chat_template_is_not_missed_where_it_is_not_used(build):
    assert build([{"text": "what is it"}], template="chat")["error"].null_count == 1
    assert build([{"q": "what is it"}], template="chat", text="q")["error"].null_count == 1


@pytest.mark.parametrize("settings", [{}, {"id": "id"}])
def test_first_row_that_lacks_the_id(build, settings):
    rows = [{"text": "what is it"}, {"id": "x", "text": "where is it"}]
    assert build(rows, **settings)["sample_id"].to_pylist() == ["row-1", "x"]


def test_first_row_that_lacks_the_text(build):
    bad, good = build([{"foo": "a"}, {"text": "what is it"}]).sort_by("row").to_pylist()
    assert bad["error"] == "column 'text' is missing or null"
    assert good["error"] is None


def test_rows_that_name_different_columns_leave_no_choice(build):
    with pytest.raises(UserError, match=r"cannot tell which columns.*text, prompt, response"):
        build([{"text": "what is it"}, {"prompt": "a", "response": "b"}])


@pytest.mark.parametrize(
    ("late", "message"),
    [
        ({"id": "x"}, "'id', an id; give every row one"),
        ({"prompt": "a", "response": "b"}, "cannot tell which columns to score"),
        ({"source": "x"}, None),
    ],
)
def test_column_that_appears_late(build, late, message):
    """After so many rows that digest ids have been given out, and texts tokenised."""
    rows = [{"text": f"what is {i}"} for i in range(1000)] + [{"text": "what is it"} | late]
    if message is None:
        assert len(build(rows)) == 1001
    else:
        with pytest.raises(UserError, match=rf"d\.jsonl, row 1001, which fills columns .*: .*{message}"):
            build(rows)
        assert len(build(rows, max_samples=1000)) == 1000


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        (None, "missing or null"),
        (7, "not text but a number: 7"),
        (["a"], "not text but list"),
        ("\ud800", "not text: it holds half of a surrogate pair"),
        ("a", "none of which can be scored"),
        ("what " * 500, "over the limit of 128"),
    ],
)
def test_bad_sample_keeps_its_row_and_reason(build, value, reason):
    table = build([{"id": "ok", "text": "what is it"}, {"id": "zbad", "text": value}])
    good, bad = table.to_pylist()
    assert good["error"] is None
    assert good["token_ids"]
    assert reason in bad["error"]
    assert bad["token_ids"] is None


def test_truncation_only_when_asked(build):
    long = [{"text": "what is the river " * 30}]
    assert build(long, max_tokens=10)["error"][0].is_valid
    (row,) = build(long, max_tokens=10, truncate=True).to_pylist()
    assert len(row["token_ids"]) == len(row["scored"]) == 10


@pytest.mark.parametrize(("max_tokens", "context", "limit"), [(None, 10, 10), (7, 10, 7), (20, 10, 10), (7, None, 7)])
def test_limit_is_the_lower_of_the_settings_and_the_models(build, max_tokens, context, limit):
    (row,) = build([{"text": "0123456789" * 9}], context=context, max_tokens=max_tokens).to_pylist()
    assert f"over the limit of {limit}" in row["error"]


def test_truncation_that_leaves_nothing_to_score_says_so(build):
    long = [{"prompt": "0123456789" * 9, "response": "blue"}]
    (row,) = build(long, score_on="response", max_tokens=20, truncate=True).to_pylist()
    assert row["error"] == "nothing to score in its first 20 tokens, all that data.truncate leaves"


@pytest.mark.parametrize("settings", [{}, {"template": "chat"}, {"text": "prompt"}])
def test_bos_stands_once_and_is_not_scored(build, bos_tokenizer, settings):
    bos_tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    row = {"prompt": "is it blue?", "response": "blue"}
    (found,) = build([row], tokenizer=bos_tokenizer, **settings).to_pylist()
    bos = [token == bos_tokenizer.bos_token_id for token in found["token_ids"]]
    assert bos == [not counts for counts in found["scored"]] == [True] + [False] * (len(bos) - 1)


def test_ids(build):
    rows = [{"id": 7, "text": "what is it"}, {"id": "x", "text": "what is it"}, {"id": None, "text": "what is it"}]
    table = build(rows)
    assert table["sample_id"].to_pylist() == ["7", "row-3", "x"]
    assert "expected text or a whole number" in table["error"][1].as_py()


@pytest.mark.parametrize("value", ["", 1.5, float("nan"), True, ["x"], "\ud800"])
def test_unusable_id_is_an_error_of_its_row(build, value):
    good, bad = build([{"id": "ok", "text": "what is it"}, {"id": value, "text": "what is it"}]).to_pylist()
    assert good["error"] is None
    assert (bad["sample_id"], bad["token_ids"]) == ("row-2", None)
    assert "'id'" in bad["error"]


def test_duplicate_ids_are_refused_with_their_rows(build):
    rows = [{"id": 7, "text": "what"}, {"id": "8", "text": "is"}, {"id": "7", "text": "it"}]
    with pytest.raises(UserError, match=r"1 id\(s\) appear more than once, for example '7' in rows 1, 3"):
        build(rows)


def test_digest_ids_and_the_tables_digest_survive_shuffling(build):
    rows = [{"text": text} for text in ("what is it", "where is it", "what is it", "blue mill", "")]
    table = build(rows)
    assert len(set(table["sample_id"].to_pylist())) == 5
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        other = build(rows)
        assert other["sample_id"].equals(table["sample_id"])
        assert samples.digest(other) == samples.digest(table)
    assert samples.digest(build(rows[:4])) != samples.digest(table)


@pytest.mark.parametrize("max_tokens", [None, 2])
def test_equal_texts_with_other_responses_keep_their_ids(build, max_tokens):
    """Whether they can be scored or are too long."""
    rows = [{"prompt": "is it", "response": "blue mill"}, {"prompt": "is it blue", "response": "mill"}]
    settings = {"template": "{prompt} {response}", "score_on": "response", "max_tokens": max_tokens}
    table, other = build(rows, **settings), build(rows[::-1], **settings)
    assert len(set(table["text"].to_pylist())) == 1
    assert samples.digest(other) == samples.digest(table)
    assert other["row"].to_pylist() == table["row"].to_pylist()[::-1]


def test_digest_ids_are_of_the_data_alone(build):
    """So that scores of the same samples under other settings can be joined."""
    rows = [{"prompt": "is it blue?", "response": "blue", "x": 1}]
    ids = {build(rows, **settings)["sample_id"][0].as_py() for settings in ({}, {"template": "{prompt}{response}"},
           {"score_on": "response"}, {"max_tokens": 2}, {"max_tokens": 2, "truncate": True})}  # fmt: skip
    assert len(ids) == 1


def test_padding_side_has_no_influence(build, tiny_model_dir):
    rows = [{"id": i, "text": text} for i, text in enumerate(("what is it", "where is the blue mill"))]
    left = AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left", pad_token="</s>")
    assert AutoTokenizer.from_pretrained(tiny_model_dir).pad_token is None
    assert samples.digest(build(rows, tokenizer=left)) == samples.digest(build(rows))


@pytest.mark.parametrize(
    "settings", [{"template": "{prompt} {response}"}, {"score_on": "response"}, {"max_tokens": 6, "truncate": True}]
)
def test_digest_changes_with_what_is_scored(build, settings):
    rows = [{"id": 1, "prompt": "is it blue?", "response": "blue"}]
    assert samples.digest(build(rows, **settings)) != samples.digest(build(rows))


def test_digest_changes_with_the_tokenizer(build, tiny_model_dir):
    rows = [{"id": 1, "text": "is it blue?"}]
    other = AutoTokenizer.from_pretrained(tiny_model_dir)
    other.add_tokens(["blue"])
    assert samples.digest(build(rows, tokenizer=other)) != samples.digest(build(rows))


def test_truncation_and_padding_saved_in_a_tokenizer_have_no_influence(build, tiny_model_dir):
    rows = [{"id": i, "text": text} for i, text in enumerate(("what is it", "where is the blue mill"))]
    other = AutoTokenizer.from_pretrained(tiny_model_dir, model_max_length=4)
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding(length=64)
    assert samples.digest(build(rows, tokenizer=other)) == samples.digest(build(rows))


@pytest.mark.parametrize("window", [2, 7, 128])
def test_windows_with_bos_cover_a_text_once(tmp_path, tokenizer, bos_tokenizer, window):
    (tmp_path / "t.txt").write_text("The mill stands by the river. " * 40)
    data = DataSettings(path=str(tmp_path / "t.txt"), window_tokens=window)
    rows = samples.build(data, bos_tokenizer, Limits(128)).sort_by("row").to_pylist()
    assert {len(row["token_ids"]) for row in rows[:-1]} == {window}
    assert {row["token_ids"].pop(0) for row in rows} == {bos_tokenizer.bos_token_id}
    assert {row["scored"].pop(0) for row in rows} == {False}
    stream = tokenizer((tmp_path / "t.txt").read_text())["input_ids"]
    assert [token for row in rows for token in row["token_ids"]] == stream
    assert all(all(row["scored"]) for row in rows)


def test_last_window_of_one_token_keeps_its_row(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("012345678")
    data = DataSettings(path=str(tmp_path / "t.txt"), window_tokens=4)
    *others, last = samples.build(data, tokenizer, Limits(128)).sort_by("row").to_pylist()
    assert [row["error"] for row in others] == [None, None]
    assert "one token" in last["error"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"window_tokens": 256}, r"data\.window_tokens: 256 .* 128 tokens"), ({"score_on": "response"}, "no responses")],
)
def test_windows_that_cannot_be_cut(tmp_path, tokenizer, settings, message):
    (tmp_path / "t.txt").write_text("The mill stands by the river.")
    with pytest.raises(UserError, match=message):
        samples.build(DataSettings(path=str(tmp_path / "t.txt"), **settings), tokenizer, Limits(128))


def test_windows_cover_a_text_once(tmp_path, tokenizer):
    text = "The mill stands by the river. " * 40
    (tmp_path / "t.txt").write_text(text)
    data = DataSettings(path=str(tmp_path / "t.txt"), window_tokens=16)
    rows = sorted(samples.build(data, tokenizer, Limits(128)).to_pylist(), key=lambda row: row["row"])
    stream = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [token for row in rows for token in row["token_ids"]] == stream
    assert {len(row["token_ids"]) for row in rows[:-1]} == {16}


def test_tofu(stories_dir, tofu_dir):
    """All of forget10; under score_on: response the scored tokens decode to the answer."""
    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    path = tofu_dir / "forget10.json"
    table = samples.build(DataSettings(path=str(path), score_on="response"), tokenizer, Limits(512))
    assert len(table) == 400
    assert table["error"].null_count == 400
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    for row in table.slice(0, 100).to_pylist():
        assert scored_text(row, tokenizer).strip() == answers[row["row"] - 1].strip()


def test_special_tokens_within_a_text_are_said(tmp_path, bos_tokenizer):
    texts = [" <s>hi there", "<s><s>hi there", "hi there", "<s>hi there"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shown = io.StringIO()
    samples.build(
        DataSettings(path=str(tmp_path / "d.jsonl")), bos_tokenizer, Limits(64), Console(file=shown, width=200)
    )
    assert "2 sample(s) already have <s> in their text; it is not added again" in shown.getvalue()
    assert "2 sample(s) have <s> within their text, where it is scored like any token; check this" in shown.getvalue()
