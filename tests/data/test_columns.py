"""Which columns a sample is made of: found where only one reading is possible, and always said."""

import io
import re

import pytest
from rich.console import Console
from scored import scored_text

from mrd_ray.config import DataSettings
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
    data = DataSettings(path=str(file), id="key")
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
        ({"template": "{instruction} {response}"}, "set data.response to the column for it"),
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
        UserError, match=r"'d' in rows 1, 2.*data\.id_with_row: true for ids like d#1, or data\.id: null"
    ):
        build(rows)
    assert build(rows, id_with_row=True)["sample_id"].to_pylist() == ["d#1", "d#2", "e"]
    assert len(set(build(rows, id=None)["sample_id"].to_pylist())) == 3
    clash = [*rows, {"id": "d#1", "text": "six seven"}]
    with pytest.raises(UserError, match="'d#1', an id made unique by its row, is also the id of another row"):
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


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"text": "Who found it?", "answers": ["Lily"]}, "--data.prompt text --data.response answers"),
        ({"text": "When?", "answer": 1987}, "--data.prompt text --data.response answer --data.numbers_as_text true"),
        ({"text": "Who?", "answers": {"text": ["Lily"]}}, "--data.response answers.text --data.response_index 0"),
        ({"question": "Who?", "answer": "Lily", "context": ["She ran."]}, "which may be part of the sample"),
    ],
)
def test_what_stands_beside_a_guess_is_not_left_out_whatever_its_type(build, row, flags):
    with pytest.raises(UserError, match=re.escape(flags)):
        build([row])


def test_a_class_beside_a_text_is_no_part_of_it(build):
    assert build([{"text": "a b c", "label": 1}])["text"].to_pylist() == ["a b c"]


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ({"instruction": "Tell", "input": "", "output": "ran"}, {"input": "runs"}),
        ({"text": "a b c", "labels": None}, {"labels": "d e"}),
        ({"text": "a b c"}, {"answer": "d e"}),
    ],
)
def test_a_column_that_is_first_filled_late_is_not_left_out(build, early, late):
    with pytest.raises(UserError, match=r"row 1002, which fills columns that the first 1000 do not"):
        build([early] * 1001 + [early | late], id=None)


def test_escapes_of_a_shell_are_line_breaks(build):
    rows = [{"instruction": "do", "context": "it", "response": "Arr"}]
    with pytest.raises(UserError, match=r"--data.template '\{instruction\}\\n\{context\}\\n\{response\}'"):
        build(rows)
    texts = [
        build(rows, template=template, response="response")["text"].to_pylist()
        for template in (r"{instruction}\n{context}\n{response}", r"{{ instruction }}\n{{ context }}\n{{ response }}")
    ]
    assert texts == [["do\nit\nArr"]] * 2


def test_a_template_of_both_kinds_is_refused(build):
    with pytest.raises(UserError, match=r"holds \{\{instruction\}\}, which a format string turns into"):
        build([{"instruction": "do", "output": "Arr"}], template="{{ instruction }} {output}")


@pytest.mark.parametrize(
    ("row", "settings", "found"),
    [
        ({"q": "x", "a": {"text": ["aa", "bb"]}},
         {"template": "{{ q }} {{ a.text }}", "response": "a.text", "response_index": 1}, "x bb"),
        ({"q": "x", "a": ["aa"]}, {"template": "{{ q }} {{ a }}"}, "prints ['aa'], which is not text but list"),
        ({"q": True, "a": "b"}, {"template": "{{ q }} {{ a }}"}, "not text but bool"),
        ({"q": float("nan"), "a": "b"}, {"template": "{{ q }} {{ a }}"}, "not text but float"),
        ({"q": None, "a": "b"}, {"template": "{{ q }} {{ a }}"}, "column 'q' is missing or empty"),
        ({"q": "  ", "a": "b"}, {"template": "{% if q %}{{ q }}: {% endif %}{{ a }}"}, "b"),
        ({"instruction": " ", "input": "x", "output": "b"}, {"template": "alpaca"}, "column 'instruction' is empty"),
        ({"q": "x", "a": "aa; bb"},
         {"prompt": "q", "response": "a", "list_separator": "; ", "response_join": " or "}, "aa or bb"),
    ],
)  # fmt: skip
def test_cells_that_a_template_cannot_print_are_said(build, row, settings, found):
    (sample,) = build([row], **settings).to_pylist()
    assert found in (sample["error"] or sample["text"])


def test_a_response_counts_with_its_white_space_unless_the_template_trims_it(build, tokenizer):
    row = {"prompt": "hi", "response": "\n\nyo man\n"}
    settings = {"prompt": "prompt", "response": "response", "score_on": "response"}
    templates = ["Q {prompt}:{response}E", "{{ prompt }}:{{ response }}E", "{{ prompt }}:{{ response | trim }}E"]
    found = [build([row], template=template, **settings).to_pylist()[0] for template in templates]
    assert [scored_text(sample, tokenizer) for sample in found] == ["\n\nyo man\n", "\n\nyo man\n", "yo man"]


def test_ids_that_are_all_empty_name_the_way_out(build):
    (sample,) = build([{"id": None, "text": "a b c"}]).to_pylist()
    assert "data.id: null for digests" in sample["error"]


def test_a_template_without_the_response_says_so(build):
    settings = {"template": "{q} {r}", "response": "a", "score_on": "response"}
    (sample,) = build([{"q": "x", "r": "y", "a": "z"}], **settings).to_pylist()
    assert sample["error"] == "none of it is a response: data.template leaves that out"
