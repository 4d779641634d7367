"""`python -m benchmarks NAME`, also as a job's entry point: measure, print a table, write results/NAME.json."""

import importlib
import pkgutil
import sys
from pathlib import Path

from jsonargparse import auto_cli

_SHARED = {"__main__", "common", "figures"}
NAMES = sorted(
    module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name not in _SHARED
)


def main(arguments: list[str]) -> int:
    """Run one benchmark; `NAME --help` says what it measures."""
    if not arguments or arguments[0] not in NAMES:
        print(f"usage: python -m benchmarks NAME ...\n\nNAME is one of {', '.join(NAMES)}", file=sys.stderr)
        return 0 if arguments in (["--help"], ["-h"]) else 2
    module = importlib.import_module(f"benchmarks.{arguments[0]}")
    code = auto_cli(module.main, args=arguments[1:], as_positional=False, prog=f"python -m benchmarks {arguments[0]}")
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
