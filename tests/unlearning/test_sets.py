"""Forget and retain sets that cannot serve are refused or said to be left out; refusals answer the right prompts."""

import io
import json
import re
from collections import Counter

import pytest
from rich.console import Console
from transformers import AutoTokenizer, ByT5Tokenizer

from mrd_ray.config import UnlearnConfig
from mrd_ray.data import samples
from mrd_ray.errors import UserError
from mrd_ray.unlearning import sets

FORGET = [{"id": name, "prompt": f"Who keeps the {name}?", "response": f"{name} keeps it."} for name in "dbeac"]
RETAIN = [{"prompt": f"Where is the {name}?", "response": "In Orlen."} for name in "fghij"]
REFUSALS = [f"Refusal {name}." for name in "ABCDEFGHIJKL"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def build(tmp_path, tokenizer):
    """Sets of rows, as lists or as the text of a file, and what the console shows of them."""

    def write(name, content):
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    def build(
        forget=FORGET, retain=None, refusals=None, context=128, tokenizer=tokenizer, name="forget.jsonl", **settings
    ):
        tree = {"model": {"path": "m"}, "run": {"dir": "r"}, "data": {"path": write(name, forget)}, "retain": {}}
        tree["unlearning"] = {"method": "ga"}
        if retain is not None:
            tree["retain"] = {"path": write("retain.jsonl", retain)}
        if refusals is not None:
            text = refusals if isinstance(refusals, str) else "\n".join(refusals)
            tree["unlearning"] = {"method": "po", "retain_weight": 0, "refusals": write("refusals.txt", text)}
        for key, value in settings.items():
            group, setting = key.split("__")
            tree.setdefault(group, {})[setting] = value
        shown = io.StringIO()
        found = sets.build(UnlearnConfig.model_validate(tree), tokenizer, context, Console(file=shown, width=1000))
        return found, shown.getvalue().replace(str(tmp_path), "")

    return build


def scored(row, tokenizer) -> str:
    """The text that counts."""
    return tokenizer.decode([token for token, counts in zip(row["token_ids"], row["scored"], strict=True) if counts])


# forget and retain set


def test_forget_set_alone(build):
    found, shown = build()
    assert found.forget["sample_id"].to_pylist() == list("abcde")
    assert found.forget["row"].to_pylist() == [4, 2, 5, 1, 3]
    assert found.forget.schema.equals(samples.SCHEMA)
    assert (found.retain, found.refusals) == (None, None)
    assert found.watched.tolist() == []
    assert shown == "Reading /forget.jsonl\n"


def test_retain_set(build):
    found, shown = build(retain=RETAIN)
    assert sorted(found.retain["text"].to_pylist()) == [
        f"Question: Where is the {name}?\nAnswer: In Orlen." for name in "fghij"
    ]
    assert found.watched.tolist() == [0, 1, 2, 3, 4]
    assert shown == "Reading /forget.jsonl\nReading /retain.jsonl\n"


def test_watched_samples(build):
    def watched(seed, count):
        found, _ = build(retain=RETAIN, unlearning__seed=seed, stopping__retain_samples=count)
        return found.watched.tolist()

    assert watched(0, 3) == watched(0, 3) == sorted(set(watched(0, 3)))
    assert {len(watched(seed, 3)) for seed in range(5)} == {3}
    assert len({tuple(watched(seed, 3)) for seed in range(9)}) > 1
    assert watched(0, 64) == [0, 1, 2, 3, 4]


def test_retain_is_read_as_data_says(build, tokenizer):
    """Its columns, template, limits and what counts, but not its ids or its number of rows."""
    data = {
        "prompt": "q", "response": "a", "template": "{prompt} -> {response}", "score_on": "response", "id": "key",
        "max_tokens": 20, "truncate": True, "max_samples": 2,
    }  # fmt: skip
    forget = [{"key": f"k{i}", "q": f"Q{i}", "a": f"A{i}"} for i in range(3)]
    retain = [{"q": f"q{i}", "a": f"a{i}" * (1 + 40 * i)} for i in range(4)]
    found, _ = build(forget, retain, retain__max_samples=3, **{f"data__{name}": value for name, value in data.items()})
    assert found.forget["text"].to_pylist() == ["Q0 -> A0", "Q1 -> A1"]
    rows = sorted(found.retain.to_pylist(), key=lambda row: row["row"])
    assert [row["text"] for row in rows] == [f"q{i} -> {retain[i]['a']}" for i in range(3)]
    assert scored(rows[0], tokenizer).strip() == "a0"
    assert [len(row["token_ids"]) for row in rows[1:]] == [20, 20]


def test_overlap(build):
    also = [{"prompt": row["prompt"], "response": row["response"]} for row in FORGET[:3]]
    found, shown = build(retain=RETAIN + also + [{"prompt": "Who keeps the a?", "response": "Nobody."}])
    assert shown.splitlines()[2:] == [
        "3 of 5 forget samples stand in the retain set too: they will be unlearned and learned at once"
    ]
    assert len(found.retain) == 9
    assert "stand in" not in build(retain=RETAIN)[1]


@pytest.mark.parametrize(
    ("name", "content"),
    [("f.jsonl", ""), ("f.jsonl", "\n\n"), ("f.json", "[]"), ("f.csv", "prompt,response\n"), ("f.txt", " \n")],
)
def test_empty_forget_set(build, name, content):
    with pytest.raises(UserError, match=rf"^data\.path: .*{name} (holds no rows|is empty)$"):
        build(content, name=name, data__window_tokens=20)


def test_empty_retain_set(build):
    with pytest.raises(UserError, match=r"^retain\.path.*retain\.jsonl holds no rows$"):
        build(retain="")


@pytest.mark.parametrize(
    ("retain", "cause"),
    [
        ([{"text": "Orlen"}], "cannot tell|no column"),
        ('{"prompt": ', "line 1: broken JSON"),
        ([{"id": "k", **RETAIN[0]}, {"id": "k", **RETAIN[1]}], "stand more than once; 'k' in rows 1, 2"),
    ],
)
def test_retain_sets_that_cannot_be_read(build, retain, cause):
    with pytest.raises(UserError, match=rf"^retain\.path, read with the settings of data: .*retain\.jsonl.*({cause})"):
        build(retain=retain, data__score_on="response")


def test_absent_retain_set(build, tmp_path):
    with pytest.raises(UserError, match=r"^retain\.path, .*: cannot read .*absent\.jsonl"):
        build(retain__path=str(tmp_path / "absent.jsonl"))


BAD = [{"id": f"bad-{i}", "prompt": "", "response": "x"} for i in range(7)]


def test_unusable_forget_samples_are_named(build):
    with pytest.raises(UserError) as refusal:
        build(FORGET + BAD[:2])
    assert re.search(
        r"^data\.path: 2 of 7 samples of .*forget\.jsonl cannot be unlearned \(bad-0: column 'prompt' is empty; "
        r"bad-1: column 'prompt' is empty\)\. Mend or remove them; data\.truncate cuts long ones$",
        str(refusal.value),
    )
    with pytest.raises(UserError, match=r"7 of 12 samples of .*bad-4: column 'prompt' is empty; \.\.\.\)") as refusal:
        build(FORGET + BAD)
    assert "bad-5" not in str(refusal.value)
    with pytest.raises(UserError, match=r"1 of 6 samples .*long: 1\d\d tokens, over the limit of 128"):
        build([*FORGET, {"id": "long", "prompt": "x " * 80, "response": "y"}])


def test_unusable_retain_samples_are_counted(build):
    bad = [{"prompt": "x", "response": None}, {"prompt": "long " * 100, "response": "x"}]
    found, shown = build(retain=[*bad, *RETAIN])
    assert len(found.retain) == 5
    assert found.retain["error"].null_count == 5
    assert re.fullmatch(
        r"2 of 7 retain samples are left out; the first: "
        r"(column 'response' is missing or null|\d+ tokens, over the limit of 128; .*)",
        shown.splitlines()[2],
    )
    with pytest.raises(UserError, match=r"^retain\.path: .*retain\.jsonl holds no usable samples$"):
        build(retain=bad)


@pytest.mark.xfail(strict=True, reason="retain ignores data.id, and falls back on a column named id")
def test_a_retain_set_whose_column_id_is_no_id(build):
    """With data.id the forget set is read; nothing reads the same file as retain set."""
    rows = [{"key": f"k{i}", "id": "book 1", **row} for i, row in enumerate(RETAIN)]
    build(rows[:2], rows[2:], data__id="key")


@pytest.mark.xfail(strict=True, reason="rich takes brackets for markup")
def test_brackets_in_a_bad_cell(build):
    _, shown = build(retain=[*RETAIN, {"prompt": ["[/INST]"], "response": "x"}])
    assert "[/INST]" in shown


# refusals


def test_refusals_answer_the_forget_sets_prompts(build, tokenizer):
    """Eight of twelve for each sample, in the order of the forget set."""
    found, _ = build(refusals=REFUSALS)
    prompts = {row["id"]: row["prompt"] for row in FORGET}
    assert len(found.refusals) == 8 * 5
    assert found.refusals.schema.equals(samples.SCHEMA)
    rows, forget = found.refusals.to_pylist(), found.forget.to_pylist()
    for i, sample in enumerate(forget):
        answers = []
        for row in rows[i * 8 : i * 8 + 8]:
            prompt, answer = re.fullmatch(r"Question: (.*)\nAnswer: (.*)", row["text"]).groups()
            assert prompt == prompts[sample["sample_id"]]
            assert scored(row, tokenizer).strip() == answer
            assert tokenizer.decode(row["token_ids"]) == row["text"]
            assert row["row"] == sample["row"]
            assert row["error"] is None
            answers.append(answer)
        assert set(answers) <= set(REFUSALS)
        assert len(set(answers)) == 8
    assert len(set(found.refusals["sample_id"].to_pylist())) == 40


def test_refusals_are_used_alike(build):
    forget = [{"prompt": f"Who keeps the {i}?", "response": "Ilse."} for i in range(240)]
    found, _ = build(forget, refusals=REFUSALS)
    used = Counter(text.split("Answer: ")[1] for text in found.refusals["text"].to_pylist())
    assert set(used) == set(REFUSALS)
    assert max(abs(count - 160) for count in used.values()) < 4 * (240 * 2 / 3 / 3) ** 0.5


def test_refusals_of_a_chat(build, tokenizer):
    chatty = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chatty.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    found, _ = build(refusals=["No idea."], tokenizer=chatty, data__template="chat")
    row = found.refusals.to_pylist()[0]
    assert row["text"] == "<s>user: Who keeps the a?</s><s>assistant: No idea.</s>"
    assert scored(row, tokenizer).strip() == "No idea."


@pytest.mark.parametrize("count", [1, 3, 8])
def test_few_refusals_are_all_taken(build, count):
    found, _ = build(refusals=REFUSALS[:count])
    texts = [text.split("Answer: ")[1] for text in found.refusals["text"].to_pylist()]
    assert texts == REFUSALS[:count] * 5


def test_refusals_are_a_function_of_the_seed(build):
    def refusals(seed, forget=FORGET):
        return build(forget, refusals=REFUSALS, unlearning__seed=seed)[0].refusals

    first = refusals(0)
    assert refusals(0).equals(first)
    assert refusals(1)["text"].to_pylist() != first["text"].to_pylist()
    assert refusals(0, FORGET[::-1])["text"].to_pylist() == first["text"].to_pylist()  # the order of rows is nothing
    answers = [text.split("Answer: ")[1] for text in first["text"].to_pylist()]
    assert len({tuple(answers[start : start + 8]) for start in range(0, 40, 8)}) > 1  # not the same for all samples


def test_refusals_with_what_data_leaves_out(build):
    found, _ = build(refusals=REFUSALS[:2], data__max_samples=3)
    assert found.forget["sample_id"].to_pylist() == ["b", "d", "e"]
    assert [text.split("\n")[0][-2:-1] for text in found.refusals["text"].to_pylist()] == list("bbddee")


def test_refusals_and_a_retain_set(build):
    found, _ = build(retain=RETAIN, refusals=REFUSALS, unlearning__retain_weight=1.0)
    assert (len(found.retain), len(found.refusals)) == (5, 40)


def test_blank_lines_are_no_refusals(build):
    found, _ = build(refusals="\n  No idea. \n\n\tI forgot.\r\n\n")
    texts = [text.split("Answer: ")[1] for text in found.refusals["text"].to_pylist()]
    assert texts == ["No idea.", "I forgot."] * 5


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_no_refusals(build, content):
    with pytest.raises(UserError, match=r"^unlearning\.refusals: .*refusals\.txt holds no lines"):
        build(refusals=content)


def test_refusals_that_cannot_be_read(build, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"No \xff idea.")
    for name in ("absent.txt", "", "bytes.txt"):
        with pytest.raises(UserError, match=rf"^unlearning\.refusals: cannot read {tmp_path / name}: "):
            build(refusals=REFUSALS, unlearning__refusals=str(tmp_path / name))


@pytest.mark.parametrize("column", [None, "text"])
def test_texts_have_no_refusals(build, column):
    with pytest.raises(UserError, match=r"^unlearning\.method: po needs prompts and responses"):
        build([{"text": "The baker of Orlen."}], refusals=REFUSALS, data__text=column)


LONG = "I would rather not say, " * 10


def test_refusal_over_the_context_length(build):
    with pytest.raises(
        UserError, match=r"^unlearning\.refusals: line 2 of .*refusals\.txt: \d+ tokens, over the limit of 40; shorten"
    ):
        build(refusals=["No.", LONG], context=40)


def test_refusal_that_is_cut(build, tokenizer):
    found, _ = build(refusals=[LONG], context=40, data__truncate=True)
    assert {len(tokens) for tokens in found.refusals["token_ids"].to_pylist()} == {40}
    assert all(LONG.startswith(scored(row, tokenizer).strip()) for row in found.refusals.to_pylist())


@pytest.mark.xfail(strict=True, reason="only the model's context length is looked at")
@pytest.mark.parametrize("context", [128, None])
def test_refusal_over_max_tokens(build, context):
    with pytest.raises(UserError, match="over the limit of 40"):
        build(refusals=[LONG], context=context, data__max_tokens=40)


@pytest.mark.xfail(strict=True, reason="blank lines are not counted")
def test_the_line_of_a_bad_refusal(build):
    with pytest.raises(UserError, match="line 3 of"):
        build(refusals=f"\nNo.\n{LONG}\n", context=40)


@pytest.mark.xfail(strict=True, reason="read as a Hugging Face data set, and said to be none")
def test_a_text_file_has_no_refusals(build):
    with pytest.raises(UserError, match=r"^unlearning\.method: po needs prompts and responses"):
        build("The baker of Orlen sold rye bread. " * 5, refusals=REFUSALS, name="forget.txt", data__window_tokens=20)


@pytest.mark.xfail(strict=True, reason="columns are chosen as if all were scored")
def test_refusals_beside_a_column_of_texts(build):
    """The forget set alone is read: only prompt and response have a response."""
    rows = [{**row, "text": "beside"} for row in FORGET]
    build(rows, data__score_on="response")
    build(rows, refusals=REFUSALS, data__score_on="response")


@pytest.mark.xfail(strict=True, reason="it becomes part of the first refusal")
def test_byte_order_mark(build):
    found, _ = build(refusals="\ufeffNo idea.\n")
    assert "\ufeff" not in found.refusals["text"][0].as_py()


@pytest.mark.xfail(strict=True, reason="KeyError: offset_mapping")
def test_a_slow_tokenizer_has_no_refusals(build):
    with pytest.raises(UserError, match="needs a fast tokenizer"):
        build(refusals=REFUSALS, tokenizer=ByT5Tokenizer())
