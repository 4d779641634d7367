"""Evaluation of the live, sharded model equals that of the checkpoint of the same step."""

from pathlib import Path

import gang
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluations import config

from mrd_ray import evaluate, unlearn
from mrd_ray.data.tokens import Limits
from mrd_ray.evaluation import sets
from mrd_ray.models import load
from mrd_ray.unlearning.in_training import InTraining


@pytest.fixture(scope="module")
def files(qa_file, tmp_path_factory):
    """Questions with wrong answers, for a random model with a context of 128."""
    folder = tmp_path_factory.mktemp("files")
    lines = qa_file.read_text().splitlines()
    (folder / "forget.jsonl").write_text("\n".join(lines[:8]))
    (folder / "retain.jsonl").write_text("\n".join(lines[8:]))
    wrong = [line[:-1] + ', "wrong": ["Nine.", "A red one."]}' for line in lines]
    (folder / "questions.jsonl").write_text("\n".join(wrong))
    return folder


def of_training(files, model, run, **settings):
    questions = {"path": str(files / "questions.jsonl"), "wrong": "wrong",
                 "metrics": ["probability", "truth_ratio", "rouge_l", "extraction_likelihood"]}  # fmt: skip
    evaluation = {"sets": {"questions": questions}, "max_new_tokens": 8, "extraction_n": 2, "generation_batch": 5,
                  "micro_batch_tokens": 64}  # fmt: skip
    settings |= {"unlearning__learning_rate": 1e-4, "stopping__forgotten": "never", "stopping__extraction_n": 0}
    made = gang.config(model, files / "forget.jsonl", files / "retain.jsonl", run, **settings)
    return made.model_validate(made.model_dump() | {"evaluation": evaluation, "evaluation_every": 2})


def train(ranks, made):
    tables = {}
    tokenizer = load.load_tokenizer(made.model)
    built = {
        name: sets.build(name, of, made.evaluation, tokenizer, Limits(128)) for name, of in made.evaluation.sets.items()
    }
    measure = InTraining(made, built)

    def keep(step, engine):
        before = engine.digest()
        tables[step] = measure(engine)
        assert engine.digest() == before

    gang.train(made, ranks, measure=keep)
    return tables


def check(lines, expected):
    for column in ("set", "sample_id", "metric", "error"):
        assert lines[column] == expected[column]
    np.testing.assert_allclose(lines["value"].to_numpy(), expected["value"].to_numpy(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_in_place_equals_the_checkpoint(files, tiny_model_dir, tmp_path, stage):
    made = of_training(files, tiny_model_dir, tmp_path, deepspeed__zero_stage=stage, unlearning__steps=3,
                       stopping__evaluate_every=1)  # fmt: skip
    of_ranks = gang.on_ranks(2, train, made)
    assert of_ranks[0] == of_ranks[1]
    assert sorted(of_ranks[0]) == [0, 2, 3]
    step = 2
    checkpoint = tmp_path / "checkpoints" / str(step) / "model"
    load.load_tokenizer(made.model).save_pretrained(checkpoint)
    settings = made.evaluation.model_dump()
    check(of_ranks[0][step], evaluate(config(checkpoint, settings, tmp_path / "evaluated")).lines)


@pytest.mark.slow
def test_a_run_leaves_evaluations(files, tiny_model_dir, tmp_path):
    made = of_training(files, tiny_model_dir, tmp_path / "run", deepspeed__zero_stage=2, unlearning__steps=2,
                       ray__workers=2)  # fmt: skip
    unlearn(made)
    found = sorted((tmp_path / "run" / "evaluations").iterdir())
    assert [file.name for file in found] == ["step-000000.parquet", "step-000002.parquet"]
    expected = evaluate(config(Path(tmp_path / "run" / "model"), made.evaluation.model_dump(), tmp_path / "evaluated"))
    lines: pa.Table = pq.read_table(found[1])
    check(lines, expected.lines)
