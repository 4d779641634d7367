"""Turns the text of samples into tokens, and marks which tokens count."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mrd_ray.config import DataSettings
from mrd_ray.data.cells import Unscorable
from mrd_ray.data.render import Rendered
from mrd_ray.errors import UserError
from mrd_ray.models import load

_TRIED = 16  # texts for which the quick path must return the same tokens as the tokenizer itself


class Limits(NamedTuple):
    """A model's limits: longest sample in tokens, and number of different tokens; None means no limit."""

    context: int | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Limits":
        """The limits of a model, which may have no storage for weights."""
        embeddings: Any = model.get_input_embeddings().weight
        return cls(load.context_length(model.config), len(embeddings))

    def with_context(self, max_tokens: int | None) -> "Limits":
        """The same limits, with samples of at most `max_tokens` tokens."""
        known = [limit for limit in (max_tokens, self.context) if limit is not None]
        return Limits(min(known, default=None), self.vocabulary)


class Tokens(NamedTuple):
    """If scored[t], token_ids[t] is scored given the tokens before it. The first token is never scored."""

    token_ids: list[int]
    scored: list[bool]


class Tokenized(NamedTuple):
    """Tokens of a sample, and which of the tokenizer's special tokens its text already had.

    own_special: those at the ends of the text, which are not added again. within: those elsewhere.
    """

    tokens: Tokens
    own_special: tuple[int, ...]
    within: frozenset[int] = frozenset()


class Encoder:
    """Tokenises many texts at once, and knows the special tokens that the tokenizer puts around a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if tokenizer.is_fast:
            _keep_white_space(tokenizer.backend_tokenizer)
        self.before, self.after = self._special()
        self.special = frozenset(self.before + self.after)
        self._quick: bool | None = None

    def _special(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text, from the first text in which they are distinct from its own."""
        for text in ("a", "The end.", "\u0391\u03c9 1 \u5b57"):
            whole, plain = (self._ids(text, special) for special in (True, False))
            places = [i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain]
            if len(places) == 1:
                return whole[: places[0]], whole[places[0] + len(plain) :]
        raise UserError(
            "model.tokenizer: cannot tell which special tokens it puts around a text; expected the text's own tokens "
            "unchanged between them. Use another tokenizer"
        )

    def _ids(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def encode(self, texts: Sequence[str], offsets: bool) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
        """Token ids of each text, without added special tokens, and with `offsets` each token's position in it."""
        if not texts:
            return []
        if self._quick is None:
            self._quick = self.tokenizer.is_fast and self._agrees(texts[:_TRIED])
        if self._quick:
            backend = self._backend()
            if offsets:
                return [(one.ids, one.offsets) for one in backend.encode_batch(list(texts), add_special_tokens=False)]
            return [(one.ids, None) for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=offsets, verbose=False)
        places = encoded["offset_mapping"] if offsets else [None] * len(texts)
        return [(list(ids), at) for ids, at in zip(encoded["input_ids"], places, strict=True)]

    def framed(self, text: str) -> list[int]:
        """The tokens of a text with the special tokens around it, none of them twice."""
        ((token_ids, _),) = self.encode([text], offsets=False)
        before, after, _ = self.around(token_ids)
        return [*before, *token_ids, *after]

    def around(self, token_ids: list[int]) -> tuple[list[int], list[int], list[int]]:
        """The special tokens to add before and after a text's tokens, and those that the text already has."""
        before, after, own = self.before, self.after, list[int]()
        if before and token_ids[: len(before)] == before:
            own, before = own + before, []
        if after and token_ids[-len(after) :] == after:
            own, after = own + after, []
        return before, after, own

    def outside(self, token_id: int, vocabulary: int) -> str:
        """The error for a token that a model with `vocabulary` embeddings does not have."""
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return (
            f"token {token_id} {token!r} is not among the model's {vocabulary} embeddings (was the model resized for "
            "this tokenizer?)"
        )

    def _backend(self) -> Any:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # some tokenizer files set these; each call of the tokenizer sets them again
        backend.no_padding()
        backend.encode_special_tokens = False
        return backend

    def _agrees(self, texts: Sequence[str]) -> bool:
        """Whether the Rust tokenizer returns what the Python one does; a model's own code may change the latter."""
        quick = [one.ids for one in self._backend().encode_batch_fast(list(texts), add_special_tokens=False)]
        return quick == [self._ids(text, False) for text in texts]


def _keep_white_space(backend: Any) -> None:
    """Let a token's position in the text include its white space, so that a token of only white space has a position.

    Some byte-level tokenizers trim positions (`trim_offsets`). This does not change the tokens.
    """
    state = json.loads(backend.to_str())
    parts = [state["post_processor"] or {}]
    parts += parts[0].get("processors", [])
    if any(part.get("trim_offsets") for part in parts):
        for part in parts:
            if "trim_offsets" in part:
                part["trim_offsets"] = False
        backend.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor


def tokenize(
    rendered: Sequence[Rendered], data: DataSettings, encoder: Encoder, limits: Limits
) -> list[Tokenized | Unscorable]:
    """Tokens of samples. All tokens are scored, or only those that overlap the responses."""
    encoded = encoder.encode([one.text for one in rendered], offsets=data.score_on != "all")
    return [_one(*pair, data, encoder, limits) for pair in zip(rendered, encoded, strict=True)]


def tokens_of(rendered: Rendered, data: DataSettings, encoder: Encoder, limits: Limits) -> Tokens:
    """Tokens of one sample. Raises Unscorable."""
    (found,) = tokenize([rendered], data, encoder, limits)
    if isinstance(found, Unscorable):
        raise found
    return found.tokens


def _one(
    rendered: Rendered,
    encoded: tuple[list[int], list[tuple[int, int]] | None],
    data: DataSettings,
    encoder: Encoder,
    limits: Limits,
) -> Tokenized | Unscorable:
    token_ids, places = encoded
    before, after, own = encoder.around(token_ids) if rendered.add_special_tokens else ([], [], [])
    within = frozenset[int]()
    if rendered.add_special_tokens and not encoder.special.isdisjoint(token_ids):
        within = encoder.special & (Counter(token_ids) - Counter(own)).keys()
    scored = None if places is None else _overlapping(places, rendered.spans)
    if before or after:
        token_ids = [*before, *token_ids, *after]
        scored = None if scored is None else [False] * len(before) + scored + [False] * len(after)
    scored = [True] * len(token_ids) if scored is None else scored
    whole = len(token_ids)
    if limits.context is not None and whole > limits.context:
        if not data.truncate:
            return Unscorable(f"{whole} tokens, over the limit of {limits.context}; shorten it or set data.truncate")
        token_ids, scored = token_ids[: limits.context], scored[: limits.context]
    if token_ids:
        if limits.vocabulary is not None and (top := max(token_ids)) >= limits.vocabulary:
            return Unscorable(encoder.outside(top, limits.vocabulary))
        scored[0] = False
    if not any(scored):
        if data.score_on == "response" and not rendered.spans:
            return Unscorable("none of it is a response: data.template leaves that out")
        if len(token_ids) < whole:
            return Unscorable(f"nothing to score in its first {limits.context} tokens, all that data.truncate leaves")
        return Unscorable(f"{len(token_ids)} token(s), none of which can be scored: each needs at least one before it")
    return Tokenized(Tokens(token_ids, scored), tuple(own), within)


def _overlapping(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token shares a character with a span; special tokens have none."""
    return [any(first < stop and last > start and last > first for start, stop in spans) for first, last in places]
