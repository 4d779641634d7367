"""`mrd-ray pipeline` and `mrd-ray demo`: the other commands in a row."""

from mrd_ray.cli import main
from mrd_ray.cli.console import console_of
from mrd_ray.cli.ending import DONE, SOME_WITHOUT_SCORE
from mrd_ray.config import DemoConfig, PipelineConfig


def pipeline(config: PipelineConfig) -> int:
    """Each stage, as its own command does it."""
    from mrd_ray.config.pipeline import Stages
    from mrd_ray.evaluation import summary
    from mrd_ray.evaluation.evaluate import evaluate
    from mrd_ray.runs.directory import RunDirectory

    RunDirectory(config.run.dir)  # the owner's alone: the report in it holds texts
    stages = Stages.of(config)
    console = console_of(config.output.quiet)
    code = main.score(stages.score)
    console.print()
    code = max(code, main.unlearn(stages.unlearn))
    runs = {when: evaluate(one) for when, one in stages.evaluations.items()}
    if runs:
        summary.show_beside(console, runs)
        code = max(code, *(SOME_WITHOUT_SCORE if run.num_errors else DONE for run in runs.values()))
    console.print()
    main.report(stages.report)
    return code


def demo(config: DemoConfig) -> int:
    """Score the bundled set, and unlearn it unless something else is scored."""
    from mrd_ray.demo import demo as bundled

    scoring = bundled.scoring(config)
    if not config.unlearn or (config.model, config.data) != (None, None):
        return main.score(scoring)
    return pipeline(bundled.pipeline(scoring))
