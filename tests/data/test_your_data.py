"""docs/your-data.md: every example there gives the samples that it shows (multiple choice: evaluation/test_shapes)."""

import json
import re
import shlex
from pathlib import Path

import pytest

from mrd_ray.cli.main import LINE
from mrd_ray.data import samples
from mrd_ray.data.tokens import Limits

PAGE = Path(__file__).parents[2] / "docs" / "your-data.md"
SAMPLES = re.sub(r"(?ms)^## Multiple choice\n.*?(?=^## )", "", PAGE.read_text(encoding="utf-8"))
EXAMPLES = [
    [cell.strip() for cell in line.strip("|\n").split(" | ")] for line in SAMPLES.splitlines() if "<br>" in line
]


@pytest.mark.parametrize("example", EXAMPLES, ids=[example[0] for example in EXAMPLES])
def test_every_example_is_read(example, chat_tokenizer, tmp_path):
    what, lines, flags = example
    named = re.match(r"`(\w+\.\w+)`", what)
    file = tmp_path / (named[1] if named else "forget.jsonl")
    content = [line.strip("`") for line in lines.split("<br>")]
    file.write_text("\n".join(content) + "\n", encoding="utf-8")
    settings = [] if flags == "..." else shlex.split(flags.strip("`"))
    arguments = ["score", "--model.path", "m", "--run.dir", "r", "--data.path", str(file), *settings]
    data = LINE.settings(arguments).data
    table = samples.build(data, chat_tokenizer, Limits(512)).sort_by("index")
    assert table["error"].to_pylist() == [None] * len(table)
    expected = {".csv": 1, ".tsv": 1, ".txt": 1}.get(file.suffix, 2)
    assert len(table) == expected
    if not named:  # an object or text per line: what the sample ends with is in its line
        for sample, line in zip(table.to_pylist(), content, strict=True):
            scored = "".join(re.findall(r"\w", chat_tokenizer.decode(sample["token_ids"])))
            row = json.loads(line)
            prompt = row if isinstance(row, str) else str(next(value for name, value in row.items() if name != "id"))
            if isinstance(row, str) or not prompt.startswith("["):
                assert "".join(re.findall(r"\w", prompt)) in scored


def test_the_page_has_an_example_of_every_format_that_is_text():
    for ending in (".jsonl", ".json", ".csv", ".tsv", ".txt"):
        assert any(f"{ending}`" in example[0] for example in EXAMPLES), ending
