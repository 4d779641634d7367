"""Forget and retain sets that cannot serve are refused or said to be left out; refusals answer the right prompts."""

import io
import json
import re

import pytest
from rich.console import Console
from transformers import AutoTokenizer, ByT5Tokenizer

from mrd_ray.config import UnlearnConfig
from mrd_ray.data import samples
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError
from mrd_ray.unlearning import sets
from mrd_ray.unlearning.sampling import ShuffledStream

FORGET = [{"id": name, "prompt": f"Who keeps the {name}?", "response": f"{name} keeps it."} for name in "dbeac"]
RETAIN = [{"prompt": f"Where is the {name}?", "response": "In Orlen."} for name in "fghij"]
REFUSALS = [f"Refusal {name}." for name in "ABCDEFGHIJKL"]
LONG = "I would rather not say, " * 10


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def build(tmp_path, tokenizer):
    """Sets of rows, as lists or as the content of a file, and what the console shows of them."""

    def write(name, content):
        rows = content if isinstance(content, bytes) else "".join(json.dumps(row) + "\n" for row in content).encode()
        (tmp_path / name).write_bytes(rows)
        return str(tmp_path / name)

    def build(forget=FORGET, retain=None, refusals=None, context=128, tokenizer=tokenizer, name="f.jsonl", **settings):
        tree = {"model": {"path": "m"}, "run": {"dir": "r"}, "data": {"path": write(name, forget)}}
        tree |= {"unlearning": {"method": "ga"}, "retain": {}}
        if retain is not None:
            tree["retain"] = {"path": write("retain.jsonl", retain)}
        if refusals is not None:
            file = write("refusals.txt", refusals if isinstance(refusals, bytes) else "\n".join(refusals).encode())
            tree["unlearning"] = {"method": "po", "retain_weight": 0, "refusals": file}
        for key, value in settings.items():
            group, setting = key.split("__")
            tree.setdefault(group, {})[setting] = value
        shown = io.StringIO()
        found = sets.build(
            UnlearnConfig.model_validate(tree), tokenizer, Limits(context), Console(file=shown, width=1000)
        )
        return found, shown.getvalue().replace(str(tmp_path), "")

    return build


def scored(row, tokenizer) -> str:
    """The text that counts."""
    tokens = zip(row["token_ids"], row["scored"], strict=True)
    return tokenizer.decode([token for token, counts in tokens if counts]).strip()


def answers(found) -> list[str]:
    return [text.split("Answer: ")[1] for text in found.refusals["text"].to_pylist()]


def test_forget_and_retain_set(build):
    alone, shown = build()
    assert alone.forget["sample_id"].to_pylist() == list("abcde")
    assert alone.forget["row"].to_pylist() == [4, 2, 5, 1, 3]
    assert alone.forget.schema.equals(samples.SCHEMA)
    assert (alone.retain, alone.refusals, alone.watched.tolist()) == (None, None, [])
    assert shown == "Reading /f.jsonl\nColumns: prompt prompt, response response, id id\n"
    found, shown = build(retain=RETAIN, name="[b]f.jsonl")
    assert found.forget.equals(alone.forget)
    assert sorted(found.retain["text"].to_pylist()) == [f"Question: {r['prompt']}\nAnswer: In Orlen." for r in RETAIN]
    assert shown.splitlines()[:3:2] == ["Reading /[b]f.jsonl", "Reading /retain.jsonl"]


def test_a_retain_set_may_be_of_texts_beside_a_forget_set_of_prompts(build, tokenizer):
    texts = ["The mill stands by the Sarn.", "Bells ring at noon."]
    settings = {"data__prompt": "prompt", "data__response": "response", "data__score_on": "response", "data__id": "id"}
    found, _ = build(retain=[{"text": text} for text in texts], retain__text="text", **settings)
    assert sorted(found.retain["text"].to_pylist()) == sorted(texts)
    assert all(sum(scored) == len(scored) - 1 for scored in found.retain["scored"].to_pylist())


def test_watched_samples(build):
    def watched(seed, count):
        found, _ = build(retain=RETAIN, unlearning__seed=seed, stopping__retain_samples=count)
        return found.watched.tolist()

    few = [watched(seed, 3) for seed in range(9)]
    assert all(len(one) == 3 and one == sorted(set(one)) for one in few)
    assert len(set(map(tuple, few))) == 1  # so that runs of several seeds compare
    assert few != [sorted(ShuffledStream(5, seed).at(0, 3).tolist()) for seed in range(9)]  # those trained on first
    assert watched(2**32 - 1, 64) == [0, 1, 2, 3, 4]


