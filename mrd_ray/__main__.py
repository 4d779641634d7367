"""The `mrd-ray` command, also as `python -m mrd_ray`: --help at once, all else by `mrd_ray.cli`."""

import argparse
import sys
from collections.abc import Sequence

DESCRIPTION = "How hard is each sample to unlearn from a language model? (arXiv 2504.06658, on Ray)"
COMMANDS = {
    "score": "Score every sample of a forget set by how hard it is to unlearn (its MRD).",
    "plan": "Say what scoring would cost: from the architecture and the tokens alone, or after trying it for a moment.",
    "compare": "Say how far two runs agree on the same samples, whatever their estimator, sigma, K, precision "
    "or model.",
    "unlearn": "Unlearn a forget set with MRD weights: Ray Train over DeepSpeed ZeRO, rescoring as the model changes.",
    "evaluate": "Measure what a model still knows, of what it was to forget and of the rest.",
    "pipeline": "Score, unlearn, evaluate before and after, and report: what each command does, in folders of one run "
    "directory.",
    "status": "Say how far a run is, from its run directory alone: from any machine that can read it.",
    "tasks": "List the tasks, and say of each of their sets whether it can be read from here.",
    "report": "Make one self-contained HTML page of finished runs: scores, unlearning, evaluations, alone or compared.",
    "demo": "Score a bundled set of invented authors on a small real model that has memorised it, and unlearn it.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default this process's; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) not in (["--help"], ["-h"]):
        try:
            from mrd_ray import cli
        except ModuleNotFoundError as problem:
            from mrd_ray.missing import what_to_do

            print(f"error: {what_to_do(problem.name or 'that it needs')}", file=sys.stderr)
            return 1
        return cli.main(arguments)
    line = argparse.ArgumentParser(prog="mrd-ray", description=DESCRIPTION)
    commands = line.add_subparsers(metavar="command", title="commands, each with a --help of its own")
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what)
    line.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
