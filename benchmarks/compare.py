"""Checks whether a result file is worse than an older one."""

from rich.console import Console
from rich.table import Table

from benchmarks.figures import read


def main(old: str, new: str, tolerance: float = 0.1) -> int:
    """Compare two result files figure by figure, by ratio; exit code 1 if one is worse by more than the tolerance.

    Figures without a target are only shown. Figures with a unit only count on the same CPU; ratios count everywhere.

    Args:
        old: result file.
        new: result file of the same benchmark.
        tolerance: relative change that counts as noise.
    """
    before, were = read(old)
    after, are = read(new)
    if before["benchmark"] != after["benchmark"]:
        raise SystemExit(f"{old} is of {before['benchmark']}, {new} of {after['benchmark']}: nothing to compare")
    same = before["machine"]["cpu"] == after["machine"]["cpu"]
    table = Table("what", before["date"], after["date"], "new / old", title=f"{after['benchmark']}: {old}, {new}")
    worse = 0
    for what, was in were.items():
        if what not in are:
            table.add_row(what, was.cells()[1], "missing", "")
            worse += was.met is not None
            continue
        now = are[what]
        ratio = now.value / was.value if was.value else float("nan")
        lost = ratio < 1 - tolerance if was.at_least is not None else ratio > 1 + tolerance
        lost &= was.met is not None and (same or not was.unit)
        worse += lost
        table.add_row(what, was.cells()[1], now.cells()[1], f"{'[red]' if lost else ''}{ratio:.3f}")
    Console().print(table)
    return 1 if worse else 0
