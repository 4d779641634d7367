"""What cannot be evaluated is refused or named: sets, settings, rows."""

import json

import pytest
from evaluations import config
from pydantic import ValidationError
from transformers import AutoTokenizer

from mrd_ray import UserError, evaluate
from mrd_ray.cli.main import LINE
from mrd_ray.config import EvaluatedSet, EvaluationSettings
from mrd_ray.data.tokens import Limits
from mrd_ray.evaluation import sets


def only(settings, **of_set):
    return {"sets": {"forget": settings["sets"]["forget"] | of_set}, "max_new_tokens": 4}


@pytest.mark.parametrize(
    ("of_set", "message"),
    [
        ({"metrics": ["rouge_l", "min_k", "rouge_l"]}, "metrics: rouge_l stands more than once"),
        ({"metrics": ["probability"], "choices": "c"}, "choices: serves multiple_choice alone, not probability"),
        ({"metrics": ["multiple_choice"], "choices": "c", "text": "t"}, "multiple_choice needs prompts with responses"),
        ({"metrics": ["multiple_choice"], "choices": "c", "path": "x.txt"}, "multiple_choice needs prompts with"),
    ],
)
def test_sets_that_cannot_serve_their_metrics_are_refused(of_set, message):
    with pytest.raises(ValidationError, match=message):
        EvaluatedSet(**{"path": "x.jsonl"} | of_set)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"utility": ["a", "a"]}, "evaluation.utility: a stands more than once"),
        ({"min_k_percent": [5, 20, 5.0000001]}, "evaluation.min_k_percent: 5 stands more than once"),
        ({"stop": ""}, "at least 1 character"),
    ],
)
def test_settings_of_no_meaning_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        EvaluationSettings(**settings)


def test_a_stop_is_what_a_shell_can_say_and_a_text_counts_whole():
    of_set = "{a: {path: x.jsonl, text: t, metrics: [min_k]}}"
    flags = ["--model.path", "m", "--run.dir", "r", "--evaluation.stop", r"a\n\tb", "--evaluation.sets", of_set]
    evaluation = LINE.settings(["evaluate", *flags]).evaluation
    assert evaluation.stop == "a\n\tb"
    assert evaluation.sets["a"].score_on == "all"


@pytest.mark.parametrize(
    ("of_set", "settings", "context", "message"),
    [
        ({"score_on": "all", "metrics": ["rouge_l"]}, {}, 512, "evaluation.sets.a, .*rouge_l needs prompts with resp"),
        ({"text": "text", "metrics": ["perplexity"], "max_tokens": 1}, {}, 512, r"max_tokens: windows of 1 token\(s\)"),
        ({"text": "text", "metrics": ["perplexity"]}, {}, 1, r"max_tokens: windows of 1 token\(s\)"),
        ({"text": "text", "metrics": ["min_k"]}, {"stop": "\n</s>"}, 512, "evaluation.stop: </s> is a special token"),
    ],
)
def test_what_the_data_or_the_tokenizer_rules_out_is_refused(stories_dir, tmp_path, of_set, settings, context, message):
    (tmp_path / "texts.jsonl").write_text('{"text": "Once there was a dog."}')
    evaluation = EvaluationSettings(sets={"a": {"path": str(tmp_path / "texts.jsonl")} | of_set}, **settings)
    with pytest.raises(UserError, match=message):
        sets.build_all(evaluation, AutoTokenizer.from_pretrained(stories_dir), Limits(context))


def test_half_a_surrogate_pair_in_a_choice_is_its_rows_error(stories_dir, tmp_path):
    (tmp_path / "choices.jsonl").write_text('{"question": "Which?", "choices": ["red\\ud800", "blue"], "answer": 1}')
    of_set = {"path": str(tmp_path / "choices.jsonl"), "choices": "choices", "metrics": ["multiple_choice"]}
    tables = sets.build_all(
        EvaluationSettings(sets={"a": of_set}), AutoTokenizer.from_pretrained(stories_dir), Limits(512)
    )
    assert tables["a"]["error"].to_pylist() == ["column 'choices' is not text: it holds half of a surrogate pair"]


@pytest.mark.parametrize(
    ("of_set", "message"),
    [
        ({"path": "nowhere.jsonl"}, r"evaluation.sets.forget, .*no such file or folder: nowhere.jsonl"),
        ({"wrong": "wrong_answers"}, r"no column 'wrong_answers' \(wrong\); its columns are question, answer"),
        ({"template": "chat"}, "no chat template"),
    ],
)
def test_unusable_sets_are_refused_by_name(stories_dir, settings, tmp_path, of_set, message):
    with pytest.raises(UserError, match=message):
        evaluate(config(stories_dir, only(settings, **of_set), tmp_path))


def test_rows_that_cannot_be_evaluated_keep_their_reason(stories_dir, tmp_path):
    rows = {
        "good": {"question": "Who?", "answer": "Nobody.", "wrong": ["Somebody."]},
        "long": {"question": "Who?", "answer": "A long one. " * 200, "wrong": ["Somebody."]},
        "null": {"question": "Who?", "answer": "Null.", "wrong": None},
        "no room": {"question": "Why? " * 300, "answer": "No room.", "wrong": ["Somebody."]},
        "no word": {"question": "Where?", "answer": "...", "wrong": ["Somewhere."]},
    }
    reasons = {
        "long": "over the limit of 512",
        "null": "column 'wrong' is None; expected a list of texts",
        "no room": "over the limit of 512",
        "no word": "column 'answer' has no word, of which rouge_l is a share",
    }
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"id": name} | row) for name, row in rows.items()))
    forget = {"path": str(file), "wrong": "wrong", "metrics": ["rouge_l", "truth_ratio"]}
    run = evaluate(config(stories_dir, {"sets": {"forget": forget}, "max_new_tokens": 4}, tmp_path / "run"))
    found = {line["sample_id"]: line["error"] for line in run.lines.to_pylist() if line["error"] is not None}
    assert run.num_errors == len(found)
    places = {(line["sample_id"], line["index"], line["file"], line["row"]) for line in run.lines.to_pylist()}
    assert places == {(name, index, None, index + 1) for index, name in enumerate(rows)}
    assert found.keys() == reasons.keys()
    assert all(reasons[name] in found[name] for name in reasons)
