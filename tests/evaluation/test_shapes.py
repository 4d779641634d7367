"""Answers, choices and conversations in the shapes that benchmarks have them."""

import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoTokenizer

from mrd_ray.config import EvaluatedSet, EvaluationSettings
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError
from mrd_ray.evaluation import sets

QUESTION, CHOICES = "Who found the ball?", ["Tom", "Lily", "Max", "Ben"]
OBJECTS = [{"text": text, "label": str(i)} for i, text in enumerate(CHOICES, 1)]
PICK = {"metrics": ["multiple_choice"], "prompt": "question", "choices": "choices", "response": "answer"}
PAGE = Path(__file__).parents[2] / "docs" / "your-data.md"
SECTION = PAGE.read_text(encoding="utf-8").partition("## Multiple choice\n")[2].partition("\n## ")[0]
EXAMPLES = [[one.strip() for one in line.strip("|").split(" | ")] for line in SECTION.splitlines() if "<br>" in line]


@pytest.fixture
def build(tmp_path, stories_dir):
    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"

    def build(rows, **settings):
        (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
        evaluation = EvaluationSettings(sets={"a": {"path": str(tmp_path / "d.jsonl"), **settings}})
        return (
            sets.build_all(evaluation, tokenizer, Limits(512, 512), Console(stderr=True))["a"]
            .sort_by("index")
            .to_pylist()
        )

    return build


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"choices": CHOICES, "answer": 1}, {}),
        ({"choices": CHOICES, "answer": "1"}, {"answers_count_from": 0}),
        ({"choices": CHOICES, "answer": 2}, {"answers_count_from": 1}),
        ({"choices": CHOICES, "answer": "(2)"}, {"answers_count_from": 1}),
        ({"choices": CHOICES, "answer": "B"}, {}),
        ({"choices": CHOICES, "answer": "Lily"}, {}),
        ({"choices": CHOICES, "answer": "b"}, {}),
        ({"choices": CHOICES, "answer": "(B)"}, {}),
        ({"choices": CHOICES, "answer": "B."}, {}),
        ({"choices": CHOICES, "answer": ["B"]}, {}),
        ({"choices": CHOICES, "answer": [0, 1, 0, 0]}, {}),
        ({"choices": CHOICES, "answer": [False, True, False, False]}, {}),
        (
            {"choices": {"choices": CHOICES, "labels": [0, 1, 0, 0]}},
            {"choices": "choices.choices", "response": "choices.labels"},
        ),
        ({"choices": dict(zip("ABCD", CHOICES, strict=True)), "answer": "B"}, {}),
        ({"choices": dict(zip("ABCD", CHOICES, strict=True)) | {"E": None}, "answer": "b"}, {}),
        ({"choices": dict(zip("1234", CHOICES, strict=True)), "answer": 2}, {}),
        ({"choices": "Tom; Lily; Max; Ben", "answer": "B"}, {"list_separator": "; "}),
        ({"choices": {"text": CHOICES, "label": list("ABCD")}, "answer": "B"}, {}),
        ({"choices": {"text": CHOICES, "label": ["1", "2", "3", "4"]}, "answer": "2"}, {}),
        ({"choices": {"text": CHOICES, "label": ["1", "2", "3", "4"]}, "answer": "2"}, {"choices": "choices.text"}),
        ({"choices": {"text": CHOICES, "label": [1, 2, 3, 4]}, "answer": 2}, {"choices": "choices.text"}),
        ({"q": {"choices": OBJECTS}, "answer": "2"}, {"choices": "q.choices"}),
        ({"q": {"choices": OBJECTS}, "answer": "2"}, {"choices": "q.choices.text"}),
        ({"choices": OBJECTS, "answer": "2"}, {}),
        ({"A": "Tom", "B": "Lily", "C": "Max", "D": "Ben", "answer": "B"}, {"choices": ["A", "B", "C", "D"]}),
    ],
)
def test_choices(build, row, settings):
    (found,) = build([{"question": QUESTION} | row], **PICK | settings)
    assert (found["error"], found["right"], found["response"]) == (None, 1, "B")
    assert found["prompt"].splitlines() == [QUESTION, "A. Tom", "B. Lily", "C. Max", "D. Ben"]
    assert len(found["asked"]["sequences"]) == 4


@pytest.mark.parametrize(
    "answer", ["E", 5, -1, True, None, "", "nobody", [], ["A", "B"], [1, 1, 0, 0], [0, 0, 0, 0], 1.0, "9" * 5000]
)
def test_a_right_choice_that_is_none(build, answer):
    (found,) = build([{"question": QUESTION, "choices": CHOICES, "answer": answer}], **PICK)
    assert "expected the index of one of its choices, its letter, label or text" in found["error"]


def rights(built):
    return [row["right"] for row in built]


def answered(*answers, choices=CHOICES):
    return [{"question": QUESTION, "choices": choices, "answer": answer} for answer in answers]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([1, 0, 3], [1, 0, 3]),
        (["1", "0"], [1, 0]),
        ([1, 4, 3], [0, 3, 2]),
        (["1", "4"], [0, 3]),
        ([1, [2], "(4)"], [0, 1, 3]),
        (["A", "1", "4"], [0, 0, 3]),
    ],
)
def test_the_set_says_whether_its_answers_count_from_0_or_from_1(build, answers, expected):
    assert rights(build(answered(*answers), **PICK)) == expected


