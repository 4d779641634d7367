"""How long one waits for --help, for an error in the settings, and for the first score."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, Results

_IMPORTS = "import time, torch\nfrom transformers import AutoModelForCausalLM, PreTrainedModel\nprint(time.time())"
_EMPTY_POOL = """
import time, ray
ray.init(include_dashboard=False, log_to_driver=False)
import ray.data, pyarrow
class Nothing:
    def __call__(self, rows):
        return rows
rows = ray.data.from_arrow(pyarrow.table({"a": [1]}))
for row in rows.map_batches(Nothing, compute=ray.data.ActorPoolStrategy(size=1)).iter_batches():
    print(time.time())
"""


def main(model: str, data: str, out: str = "benchmarks/results", repeats: int = 5) -> None:
    """Benchmark start-up, each time in a fresh process.

    Args:
        model: directory of a small model.
        data: forget set; one of its samples is scored.
        out: folder of the JSON file.
        repeats: of the first two; slower parts are timed twice.
    """
    results = Results("startup", locals(), out)
    _ended("--help")  # fills the file cache
    helps = [_ended("--help") for _ in range(repeats)]
    results.keep("--help", helps)
    refused = [_ended("score", "--scoring.sigma", "no") for _ in range(repeats)]
    results.keep("refused", refused)
    imports = [_python(_IMPORTS) for _ in range(2)]
    results.keep("imports", imports)
    empty = [_python(_EMPTY_POOL) for _ in range(2)]
    results.keep("empty pool", empty)
    first = [_first_score(model, data) for _ in range(2)]
    results.keep("first score", first)
    unit, detail = [run["first unit written"] for run in first], "after the command; with Ray and the model's loading"
    results.show(
        [
            Figure.of("--help", helps, "s", at_most=0.3),
            Figure.of("a setting is refused", refused, "s"),
            Figure.of("imports", imports, "s", "torch and a model's classes: in a driver, then in an actor"),
            Figure.of("an empty pool", empty, "s", "Ray's start, and a row through an idle actor of Ray Data"),
            Figure.of("first unit written", unit, "s", detail, at_most=10.0),
            Figure.of("done", [run["done"] for run in first], "s"),
        ]
    )


def _ended(*arguments: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mrd_ray", *arguments], capture_output=True, check=False)
    return time.perf_counter() - began


def _python(program: str) -> float:
    """Seconds that a program takes by its own clock: without the time to stop Ray."""
    began = time.time()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    return float(done.stdout.split()[-1]) - began


def _first_score(model: str, data: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        line = ["score", "--model.path", model, "--data.path", data, "--run.dir", folder, "--data.max_samples", "1"]
        began = time.time()
        subprocess.run([sys.executable, "-m", "mrd_ray", *line], capture_output=True, check=True)
        done = time.time() - began
        events = [json.loads(text) for text in Path(folder, "events.jsonl").read_text(encoding="utf-8").splitlines()]
    unit = next(event["time"] for event in events if event["event"] == "unit_done")
    return {"first unit written": unit - began, "done": done}
