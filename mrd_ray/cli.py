"""The `mrd-ray` command: parse, call one function, print where the results went."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mrd_ray.config import CompareConfig, DemoConfig, PlanConfig, ScoreConfig, UnlearnConfig
from mrd_ray.errors import UserError

# exit codes; argparse itself ends with 2 on a bad command line
_DONE, _FAILED, _SOME_WITHOUT_SCORE, _STOPPED_EARLY, _INTERRUPTED = 0, 1, 3, 4, 130


def parser() -> ArgumentParser:
    """The command line, made from the config classes."""
    top = ArgumentParser(
        prog="mrd-ray",
        description="How hard is each sample to unlearn from a language model? (arXiv 2504.06658, on Ray)",
        allow_abbrev=False,
    )
    commands = top.add_subcommands(required=True, dest="command")
    config: Any  # a class of config.py
    for name, config in _COMMANDS.items():
        command = ArgumentParser(description=config.__doc__, allow_abbrev=False)
        command.add_argument("--config", action="config", help="YAML file of these settings; flags go over it.")
        positional = {"run_a", "run_b"} if config is CompareConfig else set()
        for field in sorted(positional):
            command.add_argument(field, type=str, help=config.model_fields[field].description)
        command.add_class_arguments(config, as_group=False, skip=positional)
        commands.add_subcommand(name, command, help=(config.__doc__ or "").strip().splitlines()[0])
    return top


_COMMANDS = {
    "score": ScoreConfig,
    "plan": PlanConfig,
    "compare": CompareConfig,
    "unlearn": UnlearnConfig,
    "demo": DemoConfig,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code says whether every sample has a score (0) or not (3)."""
    line = parser()
    parsed = line.parse_args(arguments)
    try:
        values = line.instantiate(parsed)[parsed.command]
        config = _COMMANDS[parsed.command](
            **{key: value for key, value in values.items() if key not in ("config", "__path__")}
        )
    except ValidationError as problem:  # settings that are each in range but contradict one another
        line.error("; ".join(_named(problem.title, error) for error in problem.errors()))
    try:
        match config:
            case ScoreConfig():
                return _score(config)
            case PlanConfig():
                return _plan(config)
            case CompareConfig():
                return _compare(config)
            case UnlearnConfig():
                return _unlearn(config)
            case DemoConfig():
                return _demo(config)
    except UserError as problem:
        Console(stderr=True).print(f"error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
        return _FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return _INTERRUPTED
    return _FAILED


def _named(model: str, error: Any) -> str:
    """A message of pydantic's that names the setting: ours do by themselves."""
    message = str(error["msg"])
    if message.startswith("Value error, "):
        return message.removeprefix("Value error, ")
    group = model.removesuffix("Config").lower()
    return ".".join([group, *map(str, error["loc"])]) + f": {message}, not {error['input']!r}"


def _score(config: ScoreConfig) -> int:
    from mrd_ray.scoring import summary
    from mrd_ray.scoring.score import score

    started = time.monotonic()
    finished = score(config)
    console = Console() if sys.stdout.isatty() else Console(width=120)  # a job's log has no width of its own
    summary.show(console, finished.scores, finished.samples, config)
    console.print(f"\nScores:  {finished.run.path('scores.parquet')}", soft_wrap=True)
    console.print(f"Summary: {finished.run.path('summary.png')}", soft_wrap=True)
    console.print(f"Took {time.monotonic() - started:.0f} s")
    return _SOME_WITHOUT_SCORE if finished.num_errors else _DONE


def _unlearn(config: UnlearnConfig) -> int:
    from mrd_ray.unlearning import summary
    from mrd_ray.unlearning.unlearn import unlearn

    started = time.monotonic()
    finished = unlearn(config)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    summary.show(console, finished)
    console.print(f"\nModel:   {finished.run.path('model')}", soft_wrap=True)
    console.print(f"Log:     {finished.run.path('metrics.jsonl')}", soft_wrap=True)
    console.print(f"Took {time.monotonic() - started:.0f} s")
    return _STOPPED_EARLY if finished.failed else _DONE


def _demo(config: DemoConfig) -> int:
    from mrd_ray.demo import demo

    scoring = demo.scoring(config)
    code = _score(scoring)
    if not config.unlearn or (config.model, config.data) != (None, None):
        return code
    print()
    unlearning = demo.unlearning(scoring)
    code = _unlearn(unlearning)
    demo.show_answers(Console(width=None if sys.stdout.isatty() else 120), unlearning)
    return code


def _compare(config: CompareConfig) -> int:
    from mrd_ray.scoring import compare
    from mrd_ray.scoring.summary import short

    found = compare.compare(config)
    try:
        Path(config.out).write_bytes(compare.figure(found, config))
    except OSError as problem:
        raise UserError(f"out: cannot write {config.out}: {problem.strerror}") from None
    console = Console() if sys.stdout.isatty() else Console(width=120)
    table = Table(show_header=False)
    table.add_row("a", f"{config.run_a}: {found.settings[0]}")
    table.add_row("b", f"{config.run_b}: {found.settings[1]}")
    table.add_row("samples compared", f"{found.compared:,} (a alone scores {found.only_a:,}, b alone {found.only_b:,})")
    table.add_row("Spearman correlation", f"{found.spearman:.4f}")
    table.add_row("Kendall correlation", f"{found.kendall:.4f}")
    table.add_row("median of b / a", f"{found.median_ratio:.4g}")
    apart = "no standard errors to go by" if found.apart is None else f"{found.apart:.1%}"
    table.add_row("over 3 standard errors apart", apart)
    console.print(table)
    worst = Table("a", "b", "apart", "sample", "text", title="Those that disagree most", title_justify="left")
    for row in found.rows[:10]:
        apart = f"{row['b'] / row['a'] - 1:+.1%}" if found.apart is None else f"{row['z']:+.1f} s.e."
        text = short(row["text"] or "", 200)
        worst.add_row(f"{row['a']:.3g}", f"{row['b']:.3g}", apart, escape(row["sample_id"]), escape(text))
    console.print(worst)
    console.print(f"Scatter plot: {config.out}", soft_wrap=True)
    return _DONE


def _plan(config: PlanConfig) -> int:
    from mrd_ray.scoring.estimate import plan

    found = plan(config)
    table = Table(show_header=False)
    table.add_row("samples", f"{found.samples:,} ({found.unscorable:,} cannot be scored)")
    table.add_row("tokens, padding included", f"{found.padded_tokens:,} in {found.micro_batches:,} micro-batches")
    table.add_row("work units", f"{found.units:,} for {found.actors:,} actor(s)")
    table.add_row("model", f"{found.parameters / 1e6:,.1f} M parameters")
    table.add_row("memory for weights", f"{found.weight_bytes_per_actor / 2**30:,.2f} GiB per actor")
    table.add_row("forwards", f"{found.forward_flops:.3g} FLOPs")
    table.add_row("perturbations", f"{found.perturbation_bytes:.3g} bytes read and written")
    table.add_row("rate", f"{found.tflops_per_actor:.3g} TFLOP/s per actor ({found.tflops_source})")
    table.add_row("duration", _duration(found.seconds))
    Console().print(table)
    return _DONE


def _duration(seconds: float) -> str:
    if seconds >= 7200:
        return f"about {seconds / 3600:,.1f} h"
    return f"about {seconds / 60:.0f} min" if seconds >= 120 else f"about {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
