"""Chat data in every shape gives the tokens of the tokenizer's own template, and counts assistant turns only."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scored import scored_text

from mrd_ray.config import DataSettings
from mrd_ray.data import samples
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError

TURNS = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": "Who sells bread?"},
    {"role": "assistant", "content": "The baker."},
    {"role": "user", "content": "And the bells?"},
    {"role": "assistant", "content": "The bell is cracked."},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(t["role"], t["role"]), "value": t["content"]} for t in TURNS
]
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|a|>{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
# as Qwen3 does: thoughts of the last turn are shown, of earlier ones not
FORGETS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}"
)


@pytest.mark.parametrize("score_on", ["all", "response"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"messages": json.dumps(TURNS)},
        {"messages": [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]},
        {"messages": [turn | {"tool_calls": None} for turn in TURNS]},
        {"messages": {"role": [t["role"] for t in TURNS], "content": [t["content"] for t in TURNS]}},
        {"conversations": SHAREGPT},
        {"conversations": SHAREGPT[1:], "system": "You tell stories."},
        {"prompt": TURNS[:2], "completion": TURNS[2:]},
    ],
)
def test_shapes(build, chat_tokenizer, row, score_on):
    (sample,) = build([row], 512, chat_tokenizer, score_on=score_on).to_pylist()
    assert sample["error"] is None
    expected = chat_tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    assert sample["token_ids"] == expected
    if score_on == "response":
        assert scored_text(sample, chat_tokenizer) == "The baker.The bell is cracked."


def test_one_turn_is_as_question_and_answer(build, chat_tokenizer):
    settings = {"tokenizer": chat_tokenizer, "score_on": "response"}
    pair = build([{"question": "Who sells bread?", "answer": "The baker."}], 512, template="chat", **settings)
    chat = build([{"messages": TURNS[1:3]}], 512, **settings)
    trl = build([{"prompt": TURNS[1:2], "completion": TURNS[2:3]}], 512, **settings)
    for column in ("token_ids", "scored"):
        assert pair[column].to_pylist() == chat[column].to_pylist() == trl[column].to_pylist()


def test_of_a_prompt_and_completion_the_completion_counts(build, chat_tokenizer):
    row = {"prompt": TURNS[:4], "completion": TURNS[4:]}
    (sample,) = build([row], 512, chat_tokenizer, score_on="response").to_pylist()
    assert scored_text(sample, chat_tokenizer) == "The bell is cracked."
    (whole,) = build([row | {"completion": TURNS}], 512, chat_tokenizer, score_on="response").to_pylist()
    assert whole["token_ids"] == sample["token_ids"]  # a completion that brings its prompt along
    assert whole["scored"] == sample["scored"]


def test_the_templates_own_marks_decide(build, chat_tokenizer):
    chat_tokenizer.chat_template = GENERATION
    settings = {"tokenizer": chat_tokenizer, "score_on": "response"}
    (sample,) = build([{"messages": TURNS}], 512, **settings).to_pylist()
    assert scored_text(sample, chat_tokenizer) == "The baker.<|end|>The bell is cracked.<|end|>"
    made = chat_tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    assert (sample["token_ids"], sample["scored"]) == (
        made["input_ids"],
        [bool(one) for one in made["assistant_masks"]],
    )
    (pair,) = build([{"question": "Who?", "answer": "He."}], 512, template="chat", **settings).to_pylist()
    assert scored_text(pair, chat_tokenizer) == "He.<|end|>"
    (part,) = build([{"prompt": TURNS[:4], "completion": TURNS[4:]}], 512, **settings).to_pylist()
    assert scored_text(part, chat_tokenizer) == "The bell is cracked.<|end|>"


def test_a_template_that_writes_earlier_turns_otherwise_is_an_error_of_the_row(build, chat_tokenizer):
    chat_tokenizer.chat_template = FORGETS
    many, one = (
        build([{"messages": TURNS}, {"messages": TURNS[:3]}], 512, chat_tokenizer, score_on="response")
        .sort_by("index")
        .to_pylist()
    )
    assert "assistant turn 3" in many["error"]
    assert "otherwise once more turns follow" in many["error"]
    assert scored_text(one, chat_tokenizer) == "The baker."
    assert build([{"messages": TURNS}], 512, chat_tokenizer)["error"].to_pylist() == [None]  # where all counts


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"from": "human", "value": "a"}, {"from": "alien", "value": "b"}], "turn 2 is by 'alien'"),
        (TURNS[:2], "no assistant turn to score"),
        ([*TURNS[:2], {"role": "assistant", "content": None}], "or none that says anything"),
        ([*TURNS[:2], {"role": "assistant", "content": [{"type": "image"}]}], "turn 3 is not text"),
        ([1, 2], "holds no conversation"),
        (None, "holds no conversation"),
    ],
)
def test_a_conversation_that_cannot_be_scored_has_its_reason(build, chat_tokenizer, turns, reason):
    rows = [{"id": "good", "messages": TURNS}, {"id": "bad", "messages": turns}]
    bad, good = build(rows, 512, chat_tokenizer, score_on="response").sort_by("sample_id").to_pylist()
    assert reason in bad["error"]
    assert good["error"] is None


def test_preferences_need_to_be_named(build, chat_tokenizer):
    row = {"prompt": "Who?", "chosen": "He.", "rejected": "She."}
    with pytest.raises(UserError, match=r"--data\.prompt prompt --data\.response chosen\n.*--data\.response rejected"):
        build([row], 512, chat_tokenizer)
    (sample,) = build([row], prompt="prompt", response="chosen").to_pylist()
    assert sample["text"] == "Question: Who?\nAnswer: He."
    with pytest.raises(UserError, match=r"--data\.messages chosen"):
        build([{"chosen": TURNS, "rejected": TURNS}], 512, chat_tokenizer)


def test_without_a_chat_template_the_way_out_is_said(build, tokenizer):
    with pytest.raises(UserError, match=r"column messages holds conversations, but the tokenizer has no chat template"):
        build([{"messages": TURNS}])


def test_tools_reach_the_template(build, chat_tokenizer):
    chat_tokenizer.chat_template = "{% if tools %}{{ tools | length }} tools{% endif %}" + chat_tokenizer.chat_template
    tool = {"type": "function", "function": {"name": "ring", "parameters": {}}}
    for tools in ([tool], json.dumps([tool])):
        (sample,) = build([{"messages": TURNS, "tools": tools}], 512, chat_tokenizer).to_pylist()
        assert sample["text"].startswith("1 tools")


def test_a_text_that_reads_like_a_conversation_stays_a_text(build, tokenizer):
    """Columns hold conversations or texts, not now these and now those."""
    rows = [{"question": "a b", "answer": "c d"}, {"question": "a b", "answer": json.dumps(TURNS)}]
    plain, like = build(rows, 512).sort_by("index").to_pylist()
    assert like["text"] == f"Question: a b\nAnswer: {json.dumps(TURNS)}"
    assert (plain["error"], like["error"]) == (None, None)


@pytest.mark.parametrize(("tools", "reason"), [("{}{", "is no list of tools"), ({"a": 1}, "is no list of tools")])
def test_tools_that_are_none(build, chat_tokenizer, tools, reason):
    (sample,) = build([{"messages": TURNS, "tools": tools}], 512, chat_tokenizer).to_pylist()
    assert reason in sample["error"]


TOOL_CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function | tojson }}</call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def calling(arguments):
    function = {"name": "find", "arguments": arguments}
    return [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "Here."},
        {"role": "assistant", "content": "It is here."},
    ]


def test_calls_of_tools_are_the_assistants_words(build, chat_tokenizer):
    chat_tokenizer.chat_template = TOOL_CALLS
    (sample,) = build([{"messages": calling({"a": 1})}], 512, chat_tokenizer, score_on="response").to_pylist()
    assert sample["error"] is None
    assert scored_text(sample, chat_tokenizer) == ('<call>{"name": "find", "arguments": {"a": 1}}</call>It is here.')


def test_calls_of_tools_are_the_same_from_parquet(build, chat_tokenizer, tmp_path):
    """There every object has the fields of all others."""
    chat_tokenizer.chat_template = TOOL_CALLS
    rows = [{"messages": calling({"a": 1})}, {"messages": calling({"city": "Paris"})}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = samples.build(DataSettings(path=str(tmp_path / "d.parquet")), chat_tokenizer, Limits(512))
    assert found.drop(["file"]) == build(rows, 512, chat_tokenizer).drop(["file"])


def test_a_turn_of_weight_0_and_an_empty_one_do_not_count(build, chat_tokenizer):
    turns = [*TURNS[:2], TURNS[2] | {"weight": 0}, *TURNS[3:], TURNS[3], {"role": "assistant", "content": ""}]
    (sample,) = build([{"messages": turns}], 512, chat_tokenizer, score_on="response").to_pylist()
    assert scored_text(sample, chat_tokenizer) == "The bell is cracked."


@pytest.mark.parametrize("prompt", ["Who sells bread?", " Who sells bread?\n", TURNS[:2], TURNS[1:2]])
def test_a_response_that_brings_the_prompt_along(build, chat_tokenizer, prompt):
    rows = [{"prompt": prompt, "chosen": TURNS[:3]}]
    settings = {"prompt": "prompt", "response": "chosen", "score_on": "response"}
    (sample,) = build(rows, 512, chat_tokenizer, **settings).to_pylist()
    (whole,) = build([{"messages": TURNS[:3]}], 512, chat_tokenizer, score_on="response").to_pylist()
    assert [sample["token_ids"], sample["scored"]] == [whole["token_ids"], whole["scored"]]


def test_a_response_of_another_conversation_is_refused(build, chat_tokenizer):
    rows = [{"prompt": "And the bells?", "chosen": TURNS[1:3]}]
    (sample,) = build(rows, 512, chat_tokenizer, prompt="prompt", response="chosen").to_pylist()
    assert "begins with a turn of user that is not the prompt's" in sample["error"]


@pytest.mark.parametrize("column", ["system", "system_prompt", "System"])
def test_system_reaches_the_chat_template_of_prompts_and_responses(build, chat_tokenizer, column):
    row = {column: "You tell stories.", "prompt": "Who sells bread?", "response": "The baker."}
    (sample,) = build([row], 512, chat_tokenizer, template="chat").to_pylist()
    assert sample["token_ids"] == chat_tokenizer.apply_chat_template(TURNS[:3], tokenize=True, return_dict=False)


@pytest.mark.parametrize("names", [("Human", "GPT"), ("user", "model"), ("human", "bot")])
def test_names_of_speakers(build, chat_tokenizer, names):
    turns = [{"from": name, "value": turn["content"]} for name, turn in zip(names, TURNS[1:3], strict=True)]
    (sample,) = build([{"conversations": turns}], 512, chat_tokenizer).to_pylist()
    assert sample["token_ids"] == chat_tokenizer.apply_chat_template(TURNS[1:3], tokenize=True, return_dict=False)


@pytest.mark.parametrize("content", [["The", " baker."], [{"text": "The baker."}]])
def test_parts_of_content_without_a_type(build, chat_tokenizer, content):
    turns = [TURNS[1], {"role": "assistant", "content": content}]
    (sample,) = build([{"messages": turns}], 512, chat_tokenizer, score_on="response").to_pylist()
    assert scored_text(sample, chat_tokenizer) == "The baker."


@pytest.mark.parametrize("content", ["\n\nThe baker.\n", "The baker.", " The baker."])
def test_white_space_of_turns_counts_where_the_template_keeps_it(build, chat_tokenizer, content):
    turns = [TURNS[1], {"role": "assistant", "content": content}]
    (sample,) = build([{"messages": turns}], 512, chat_tokenizer, score_on="response").to_pylist()
    assert scored_text(sample, chat_tokenizer) == content
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("m.content", "m.content | trim")
    (sample,) = build([{"messages": turns}], 512, chat_tokenizer, score_on="response").to_pylist()
    assert scored_text(sample, chat_tokenizer) == content.strip()
