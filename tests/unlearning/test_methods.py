"""On a real model that has memorised TOFU's forget01 and 80 retain rows, every method unlearns. Some 40 minutes.

`-s` prints what was measured, MRD weights against uniform ones too.
"""

import json
from pathlib import Path
from statistics import fmean

import gang
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from mrd_ray.config import ModelSettings
from mrd_ray.demo import demo
from mrd_ray.models import fine_tune, load
from mrd_ray.mrd.extraction import greedy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
METHODS = ["ga", "graddiff", "po", "npo"]
RETAIN_ROWS, STEPS = 80, 10


@pytest.fixture(scope="module")
def memorised(tofu_dir, tmp_path_factory):
    """SmolLM2 fine-tuned on both sets, kept between runs beside the demo's models; and the sets."""
    cache = Path("~/.cache/mrd_ray").expanduser()
    forget, retain = tofu_dir / "forget01.json", tmp_path_factory.mktemp("tofu") / "retain.jsonl"
    retain.write_text("".join((tofu_dir / "retain99.json").read_text().splitlines(keepends=True)[:RETAIN_ROWS]))
    if not (cache / "smollm2-authors-57ffba28").is_dir() and not (cache / "smollm2-135m-instruct").is_dir():
        pytest.skip("run `make demo` once, for its model")
    pretrained = demo.unpacked(cache)
    model = fine_tune.cached(
        cache, "smollm2-tofu-forget01", lambda folder: demo.memorise(pretrained, folder, [forget, retain])
    )
    return model, forget, retain


def config(memorised, tofu_dir, run, method, **more):
    settings = {
        "unlearning__method": method, "unlearning__steps": STEPS, "unlearning__refresh_every": 5,
        "unlearning__batch_size": 8, "unlearning__learning_rate": 5e-5, "scoring__micro_batch_tokens": 512,
        "stopping__evaluate_every": STEPS, "stopping__forgotten": "never", "stopping__max_retain_loss_ratio": None,
        "unlearning__refusals": str(tofu_dir / "idontknow.jsonl") if method == "po" else None,
    }  # fmt: skip
    return gang.config(*memorised, run, **(settings | more))


def unlearned(ranks, configs):
    """(MA, ROUGE-L recall, retain loss) before and after each."""
    found = []
    for one in configs:
        _, loop, _ = gang.train(one, ranks, keep=False)
        before, after = loop.state.initial, loop.state.latest
        found.append(
            {
                "ma": (fmean(before.memorization_accuracy), fmean(after.memorization_accuracy)),
                "retain loss": (before.retain_loss, after.retain_loss),
                "rouge": rouge(loop.engine.model, one),
            }
        )
    return found


def rouge(model, one) -> float:
    """Mean ROUGE-L recall of the greedy answers to the forget questions."""
    tokenizer = load.load_tokenizer(one.model)
    rows = [json.loads(line) for line in Path(one.data.path).read_text(encoding="utf-8").splitlines()]
    prompts = [tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"] for row in rows]
    lengths = [len(tokenizer(row["answer"])["input_ids"]) + 4 for row in rows]
    answers = [tokenizer.decode(tokens).split("\n")[0] for tokens in greedy(model, prompts, lengths)]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return fmean(
        scorer.score(row["answer"], answer)["rougeL"].recall for row, answer in zip(rows, answers, strict=True)
    )


@pytest.fixture(scope="module")
def rouge_before(memorised, tofu_dir, tmp_path_factory):
    model = load.load_model(ModelSettings(path=str(memorised[0])), torch.device("cpu"))
    return rouge(model, config(memorised, tofu_dir, tmp_path_factory.mktemp("unused"), "npo"))


def test_every_method_forgets(memorised, tofu_dir, tmp_path, rouge_before):
    configs = [config(memorised, tofu_dir, tmp_path, method) for method in METHODS]
    found = [row for one in configs for row in gang.on_ranks(1, unlearned, [one], threads=2)[0]]
    print(f"\nROUGE-L before: {rouge_before:.3f}")
    for method, row in zip(METHODS, found, strict=True):
        print(method, json.dumps(row))
    assert rouge_before > 0.6
    for method, row in zip(METHODS, found, strict=True):
        before, after = row["ma"]
        assert after < before, method
        assert row["rouge"] < rouge_before, method


def test_mrd_against_uniform_weights(memorised, tofu_dir, tmp_path):
    """Reported, whichever wins."""
    cases = [(weighting, seed) for seed in range(3) for weighting in ("mrd", "uniform")]
    configs = [
        config(memorised, tofu_dir, tmp_path, "npo", unlearning__weighting=weighting, unlearning__seed=seed)
        for weighting, seed in cases
    ]
    for case, one in zip(cases, configs, strict=True):  # a process each, since an engine leaves memory behind
        ((row,),) = gang.on_ranks(1, unlearned, [one], threads=2)
        print(*case, json.dumps(row), flush=True)
        assert row["ma"][1] < row["ma"][0]
