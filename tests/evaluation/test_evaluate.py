"""Evaluation through real Ray, on real data: right, invariant, resumable, loud about what it cannot evaluate."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from evaluations import config, rouge_l_recall, values
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrd_ray import RaySettings, UserError, evaluate
from mrd_ray.cli.main import main
from mrd_ray.demo import demo


class Reference:
    """One sample at a time, straight from the definitions, through nothing but transformers."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def log_probs(self, question: str, answer: str) -> list[float]:
        """Of the answer's tokens, given the question."""
        opening = f"Question: {question}\nAnswer: "
        encoded = self.tokenizer(opening + answer, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])
        all_log_probs = self.model(ids[None]).logits[0].double().log_softmax(-1)
        return [
            float(all_log_probs[t - 1, ids[t]])
            for t, (_, stop) in enumerate(encoded["offset_mapping"])
            if stop > len(opening)
        ]

    @torch.no_grad()
    def answer(self, question: str, answer: str, count: int) -> str:
        """Greedy, one whole forward per token, from the tokens that go before the true answer."""
        opening = f"Question: {question}\nAnswer: "
        encoded = self.tokenizer(opening + answer, return_offsets_mapping=True)
        ids = [t for t, (_, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
               if stop <= len(opening)]  # fmt: skip
        start = len(ids)
        while len(ids) < start + count:
            token = int(self.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == self.model.generation_config.eos_token_id:
                break
            ids.append(token)
        return self.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def rows_by_answer(run, name):
    return {row["answer"]: row for row in run.answers.to_pylist() if row["set"] == name}


def check_against_reference(run, folder, path, name, count):
    reference = Reference(folder)
    found = {metric: values(run, name, metric) for metric in ("probability", "truth_ratio", "accuracy", "rouge_l")}
    rows, checked = rows_by_answer(run, name), 0
    for line in Path(path).read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        if (answered := rows.get(row["answer"])) is None:
            continue
        checked += 1
        sample_id = answered["sample_id"]
        answer = reference.log_probs(row["question"], row["answer"])
        paraphrase = reference.log_probs(row["question"], row["paraphrased_answer"])
        wrong = [reference.log_probs(row["question"], text) for text in row["perturbed_answer"]]
        assert found["probability"][sample_id] == pytest.approx(math.exp(np.mean(answer)), rel=1e-5)
        ratio = math.exp(np.mean([np.mean(w) for w in wrong])) / math.exp(np.mean(paraphrase))
        assert found["truth_ratio"][sample_id] == pytest.approx(ratio, rel=1e-5)
        assert found["accuracy"][sample_id] == all(np.mean(paraphrase) > np.mean(w) for w in wrong)
        for percent in (5, 20, 60):
            lowest = sorted(answer)[: max(1, len(answer) * percent // 100)]
            assert values(run, name, f"min_{percent}")[sample_id] == pytest.approx(np.mean(lowest), rel=1e-5)
        generated = reference.answer(row["question"], row["answer"], run.config.evaluation.max_new_tokens)
        assert answered["generated"] == generated
        assert found["rouge_l"][sample_id] == pytest.approx(rouge_l_recall(generated, row["answer"]), rel=1e-5)
    return checked


def test_metrics_equal_a_straightforward_computation(finished, stories_dir, tofu_dir):
    assert check_against_reference(finished, stories_dir, tofu_dir / "forget01_perturbed.json", "forget", 8) >= 6


@pytest.mark.slow
def test_metrics_equal_a_straightforward_computation_on_a_real_model(settings, tofu_dir, tmp_path):
    folder = demo.unpacked(Path("~/.cache/mrd_ray").expanduser())
    small = {"sets": {"forget": settings["sets"]["forget"]}, "utility": [], "membership": None}
    run = evaluate(config(folder, settings | small, tmp_path))
    assert check_against_reference(run, folder, tofu_dir / "forget01_perturbed.json", "forget", 8) == 8


@pytest.mark.gpu
def test_a_gpu_evaluates_as_a_cpu(settings, stories_dir, tmp_path):
    runs = []
    for gpus in (0, 1):
        settings_of_run = config(stories_dir, settings, tmp_path / str(gpus))
        pool = RaySettings(actors=1, gpus_per_actor=gpus)
        runs.append(evaluate(settings_of_run.model_copy(update={"ray": pool})))
    for name, metric in (("forget", "probability"), ("forget", "truth_ratio"), ("story", "perplexity")):
        on_cpu, on_gpu = (values(run, name, metric) for run in runs)
        assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_figures_are_those_of_the_rows(finished):
    by = {(figure.set, figure.metric): figure for figure in finished.figures}
    ratios = values(finished, "facts", "truth_ratio").values()
    parts = [np.mean([max(0, 1 - r) for r in ratios])]
    parts += [np.mean(list(values(finished, "facts", m).values())) for m in ("normalized_probability", "rouge_l")]
    parts += [np.mean([max(0, 1 - r) for r in values(finished, "retain", "truth_ratio").values()])]
    parts += [np.mean(list(values(finished, "retain", m).values())) for m in ("probability", "rouge_l")]
    expected = 0 if min(parts) == 0 else 6 / sum(1 / part for part in parts)
    assert by[None, "model_utility"].value == pytest.approx(expected)
    rouge = list(values(finished, "forget", "rouge_l").values())
    assert by["forget", "rouge_l"].value == pytest.approx(np.mean(rouge))
    assert by["forget", "RR"].value == pytest.approx(1 - np.mean(rouge))
    assert (None, "min_20_auc") in by
    assert json.loads(finished.run.read("figures.json"))[0]["metric"] == finished.figures[0].metric


@torch.no_grad()
def test_perplexity_scores_each_token_once_in_overlapping_windows(finished, settings, stories_dir):
    reference = Reference(stories_dir)
    ids = torch.tensor(
        reference.tokenizer(Path(settings["sets"]["story"]["path"]).read_text(encoding="utf-8"))["input_ids"]
    )
    losses = []
    for t in range(1, len(ids)):  # windows of 96 begin at 0, 32, 64, ...; each token is of the first that holds it
        start = max(0, math.ceil((t + 1 - 96) / 32) * 32)
        start = min(start, max(0, len(ids) - 96)) if t >= 96 else 0
        stop = min(start + 96, len(ids))
        logits = reference.model(ids[None, start:stop]).logits[0, t - 1 - start].double()
        losses.append(-float(logits.log_softmax(-1)[ids[t]]))
    (figure,) = [figure for figure in finished.figures if figure.metric == "perplexity"]
    assert figure.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


@torch.no_grad()
def test_a_text_file_is_cut_into_the_windows_that_scoring_cuts(finished, settings, stories_dir):
    reference = Reference(stories_dir)
    ids = reference.tokenizer(
        Path(settings["sets"]["story"]["path"]).read_text(encoding="utf-8"), add_special_tokens=False
    )
    expected = []
    for start in range(0, 3 * 63, 63):  # a window begins with <s>
        window = torch.tensor([[reference.tokenizer.bos_token_id, *ids["input_ids"][start : start + 63]]])
        likeliest = reference.model(window).logits[0, :-1].argmax(-1)
        expected.append(float((likeliest == window[0, 1:]).double().mean()))
    assert sorted(values(finished, "windows", "memorization_accuracy").values()) == pytest.approx(sorted(expected))
    assert len(values(finished, "windows", "extraction_likelihood")) == 3


def test_multiple_choice_takes_the_likeliest_letter_and_is_given_by_subject(finished, stories_dir, choices_file):
    reference = Reference(stories_dir)
    right = []
    for line in choices_file.read_text().splitlines():
        row = json.loads(line)
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
        text = f"{row['question']}\n{listed}\nAnswer: "
        scores = []
        for letter in "ABCD":
            ids = torch.tensor(reference.tokenizer(text + letter)["input_ids"])
            with torch.no_grad():
                scores.append(float(reference.model(ids[None]).logits[0, -2].log_softmax(-1)[ids[-1]]))
        right.append(int(np.argmax(scores)) == row["answer"])
    by = {figure.metric: figure.value for figure in finished.figures if figure.set == "choices"}
    assert by["multiple_choice"] == pytest.approx(np.mean(right))
    assert by["multiple_choice: colours"] == pytest.approx(np.mean(right[::2]))
    assert by["multiple_choice: numbers"] == pytest.approx(np.mean(right[1::2]))


def test_two_actors_equal_one(finished, stories_dir, settings, tmp_path):
    run = evaluate(config(stories_dir, settings, tmp_path, actors=2))
    assert run.lines == finished.lines
    assert run.answers == finished.answers


def test_a_run_goes_on_from_its_finished_units(finished, stories_dir, settings, tmp_path):
    shutil.copytree(finished.run.uri, tmp_path, dirs_exist_ok=True)
    units = sorted((tmp_path / "units").glob("*.parquet"))
    lost, kept = units[::2], units[1::2]
    before = {unit.name: unit.stat().st_mtime_ns for unit in kept}
    for file in [*lost, tmp_path / "evaluation.parquet"]:
        file.unlink()
    run = evaluate(config(stories_dir, settings, tmp_path))
    assert run.lines == finished.lines
    assert {unit.name: unit.stat().st_mtime_ns for unit in kept} == before


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_the_same_command(finished, stories_dir, settings, tmp_path):
    def units():
        return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run" / "units").glob("*.parquet")}

    file = tmp_path / "evaluate.yaml"
    given = config(stories_dir, settings, tmp_path / "run").model_dump(mode="json")
    file.write_text(yaml.safe_dump(given, sort_keys=False))  # lines come in the order of the sets
    command = [sys.executable, "-m", "mrd_ray", "evaluate", "--config", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as driver:
        while not units():
            assert driver.poll() is None, driver.stdout.read().decode()
            time.sleep(0.02)
        driver.kill()
    before = units()
    assert len(before) < len(list(Path(finished.run.uri, "units").iterdir()))
    assert not (tmp_path / "run" / "evaluation.parquet").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert before.items() < units().items()
    assert pq.read_table(tmp_path / "run" / "evaluation.parquet") == finished.lines


@pytest.mark.slow
def test_batched_equals_one_by_one(finished, stories_dir, settings, tmp_path):
    alone = evaluate(config(stories_dir, settings, tmp_path, micro_batch_tokens=1, generation_batch=1))
    for column in ("set", "sample_id", "metric", "error"):
        assert alone.lines[column] == finished.lines[column]
    np.testing.assert_allclose(alone.lines["value"].to_numpy(), finished.lines["value"].to_numpy(), rtol=2e-5)
    assert alone.answers == finished.answers


def test_another_model_in_the_same_directory_is_refused(finished, tiny_model_dir, settings):
    with pytest.raises(UserError, match="holds a run of something else"):
        evaluate(config(tiny_model_dir, settings, finished.run.uri))


def test_a_model_that_ends_its_answers_elsewhere_is_another(finished, stories_dir, settings, tmp_path):
    shutil.copytree(stories_dir, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [2, 13]}')
    with pytest.raises(UserError, match=r"differs:\n  model.eos_token_id: 2 there, \[2, 13\] now\nUse"):
        evaluate(config(tmp_path / "model", settings, finished.run.uri))


def test_forget_quality_compares_with_a_reference_run(finished, stories_dir, settings, tmp_path):
    run = evaluate(config(stories_dir, settings, tmp_path, reference=finished.run.uri))
    assert {figure.metric: figure.value for figure in run.figures}["forget_quality"] == 1.0


@pytest.mark.parametrize(
    ("reference", "max_samples", "message"),
    [
        ("finished", 7, "was asked something else of 'forget'"),
        ("run", 8, "is run.dir"),
        ("mistyped", 8, "holds no finished evaluation"),
    ],
)
def test_a_reference_that_cannot_be_compared_is_refused(
    finished, stories_dir, settings, tmp_path, reference, max_samples, message
):
    uri = finished.run.uri if reference == "finished" else f"{tmp_path}/{reference}"
    of_sets = settings["sets"] | {"forget": settings["sets"]["forget"] | {"max_samples": max_samples}}
    with pytest.raises(UserError, match=message):
        evaluate(config(stories_dir, settings, tmp_path / "run", sets=of_sets, reference=uri))
    assert not (tmp_path / "mistyped").exists()


@pytest.mark.slow
def test_rows_shared_with_the_forget_set_are_counted_aloud(stories_dir, settings, tmp_path, capsys):
    forget = settings["sets"]["forget"]
    evaluate(config(stories_dir, {"sets": {"forget": forget, "retain": forget}, "forget": "forget",
                                  "max_new_tokens": 4}, tmp_path))  # fmt: skip
    assert "8 of 8 rows of the forget set are in retain too" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_evaluates_a_task_on_a_local_copy(stories_dir, tofu_dir, tmp_path, capsys):
    task = tmp_path / "mine.yaml"
    task.write_text(
        "copies: {locuslab/TOFU: '{name}.json'}\n"
        "evaluation:\n  max_new_tokens: 4\n  sets:\n    facts: {path: locuslab/TOFU, name: world_facts_perturbed, "
        "max_samples: 4, wrong: perturbed_answer, metrics: [normalized_probability, rouge_l, accuracy]}\n"
    )
    code = main(["evaluate", "--task", str(task), "--task_data", f"{{locuslab/TOFU: {tofu_dir}}}", "--ray.actors", "1",
                 "--model.path", str(stories_dir), "--run.dir", str(tmp_path / "run")])  # fmt: skip
    assert code == 0
    assert "answer probability among the choices" in capsys.readouterr().out
    lines = pq.read_table(tmp_path / "run" / "evaluation.parquet")
    assert len(lines) == 12


@pytest.mark.slow
def test_a_zero_shot_task_of_the_harness_runs_offline(settings, stories_dir, tmp_path):
    rows = [{"text": "Once upon a time there was a", "choices": ["little girl", "zqx vbw"], "right": i % 2}
            for i in range(6)]  # fmt: skip
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "openings.yaml").write_text(
        f"task: openings\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.json}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_target: right\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "doors.yaml").write_text("group: doors\ntask: [openings]\naggregate_metric_list: [{metric: acc}]\n")
    suite = {"zero_shot": ["doors"], "zero_shot_tasks": str(tmp_path)}
    small = {"sets": {"choices": settings["sets"]["choices"]}}
    run = evaluate(config(stories_dir, small | suite, tmp_path / "run"))
    by = {figure.set: (figure.metric, figure.value, figure.rows) for figure in run.figures if figure.set != "choices"}
    assert by == {"openings": ("acc", 0.5, 6), "doors": ("acc", 0.5, 6)}  # it always prefers the little girl
    assert evaluate(run.config).figures == run.figures
    with pytest.raises(UserError, match="knows no 'closings'"):
        evaluate(config(stories_dir, small | suite | {"zero_shot": ["closings"]}, tmp_path / "other"))
    (tmp_path / "doors.yaml").write_text("group: doors\ntask: [openings]\n")
    with pytest.raises(UserError, match=r"differs:\n  evaluation.zero_shot_tasks: "):
        evaluate(run.config)
