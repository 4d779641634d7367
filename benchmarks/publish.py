"""The results that are there, as a section of README.md."""

from pathlib import Path

from benchmarks.__main__ import NAMES
from benchmarks.figures import Figure, read

_HEAD = "| what | value | target | detail |\n| --- | --- | --- | --- |\n"
README, BEGIN, END = Path(__file__).with_name("README.md"), "<!-- results -->\n", "<!-- end of results -->\n"


def main(results: str = "benchmarks/results") -> None:
    """Write the tables of all result files into benchmarks/README.md.

    Args:
        results: folder of the JSON files.
    """
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + section(Path(results)) + END + after, encoding="utf-8")


def section(results: Path) -> str:
    """A table for each result file of this suite, in Markdown, with its plot where there is one."""
    parts = []
    for file in sorted(file for name in NAMES if (file := results / f"{name}.json").is_file()):
        content, figures = read(str(file))
        if not figures:  # a run that did not end
            continue
        machine = content["machine"]
        settings = ", ".join(f"{name} {value}" for name, value in content["settings"].items() if name != "out")
        parts.append(
            f"\n### {content['benchmark']}\n\n{content['date']}, {machine['cpu']}, {machine['usable cores']} cores, "
            f"torch {machine['versions']['torch']}; {settings}\n\n{_HEAD}"
        )
        parts += map(_row, figures.values())
        if file.with_suffix(".png").is_file():
            parts.append(f"\n![{content['benchmark']}]({results.name}/{file.stem}.png)\n")
    return "".join(parts) + "\n"


def _row(figure: Figure) -> str:
    cells = (cell.replace("|", "\\|") for cell in figure.cells())
    missed = " **missed**" if figure.met is False else ""
    what, value, target, detail = cells
    return f"| {what} | {value} | {target}{missed} | {detail} |\n"
