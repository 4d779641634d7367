"""Rows become tokens: which count, under which id, and with which reason if none."""

import json
import random

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from mrd_ray.config import DataConfig
from mrd_ray.data import samples
from mrd_ray.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def bos_tokenizer(tiny_model_dir):
    """Begins every text with <s>."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture
def build(tmp_path, tokenizer):
    def build(rows, context=128, tokenizer=tokenizer, **settings):
        path = tmp_path / "d.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return samples.build(DataConfig(path=str(path), **settings), tokenizer, context)

    return build


def scored_text(row, tokenizer):
    return tokenizer.decode([token for token, counts in zip(row["token_ids"], row["scored"], strict=True) if counts])


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
        with pytest.raises(UserError, match=rf"d\.jsonl, row 1001, which names columns .*: .*{message}"):
            build(rows)
        assert len(build(rows, max_samples=1000)) == 1000


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        (None, "missing or null"),
        (7, "not text but int"),
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


@pytest.mark.parametrize(
    "template",
    ["Question: {prompt}\nAnswer: {response}", "{{x}} {prompt}|{response} {{y}}", "A: {response}\nQ: {prompt}"],
)
@pytest.mark.parametrize(("prompt", "response"), [("is it blue?", "blue"), ("plum cakes. plum", "plum cakes.")])
def test_response_alone_is_scored(build, tokenizer, template, prompt, response):
    row = {"prompt": prompt, "response": response}
    (found,) = build([row], template=template, score_on="response").to_pylist()
    assert found["text"] == template.format(**row)
    assert scored_text(found, tokenizer).strip() == response
    (everything,) = build([row], template=template).to_pylist()
    assert everything["scored"] == [False] + [True] * (len(everything["token_ids"]) - 1)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# trims, and its system text holds a prompt and a response
LLAMA3 = (
    "<|start_header_id|>system<|end_header_id|>\n\nTo is it blue? say blue. Today is {{ strftime_now('%d %b %Y') }}."
    "<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# no end of turn, and the generation prompt opens thoughts that a whole chat does not hold
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# writes thoughts, those of the answer or empty ones
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set parts = "
    "m.content.split('</think>') %}<think>\n{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}\n"
    "</think>\n\n{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture
def build_chat(build, tiny_model_dir):
    def build_chat(template, prompt, response):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        tokenizer.chat_template = template
        row = {"prompt": prompt, "response": response}
        (found,) = build([row], 512, tokenizer, template="chat", score_on="response").to_pylist()
        if found["error"]:
            return found["error"]
        scored = found["scored"]
        assert tokenizer.decode(found["token_ids"]) == found["text"]
        before = tokenizer.decode(found["token_ids"][: scored.index(True)])
        after = tokenizer.decode(found["token_ids"][len(scored) - scored[::-1].index(True) :])
        return before, scored_text(found, tokenizer), after

    return build_chat


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        (CHATML, "<|im_start|>assistant\n", "<|im_end|>\n"),
        (LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        (DEEPSEEK, "<|Assistant|>", ""),
        (QWEN3, "<think>\n\n</think>\n\n", "<|im_end|>\n"),
    ],
    ids=["chatml", "llama3", "deepseek", "qwen3"],
)
@pytest.mark.parametrize(
    ("prompt", "response"),
    [("is it blue?", "blue"), ("say assistant", "assistant"), ("blue\nblue", "blue\n\nblue"), ("end", "<|im_end|>")],
)
def test_response_is_found_in_a_chat(build_chat, template, before, after, prompt, response):
    found = build_chat(template, prompt, response)
    assert found[1:] == (response, after)
    assert found[0].endswith(before)
    assert prompt in found[0]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, DEEPSEEK, QWEN3])
def test_response_is_found_in_a_chat_whatever_becomes_of_its_ends(build_chat, template):
    assert build_chat(template, " is it blue? ", "\n blue \n")[1].strip() == "blue"


def test_response_that_brings_its_own_thoughts(build_chat):
    response = "<think>\nthe sea is\n</think>\n\nblue"
    before, found, _ = build_chat(QWEN3, "is it blue?", response)
    assert (before[-10:], found) == ("assistant\n", response)
    assert "changes the response" in build_chat(DEEPSEEK, "is it blue?", response)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the response"),
        ("{% for m in messages %}{{ m.content | replace('c', 'k') }}{% endfor %}", "changes the response"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "repeats it"),
        ("{{ messages[0].content }}", "leaves it out"),
        ("{{ raise_exception('only systems may speak') }}", "refuses it: only systems may speak"),
        ("{{ messages[0].content + 1 }}", "refuses it: can only concatenate str"),
        ("{% if %}", "refuses it: Expected an expression"),
    ],
)
def test_chat_template_that_cannot_take_a_sample(build_chat, template, reason):
    assert reason in build_chat(template, "a b", "c d")


def test_chat_template_that_writes_the_date(build_chat):
    """A run begun today goes on tomorrow."""
    assert "Today is 26 Jul 2024." in build_chat(LLAMA3, "a b", "c d")[0]
    early = "\n{% if strftime_now is defined %}{% set y = strftime_now('%Y') | int - 1 %}{% endif %}{{ y }}: " + CHATML
    assert build_chat(early, "a b", "c d")[0].startswith("\n2023: <|im_start|>")


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
    with pytest.raises(UserError, match=r"1 id\(s\) stand more than once; '7' in rows 1, 3"):
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
    data = DataConfig(path=str(tmp_path / "t.txt"), window_tokens=window)
    rows = samples.build(data, bos_tokenizer, 128).sort_by("row").to_pylist()
    assert {len(row["token_ids"]) for row in rows[:-1]} == {window}
    assert {row["token_ids"].pop(0) for row in rows} == {bos_tokenizer.bos_token_id}
    assert {row["scored"].pop(0) for row in rows} == {False}
    stream = tokenizer((tmp_path / "t.txt").read_text())["input_ids"]
    assert [token for row in rows for token in row["token_ids"]] == stream
    assert all(all(row["scored"]) for row in rows)


def test_last_window_of_one_token_keeps_its_row(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("012345678")
    data = DataConfig(path=str(tmp_path / "t.txt"), window_tokens=4)
    *others, last = samples.build(data, tokenizer, 128).sort_by("row").to_pylist()
    assert [row["error"] for row in others] == [None, None]
    assert "one token" in last["error"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"window_tokens": 256}, r"data\.window_tokens: 256 .* 128 tokens"), ({"score_on": "response"}, "no responses")],
)
def test_windows_that_cannot_be_cut(tmp_path, tokenizer, settings, message):
    (tmp_path / "t.txt").write_text("The mill stands by the river.")
    with pytest.raises(UserError, match=message):
        samples.build(DataConfig(path=str(tmp_path / "t.txt"), **settings), tokenizer, 128)


def test_windows_cover_a_text_once(tmp_path, tokenizer):
    text = "The mill stands by the river. " * 40
    (tmp_path / "t.txt").write_text(text)
    data = DataConfig(path=str(tmp_path / "t.txt"), window_tokens=16)
    rows = sorted(samples.build(data, tokenizer, 128).to_pylist(), key=lambda row: row["row"])
    stream = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [token for row in rows for token in row["token_ids"]] == stream
    assert {len(row["token_ids"]) for row in rows[:-1]} == {16}


def test_tofu(stories_dir, tofu_dir):
    """All of forget10; under score_on: response the scored tokens decode to the answer."""
    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    path = tofu_dir / "forget10.json"
    table = samples.build(DataConfig(path=str(path), score_on="response"), tokenizer, 512)
    assert len(table) == 400
    assert table["error"].null_count == 400
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    for row in table.slice(0, 100).to_pylist():
        assert scored_text(row, tokenizer).strip() == answers[row["row"] - 1].strip()
