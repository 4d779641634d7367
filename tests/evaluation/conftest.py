"""What the evaluation tests share: the sets, and one finished run."""

import json
from pathlib import Path

import pytest
from evaluations import config

from mrd_ray import evaluate

METRICS = ["probability", "rouge_l", "truth_ratio", "accuracy", "memorization_accuracy", "min_k"]
QUESTIONS = {"prompt": "question", "response": "answer", "wrong": "perturbed_answer", "max_samples": 8}


@pytest.fixture(scope="session", autouse=True)
def ray_for_all(ray_cluster):
    """Every evaluation test."""


@pytest.fixture(scope="session")
def choices_file(tmp_path_factory) -> Path:
    """Multiple-choice questions as WMDP and MMLU publish them."""
    file = tmp_path_factory.mktemp("choices") / "choices.jsonl"
    rows = [
        {
            "question": f"Which is number {i}?",
            "choices": ["red", "blue", "green", "grey"],
            "answer": i % 4,
            "subject": s,
        }
        for i, s in enumerate(["colours", "numbers"] * 3)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="session")
def settings(tofu_dir, choices_file, tmp_path_factory) -> dict:
    """Sets of all kinds, small."""
    story = tmp_path_factory.mktemp("text") / "story.txt"
    story.write_text(" ".join(f"Once there was a cat who had {n} hats and wore them all." for n in range(60)))
    tofu = {name: str(tofu_dir / f"{name}_perturbed.json") for name in ("forget01", "retain", "world_facts")}
    return {
        "sets": {
            "forget": {"path": tofu["forget01"], "paraphrase": "paraphrased_answer", "metrics": METRICS} | QUESTIONS,
            "retain": {"path": tofu["retain"], "paraphrase": "paraphrased_answer", "metrics": METRICS} | QUESTIONS,
            "facts": {"path": tofu["world_facts"], "metrics": ["normalized_probability", *METRICS[1:4]]} | QUESTIONS,
            "choices": {"path": str(choices_file), "choices": "choices", "subject": "subject",
                        "template": "{prompt}\nAnswer: {response}", "metrics": ["multiple_choice"]},
            "story": {"path": str(story), "metrics": ["perplexity", "memorization_accuracy"]},
            "windows": {"path": str(story), "window_tokens": 64, "max_samples": 3,
                        "metrics": ["memorization_accuracy", "extraction_likelihood"]},
        },
        "forget": "forget",
        "extraction_n": 3,
        "extraction_stride": 16,
        "utility": ["retain", "facts"],
        "membership": {"members": "forget", "non_members": "retain"},
        "max_new_tokens": 24,
        "perplexity_window": 96,
        "perplexity_stride": 32,
    }  # fmt: skip


@pytest.fixture(scope="session")
def finished(stories_dir, settings, tmp_path_factory):
    """One actor, uninterrupted."""
    return evaluate(config(stories_dir, settings, tmp_path_factory.mktemp("evaluation")))
