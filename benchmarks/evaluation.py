"""Compares evaluation's cost with a plain batched transformers loop over the same rows: likelihoods and answers.

Only ratios within one run are meaningful, on a machine that does nothing else at the time. For CPUs, on Linux.
"""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common import stopwatch
from benchmarks.figures import Figure, Results, ratios
from mrd_ray import ModelSettings
from mrd_ray.config import EvaluationSettings
from mrd_ray.data.tokens import Limits
from mrd_ray.evaluation import sets
from mrd_ray.evaluation.measure import Measurer, Record
from mrd_ray.models import load

OURS, PLAIN = "mrd_ray", "plain loop"


def main(
    model: str,
    data: str,
    out: str = "benchmarks/results",
    max_samples: int = 24,
    max_new_tokens: int = 32,
    repeats: int = 3,
    threads: int = 1,
) -> None:
    """Benchmark one evaluation actor's work here.

    Args:
        model: directory or hub id; the demo keeps one under ~/.cache/mrd_ray.
        data: questions with wrong answers, for example TOFU's ../shared/data/tofu/forget10_perturbed.json.
        out: folder of the JSON file.
        max_samples: rows of the set.
        max_new_tokens: tokens of an answer.
        repeats: passes over the rows for each of the two ways, which take turns.
        threads: number of torch threads.
    """
    results = Results("evaluation", locals(), out)
    torch.set_num_threads(threads)
    questions = {"path": data, "prompt": "question", "response": "answer", "wrong": "perturbed_answer",
                 "max_samples": max_samples}  # fmt: skip
    figures = []
    of_path = ModelSettings(path=model)
    loaded = load.load_model(of_path, torch.device("cpu"))
    tokenizer = load.load_tokenizer(of_path)
    for part, metric in {"likelihoods": "truth_ratio", "answers": "rouge_l"}.items():
        own = questions | {"metrics": [metric]} | ({} if metric == "truth_ratio" else {"wrong": None})
        evaluation = EvaluationSettings.model_validate({"sets": {part: own}, "max_new_tokens": max_new_tokens})
        table = sets.build(part, evaluation.sets[part], evaluation, tokenizer, Limits.of(loaded))
        units = [rows for _, rows in sets.units(part, table)]
        measurer = Measurer(loaded, tokenizer, evaluation)
        if part == "answers":  # the other part measures their likelihood
            units = [[row | {"sequences": []} for row in rows] for rows in units]
        seconds: dict[str, list[float]] = {OURS: [], PLAIN: []}
        for repeat in range(repeats + 1):  # the first one warms up
            lap = stopwatch()
            records = [record for rows in units for record in measurer(rows)]
            ours = lap()
            expected = [value for rows in units for value in plain(loaded, tokenizer, rows, evaluation)]
            theirs = lap()
            check(records, expected)
            if repeat:
                seconds[OURS].append(ours)
                seconds[PLAIN].append(theirs)
        results.keep(part, seconds)
        figures += [Figure.of(f"{part}, {way}", laps, "s", f"{max_samples} rows") for way, laps in seconds.items()]
        ratio = ratios(seconds[OURS], seconds[PLAIN])
        figures.append(Figure.of(f"{part}, ours / plain, time", ratio, at_most=1.05))
    results.show(figures)


@torch.no_grad()
def plain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[sets.EvaluatedRow],
    evaluation: EvaluationSettings,
) -> list[Any]:
    """The usual code: sort by length, pad, forward with an attention mask, log_softmax; generate.

    Returns the sum of log p of each sequence's scored tokens, in the rows' order, then the answers' texts.
    """
    sequences = [(i, sequence) for i, row in enumerate(rows) for sequence in row["sequences"]]
    order = sorted(range(len(sequences)), key=lambda at: len(sequences[at][1]["token_ids"]))
    sums = [0.0] * len(sequences)
    while order:
        batch: list[int] = []
        while order and (len(batch) + 1) * len(sequences[order[0]][1]["token_ids"]) <= max(
            evaluation.micro_batch_tokens, len(sequences[order[0]][1]["token_ids"])
        ):
            batch.append(order.pop(0))
        width = len(sequences[batch[-1]][1]["token_ids"])
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, at in enumerate(batch):
            length = len(sequences[at][1]["token_ids"])
            ids[row, :length] = torch.tensor(sequences[at][1]["token_ids"])
            scored[row, :length] = torch.tensor(sequences[at][1]["scored"])
            mask[row, :length] = 1
        log_probs = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        of_targets = log_probs.gather(-1, ids[:, 1:, None])[..., 0] * scored[:, 1:]
        for row, at in enumerate(batch):
            sums[at] = float(of_targets[row].sum())
    answers: dict[int, str] = {}
    prompts = {i: row["prompt_ids"] for i, row in enumerate(rows) if row["prompt_ids"]}
    asked = sorted(prompts, key=lambda i: len(prompts[i]))
    for start in range(0, len(asked), evaluation.generation_batch):
        members = asked[start : start + evaluation.generation_batch]
        width = max(len(prompts[i]) for i in members)
        ids = torch.zeros(len(members), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(members):
            prompt = prompts[i]
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        generator: Any = model
        output = generator.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=evaluation.max_new_tokens, pad_token_id=0
        )
        for row, i in enumerate(members):
            answers[i] = str(tokenizer.decode(output[row, width:], skip_special_tokens=True)).strip()
    return [*sums, *(answers[i] for i in sorted(answers))]


def check(records: list[Record], expected: list[Any]) -> None:
    """Check that both ways did the same work."""
    if records[0]["generated"] is not None:
        same = sum(record["generated"] == answer for record, answer in zip(records, expected, strict=True))
        assert same >= 0.9 * len(records), f"{same} of {len(records)} answers are the same"
        return
    sums = [sum(log_probs) for record in records for log_probs in record["log_probs"]]
    assert all(abs(a - b) <= 1e-3 * max(1.0, abs(b)) for a, b in zip(sums, expected, strict=True))
