"""Tokenizers, and a way to build a samples table from rows."""

import json

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from mrd_ray.config import DataSettings
from mrd_ray.data import samples
from mrd_ray.data.tokens import Limits


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def bos_tokenizer(tiny_model_dir):
    """Begins every text with <s>."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture
def build(tmp_path, tokenizer):
    def build(rows, context=128, tokenizer=tokenizer, **settings):
        path = tmp_path / "d.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return samples.build(DataSettings(path=str(path), **settings), tokenizer, Limits(context))

    return build


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tiny_model_dir):
    """With ChatML."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = CHATML
    return tokenizer
