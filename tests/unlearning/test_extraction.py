"""Against the definition written out line by line: one prefix at a time, no cache, no padding."""

import json
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, SAMPLES, memorise, model_of
from transformers import GPT2Config

from mrd_ray.mrd.extraction import extraction_likelihoods, overlap

LONGEST = max(map(len, SAMPLES))
# no position left after the longest sample
FULL = GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=LONGEST, n_inner=48)
SHARES = [[SAMPLES, []], [SAMPLES[:1], SAMPLES[1:]], [[], [SAMPLES[2]]]]  # by rank
N, ROWS = 1, 3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More are no faster on tiny models, and far slower where others compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Reference:
    """The definition, which remembers continuations."""

    def __init__(self, model, *eos):
        self.model, self.eos, self.known = model, eos or (model.config.eos_token_id,), {}

    @torch.no_grad()
    def continuation(self, prefix, length):
        tokens = list(prefix)
        while len(tokens) < len(prefix) + length:
            token = self.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item()
            if token in self.eos:
                break
            tokens.append(token)
        return tokens[len(prefix) :]

    def __call__(self, sample, n, stride=1):
        overlaps = []
        for t in range(1, len(sample) - n + 1, stride):
            key = tuple(sample), t
            if key not in self.known:
                self.known[key] = self.continuation(sample[:t], len(sample) - t)
            generated, suffix = self.known[key], sample[t:]
            grams = [generated[i : i + n] for i in range(len(generated) - n + 1)]
            true = [suffix[i : i + n] for i in range(len(suffix) - n + 1)]
            overlaps.append(sum(gram in true for gram in grams) / len(grams) if grams else 0.0)
        return sum(overlaps) / len(overlaps) if overlaps else math.nan


def half_known(reference):
    """Samples that the model continues rightly now and then: its own words, with a token exchanged."""
    samples = []
    for start in ([5], [22, 17, 40]):
        tokens = start + reference.continuation(start, 10)
        tokens[len(tokens) // 2] = 13
        samples.append(tokens)
    return samples


def approx(values):
    return pytest.approx(values, rel=1e-12, nan_ok=True)


def test_overlap():
    assert overlap([1, 2, 3, 1], [9, 1, 2, 8, 3], 1) == 1
    assert overlap([1, 2, 3, 1], [9, 1, 2, 8, 3], 2) == 1 / 3
    assert overlap([1, 2, 1, 2, 5], [1, 2], 2) == 2 / 4  # repetitions count
    assert overlap([1, 2, 3], [2, 3, 1], 3) == 0
    assert overlap([1], [1, 2], 2) == 0
    assert overlap([], [1], 1) == 0


# Gemma 2 in float32: transformers' eager attention turns a float64 row that is all padding into nan
@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float64), ("gpt2", torch.float64), ("gemma2", torch.float32)]
)
def test_definition(name, dtype):
    model = model_of(name, dtype)
    reference = Reference(model)
    samples = SAMPLES + half_known(reference)
    for n in (1, 2, 3):
        for stride, numbers in ((1, (1, 100)), (3, (4,))):
            expected = [reference(sample, n, stride) for sample in samples]
            assert any(0 < value < 1 for value in expected)
            for rows in numbers:
                assert extraction_likelihoods(model, samples, n, stride, rows) == approx(expected)


def test_of_a_scored_response_the_prompt_is_given():
    model = model_of("llama", torch.float64)
    reference = Reference(model)
    sample, n = max(half_known(reference), key=len), 2
    start, stop = 4, len(sample) - 1  # a prompt of four tokens, and one after the response
    scored = [start <= t < stop for t in range(len(sample))]
    overlaps = [
        overlap(reference.continuation(sample[:t], stop - t), sample[t:stop], n) for t in range(start, stop - n + 1)
    ]
    found = extraction_likelihoods(model, [sample], n, scored=[scored])
    assert found == approx([sum(overlaps) / len(overlaps)])
    assert found != approx(extraction_likelihoods(model, [sample], n))


def test_too_short_a_sample_has_none():
    found = extraction_likelihoods(model_of("llama"), SAMPLES, 3)
    assert [math.isnan(value) for value in found] == [False, True, True, False]
    assert extraction_likelihoods(model_of("llama"), [], 3) == []


def test_memorised_and_random():
    samples = [sample for sample in SAMPLES if len(sample) > 3]
    model = model_of("llama", torch.float32)
    assert max(extraction_likelihoods(model, samples, 3)) < 0.1
    memorise(model, samples)
    assert min(extraction_likelihoods(model, samples, 3)) > 0.9


def test_eos_ends_a_continuation():
    model = model_of("gpt2")
    endless = Reference(model)
    samples = half_known(endless)
    ends = endless.continuation(samples[0][:1], 3)[1:]
    without = extraction_likelihoods(model, samples, 2)
    model.generation_config.eos_token_id = ends
    found = extraction_likelihoods(model, samples, 2)
    assert found == approx([Reference(model, *ends)(sample, 2) for sample in samples])
    assert found != approx(without)
    model.generation_config.eos_token_id, model.config.eos_token_id = None, ends[0]
    assert extraction_likelihoods(model, samples, 2) == approx([Reference(model)(sample, 2) for sample in samples])


def test_the_models_generation_settings_do_not_leak():
    model = model_of("llama")
    expected = extraction_likelihoods(model, SAMPLES, 1)
    model.generation_config.update(
        do_sample=True, temperature=9.0, repetition_penalty=9.0, num_beams=2, no_repeat_ngram_size=1, max_length=4,
        suppress_tokens=list(range(30)), bad_words_ids=[[40]], sequence_bias=[[[50], 99.0]], forced_eos_token_id=50,
    )  # fmt: skip
    settings = model.generation_config.to_dict()
    assert extraction_likelihoods(model, SAMPLES, 1) == expected
    assert model.generation_config.to_dict() == settings


def test_rows_that_run_past_a_full_context(monkeypatch):
    monkeypatch.setitem(CONFIGS, "full", FULL)
    model = model_of("full")
    reference = Reference(model)
    assert extraction_likelihoods(model, SAMPLES, N) == approx([reference(sample, N) for sample in SAMPLES])


def share(rank, folder):
    """What one of two processes does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    CONFIGS["full"] = FULL
    found = []
    for name in ("llama", "full"):
        model = model_of(name)
        forwards = []
        with model.register_forward_hook(lambda *_, forwards=forwards: forwards.append(0)):
            values = [extraction_likelihoods(model, by_rank[rank], N, rows=ROWS, all_ranks=True) for by_rank in SHARES]
            found.append([values, len(forwards)])
        if rank == 0:  # alone, it waits for nobody
            extraction_likelihoods(model, SAMPLES[:1], N)
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "full", FULL)
    torch.multiprocessing.spawn(share, (str(tmp_path),), nprocs=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for name, (values_0, forwards_0), (values_1, forwards_1) in zip(("llama", "full"), *ranks, strict=True):
        assert forwards_0 == forwards_1
        for by_rank, *values in zip(SHARES, values_0, values_1, strict=True):
            for samples, found in zip(by_rank, values, strict=True):
                assert found == approx(extraction_likelihoods(model_of(name), samples, N, rows=ROWS))
