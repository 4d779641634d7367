"""Answers, choices and conversations in the shapes that benchmarks have them."""

import json

import pytest
from transformers import AutoTokenizer

from mrd_ray.config import EvaluationConfig
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError
from mrd_ray.evaluation import sets

QUESTION, CHOICES = "Who found the ball?", ["Tom", "Lily", "Max", "Ben"]
PICK = {"metrics": ["multiple_choice"], "prompt": "question", "choices": "choices", "response": "answer"}


@pytest.fixture
def build(tmp_path, stories_dir):
    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"

    def build(rows, **settings):
        (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
        evaluation = EvaluationConfig(sets={"a": {"path": str(tmp_path / "d.jsonl"), **settings}})
        return sets.build_all(evaluation, tokenizer, Limits(512, 512))["a"].sort_by("index").to_pylist()

    return build


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"choices": CHOICES, "answer": 1}, {}),
        ({"choices": CHOICES, "answer": "1"}, {}),
        ({"choices": CHOICES, "answer": "B"}, {}),
        ({"choices": CHOICES, "answer": "Lily"}, {}),
        ({"choices": "Tom; Lily; Max; Ben", "answer": "B"}, {"list_separator": "; "}),
        ({"choices": {"text": CHOICES, "label": list("ABCD")}, "answer": "B"}, {}),
        ({"choices": {"text": CHOICES, "label": ["1", "2", "3", "4"]}, "answer": "2"}, {}),
        ({"A": "Tom", "B": "Lily", "C": "Max", "D": "Ben", "answer": "B"}, {"choices": ["A", "B", "C", "D"]}),
    ],
)
def test_choices(build, row, settings):
    (found,) = build([{"question": QUESTION} | row], **PICK | settings)
    assert (found["error"], found["right"], found["response"]) == (None, 1, "B")
    assert found["prompt"].splitlines() == [QUESTION, "A. Tom", "B. Lily", "C. Max", "D. Ben"]
    assert len(found["asked"]["sequences"]) == 4


@pytest.mark.parametrize("answer", ["E", 4, -1, True, None, "nobody", ["B"], 1.0])
def test_a_right_choice_that_is_none(build, answer):
    (found,) = build([{"question": QUESTION, "choices": CHOICES, "answer": answer}], **PICK)
    assert "expected the index of one of its choices, its letter, label or text" in found["error"]


def test_a_number_that_may_be_an_index_or_a_choice_is_refused(build):
    row = {"question": "How many?", "choices": ["1", "2", "3"], "answer": "1"}
    assert "expected the index" in build([row], **PICK)[0]["error"]


def test_wrong_answers_in_a_text(build):
    row = {"q": QUESTION, "best": "Lily did", "others": "Tom did; Max did;"}
    settings = {"prompt": "q", "response": "best", "wrong": "others", "metrics": ["truth_ratio"]}
    (found,) = build([row], **settings, list_separator=";")
    assert [one["role"] for one in found["asked"]["sequences"]] == ["answer", "wrong-0", "wrong-1"]
    assert "list_separator" in build([row], **settings)[0]["error"]


def test_truthfulqa_and_arc_from_the_field(shared, stories_dir):
    folder = shared / "cases" / "15-multiple-choice-shapes"
    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    of_sets = {
        name: {"path": str(folder / f"{name}.jsonl"), "prompt": "question", "choices": "choices", "response": response,
               "metrics": ["multiple_choice"]}
        for name, response in {"arc": "answerKey", **dict.fromkeys(("letter", "index_text", "index"), "answer")}.items()
    }  # fmt: skip
    of_sets["columns_abcd"] = of_sets["arc"] | {
        "path": str(folder / "columns_abcd.jsonl"), "choices": list("ABCD"), "response": "target"
    }  # fmt: skip
    built = sets.build_all(EvaluationConfig(sets=of_sets), tokenizer, Limits(512, 512))
    asked = {name: table.to_pylist()[0]["asked"]["sequences"] for name, table in built.items()}
    assert all(one == asked["index"] for one in asked.values())


def test_a_conversations_last_turn_is_the_answer(build):
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Lily."}]
    before = [{"role": "user", "content": "A story?"}, {"role": "assistant", "content": "Yes."}]
    metrics = {"metrics": ["probability", "rouge_l", "memorization_accuracy"]}
    (pair,) = build([{"question": QUESTION, "answer": "Lily."}], template="chat", **metrics)
    (chat,) = build([{"messages": turns}], **metrics)
    assert chat["asked"] | {"sample_id": ""} == pair["asked"] | {"sample_id": ""}
    assert (chat["prompt"], chat["response"]) == (QUESTION, "Lily.")
    (longer,) = build([{"messages": before + turns}], **metrics)
    assert longer["prompt"] == f"A story?\nYes.\n{QUESTION}"
    assert len(longer["asked"]["prompt_ids"]) > len(pair["asked"]["prompt_ids"])
    (answer,) = longer["asked"]["sequences"]
    assert sum(answer["scored"]) == sum(pair["asked"]["sequences"][0]["scored"])


def test_numbers_and_lists(build):
    rows = [{"question": "When?", "answer": 1987}, {"question": "Who?", "answer": ["Lily", "she"]}]
    first, second = build(rows, metrics=["probability"], numbers_as_text=True, response_index=0)
    assert (first["response"], second["response"]) == ("1987", "Lily")


def test_rouge_needs_a_response(build):
    rows = [{"a": "x", "b": "y"}]
    with pytest.raises(UserError, match="say which column that is with `response`"):
        build(rows, template="{a} {b}", score_on="all", metrics=["rouge_l"])


def test_a_letter_stands_for_a_column_of_another_name(build):
    row = {"question": QUESTION, "opa": "Tom", "opb": "Lily", "answer": "B"}
    (found,) = build([row], **PICK | {"choices": ["opa", "opb"]})
    assert (found["error"], found["right"]) == (None, 1)
    assert build([row | {"answer": "opb"}], **PICK | {"choices": ["opa", "opb"]})[0]["right"] == 1
