"""The pages of docs/reference, from the code: `make reference`, or PYTHONPATH=. python docs/generate.py.

tests/test_docs.py checks that the pages are those that this makes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
from pydantic.fields import FieldInfo

from mrd_ray import config
from mrd_ray.cli import ending
from mrd_ray.cli.commands import COMMANDS
from mrd_ray.config import Metric
from mrd_ray.config.renamed import OLD_NAMES
from mrd_ray.config.words import default_of, is_section, kind_of
from mrd_ray.data import samples
from mrd_ray.evaluation import evaluate
from mrd_ray.evaluation import table as evaluation_table
from mrd_ray.runs import directory
from mrd_ray.scoring import result, score
from mrd_ray.scoring import table as scores_table
from mrd_ray.unlearning import log, unlearn

FOLDER = Path(__file__).with_name("reference")
NOTE = "<!-- Made by docs/generate.py from the code. Change the code, then run `make reference`. -->\n"

EXIT_CODES = {
    ending.DONE: "done",
    ending.FAILED: "failed, with a sentence that says why",
    ending.REFUSED: "settings that are wrong or contradict one another",
    ending.SOME_WITHOUT_SCORE: "done, with samples (or rows) that have an error instead of a result; for `plan`: that "
    "would have one",
    ending.STOPPED_EARLY: "unlearning kept an earlier state, because the model fell below the utility floor or a "
    "loss was not finite",
    ending.INTERRUPTED: "interrupted by ctrl-C, `ray job stop` or SIGTERM; what is finished is kept",
}

METRICS: dict[str, str] = {
    "probability": "exp of the mean log p of the answer's tokens. TOFU's masks, here and in the two metrics below, "
    "also count the EOS after the answer and, for some models, `Answer: `.",
    "normalized_probability": "the probability of the answer, divided by the sum of that probability and those of the "
    "wrong answers (TOFU's real authors and world facts)",
    "truth_ratio": "geometric mean of the wrong answers' probabilities, divided by the paraphrased answer's "
    "probability, as in TOFU's released code",
    "accuracy": "1 if the paraphrased answer has a higher mean log p than every wrong one; UA is 1 minus its mean",
    "embedding_accuracy": "whether the model's own answer is more like the truth than like every wrong answer; needs "
    "`evaluation.embedding_model`",
    "rouge_l": "ROUGE-L recall of the greedy answer (`rouge-score`, stemmed); RR is 1 minus its mean",
    "memorization_accuracy": "MA: share of tokens that are the model's likeliest",
    "extraction_likelihood": "EL_n: share of n-grams that the model reproduces when it is given the beginning",
    "min_k": "Min-k% Prob: mean log p of the k% least likely tokens, for each k of `evaluation.min_k_percent`",
    "perplexity": "of texts, in overlapping windows, each token scored once",
    "multiple_choice": "1 if the right choice's letter is the likeliest (WMDP, MMLU; "
    "[shapes](../your-data.md#multiple-choice)); also by `subject`",
    "toxicity": "score of a text classifier that you name in `evaluation.toxicity_model`",
}

FILES: dict[str, dict[str, str]] = {
    "Every run of `score`, `unlearn` and `evaluate`": {
        "config.yaml": "all settings; replays the run",
        "manifest.json": "identity, digests, versions, hardware, commands",
        directory.PROGRESS: "how far the run is, with a sign of life every 10 seconds; `mrd-ray status` reads it",
        directory.EVENTS: "units with their workers and seconds, restarts, nodes that joined or were lost, stalls",
        directory.TRACEBACK: "the whole traceback, if the run failed",
    },
    "score": {
        "scores.parquet": "one row per sample, sorted by `sample_id`; see [columns](columns.md)",
        "samples.parquet": "ids, text and tokens",
        "summary.png": "the scores at a glance",
        "units": "finished work, one Parquet file per unit",
    },
    "unlearn": {
        "model": "the result: a Hugging Face directory, or an adapter with `lora.rank`",
        "metrics.jsonl": "every step, refresh and evaluation, one JSON object per line",
        "scores": "`step-*.parquet`, one per refresh, with the columns of `scores.parquet`",
        "checkpoints": "what a run resumes from; every checkpoint holds a Hugging Face `model/` of its own",
        "refreshes": "score runs, one per refresh, with `unlearning.refresh actors`",
        "start.json": "node, process and time of the latest start",
        "tensorboard": "the log for TensorBoard, with `tracking.tensorboard`",
        "evaluations": "`step-*.parquet`, with `evaluation_every`; with the columns of `evaluation.parquet`",
    },
    "evaluate": {
        "evaluation.parquet": "one row per sample and metric; see [columns](columns.md)",
        "answers.parquet": "what the model answered",
        "figures.parquet": "what the summary on the terminal shows",
        "figures.json": "the same as JSON",
        "units": "finished work, one Parquet file per unit",
    },
    "report": {"report.html": "one self-contained page, in the first run directory unless `--out` names another place"},
}
LOG: dict[str, dict[str, str]] = {
    "step": {
        "forget_loss": "mean over the forget samples; for `ga` and `graddiff` their mean log p, nats per token",
        "retain_loss": "mean over the retain samples, nats per token; null if the step uses none",
        "grad_norm": "norm of the gradient before clipping; null if DeepSpeed does not tell it",
        "tokens": "tokens of the step",
        "seconds": "of the step",
    },
    "refresh": {
        "mrd_median": "median MRD of the forget set; null if no sample has a score",
        "doubts": "number of scores in doubt",
        "seconds": "of the refresh",
    },
    "evaluation": {
        "forget_log_prob": "nats per sample: mean of log p summed over the scored tokens",
        "forget_memorization_accuracy": "MA, mean over the forget set",
        "forget_extraction_likelihood": "EL_n, mean over the forget set; null if it is not measured",
        "retain_perplexity": "of the tokens of the watched retain samples; null without a retain set",
        "seconds": "of the evaluation",
    },
    "stop": {"reason": "why the run stopped"},
}
_LINES = {"step": log.StepLine, "refresh": log.RefreshLine, "evaluation": log.EvaluationLine, "stop": log.StopLine}
_OWNED = {"score": score._OWNS, "unlearn": unlearn._OWNS, "evaluate": evaluate._OWNS}


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    escaped = text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").replace("](", "]\\(")
    return escaped if "`" in text else escaped.replace("*", "\\*")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    default = default_of(field).replace("|", "\\|")
    is_word = field.is_required() or field.default is None or field.default in ((), {})
    return default if is_word else f"`{default}`"


def _is_section(field: FieldInfo) -> bool:
    return is_section(field.annotation)


def _sections(model: Any) -> str:
    return ", ".join(f"`{name}`" for name, field in model.model_fields.items() if _is_section(field)) or "none"


def _settings_of(model: Any) -> str:
    rows = [
        [f"`{name}`", _cell(kind_of(field)), _default(field), _cell(field.description or "")]
        for name, field in model.model_fields.items()
        if not _is_section(field)
    ]
    return _table(["setting", "type", "default", "what it does"], rows)


def settings() -> str:
    """Every setting: of commands by themselves, and of sections, which several commands may share."""
    classes = {name: getattr(config, command.config) for name, command in COMMANDS.items()}
    used: dict[tuple[str, Any], list[str]] = {}
    for command, settings_class in classes.items():
        for name, field in settings_class.model_fields.items():
            if _is_section(field):
                used.setdefault((name, field.annotation), []).append(command)
    parts = [
        "# Settings\n",
        "A setting is a flag (`--scoring.sigma 1e-5`) or a key in YAML (`scoring: {sigma: 1e-5}`, with `--config`).",
        "Flags go over YAML, YAML over the defaults of `--task`. `--print_config` shows the result.",
        "`mrd-ray COMMAND --help` prints the settings that most people need, `--help=all` all of them.\n",
        "## Commands\n",
        _table(
            ["command", "what it does", "sections"],
            [[f"`{name}`", _cell(one.help), _sections(classes[name])] for name, one in COMMANDS.items()],
        ),
    ]
    for command, settings_class in classes.items():
        if any(not _is_section(field) for field in settings_class.model_fields.values()):
            parts += [f"### Settings of `{command}` outside sections\n", _settings_of(settings_class)]
    for (section, settings_class), commands in used.items():
        same = [one for (name, one) in used if name == section]
        of = ", ".join(f"`{command}`" for command in commands)
        title = f"## `{section}`" if len(same) == 1 else f"## `{section}` of {of}"
        summary = " ".join((settings_class.__doc__ or "").split())
        parts += [f"{title}\n", f"{_cell(summary)} Taken by {of}.\n", _settings_of(settings_class)]
    parts += ["## A set of `evaluation.sets`\n", _settings_of(config.EvaluatedSet)]
    renamed = [[f"`{old}`", f"`{new}`"] for old, new in OLD_NAMES.items()]
    parts += ["## Old names\n", "These work in this release. A line on the terminal tells the new name.\n"]
    parts += [_table(["old name", "new name"], renamed)]
    return "\n".join(parts)


def exit_codes() -> str:
    """What the command ends with."""
    rows = [[str(code), _cell(words)] for code, words in sorted(EXIT_CODES.items())]
    more = "`ray job submit` itself exits with 1; the job's exit code is in its last lines.\n"
    return "\n".join(["# Exit codes\n", _table(["exit code", "meaning"], rows), more])


def _type(kind: pa.DataType) -> str:
    return str(kind).replace("large_", "").replace("item: ", "")


def _columns_of(schema: pa.Schema) -> str:
    def unit(field: pa.Field) -> str:
        return _cell((field.metadata or {}).get(b"unit", b"").decode())

    rows = [[f"`{one.name}`", _cell(_type(one.type)), "yes" if one.nullable else "no", unit(one)] for one in schema]
    return _table(["column", "type", "null?", "unit, meaning"], rows)


def columns() -> str:
    """Columns of every table that a user may read."""
    tables = {
        "scores.parquet": scores_table.SCHEMA,
        "scores.parquet: columns of `scoring.measures`": pa.schema([*scores_table.MEASURES.values()]),
        "samples.parquet": samples.SCHEMA,
        "evaluation.parquet": evaluation_table.SCHEMA,
        "answers.parquet": evaluate.ANSWERS,
        "figures.parquet": evaluation_table.FIGURES,
        "units/*.parquet of score": result.RESULT_SCHEMA,
    }
    head = "# Columns\n\nThe schemas of `scores.parquet` and `evaluation.parquet` hold these units as metadata too.\n"
    return "\n".join([head, *(f"## {name}\n\n{_columns_of(schema)}" for name, schema in tables.items())])


def files() -> str:
    """What is in a run directory."""
    for command, owned in _OWNED.items():
        if missing := set(owned) - FILES[command].keys():
            raise ValueError(f"docs/generate.py: FILES[{command!r}] does not describe {sorted(missing)}")
    parts = ["# Files of a run directory\n"]
    for command, described in FILES.items():
        title = command if command not in COMMANDS else f"`{command}`"
        rows = [[f"`{name}`", what] for name, what in described.items()]
        parts += [f"## {title}\n", _table(["file", "what it holds"], rows)]
    parts.append("## The log of `unlearn`\n")
    parts.append("Every line of `metrics.jsonl` has `event`, `step` and `of`, the last step, and:\n")
    rows = []
    for event, line in _LINES.items():
        _complete(LOG[event], tuple(line.__annotations__.keys() - {"step", "of", "event"}), f"LOG[{event!r}]")
        rows += [[f"`{event}`", f"`{name}`", _cell(what)] for name, what in LOG[event].items()]
    parts.append(_table(["event", "field", "what it is"], rows))
    parts.append("`pipeline` makes a run directory for each stage: `score`, `unlearn`, `evaluate-before` and")
    parts.append("`evaluate-after`, and `report.html` beside them.\n")
    return "\n".join(parts)


def _complete(described: Mapping[str, str], names: tuple[str, ...], where: str) -> None:
    if described.keys() != set(names):
        raise ValueError(f"docs/generate.py: {where} differs from the code in {sorted(described.keys() ^ set(names))}")


def metrics() -> str:
    """What `evaluate` can measure."""
    _complete(METRICS, get_args(Metric), "METRICS")
    rows = [[f"`{name}`", METRICS[name]] for name in get_args(Metric)]
    head = "# Metrics\n\nValues of one row. The [guide](../guides/evaluation.md) has those of the model as a whole.\n"
    return "\n".join([head, _table(["metric", "what it is, per row"], rows)])


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings,
    "exit-codes.md": exit_codes,
    "columns.md": columns,
    "files.md": files,
    "metrics.md": metrics,
}


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        (FOLDER / name).write_text(NOTE + make(), encoding="utf-8")


if __name__ == "__main__":
    main()
