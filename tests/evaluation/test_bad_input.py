"""What cannot be evaluated is refused or named: sets, settings, rows."""

import json

import pytest
from evaluations import config

from mrd_ray import UserError, evaluate


def only(settings, **of_set):
    return {"sets": {"forget": settings["sets"]["forget"] | of_set}, "max_new_tokens": 4}


@pytest.mark.parametrize(
    ("of_set", "message"),
    [
        ({"path": "nowhere.jsonl"}, r"evaluation.sets.forget, .*cannot read nowhere.jsonl"),
        ({"wrong": "wrong_answers"}, r"no column 'wrong_answers' \(wrong\); its columns are question, answer"),
        ({"template": "chat"}, "no chat template"),
    ],
)
def test_unusable_sets_are_refused_by_name(stories_dir, settings, tmp_path, of_set, message):
    with pytest.raises(UserError, match=message):
        evaluate(config(stories_dir, only(settings, **of_set), tmp_path))


def test_rows_that_cannot_be_evaluated_keep_their_reason(stories_dir, tmp_path):
    rows = [
        {"question": "Who?", "answer": "Nobody.", "wrong": ["Somebody."]},
        {"question": "Who?", "answer": "A long one. " * 200, "wrong": ["Somebody."]},
        {"question": "Who?", "answer": "Null.", "wrong": None},
        {"question": "Why? " * 300, "answer": "No room.", "wrong": ["Somebody."]},
        {"question": "Where?", "answer": "...", "wrong": ["Somewhere."]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    forget = {"path": str(file), "wrong": "wrong", "metrics": ["rouge_l", "truth_ratio"]}
    run = evaluate(config(stories_dir, {"sets": {"forget": forget}, "max_new_tokens": 4}, tmp_path / "run"))
    errors = sorted(error for error in run.lines["error"].to_pylist() if error is not None)
    assert run.num_errors == len(errors) == 4
    assert [error for error in errors if "over the limit of 512" in error][1:] == [errors[1]]
    assert any("column 'answer' has no word, of which rouge_l is a share" in error for error in errors)
    assert any("column 'wrong' is None; expected a list of texts" in error for error in errors)