def test_retain_is_read_as_data_says(build, tokenizer):
    """Its columns, ids, template, limits and what counts, but not its number of rows."""
    data = {
        "prompt": "q", "response": "a", "template": "{prompt} -> {response}", "score_on": "response", "id": "key",
        "max_tokens": 20, "truncate": True, "max_samples": 2,
    }  # fmt: skip
    forget = [{"key": f"k{i}", "q": f"Q{i}", "a": f"A{i}"} for i in range(3)]
    retain = [{"key": f"r{i}", "id": "no id", "q": f"q{i}", "a": f"a{i}" * (1 + 40 * i)} for i in range(4)]
    found, _ = build(forget, retain, retain__max_samples=3, **{f"data__{name}": value for name, value in data.items()})
    assert found.forget["text"].to_pylist() == ["Q0 -> A0", "Q1 -> A1"]
    rows = found.retain.to_pylist()
    assert [row["sample_id"] for row in rows] == ["r0", "r1", "r2"]
    assert [row["text"] for row in rows] == [f"q{i} -> {retain[i]['a']}" for i in range(3)]
    assert scored(rows[0], tokenizer) == "a0"
    assert [len(row["token_ids"]) for row in rows[1:]] == [20, 20]


def test_overlap(build):
    also = [{"prompt": row["prompt"], "response": row["response"]} for row in FORGET[:3]]
    found, shown = build(retain=RETAIN + also + [{"prompt": "Who keeps the a?", "response": "Nobody."}])
    expected = "3 of 5 forget samples are in the retain set too, which the model should still know"
    assert shown.splitlines()[4:] == [expected]
    assert len(found.retain) == 9


LIMIT = r"\d+ tokens, over the limit of 128; shorten it or set data\.truncate"


def test_unusable_forget_samples_are_named(build):
    """The first five, by id."""
    bad = [{"id": "a-long", "prompt": "x " * 80, "response": "y"}]
    bad += [{"id": f"bad-{i}", "prompt": "", "response": "x"} for i in range(6)]
    named = [f"a-long, row 6: {LIMIT}"] + [f"bad-{i}, row {7 + i}: column 'prompt' is empty" for i in range(4)]
    for count, which in [(2, "; ".join(named[:2])), (7, "; ".join(named) + r"; \.\.\.")]:
        expected = (
            rf"{count} of {count + 5} samples of .*f\.jsonl cannot be unlearned \({which}\)\. Fix or remove them; "
        )
        with pytest.raises(UserError, match=rf"^data\.path: {expected}"):
            build(FORGET + bad[:count])


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, "column 'prompt' is missing or null"),
        ("long " * 100, LIMIT),
        (["[/INST]"], r"column 'prompt' is not text but list: \['\[/INST\]'\]"),  # brackets are no markup
    ],
)
def test_unusable_retain_samples_are_counted(build, cell, reason):
    bad = [{"id": name, "prompt": cell, "response": "x"} for name in "ab"]
    found, shown = build(retain=bad + [row | {"id": row["prompt"]} for row in RETAIN])
    assert len(found.retain) == found.retain["error"].null_count == 5
    assert re.fullmatch(f"2 of 7 retain samples are left out; the first: {reason}", shown.splitlines()[4])
    with pytest.raises(UserError, match=r"^retain\.path: .*retain\.jsonl holds no usable samples$"):
        build(retain=bad)


def test_refusals_answer_the_forget_sets_prompts(build, tokenizer):
    """Eight of twelve for each sample, in the order of the forget set."""
    found, _ = build(retain=RETAIN, refusals=REFUSALS, unlearning__retain_weight=1.0)
    prompts = {row["id"]: row["prompt"] for row in FORGET}
    assert (len(found.retain), len(found.refusals)) == (5, 8 * 5)
    assert found.refusals.schema.equals(samples.SCHEMA)
    rows, answer = found.refusals.to_pylist(), answers(found)
    for i, sample in enumerate(found.forget.to_pylist()):
        for j in range(i * 8, i * 8 + 8):
            assert rows[j]["text"] == f"Question: {prompts[sample['sample_id']]}\nAnswer: {answer[j]}"
            assert scored(rows[j], tokenizer) == answer[j]
            assert tokenizer.decode(rows[j]["token_ids"]) == rows[j]["text"]
            assert (rows[j]["index"], rows[j]["row"], rows[j]["error"]) == (sample["index"], sample["row"], None)
        assert len(set(answer[i * 8 : i * 8 + 8]) & set(REFUSALS)) == 8
    assert len(set(found.refusals["sample_id"].to_pylist())) == 40


def test_refusals_of_several_files_answer_their_own_prompts(build, tmp_path):
    """Whose row numbers repeat, and whose ids are in no order."""
    files = [tmp_path / name for name in ("b.jsonl", "a.jsonl")]
    for file, part in zip(files, (FORGET[:3], FORGET[3:]), strict=True):
        file.write_text("\n".join(map(json.dumps, part)))
    found, _ = build(refusals=REFUSALS, data__path=[str(file) for file in files])
    prompts = {row["id"]: row["prompt"] for row in FORGET}
    for i, sample in enumerate(found.forget.to_pylist()):
        for refusal in found.refusals.to_pylist()[i * 8 : i * 8 + 8]:
            assert refusal["text"].startswith(f"Question: {prompts[sample['sample_id']]}\nAnswer: ")
            assert (refusal["file"], refusal["row"]) == (sample["file"], sample["row"])