def test_a_column_per_choice_and_numbers_from_1(build):
    rows = [{"question": QUESTION, "option1": "Tom", "option2": "Lily", "answer": answer} for answer in ("1", "2")]
    assert rights(build(rows, **PICK | {"choices": ["option1", "option2"]})) == [0, 1]
    columns = ["opa", "opb", "opc", "opd"]
    rows = [{"question": QUESTION, "cop": i} | dict(zip(columns, CHOICES, strict=True)) for i in (1, 2, 3, 4)]
    assert rights(build(rows, **PICK | {"choices": columns, "response": "cop"})) == [0, 1, 2, 3]


def test_the_number_of_choices_may_differ_by_row(build):
    rows = answered(1, 2) + answered(3, choices=CHOICES[:3])
    assert rights(build(rows, **PICK)) == [0, 1, 2]


@pytest.mark.parametrize(("answers", "expected"), [([1, 2], [1, 2]), (["3", "A"], [3, 0]), (["2"], [2])])
def test_a_set_that_leaves_open_where_its_answers_count_from_says_so(build, answers, expected, capsys):
    assert rights(build(answered(*answers), **PICK)) == expected
    assert "are assumed to count from 0, so that 1 is the second choice (row 1 has" in capsys.readouterr().err


def test_the_names_of_columns_are_labels(build):
    row = {"question": QUESTION, "option1": "Tom", "option2": "Lily", "answer": "1"}
    assert rights(build([row], **PICK | {"choices": ["option1", "option2"]})) == [0]


def test_answers_that_count_from_0_and_from_1_are_refused(build):
    message = r"evaluation.sets.a, .*'answer': answers count both from 0 \(row 2 has 0\) and from 1 \(row 3 has 4"
    with pytest.raises(UserError, match=message):
        build(answered(1, 0, 4), **PICK)
    first, second, third = build(answered(1, 0, 4), **PICK, answers_count_from=0)
    assert (first["right"], second["right"]) == (1, 0)
    assert "is 4; expected the index" in third["error"]


@pytest.mark.parametrize(("answer", "numbers_as_text"), [(1, True), ("1", False), ("1", True)])
def test_a_number_that_may_be_an_index_or_a_choice_is_refused(build, answer, numbers_as_text):
    choices = [1, 3] if numbers_as_text else ["1", "3"]
    row = {"question": "2+1?", "choices": choices, "answer": answer}
    settings = PICK | {"numbers_as_text": numbers_as_text}
    error = build([row], **settings)[0]["error"]
    assert "which may be the text of A, or the index of A or B; answers_count_from says" in error
    found = [rights(build([row], **settings, answers_count_from=of))[0] for of in (0, 1, None)]
    assert found == [1, 0, 0]


def test_a_number_that_may_be_an_index_or_a_choice_is_what_numbers_of_its_set_are(build):
    doubtful = answered("1", choices=["1", "3"])
    by_index = build(doubtful + answered("0", "1"), **PICK)
    assert rights(by_index) == [1, 0, 1]
    by_text = build(doubtful + answered("7", choices=["7", "9"]), **PICK)
    assert rights(by_text) == [0, 0]
    of_both = build(doubtful + answered("0", "1") + answered("7", choices=["7", "9"]), **PICK)
    assert rights(of_both) == [None, 0, 1, 0]
    assert "the text of A, or the index of B" in of_both[0]["error"]


def test_a_letter_that_is_a_choice_too(build):
    doubtful = answered("A", choices=["B", "A"])
    assert "the letter of A, or the text of B" in build(doubtful, **PICK)[0]["error"]
    assert rights(build(doubtful + answered("C"), **PICK)) == [0, 2]
    assert rights(build(doubtful + answered("Tom"), **PICK)) == [1, 0]


def test_labels_come_before_indices_unless_other_rows_are_none(build):
    of_row = {"question": QUESTION, "choices": {"text": CHOICES, "label": ["1", "2", "3", "4"]}}
    assert rights(build([of_row | {"answer": one} for one in ("1", "2", "4")], **PICK)) == [0, 1, 3]
    assert rights(build([of_row | {"answer": one} for one in (1, 0, 3)], **PICK)) == [1, 0, 3]


def test_a_choice_named_twice_is_refused(build):
    row = answered("Tom", choices=["Tom", "Tom"])
    assert "the text of A or B" in build(row, **PICK)[0]["error"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"text": CHOICES, "label": ["1", "2"]}, "has 4 choices, but 2 labels"),
        ({"A": "Tom", "B": None, "C": "Max"}, "column 'choices.B' is missing or null"),
        ({}, "column 'choices' is {}; expected choices by their labels"),
        ([{"label": "A"}], "column 'choices.text' is missing or null"),
        (["x"] * 27, "has 27 choices; expected at most 26"),
    ],
)
def test_choices_that_are_none(build, choices, message):
    assert message in build(answered("A", choices=choices), **PICK)[0]["error"]


def test_where_answers_count_from_goes_with_choices():
    with pytest.raises(ValidationError, match="answers_count_from: serves multiple_choice alone"):
        EvaluatedSet(path="x.jsonl", metrics=["probability"], answers_count_from=1)


@pytest.mark.parametrize("example", EXAMPLES, ids=[example[0] for example in EXAMPLES])
def test_every_example_of_the_page_is_read(build, example):
    _, lines, settings, right = example
    rows = [json.loads(line.strip("`")) for line in lines.split("<br>")]
    given = yaml.safe_load("{" + settings.strip("`") + "}")
    built = build(rows, **{"prompt": "question", "metrics": ["multiple_choice"]} | given)
    assert [(row["error"], row["response"]) for row in built] == [(None, letter) for letter in re.split(", ", right)]


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
    built = sets.build_all(EvaluationSettings(sets=of_sets), tokenizer, Limits(512, 512))
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
