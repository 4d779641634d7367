"""Whatever a YAML file of settings or a task holds, it gives settings, or exit code 1 or 2 with an error."""

import pytest
import yaml
from hypothesis import strategies as st
from mangled import TIMES, explore, of_bytes, of_json

from mrd_ray.cli import main as cli

SETTINGS = {
    "model": {"path": "m", "dtype": "float32"},
    "data": {"path": "d.jsonl", "where": {"safe": False}, "max_samples": 3},
    "run": {"dir": "r"},
    "scoring": {"sigma": 1e-5, "measures": ["entropy"], "num_draws": 4},
    "ray": {"actors": 2},
}
TASK = {
    "description": "mine",
    "copies": {"a/b": "{name}.json"},
    "data": {"path": "a/b", "prompt": "question", "response": "answer"},
    "unlearning": {"method": "npo"},
    "methods": {"npo": {"beta": 0.2}},
    "evaluation": {"forget": "f", "sets": {"f": {"path": "f.jsonl", "metrics": ["rouge_l"]}}},
}
TASK_LINE = ["--model.path", "m", "--data.path", "d.jsonl", "--run.dir", "r"]


@pytest.fixture
def called(monkeypatch):
    """Settings are parsed, and go no further."""
    monkeypatch.setattr(cli, "_call", lambda config: 0)


def outcome(arguments: list[str], capsys) -> int:
    code = cli.main(arguments)
    printed = capsys.readouterr().err
    assert code in (0, 1, 2)
    assert "Traceback" not in printed
    assert (code == 0) or "error: " in printed
    return code


@TIMES
@pytest.mark.parametrize("flag", ["--config", "--task"])
def test_yaml(flag, times, called, capsys, tmp_path):
    good, rest = (SETTINGS, []) if flag == "--config" else (TASK, TASK_LINE)
    file = tmp_path / "c.yaml"

    def check(mangled: bytes) -> None:
        file.write_bytes(mangled)
        outcome(["score", flag, str(file), *rest], capsys)

    check(yaml.safe_dump(good).encode())
    dumped = of_json(good).map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode(errors="replace"))
    explore(check, 40 * times, dumped | of_bytes(yaml.safe_dump(good).encode()) | st.binary(max_size=60))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("flag", ["--config", "--task"])
@pytest.mark.parametrize(
    "content",
    [
        BOMB, BOMB.replace("a: &a", "data: &a", 1), "data: &a {path: *a}", "data: " + "[" * 10_000, "- 1\n- 2", "5", "",
        "data: {1: 2}", "{a: 1}: 4", "1: 2", "data: {<<: 5}", "data: !!python/object/apply:os.getcwd []", "data: x",
        "scoring: {sigma: 1" + "0" * 5000 + "}", "data: \0", b"data: \xff\xfe", "data: {path: {a: b}}", "data: []",
        "a: b\n---\na: b", "data: {path: d.jsonl}\nscoring:\n",
    ],
)  # fmt: skip
def test_yaml_that_means_harm(flag, content, called, capsys, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    rest = [] if flag == "--task" else ["--model.path", "m"]
    assert outcome(["score", flag, str(file), *rest, "--run.dir", "r"], capsys) in (1, 2)
