"""The log of a run: lines of earlier versions are read as those of this one."""

import json
import math

import pytest

from mrd_ray.runs.directory import RunDirectory
from mrd_ray.unlearning import log
from mrd_ray.unlearning.state import State

STEP = {"step": 1, "of": 2, "event": "step", "forget_loss": 1.0, "retain_loss": 0.7}
EVALUATION = {"step": 1, "of": 2, "event": "evaluation", "forget_log_prob": -3.0}


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ({"retain_loss": 0.5}, {"retain_perplexity": math.exp(0.5)}),
        ({"retain_loss": None}, {"retain_perplexity": None}),
        ({"retain_loss": 1e4}, {"retain_perplexity": math.exp(230.0)}),  # a number that can be written and read again
        ({"retain_perplexity": 2.0}, {"retain_perplexity": 2.0}),
    ],
)
def test_the_retain_loss_of_earlier_evaluations_becomes_a_perplexity(tmp_path, earlier, now):
    lines = [STEP, EVALUATION | earlier]
    (tmp_path / log.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = {"step": 1, "scored_at": -1, "log": lines, "initial": None, "latest": None}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert State.load(tmp_path).log == [STEP, EVALUATION | now]
    assert log.read(RunDirectory(str(tmp_path))) == [STEP, EVALUATION | now]
