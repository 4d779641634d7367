"""Tokenizers that transformers reads otherwise than their files mean it: refused, or at least said."""

import io
import json
import shutil

import pytest
from rich.console import Console
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer, LlamaTokenizer

from mrd_ray.config import ModelSettings
from mrd_ray.errors import UserError
from mrd_ray.models import load

LIKE_LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
NO_BYTES = {**LIKE_LLAMA, "byte_fallback": False}
CLASS = {"tokenizer_class": "LlamaTokenizer"}


def of(folder, **settings) -> ModelSettings:
    return ModelSettings(path=str(folder), **settings)


@pytest.fixture
def with_pieces(tmp_path, tiny_model_dir, qa_file):
    """Make a folder of the tiny model with a SentencePiece vocabulary alone."""

    def make(**rules):
        folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
        for file in folder.glob("tokenizer*"):
            file.unlink()
        model, size = io.BytesIO(), 400 if rules["byte_fallback"] else 160
        rows = map(json.loads, qa_file.read_text(encoding="utf-8").splitlines())
        texts = (row[name].replace("Q", "q") for row in rows for name in ("prompt", "response"))
        SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=model, vocab_size=size, model_type="bpe", minloglevel=2, **rules
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        return folder, SentencePieceProcessor(model_proto=model.getvalue())

    return make


def set_up(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_what_the_message_says_about_a_llama_vocabulary_is_right(with_pieces):
    """Its own advice once led to texts without <s>, silently."""
    folder, own = with_pieces(**LIKE_LLAMA)
    with pytest.raises(UserError, match="transformers splits text differently") as refused:
        load.load_tokenizer(of(folder))
    advice = json.loads(str(refused.value).partition("beside it: ")[2].partition("}")[0] + "}")
    assert advice == CLASS | {"add_bos_token": True}
    set_up(folder, **advice)
    for text in ("the mill", "Quick cat: Z\n½ ﬁve  日本 \ue000"):
        assert load.load_tokenizer(of(folder)).encode(text) == [own.bos_id(), *own.encode(text)]


def test_whether_texts_begin_with_a_token_is_to_be_said(with_pieces):
    folder, own = with_pieces(**LIKE_LLAMA)
    set_up(folder, **CLASS)
    with pytest.raises(UserError, match=r"begins texts without <s>.*\"add_bos_token\": true"):
        load.load_tokenizer(of(folder))
    set_up(folder, **CLASS, add_bos_token=False)
    assert load.load_tokenizer(of(folder)).encode("the mill") == own.encode("the mill")


def said(folder):
    console = Console(record=True, file=io.StringIO(), width=1000)
    load.load_tokenizer(of(folder), console)
    return console.export_text()


def test_a_tokenizer_json_that_says_nothing_about_it_is_told_of(with_pieces, tiny_model_dir, stories_dir):
    folder, own = with_pieces(**LIKE_LLAMA)
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert "begin with <s>, though the model has a bos_token_id (1)" in said(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    set_up(folder, **settings, add_bos_token=False)
    assert said(folder) == ""
    set_up(folder, **settings, add_bos_token=True)
    with pytest.raises(UserError, match=r"says add_bos_token: true, but .* tokenizer\.json, .* without <s>"):
        load.load_tokenizer(of(folder))
    AutoTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder)  # the remedy in both messages
    assert said(folder) == ""
    assert load.load_tokenizer(of(folder)).encode("the mill") == [own.bos_id(), *own.encode("the mill")]
    assert said(tiny_model_dir) == said(stories_dir) == ""


def test_a_vocabulary_whose_ordinary_text_llamas_class_misreads_is_refused(with_pieces):
    """It drops characters that the vocabulary lacks, capitals among them here, where SentencePiece has <unk>."""
    folder, _ = with_pieces(**NO_BYTES)
    for settings in ({}, CLASS | {"add_bos_token": True}):
        set_up(folder, **settings)
        with pytest.raises(UserError, match=r"splits text differently.*So does the class of Llama's tokenizers"):
            load.load_tokenizer(of(folder))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # the remedy, if transformers split the text before
    load.load_tokenizer(of(folder))


@pytest.mark.parametrize(
    "rules", [{"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True}], ids=["ligatures", "spaces"]
)
def test_characters_that_llamas_class_treats_otherwise_are_said(with_pieces, rules):
    folder, own = with_pieces(**LIKE_LLAMA | rules)
    with pytest.raises(UserError, match=r"transformers splits text differently"):
        load.load_tokenizer(of(folder))
    set_up(folder, **CLASS, add_bos_token=True)
    assert "splits some text differently than" in said(folder)
    assert load.load_tokenizer(of(folder)).encode("the cat") == [own.bos_id(), *own.encode("the cat")]


def test_unknown_characters_of_a_tokenizer_json_are_kept(with_pieces):
    """Llama's class takes the vocabulary from that file, and leaves out that it has an <unk>."""
    folder, own = with_pieces(**NO_BYTES)
    whole = LlamaTokenizer.from_pretrained(folder)
    whole.backend_tokenizer.model.unk_token = "<unk>"
    whole.backend_tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    set_up(folder, **CLASS, **special)
    with pytest.raises(UserError, match=r"drops characters for which .*tokenizer\.json has <unk>"):
        load.load_tokenizer(of(folder))
    set_up(folder, tokenizer_class="PreTrainedTokenizerFast", **special)
    text = "Quick cat: Z"
    assert load.load_tokenizer(of(folder)).encode(text) == own.encode(text)
    assert own.unk_id() in own.encode(text)