def test_refusals_of_a_chat(build, tokenizer):
    chatty = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chatty.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    row = build(refusals=["No idea."], tokenizer=chatty, data__template="chat")[0].refusals.to_pylist()[0]
    assert row["text"] == "<s>user: Who keeps the a?</s><s>assistant: No idea.</s>"
    assert scored(row, tokenizer) == "No idea."


def test_few_refusals_are_all_taken(build):
    for count in (1, 3, 8):
        assert answers(build(refusals=REFUSALS[:count])[0]) == REFUSALS[:count] * 5
    windows = "\ufeffNo idea. \r\n\r\n\tI forgot.\r\n\n".encode()
    assert answers(build(refusals=windows)[0]) == ["No idea.", "I forgot."] * 5


def test_refusals_are_a_function_of_the_seed(build):
    def refusals(seed, forget=FORGET):
        return build(forget, refusals=REFUSALS, unlearning__seed=seed)[0]

    first = refusals(0)
    assert refusals(0).refusals.equals(first.refusals)
    assert answers(refusals(1)) != answers(first)
    assert answers(refusals(0, FORGET[::-1])) == answers(first)  # the order of rows is nothing
    assert len({tuple(answers(first)[start : start + 8]) for start in range(0, 40, 8)}) > 1  # not all samples the same


def test_refusals_with_what_data_leaves_out(build):
    """The rows after data.max_samples, and a column of texts beside."""
    forget = [row | {"text": "beside"} for row in FORGET]
    chosen = {"data__prompt": "prompt", "data__response": "response", "data__id": "id"}
    limits = {"data__max_samples": 3, "data__score_on": "response"}
    found, _ = build(forget, refusals=REFUSALS[:2], **chosen, **limits)
    assert found.forget["sample_id"].to_pylist() == ["b", "d", "e"]
    assert [text.split("\n")[0][-2:-1] for text in found.refusals["text"].to_pylist()] == list("bbddee")


@pytest.mark.parametrize(("context", "max_tokens"), [(40, None), (40, 99), (128, 40), (None, 40)])
def test_refusal_over_the_limit(build, tokenizer, context, max_tokens):
    limits = {"context": context, "data__max_tokens": max_tokens}
    where = r"unlearning\.refusals: line 3 of .*refusals\.txt, with the prompt of row 1"
    with pytest.raises(UserError, match=rf"^{where}: \d+ tokens, over the limit of 40; shorten it"):
        build(refusals=["", "No.", LONG], **limits)
    rows = build(refusals=[LONG], data__truncate=True, **limits)[0].refusals.to_pylist()
    assert {len(row["token_ids"]) for row in rows} == {40}
    assert all(LONG.startswith(scored(row, tokenizer)) for row in rows)


NO_FORGET = r"data\.path: .*/f\.\w+ (holds no rows|is empty)$"
NO_RETAIN = r"retain\.path, read with the settings of data: .*retain\.jsonl"
NO_PROMPTS = r"unlearning\.method: po needs prompts and responses"
TEXTS = {"forget": [{"text": "The baker of Orlen sold rye bread."}], "refusals": REFUSALS}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"forget": []}, NO_FORGET),
        ({"forget": b" \n", "name": "f.txt", "data__window_tokens": 20}, NO_FORGET),
        ({"retain": []}, f"{NO_RETAIN} holds no rows$"),
        ({"retain": [{"text": "Orlen"}], "data__score_on": "response"}, f"{NO_RETAIN}.*(cannot tell|no column)"),
        ({"retain": b'{"prompt": '}, f"{NO_RETAIN}.*line 1: broken JSON"),
        (
            {"retain": [{"id": "k", **row} for row in RETAIN]},
            f"{NO_RETAIN}.*appear more than once, for example 'k' in rows 1, 2",
        ),
        ({"retain": RETAIN, "data__id": "id"}, rf"{NO_RETAIN}: no column 'id' \(data\.id\)"),
        (
            {"retain__path": "/absent/retain.jsonl"},
            "retain\\.path, read with the settings of data: .*no such file or folder: /absent/retain\\.jsonl",
        ),
        ({"refusals": "\ufeff\n \n\t\n".encode()}, r"unlearning\.refusals: .*refusals\.txt has no lines"),
        ({"refusals": b"No \xff idea."}, r"unlearning\.refusals: cannot read .*refusals\.txt: "),
        ({"refusals": [], "unlearning__refusals": "/absent.txt"}, r"unlearning\.refusals: cannot read /absent\.txt: "),
        ({"refusals": [], "unlearning__refusals": "/"}, r"unlearning\.refusals: cannot read /: "),
        (TEXTS, NO_PROMPTS),
        (TEXTS | {"data__text": "text"}, NO_PROMPTS),
        (TEXTS | {"forget": b"The baker sold rye. " * 9, "name": "f.TXT", "data__window_tokens": 20}, NO_PROMPTS),
        ({"refusals": REFUSALS, "tokenizer": ByT5Tokenizer()}, r"unlearning\.method: po needs a fast tokenizer"),
    ],
)
def test_sets_that_cannot_serve(build, given, message):
    with pytest.raises(UserError, match=f"^{message}"):
        build(**given)
