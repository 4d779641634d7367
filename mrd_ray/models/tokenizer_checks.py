"""Checks that transformers reads a tokenizer as its files intend; it reports no errors about that itself."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerBase

from mrd_ray.errors import UserError

_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_BEGINNING_OF_WORDS = "▁"  # as SentencePiece writes it
# ordinary text, then characters that some vocabularies lack or rewrite: capitals, lines, ligatures, private use
_ORDINARY = ("the cat", "Where does the river end?", "In 1897, she left; nobody knows why.")
_TEXTS = (*_ORDINARY, "Quick cat: Z", "one\ntwo  three", "ﬁve ½ é 日本 \ue000 end")


def refuse_misread(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises UserError if text becomes different tokens than by the folder's tokenizer.json or SentencePiece model."""
    if (whole := folder / "tokenizer.json").is_file():
        _refuse_lost_characters(tokenizer, whole)
        _refuse_ignored_beginning(tokenizer, folder)
    elif (pieces := _pieces(folder)) is not None:
        own = SentencePieceProcessor(model_file=str(pieces))
        _refuse_other_pieces(tokenizer, pieces, own.encode)
        _refuse_unsaid_beginning(tokenizer, pieces, own)


def _pieces(folder: Path) -> Path | None:
    return next((folder / name for name in _PIECES if (folder / name).is_file()), None)


def _refuse_other_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Path, own: Callable[[str], list[int]]) -> None:
    """Raises UserError if ordinary text becomes different tokens. For other text see `notices`."""
    if (text := _first_misread(tokenizer, own, _ORDINARY)) is None:
        return
    problem = f"model.tokenizer: transformers splits text differently than {pieces} does, for example {text!r}"
    if _is_llamas(pieces, own):
        raise UserError(
            f'{problem}. Name its class in a tokenizer_config.json beside it: {{"tokenizer_class": "LlamaTokenizer", '
            '"add_bos_token": true}, as for Llama; false if the model was trained on texts without <s>'
        )
    raise UserError(
        f"{problem}. So does the class of Llama's tokenizers. Put the tokenizer.json of the model's training next to "
        'it, and a tokenizer_config.json with {"tokenizer_class": "PreTrainedTokenizerFast"}, which reads that file as '
        f"it is. If transformers split the text in training, AutoTokenizer.from_pretrained({str(pieces.parent)!r}) is "
        "that tokenizer: its save_pretrained writes both files"
    )


def _is_llamas(pieces: Path, own: Callable[[str], list[int]]) -> bool:
    """Whether the class of Llama's tokenizers splits ordinary text as SentencePiece does."""
    try:
        tried = LlamaTokenizer.from_pretrained(pieces.parent)
    except Exception:  # another kind of vocabulary
        return False
    return _first_misread(tried, own, _ORDINARY) is None


def _first_misread(
    tokenizer: PreTrainedTokenizerBase, own: Callable[[str], list[int]], texts: Sequence[str]
) -> str | None:
    return next((text for text in texts if _ids(tokenizer, text) != own(text)), None)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _refuse_lost_characters(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Some classes read only the vocabulary from tokenizer.json, not how it treats unknown characters."""
    if not tokenizer.is_fast or "__init__" not in vars(type(tokenizer)):
        return
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    if (unknown := own.token_to_id(str(tokenizer.unk_token))) is None:
        return
    for text in _TEXTS:
        meant, found = own.encode(text, add_special_tokens=False).ids, _ids(tokenizer, text)
        if meant.count(unknown) > found.count(unknown) and len(found) < len(meant):
            raise UserError(
                f"model.tokenizer: {type(tokenizer).__name__} of transformers drops characters for which {file} has "
                f"{tokenizer.unk_token}: {text!r} becomes {len(found)} tokens instead of {len(meant)}. Set "
                '"tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json, which reads that file as it is'
            )


def _refuse_ignored_beginning(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """If there is a tokenizer.json, transformers 5 ignores `add_bos_token`, which earlier versions followed."""
    if _said(folder) is True and _begins_without(tokenizer):
        raise UserError(
            f"model.tokenizer: tokenizer_config.json in {folder} says add_bos_token: true, but transformers 5 follows "
            f"tokenizer.json, which begins texts without {tokenizer.bos_token or 'it'}. {_rewrite(folder)} "
            "If texts should begin without it, write add_bos_token: false"
        )


def _rewrite(folder: Path) -> str:
    """Advice on how to make a tokenizer.json that begins texts with the token."""
    return (
        f"AutoTokenizer.from_pretrained({str(folder)!r}, add_bos_token=True) is a tokenizer that begins texts with it; "
        "save it with save_pretrained, and name its folder in model.tokenizer."
    )


def _refuse_unsaid_beginning(tokenizer: PreTrainedTokenizerBase, pieces: Path, own: Any) -> None:
    """Raises UserError if versions 4 and 5 of transformers differ in whether texts begin with <s>."""
    if own.bos_id() >= 0 and _begins_without(tokenizer) and _said(pieces.parent) is not False:
        raise UserError(
            f"model.tokenizer: transformers 5 begins texts without {own.id_to_piece(own.bos_id())}, where earlier "
            f"versions put it, and nothing next to {pieces} says which is right. Set "
            '"add_bos_token": true in tokenizer_config.json, as for Llama; false if the model was trained on texts '
            "without it"
        )


def notices(tokenizer: PreTrainedTokenizerBase, folder: Path, begins: int | Sequence[int] | None) -> list[str]:
    """Notices about a tokenizer that may or may not be read as intended.

    Args:
        begins: the model's bos_token_id.
    """
    found = [_rewritten(tokenizer, folder), _unsaid_beginning(tokenizer, folder, begins)]
    return [notice for notice in found if notice is not None]


def _rewritten(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """A notice if characters that the vocabulary lacks or rewrites, or spaces, become different tokens, or None.

    It is not an error: if the model was trained with transformers, it saw these tokens.
    """
    if (folder / "tokenizer.json").is_file() or (pieces := _pieces(folder)) is None:
        return None
    own = SentencePieceProcessor(model_file=str(pieces))
    if (text := _first_misread(tokenizer, own.encode, _TEXTS)) is None:
        return None
    return (
        f"transformers splits some text differently than {pieces} does, for example {text!r}: "
        f"{len(_ids(tokenizer, text))} tokens instead of {len(own.encode(text))}. The tokens of transformers "
        "are scored. If the model was not trained on those, put the tokenizer.json of its training next to it"
    )


def _unsaid_beginning(
    tokenizer: PreTrainedTokenizerBase, folder: Path, begins: int | Sequence[int] | None
) -> str | None:
    """A notice if a tokenizer of Llama's kind begins texts without the token that its model has for this.

    None if it begins texts with that token, or its settings say that it should not.
    """
    of_llamas_kind = _BEGINNING_OF_WORDS in tokenizer.get_vocab()
    if begins is None or not of_llamas_kind or not _begins_without(tokenizer) or _said(folder) is False:
        return None
    return (
        f"Texts do not begin with {tokenizer.bos_token or begins}, though the model has a bos_token_id ({begins}). If "
        f"the model was trained with it, as Llama was: {_rewrite(folder)} If not, write "
        '"add_bos_token": false into tokenizer_config.json'
    )


def _begins_without(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether texts begin without a special token."""
    return tokenizer.encode("a")[:1] == _ids(tokenizer, "a")[:1]


def _said(folder: Path) -> bool | None:
    """The `add_bos_token` of the settings beside a tokenizer, None if they do not have it."""
    try:
        return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("add_bos_token")
    except (OSError, ValueError, AttributeError):
        return None
