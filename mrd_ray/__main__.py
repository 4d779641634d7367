"""The `mrd-ray` command, also as `python -m mrd_ray`: prints --help quickly, leaves the rest to `mrd_ray.cli.main`."""

import argparse
import sys
from collections.abc import Sequence

from mrd_ray.cli.commands import COMMANDS, DESCRIPTION


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) not in (["--help"], ["-h"]):
        try:
            from mrd_ray.cli.main import main as run
        except ModuleNotFoundError as problem:
            from mrd_ray.cli.missing import what_to_do

            print(f"error: {what_to_do(problem.name or 'that it needs')}", file=sys.stderr)
            return 1
        return run(arguments)
    line = argparse.ArgumentParser(prog="mrd-ray", description=DESCRIPTION)
    commands = line.add_subparsers(metavar="command", title="commands, each with a --help of its own")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help)
    line.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
