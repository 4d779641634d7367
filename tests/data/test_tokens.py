"""The response alone is scored, wherever a template puts it."""

import pytest
from scored import scored_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.mark.parametrize(
    "template",
    ["Question: {prompt}\nAnswer: {response}", "{{x}} {prompt}|{response} {{y}}", "A: {response}\nQ: {prompt}"],
)
@pytest.mark.parametrize(("prompt", "response"), [("is it blue?", "blue"), ("plum cakes. plum", "plum cakes.")])
def test_response_alone_is_scored(build, tokenizer, template, prompt, response):
    row = {"prompt": prompt, "response": response}
    (found,) = build([row], template=template, score_on="response").to_pylist()
    assert found["text"] == template.format(**row)
    assert scored_text(found, tokenizer).strip() == response
    (everything,) = build([row], template=template).to_pylist()
    assert everything["scored"] == [False] + [True] * (len(everything["token_ids"]) - 1)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# trims, and its system text holds a prompt and a response
LLAMA3 = (
    "<|start_header_id|>system<|end_header_id|>\n\nTo is it blue? say blue. Today is {{ strftime_now('%d %b %Y') }}."
    "<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# no end of turn, and the generation prompt opens thoughts that a whole chat does not hold
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# writes thoughts, those of the answer or empty ones
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set parts = "
    "m.content.split('</think>') %}<think>\n{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}\n"
    "</think>\n\n{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture
def build_chat(build, tiny_model_dir):
    def build_chat(template, prompt, response):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        tokenizer.chat_template = template
        row = {"prompt": prompt, "response": response}
        (found,) = build([row], 512, tokenizer, template="chat", score_on="response").to_pylist()
        if found["error"]:
            return found["error"]
        scored = found["scored"]
        assert tokenizer.decode(found["token_ids"]) == found["text"]
        before = tokenizer.decode(found["token_ids"][: scored.index(True)])
        after = tokenizer.decode(found["token_ids"][len(scored) - scored[::-1].index(True) :])
        return before, scored_text(found, tokenizer), after

    return build_chat


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        (CHATML, "<|im_start|>assistant\n", "<|im_end|>\n"),
        (LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        (DEEPSEEK, "<|Assistant|>", ""),
        (QWEN3, "<think>\n\n</think>\n\n", "<|im_end|>\n"),
    ],
    ids=["chatml", "llama3", "deepseek", "qwen3"],
)
@pytest.mark.parametrize(
    ("prompt", "response"),
    [("is it blue?", "blue"), ("say assistant", "assistant"), ("blue\nblue", "blue\n\nblue"), ("end", "<|im_end|>")],
)
def test_response_is_found_in_a_chat(build_chat, template, before, after, prompt, response):
    found = build_chat(template, prompt, response)
    assert found[1:] == (response, after)
    assert found[0].endswith(before)
    assert prompt in found[0]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, DEEPSEEK, QWEN3])
def test_response_is_found_in_a_chat_whatever_becomes_of_its_ends(build_chat, template):
    assert build_chat(template, " is it blue? ", "\n blue \n")[1].strip() == "blue"


def test_response_that_brings_its_own_thoughts(build_chat):
    response = "<think>\nthe sea is\n</think>\n\nblue"
    before, found, _ = build_chat(QWEN3, "is it blue?", response)
    assert (before[-10:], found) == ("assistant\n", response)
    assert "changes the response" in build_chat(DEEPSEEK, "is it blue?", response)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the response"),
        ("{% for m in messages %}{{ m.content | replace('c', 'k') }}{% endfor %}", "changes the response"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "repeats it"),
        ("{{ messages[0].content }}", "leaves it out"),
        ("{{ raise_exception('only systems may speak') }}", "refuses it: only systems may speak"),
        ("{{ messages[0].content + 1 }}", "refuses it: can only concatenate str"),
        ("{% if %}", "refuses it: Expected an expression"),
    ],
)
def test_chat_template_that_cannot_take_a_sample(build_chat, template, reason):
    assert reason in build_chat(template, "a b", "c d")


def test_chat_template_that_writes_the_date(build_chat):
    """A run begun today goes on tomorrow."""
    assert "Today is 26 Jul 2024." in build_chat(LLAMA3, "a b", "c d")[0]
    early = "\n{% if strftime_now is defined %}{% set y = strftime_now('%Y') | int - 1 %}{% endif %}{{ y }}: " + CHATML
    assert build_chat(early, "a b", "c d")[0].startswith("\n2023: <|im_start|>")


@pytest.mark.parametrize("in_sequence", [False, True])
def test_white_space_of_a_response_counts_where_places_are_trimmed(build, in_sequence):
    """Byte-level tokenizers with trim_offsets give tokens of white space alone no place in the text."""
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<s>"]))
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trimming = processors.ByteLevel(trim_offsets=True)
    rust.post_processor = processors.Sequence([trimming, begin]) if in_sequence else trimming
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust)
    row = {"prompt": "hi ", "response": "\n\nyes \n no"}
    (sample,) = build([row], 64, tokenizer, score_on="response", template="{prompt}{response} ").to_pylist()
    assert scored_text(sample, tokenizer) == "\n\nyes \n no"
