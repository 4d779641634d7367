"""Small files from the field, beside the repository, that once gave wrong samples or none."""

import pytest
from scored import scored_text
from transformers import AutoTokenizer

from mrd_ray.config import DataSettings
from mrd_ray.data import samples
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[U] {{ m.content }}\n"
    "{% elif m.role == 'system' %}[S] {{ m.content }}\n{% else %}[A] {{ m.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[A] {% endif %}"
)
LILY, BALL = "The girl is Lily.", "He went to the park with his red ball."


@pytest.fixture
def read(shared, stories_dir):
    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    tokenizer.chat_template = CHAT

    def read(path, **settings):
        data = DataSettings(path=str(shared / "cases" / path), **settings)
        table = samples.build(data, tokenizer, Limits(512, 512)).sort_by("index")
        return [row | {"counted": row["token_ids"] and scored_text(row, tokenizer)} for row in table.to_pylist()]

    return read


def test_chat_columns(read):
    response = {"score_on": "response"}
    messages = read("01-chat-columns/messages.jsonl", **response)
    assert [row["counted"].split() for row in messages] == [LILY.split(), f"{LILY} {BALL}".split()]
    shares = read("01-chat-columns/sharegpt.jsonl", **response)
    assert [row["text"] for row in shares] == [row["text"].replace("[S] You tell stories.\n", "") for row in messages]
    flat = read("01-chat-columns/prompt_completion_text.jsonl", template="chat", **response)
    trl = read("01-chat-columns/trl_prompt_completion.jsonl", **response)
    for column in ("token_ids", "scored"):
        assert [row[column] for row in flat] == [row[column] for row in trl]
        assert flat[0][column] == shares[0][column]


def test_a_text_that_has_its_special_tokens(read):
    templated, plain = read("02-text-with-bos/templated.jsonl"), read("02-text-with-bos/plain.jsonl")
    assert [row["token_ids"] for row in templated] == [row["token_ids"] for row in plain]
    assert all(row["token_ids"][:2] != [1, 1] for row in templated)


def test_text_and_labels(read):
    with pytest.raises(UserError, match=r"--data\.prompt text --data\.response labels\n  --data\.text text"):
        read("03-text-and-labels/unlearn_train.json")
    named = {"prompt": "text", "response": "labels"}
    whole = read("03-text-and-labels/unlearn_train.json", **named)
    assert sum(len(row["token_ids"]) for row in whole) == 128
    assert [row["text"] for row in read("03-text-and-labels/one_row.json", **named)] == [whole[0]["text"]]
    keys = read("03-text-and-labels/splits_as_keys.json", split="retention", **named)
    assert [row["text"] for row in keys] == [whole[1]["text"]]


def test_muse(read):
    assert len(read("04-muse/privleak_forget.json")) == 2
    verbatim = {"prompt": "prompt", "response": "gt", "template": "{prompt}{response}"}
    assert len(read("04-muse/verbmem_forget.json", **verbatim)) == 2
    assert len(read("04-muse/knowmem_qa.json")) == 2
    assert len(read("04-muse/raw_forget.txt")) == 9


def test_alpaca(read):
    with pytest.raises(UserError, match=r"--data\.template alpaca"):
        read("05-alpaca/alpaca.json")
    first, second = read("05-alpaca/alpaca.json", template="alpaca", score_on="response")
    assert "Lily runs to the park." in second["text"]
    assert "### Input" not in first["text"]
    assert second["counted"].strip() == "Lily ran to the park."


@pytest.mark.parametrize(
    ("path", "settings", "count"),
    [
        ("07-save-to-disk/forget", {}, 2),
        ("07-save-to-disk/forget_dict", {}, 2),
        ("08-compressed/forget.jsonl.gz", {}, 2),
        ("08-compressed/c4-validation.00000-of-00008.json.gz", {}, 2),
        ("08-compressed", {"split": "validation"}, 2),
        ("09-shards/part-*.jsonl", {}, 12),
        ("09-shards/dir", {}, 12),
        ("09-shards/dir", {"split": "train[:4]"}, 4),
        ("09-shards/dir", {"split": "train[:50%]"}, 6),
        ("10-duplicates/repeated_rows.jsonl", {}, 4),
        ("10-duplicates/id_of_document.jsonl", {"id": None}, 3),
        ("10-duplicates/id_of_document.jsonl", {"id_with_row": True}, 3),
        ("12-other-answers/pandas_default.json", {}, 2),
        ("12-other-answers/columns.json", {}, 2),
        ("12-other-answers/lists.jsonl", {"response_index": 0}, 2),
        ("12-other-answers/lists.jsonl", {"response_join": ", "}, 2),
        ("12-other-answers/squad.jsonl", {"prompt": "question", "response": "answers.text", "response_index": 0}, 1),
    ],
)
def test_every_row_is_read(read, path, settings, count):
    rows = read(path, **settings)
    assert [row["error"] for row in rows] == [None] * count


def test_numbers(read):
    rows = read("12-other-answers/numbers.jsonl", numbers_as_text=True, score_on="response")
    assert [row["counted"] and row["counted"].strip() for row in rows] == ["1987", "3", None, "Lily"]
    assert rows[2]["error"] == "column 'answer' is not text but bool: True"
    left = [row["error"] is None for row in read("12-other-answers/numbers.jsonl")]
    assert left == [False, False, False, True]


def test_tokens_that_the_model_does_not_have(shared, stories_dir):
    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    path = str(shared / "cases" / "22-tokenizer-larger-than-model" / "qa.jsonl")
    data = DataSettings(path=path, template="<|user|>{prompt}<|assistant|>{response}")
    errors = samples.build(data, tokenizer, Limits(512, 512))["error"].to_pylist()
    assert all(
        error.startswith("token 513 '<|assistant|>' is not among the model's 512 embeddings") for error in errors
    )
    assert samples.build(data, tokenizer, Limits(512, 514))["error"].null_count == len(errors)
