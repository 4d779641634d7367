"""Measures all architectures and writes docs/models.md: `make models`, or PYTHONPATH=. python tests/mrd/zoo_page.py."""

import collections
import sys
import warnings
from pathlib import Path

import transformers
from zoo_measure import CRASHED, REFUSED, RIGHT, WRONG, Row, measure
from zoo_shrink import NAMES, NOT_BUILT

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_HEAD = ["model type", "class", "measured in", "causal", "Monte Carlo", "closed form", "control variate", "chooses"]
_LONGEST = 240  # characters of a reason
_TEXT = """# Models

Every architecture for which transformers {version} has a causal language model: {names} model types, of which {built}
were built small, with random weights, and scored; the others are at the end. `make models` repeats the measurement and
writes this page, in a few minutes; a test (`pytest -m slow tests/mrd/test_zoo.py`) checks that the table is still true.

**How to read it.** *right* means that four short samples of different lengths, scored together, get the same values as
from a few lines of plain code for each sample separately: each draw's Delta for Monte Carlo, the norm of autograd's
gradient for the closed form, and the gradient's product with the draw for the control variate. *refused* means that
mrd_ray stops with a message instead of a number; the messages are below the table, one for each model type. "N of M
parameters by autograd" need `--scoring.allow_slow_parameters true`, since no rule covers them.

*causal: if is_decoder* means that the model is refused unless its config.json has `is_decoder: true`. *chooses: yes*
means that the model chooses experts, or positions to attend to, by size. Noise can change the choice, but no gradient
shows this, so the closed form may differ from Monte Carlo. A right number here means that mrd_ray handles the
architecture, in float64 (in float32 if it has no other). It does not mean that sigma suits a trained model; Monte Carlo
tries that out before it scores.

{counts}

| {head} |
| {rule} |
{rows}

## What the refusals say

{reasons}

## Not built

{not_built}
"""


def page(rows: list[Row]) -> str:
    """The text of the page."""
    return _TEXT.format(
        version=transformers.__version__,
        names=len(NAMES),
        built=len(rows),
        counts=_counts(rows),
        head=" | ".join(_HEAD),
        rule=" | ".join(["---"] * len(_HEAD)),
        rows="\n".join(f"| {' | '.join([f'`{row.model_type}`', *row.cells[1:]])} |" for row in rows),
        reasons="\n".join(f"- `{row.model_type}`: {_short(row.reason)}" for row in rows if row.reason),
        not_built="\n".join(f"- `{name}`: {NOT_BUILT[name]}" for name in NAMES if name in NOT_BUILT),
    )


def _counts(rows: list[Row]) -> str:
    """A small table of the verdicts in each column."""
    kinds = [RIGHT, REFUSED, WRONG, CRASHED]
    lines = [f"| | {' | '.join(kinds)} |", f"|{' --- |' * (len(kinds) + 1)}"]
    for title, name in zip(_HEAD[4:7], ("monte_carlo", "closed_form", "control_variate"), strict=True):
        verdicts = collections.Counter(getattr(row, name).partition(",")[0] for row in rows)
        lines.append(f"| {title} | {' | '.join(str(verdicts[kind]) for kind in kinds)} |")
    return "\n".join(lines)


def _short(reason: str) -> str:
    reason = " ".join(reason.split())
    return reason if len(reason) <= _LONGEST else reason[:_LONGEST].rpartition(" ")[0] + " ..."


def listed() -> dict[str, list[str]]:
    """The cells of each row of the page, by model type; no cells for types that were not built."""
    table, _, not_built = PAGE.read_text(encoding="utf-8").partition("## What the refusals say")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    built = {cells[0].strip("`"): [cells[0].strip("`"), *cells[1:]] for cells in rows}
    lines = not_built.partition("## Not built")[2].splitlines()
    return built | {line.split("`")[1]: [] for line in lines if line.startswith("- `")}


def version() -> str:
    """The version of transformers that the page is about."""
    return PAGE.read_text(encoding="utf-8").partition("transformers ")[2].split()[0]


def main() -> None:
    """Measure everything, and write the page."""
    warnings.filterwarnings("ignore")
    rows = []
    for name in NAMES:
        if name not in NOT_BUILT:
            rows.append(measure(name))
            print(" | ".join(rows[-1].cells), file=sys.stderr)
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
