"""`mrd-ray report`, start to end."""

import base64
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

from mrd_ray.config import ReportConfig
from mrd_ray.errors import UserError
from mrd_ray.report import evaluation, scores, tables, unlearning, words
from mrd_ray.report.facts import facts
from mrd_ray.report.read import Evaluation, Run, Scores, Unlearning, read
from mrd_ray.runs import storage
from mrd_ray.runs.directory import RunDirectory


def write_report(config: ReportConfig) -> str:
    """Write one HTML page about all runs. Returns its path.

    Raises:
        UserError: a directory with nothing to report, a damaged file, or a path that cannot be written to.
    """
    whole = page(read(config.runs), config.output.texts)
    content = whole.encode(errors="replace")  # a recorded command may have bytes that are not text
    if config.out is None:
        run = RunDirectory(config.runs[0])
        run.write("report.html", content, mode=0o600)
        return run.path("report.html")
    try:
        storage.write_private(config.out, content)
    except (ImportError, ValueError, OSError) as problem:
        raise UserError(f"out: cannot write {config.out}: {getattr(problem, 'strerror', None) or problem}") from None
    return config.out


def page(runs: list[Run], include_text: bool) -> str:
    """The page as HTML."""
    of_scores = [run for run in runs if isinstance(run, Scores)]
    texts = {str(run.about.manifest["identity"].get("samples")): run.texts for run in of_scores if include_text}
    here = Path(__file__).parent
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = words.number
    environment.tests["sample"] = lambda cell: isinstance(cell, tables.Text)
    return environment.get_template("page.html.jinja").render(
        title=" and ".join(run.about.name for run in runs),
        facts=[facts(run) for run in runs],
        scores=[scores.section(run, number, include_text) for number, run in enumerate(of_scores, 1)],
        agreement=scores.agreement(of_scores, include_text),
        unlearning=unlearning.sections([run for run in runs if isinstance(run, Unlearning)], texts),
        evaluation=evaluation.section([run for run in runs if isinstance(run, Evaluation)], include_text),
        include_text=include_text,
        style=Markup(style),  # our own files; the policy below allows no other style or script
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'",
    )


def _source(content: str) -> str:
    """The name of an inline style or script in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
