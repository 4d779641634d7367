"""Which columns a sample is made of: found where only one reading is possible, and always said."""

import io

import pytest
from rich.console import Console
from scored import scored_text

from mrd_ray.config import DataConfig
from mrd_ray.data import samples
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError

QA = {"question": "Who sells bread?", "answer": "The baker."}


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"text": "Who?", "labels": "He."}, ["--data.prompt text --data.response labels", "--data.text text"]),
        ({"text": "Who?", "completion": "He."}, ["--data.prompt text --data.response completion"]),
        ({"instruction": "Do", "input": "it", "output": "Done."}, ["--data.template alpaca"]),
        (QA | {"context": "Bread is sold."}, [r"--data.template '{question}\n{context}\n{response}' --data.response"]),
        (QA | {"text": "both"}, ["--data.prompt question --data.response answer", "--data.text text"]),
        ({"question": "Who?", "answers": {"text": ["He"]}}, ["--data.response answers.text --data.response_index 0"]),
        ({"question": "Who?", "target": "He"}, ["--data.prompt question --data.response target"]),
    ],
)
def test_where_two_readings_are_possible_both_are_shown(build, row, flags):
    with pytest.raises(UserError) as refused:
        build([row])
    for flag in flags:
        assert flag in str(refused.value)


@pytest.mark.parametrize(
    "more",
    [
        {"labels": 1},  # a class, not a text
        {"input": ""},
        {"context": None},
        {"paraphrased_answer": "By the baker."},  # of TOFU
        {"subject": "bread", "url": "http://a"},
    ],
)
def test_what_is_no_part_of_a_sample_does_not_stop_it(build, more):
    assert build([QA | more])["text"].to_pylist() == ["Question: Who sells bread?\nAnswer: The baker."]


def test_names_in_capitals_are_found(build):
    assert build([{"Question": "a b", "Answer": "c d"}])["text"].to_pylist() == ["Question: a b\nAnswer: c d"]


def test_columns_are_said(tmp_path, tokenizer):
    file = tmp_path / "d.jsonl"
    file.write_text('{"key": "a", "question": "Who?", "answer": "He.", "url": "x", "n": 1}')
    shown = io.StringIO()
    data = DataConfig(path=str(file), id="key")
    samples.build(data, tokenizer, Limits(128), Console(file=shown, width=200))
    assert shown.getvalue().splitlines()[1:] == ["Columns: prompt question, response answer, id key; not used: url, n"]


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"template": "{instruction}: {input} -> {output}"}, [None, "Past: runs -> ran"]),
        ({"template": "{{ instruction }}{% if input %}: {{ input }}{% endif %} -> {{ output }}"},
         ["Tell -> ran", "Past: runs -> ran"]),
        ({"template": "{prompt} -> {response}", "prompt": "{{ instruction }}{% if input %}: {{ input }}{% endif %}",
          "response": "output"}, ["Tell -> ran", "Past: runs -> ran"]),
        ({"template": "{instruction} -> {response}", "response": "output"}, ["Tell -> ran", "Past -> ran"]),
        ({"template": "{{{{instruction}}}} {instruction} {output}"},
         ["{{instruction}} Tell ran", "{{instruction}} Past ran"]),
    ],
)  # fmt: skip
def test_templates_name_any_column(build, settings, texts):
    rows = [
        {"instruction": "Tell", "input": "", "output": "ran"},
        {"instruction": "Past", "input": "runs", "output": "ran"},
    ]
    found = build(rows, **settings).sort_by("index")
    assert found["text"].to_pylist() == texts
    if texts[0] is None:
        assert (
            found["error"][0].as_py()
            == "column 'input' is empty; where it may be, write '{% if input %}...{% endif %}'"
        )


@pytest.mark.parametrize("template", ["{instruction}: {output}.", "{{ instruction }}: {{ output }}.", "alpaca"])
def test_the_response_of_a_template_of_columns_is_marked(build, tokenizer, template):
    row = {"instruction": "Say ran ran", "input": "ran", "output": "ran"}  # its word is in the prompt too
    (sample,) = build([row], 512, template=template, response="output", score_on="response").to_pylist()
    assert scored_text(sample, tokenizer).strip(" :.\n") == "ran"
    assert sample["scored"].index(True) > len(sample["scored"]) * 2 // 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{instruction} {nothing}"}, r"no column 'nothing' \(data\.template\)"),
        ({"template": "{instruction} {response}"}, "say which column that is with data.response"),
        ({"template": "{instruction} {output}", "score_on": "response"}, "which of instruction, output"),
        ({"prompt": "{nothing}", "response": "output"}, r"no column 'nothing' \(data\.prompt\)"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(build, settings, message):
    with pytest.raises(UserError, match=message):
        build([{"instruction": "Tell", "input": "", "output": "ran"}], **settings)


def test_a_template_that_changes_the_response_is_an_error_of_the_row(build):
    settings = {"template": "{{ q }} {{ a }} {{ a }}", "response": "a", "score_on": "response"}
    assert build([{"q": "x", "a": "said"}], **settings)["error"].to_pylist() == [
        "data.template changes the response, repeats it or leaves it out: its place is not known"
    ]
    settings["template"] = "{{ q }} {{ a | trim }}"
    assert build([{"q": "x", "a": " said "}], **settings)["error"].to_pylist() == [None]


def test_a_template_cannot_reach_out(build):
    (sample,) = build([{"q": "x", "a": "y"}], template="{{ q.__class__.__mro__ }} {{ a }}").to_pylist()
    assert sample["error"].startswith("data.template refuses it: access to attribute '__class__'")


def test_ids(build):
    rows = [{"id": "d", "text": "one two"}, {"id": "d", "text": "three four"}, {"id": "e", "text": "five six"}]
    with pytest.raises(
        UserError, match=r"'d' in rows 1, 2.*data\.id_with_row: true for ids such as d#1, or data\.id: null"
    ):
        build(rows)
    assert build(rows, id_with_row=True)["sample_id"].to_pylist() == ["d#1", "d#2", "e"]
    assert len(set(build(rows, id=None)["sample_id"].to_pylist())) == 3
    clash = [*rows, {"id": "d#1", "text": "six seven"}]
    with pytest.raises(UserError, match="'d#1' in rows 1, 4"):
        build(clash, id_with_row=True)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ('{{"q": "{prompt}", "a": "{response}"}}', '{"q": "one", "a": "two"}'),  # braces of JSON are literal
        ("{prompt} {context} {response}", "one ctx two"),
        ("{{ context }} {{ response }}", "ctx two"),
    ],
)
def test_prompt_and_response_are_columns_of_these_names_too(build, template, text):
    row = {"prompt": "one", "context": "ctx", "response": "two"}
    settings = {} if "context" in template else {"prompt": "prompt", "response": "response"}
    assert build([row], template=template, **settings)["text"].to_pylist() == [text]
