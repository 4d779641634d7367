"""Extraction Likelihood of Jang et al., 2023, "Knowledge Unlearning for Mitigating Privacy Risks in Language Models".

How much of a sample the model reveals when prompted with its beginning, as in the stopping rule of arXiv 2504.06658,
C.4:

    EL_n(x) = sum_{t=1}^{T-n} OVERLAP_n(f(x_<=t), x_>t) / (T - n)

f(x_<=t) is the greedy continuation of the first t tokens, at most as long as x_>t. Where only responses are scored, x
is the response, and the prompt precedes every prefix.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel


def overlap(generated: Sequence[int], suffix: Sequence[int], n: int) -> float:
    """OVERLAP_n: the share of generated's n-grams, counted with repeats, that suffix contains; 0 if it has none."""
    known = set(_ngrams(suffix, n))
    ngrams = _ngrams(generated, n)
    return sum(ngram in known for ngram in ngrams) / len(ngrams) if ngrams else 0.0


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


@torch.no_grad()
def extraction_likelihoods(
    model: PreTrainedModel,
    samples: Sequence[Sequence[int]],
    n: int,
    stride: int = 1,
    rows: int = 32,
    all_ranks: bool = False,
    scored: Sequence[Sequence[bool]] | None = None,
) -> list[float]:
    """EL_n of every sample, between 0 and 1; nan for a sample with too few tokens for one n-gram.

    Args:
        model: a causal language model in eval mode. Of its generation settings, only the EOS and pad ids are used.
        samples: token ids of each sample.
        n: tokens per n-gram, at least 1.
        stride: average over every stride-th prefix; 1 is the definition.
        rows: prefixes per call of `generate`. Affects the result only through rounding.
        all_ranks: every rank of the default process group calls this, each with its own samples, possibly none. All
            then make the same number of forwards, as ZeRO-3 requires. Otherwise only this rank works.
        scored: whether each token counts: x runs from the first token that does to the last. None: all but the first.
    """
    flags = [[False] + [True] * (len(sample) - 1) for sample in samples] if scored is None else [*map(list, scored)]
    spans = [(of.index(True), len(of) - of[::-1].index(True)) if any(of) else (0, 0) for of in flags]
    samples = [sample[:stop] for sample, (_, stop) in zip(samples, spans, strict=True)]
    prefixes = [(i, t) for i, (start, stop) in enumerate(spans) for t in range(start, stop - n + 1, stride)]
    # Sorted by tokens to generate, so that few rows generate more than they need; most first, alike on every rank.
    prefixes.sort(key=lambda prefix: (len(samples[prefix[0]]) - prefix[1], prefix[1]), reverse=True)
    calls = [prefixes[start : start + rows] for start in range(0, len(prefixes), rows)]
    if all_ranks:
        most = torch.tensor(len(calls), device=model.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        calls += [[]] * (int(most) - len(calls))
    overlaps: list[list[float]] = [[] for _ in samples]
    for call in calls:
        heads = [samples[i][:t] for i, t in call] or [[0]]  # a call without rows joins in with a dummy row
        lengths = [len(samples[i]) - t for i, t in call] or [1]
        continuations = greedy(model, heads, lengths, synced=all_ranks)
        for (i, t), generated in zip(call, continuations, strict=bool(call)):
            overlaps[i].append(overlap(generated, samples[i][t:], n))
    # fsum, because the order of a sample's prefixes depends on the other samples
    return [math.fsum(found) / len(found) if found else math.nan for found in overlaps]


@torch.no_grad()
def greedy(
    model: PreTrainedModel, prefixes: Sequence[Sequence[int]], lengths: Sequence[int], synced: bool = False
) -> list[list[int]]:
    """The greedy continuation of each prefix: at most lengths[row] tokens, ending before the model's EOS.

    synced: continue with forwards until every rank is done.
    """
    eos = _token_id(model, "eos_token_id")
    ends = [eos] if isinstance(eos, int) else list(eos or [])
    pad = _token_id(model, "pad_token_id") or 0
    if not 0 <= pad < model.config.get_text_config().vocab_size:  # some models set -1, or an id past the end
        pad = 0
    width = max(map(len, prefixes))
    tokens = torch.full((len(prefixes), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prefix in enumerate(prefixes):
        tokens[row, width - len(prefix) :] = torch.tensor(prefix)
        mask[row, width - len(prefix) :] = 1
    settings = GenerationConfig(
        max_new_tokens=max(lengths),
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=ends or None,
    )
    last = max(len(prefix) + length for prefix, length in zip(prefixes, lengths, strict=True)) - 1

    def clamp_positions(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = positions.clamp(max=last)
        return args, kwargs

    generator: Any = model
    kept = generator.generation_config
    # `generate` takes what `settings` leaves unset from the model's own (repetition penalty, suppressed tokens, ...).
    generator.generation_config = GenerationConfig()
    try:
        # Rows run past their length, and synced ranks past their last token; a full context has no further position.
        with model.register_forward_pre_hook(clamp_positions, with_kwargs=True):
            output = generator.generate(
                tokens.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                synced_gpus=synced,  # if unset, `generate` would ask torch.distributed
            )
    finally:
        generator.generation_config = kept
    continuations = []
    for generated, length in zip(output[:, width:].tolist(), lengths, strict=True):
        stop = next((at for at, token in enumerate(generated[:length]) if token in ends), length)
        continuations.append(generated[:stop])
    return continuations


def _token_id(model: PreTrainedModel, name: str) -> Any:
    """A special token's id, or ids, from the model's generation settings, else from its config; None if in neither."""
    found = getattr(model.generation_config, name)
    return getattr(model.config.get_text_config(), name, None) if found is None else found
