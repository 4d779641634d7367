"""The page says what the run directories hold, shows texts as text, and keeps them out where asked."""

import html
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from runs_of_report import HOSTILE, LOG, QUOTED, unlearn_run

from mrd_ray import CompareConfig, ReportConfig, UserError, compare, write_report
from mrd_ray.cli import main as cli
from mrd_ray.data.samples import PLACE
from mrd_ray.report import tables
from mrd_ray.report.words import number
from mrd_ray.scoring import summary


class Page(HTMLParser):
    """Tags, and what stands in script elements by id."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: dict[str, str] = {}
        self.words = ""
        self._in: str | None = None
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.words += " "
        self._in = dict(attributes).get("id", "main") if tag == "script" else None

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in is not None:
            self.scripts[self._in] = self.scripts.get(self._in, "") + data
        else:
            self.words += data

    def data(self, name: str) -> dict[str, list]:
        """Columns of a table of all samples by label."""
        section = self.source.split(f'data-source="{name}"')[1].split("</thead>")[0]
        labels = [html.unescape(label) for label in re.findall(r"<button[^>]*>([^<]*)</button></th>", section)]
        return dict(zip(labels, json.loads(self.scripts[name])["columns"], strict=True))


def write(tmp_path: Path, *runs: Path, **settings: object) -> Page:
    write_report(ReportConfig(runs=[str(run) for run in runs], out=str(tmp_path / "page.html"), **settings))
    return Page(tmp_path / "page.html")


def edit_manifest(run: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    change(manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))


def edit_settings(run: Path, group: str, **settings: object) -> None:
    """Those of the last start."""
    edit_manifest(run, lambda manifest: manifest["invocations"][-1]["config"][group].update(settings))


def edit_table(file: Path, **columns: object) -> None:
    """One value for all rows, or a list of values."""
    table = pq.read_table(file)
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        values = values if isinstance(values, list) else [values] * len(table)
        table = table.set_column(at, table.field(at), pa.array(values, table.field(at).type))
    pq.write_table(table, file)


@pytest.mark.parametrize(("run", "name"), [("exact", "samples-1"), ("drawn", "samples-2")])
def test_table_holds_the_scores(runs, report, run, name, pairs):
    """To six digits, in the order of ranks, those without a score last."""
    scores = pq.read_table(runs[run] / "scores.parquet").sort_by([("mrd", "ascending"), ("sample_id", "ascending")])
    shown = Page(report).data(name)
    for label, column in {"MRD": "mrd", "± s.e.": "mrd_se", "log p": "log_prob", "weight": "weight"}.items():
        expected, found = (np.array(values, float) for values in (scores[column].to_pylist(), shown[label]))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    for label, column in {
        "draws": "num_draws",
        "tokens": "num_tokens",
        "sample": "sample_id",
        "index": "index",
    }.items():
        assert shown[label] == scores[column].to_pylist()
    errors = dict(zip(scores["sample_id"].to_pylist(), scores["error"].to_pylist(), strict=True))
    assert dict(zip(shown["sample"], shown["error"], strict=True)) == errors
    assert shown["rank"] == [*range(1, len(HOSTILE) + len(pairs) + 1), None, None]


def test_texts_are_whole(runs, report, hostile_file):
    shown = Page(report).data("samples-1")
    texts = dict(zip(shown["sample"], shown["text"], strict=True))
    for name, text in HOSTILE.items():
        assert texts[name].replace("␀", "\0").replace("␇", "\a").replace("␛", "\x1b") == text


def test_hostile_texts_make_no_elements(report):
    """Beside our own script there are only blocks of JSON, and nothing asks the network for anything."""
    page = Page(report)
    assert [tag for tag, _ in page.tags].count("img") == 0
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [of.get("type") for of in scripts] == ["application/json"] * 3 + [None]
    assert not [of for _, of in page.tags for name in of if name == "src" or name.startswith("on")]
    assert {of["href"][0] for _, of in page.tags if "href" in of} == {"#", "d"}
    assert HOSTILE["template"] in html.unescape(page.source)
    assert "http:" not in page.source.replace("http://www.w3.org", "")


def test_hardest_and_easiest_are_in_the_page(runs, report):
    scores = pq.read_table(runs["exact"] / "scores.parquet").filter(pc.field("mrd").is_valid()).sort_by("mrd")
    words = Page(report).words
    for row in (scores.slice(0, 10).to_pylist(), scores.slice(len(scores) - 10).to_pylist()):
        assert all(number(sample["mrd"]) in words and sample["sample_id"] in words for sample in row)
    quartiles = np.quantile(scores["mrd"].to_numpy(), [0.25, 0.75])
    assert f"half of them lie between {number(quartiles[0])} and {number(quartiles[1])}" in words


def test_runs_that_were_compared(runs, report):
    found = compare(CompareConfig(run_a=str(runs["exact"]), run_b=str(runs["drawn"])))
    words = " ".join(Page(report).words.split())
    assert f"drawn against exact {found.compared} {number(found.spearman)} {number(found.kendall)}" in words


def test_runs_that_cannot_be_compared_say_why(runs, tmp_path):
    shutil.copytree(runs["drawn"], tmp_path / "other")
    scores = pq.read_table(tmp_path / "other" / "scores.parquet")
    pq.write_table(scores.slice(1), tmp_path / "other" / "scores.parquet")
    assert "not compared" in write(tmp_path, runs["exact"], tmp_path / "other").words


def test_unlearning_says_before_after_and_stop(report):
    words = " ".join(Page(report).words.split())
    assert "forget MA: share of tokens that are the likeliest 0.9222 0.8594" in words
    assert f"retain perplexity {number(1.2386)} {number(1.5233)}" in words
    assert "Forget loss goes from 13 at step 1 to 4 at step 10" in words
    assert "Scores are refreshed at steps 0, 5. The run stops after step 10." in words
    assert "Stopped after 10 steps: the last of 10 steps." in words


def test_unlearning_texts_come_from_the_score_run_of_the_same_samples(runs, tmp_path, pairs):
    moved = "The samples that moved most"
    alone = write(tmp_path, runs["unlearned"]).source
    assert moved in alone
    assert pairs[0][0] not in alone
    both = write(tmp_path, runs["unlearned"], runs["exact"]).source
    assert any(html.escape(prompt) in both.split(moved)[-1] for prompt, _ in pairs)


def test_unlearning_in_mid_run(runs, tmp_path):
    unlearn_run(tmp_path / "run", {0: runs["exact"]}, LOG[:5], ended=False)
    words = write(tmp_path, tmp_path / "run").words
    assert "Not finished: 3 of 10 steps so far" in words
    assert "stops after" not in words
    assert "share of tokens that are the likeliest 0.9222 -" in " ".join(words.split())  # nothing known after


def test_unlearning_that_is_continued_is_not_finished(runs, tmp_path):
    unlearn_run(tmp_path / "run", {0: runs["exact"]}, [line | {"of": 20} for line in LOG])
    edit_settings(tmp_path / "run", "unlearning", steps=20)
    words = write(tmp_path, tmp_path / "run").words
    assert "Not finished: 10 of 20 steps so far" in words
    assert "stops after" not in words


def test_unlearning_that_has_not_begun(runs, tmp_path):
    unlearn_run(tmp_path / "run", {0: runs["exact"]}, [], ended=False)
    words = write(tmp_path, tmp_path / "run").words
    assert "Not finished: no step so far" in words
    assert "knew before" not in words


def test_unlearning_that_diverged_counts_the_step_it_diverged_at(runs, tmp_path):
    log = [*LOG[:3], {"event": "stop", "step": 2, "reason": "diverged at step 2"}]
    unlearn_run(tmp_path / "run", {0: runs["exact"]}, log)
    assert "Stopped after 2 steps: diverged at step 2." in write(tmp_path, tmp_path / "run").words


@pytest.mark.parametrize(
    ("change", "says", "moved"),
    [
        (lambda mrd: mrd, "a Spearman rank correlation of 1.00; 0 of them move. Of the 6 that were hardest, 6", False),
        (lambda mrd: 1 / mrd, "a Spearman rank correlation of -1.00; half of them move by 10 ranks or more", True),
        (lambda mrd: 0.005, "no rank correlation, since in one of them all scores are the same; half", True),
    ],
    ids=["unmoved", "reversed", "all equal"],
)
def test_how_ranks_move_in_words(runs, tmp_path, change, says, moved):
    shutil.copytree(runs["exact"], tmp_path / "last")
    mrd = pq.read_table(runs["exact"] / "scores.parquet")["mrd"].to_pylist()
    edit_table(tmp_path / "last" / "scores.parquet", mrd=[None if one is None else change(one) for one in mrd])
    unlearn_run(tmp_path / "run", {0: runs["exact"], 5: tmp_path / "last"}, LOG)
    words = write(tmp_path, tmp_path / "run").words
    assert f"From step 0 to step 5, the orders of the 20 samples have {says}" in words
    assert ("The samples that moved most" in words) == moved


def test_evaluations_in_the_course_of_unlearning(runs, tmp_path):
    unlearn_run(tmp_path / "run", {0: runs["exact"]}, LOG, evaluations={0: runs["before"], 10: runs["after"]})
    words = " ".join(write(tmp_path, tmp_path / "run").words.split())
    before, after = (
        next(of["value"] for of in pq.read_table(runs[name] / "figures.parquet").to_pylist()
             if (of["set"], of["metric"]) == ("kept", "probability"))
        for name in ("before", "after")
    )  # fmt: skip
    assert "Evaluation of the set kept" in words
    assert f"per token goes from {number(before)} at step 0 to {number(after)} at step 10" in words


def test_several_unlearn_runs_in_one_table(runs, tmp_path):
    unlearn_run(tmp_path / "second", {0: runs["exact"]}, [*LOG[:-2], {**LOG[-2], "retain_perplexity": 1.35}, LOG[-1]])
    words = write(tmp_path, runs["unlearned"], tmp_path / "second").words
    assert "Retain perplexity, by run" in words
    assert "second: after" in words
    assert number(np.exp(0.3)) in words


def test_figures_of_evaluations_side_by_side(runs, report):
    words = " ".join(Page(report).words.split())
    before, after = (pq.read_table(runs[name] / "figures.parquet").to_pylist() for name in ("before", "after"))
    for a, b in zip(before, after, strict=True):
        cells = (f"{number(of['value'])} ± {number(of['se'], 2)} ({of['rows']} rows)" for of in (a, b))
        assert f"{a['set']} {' '.join(cells)} {b['value'] - a['value']:+.3g}" in words


def test_answers_side_by_side(runs, report, pairs):
    shown = Page(report).data("answers")
    for name in ("before", "after"):
        answers = pq.read_table(runs[name] / "answers.parquet")
        assert shown[name] == [tables.Text(text).all for text in answers["generated"].to_pylist()]
    assert shown["true answer"][-len(pairs) :] == [response for _, response in pairs]


def test_sets_of_one_name_with_other_rows_are_not_compared(runs, tmp_path):
    shutil.copytree(runs["after"], tmp_path / "run")
    edit_manifest(tmp_path / "run", lambda manifest: manifest["identity"].update({"evaluation.sets.forget": "other"}))
    page = write(tmp_path, runs["before"], tmp_path / "run")
    words = " ".join(page.words.split())
    assert "(other rows, tokens or metrics): forget." in words
    forget, kept = words.split("Completeness:")[1].split("Figures from 0 to 1")[0].split("Utility:")
    assert len(re.findall(r"rows\) [+-]\d", forget)) == 0
    assert len(re.findall(r"rows\) [+-]\d", kept)) == 3
    assert set(page.data("answers")["set"]) == {"kept"}
    assert "Answers on the set forget" not in words
    assert page.source.count('class="line link"') == 3


@pytest.mark.parametrize("include_text", [True, False])
def test_subjects_are_texts(runs, tmp_path, include_text):
    shutil.copytree(runs["before"], tmp_path / "run")
    edit_table(tmp_path / "run" / "figures.parquet", metric="multiple_choice: Jane Doe")
    assert (
        "Jane Doe" in write(tmp_path, tmp_path / "run", output={"include_text": include_text}).words
    ) == include_text


def test_figures_without_a_forget_set(runs, tmp_path):
    shutil.copytree(runs["before"], tmp_path / "run")
    edit_settings(tmp_path / "run", "evaluation", forget=None)
    words = write(tmp_path, tmp_path / "run").words
    assert "What the model knows of each set" in words
    assert "Utility" not in words


@pytest.mark.parametrize(("value", "shown"), [(float("inf"), "∞"), (float("nan"), "-")])
def test_figures_that_are_not_finite(runs, tmp_path, value, shown):
    shutil.copytree(runs["before"], tmp_path / "run")
    edit_table(tmp_path / "run" / "figures.parquet", value=value, se=float("nan"))
    words = write(tmp_path, runs["before"], tmp_path / "run").words
    assert f"{shown} (6\u00a0rows)" in words
    assert not re.search(r"\bnan\b|\binf\b", words)


def test_without_texts_nothing_of_them_is_left(runs, report, tmp_path, pairs):
    answers = [text for name in ("before", "after")
               for text in pq.read_table(runs[name] / "answers.parquet")["generated"].to_pylist()]  # fmt: skip
    texts = [*HOSTILE.values(), *(part for pair in pairs for part in pair), *answers, QUOTED]

    def leaks(source: str) -> list[str]:
        """Each two words of a text that stand in the page."""
        words = [text[:500].split() for text in texts]
        fragments = [" ".join(of[at : at + 2]) for of in words for at in range(max(1, len(of) - 1))]
        return [fragment for fragment in fragments if len(fragment) > 10 and fragment in source]

    source = html.unescape(write(tmp_path, *runs.values(), output={"include_text": False}).source)
    assert leaks(source) == []
    assert len(leaks(html.unescape(report.read_text()))) > 40
    scores = pq.read_table(runs["exact"] / "scores.parquet")
    assert all(number(mrd) in source for mrd in sorted(scores["mrd"].drop_null().to_pylist())[:3])


def test_same_runs_same_page(runs, tmp_path):
    assert write(tmp_path, *runs.values()).source == write(tmp_path, *runs.values()).source


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    for parent in ("a", "b"):
        shutil.copytree(runs["exact"], tmp_path / parent / "run")
    assert "b/run against a/run" in write(tmp_path, tmp_path / "a" / "run", tmp_path / "b" / "run").words


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        ({"model": "other"}, "apart; another model"),
        ({"scoring.sigma": 1e-3}, "apart; another sigma: compare ranks only"),
        ({}, "apart"),
    ],
)
def test_scores_of_another_model_or_sigma(runs, tmp_path, identity, said):
    shutil.copytree(runs["drawn"], tmp_path / "a")
    shutil.copytree(runs["drawn"], tmp_path / "b")
    edit_manifest(tmp_path / "b", lambda manifest: manifest["identity"].update(identity))
    words = " ".join(write(tmp_path, tmp_path / "a", tmp_path / "b").words.split())
    assert f"0.0% over 3 s.e. {said} b against a" in words
    assert f"0.0% are over three standard errors {said}." in words


def test_facts_count_the_draws_that_were_made(runs, tmp_path):
    shutil.copytree(runs["drawn"], tmp_path / "run")
    draws = pq.read_table(runs["drawn"] / "scores.parquet")["num_draws"].to_pylist()
    more = [n and n + 10 * (row % 3) for row, n in enumerate(draws)]  # none of those without a score
    edit_table(tmp_path / "run" / "scores.parquet", num_draws=more)
    assert "K = 6 to 26 draws" in write(tmp_path, tmp_path / "run").words


def test_nonlinear_scores_are_warned_of(runs, tmp_path):
    shutil.copytree(runs["drawn"], tmp_path / "run")
    edit_table(tmp_path / "run" / "scores.parquet", nonlinearity=summary.NONLINEAR * 2)
    assert "20 sample(s) have a nonlinearity over 0.3" in write(tmp_path, tmp_path / "run").words


@pytest.mark.parametrize("weighting", ["mrd", "uniform"])
def test_unlearning_with_equal_weights_has_no_estimator(runs, tmp_path, weighting):
    unlearn_run(tmp_path / "run", {0: runs["exact"]}, LOG)
    edit_settings(tmp_path / "run", "unlearning", weighting=weighting)
    assert ("0 curvature probes" in write(tmp_path, tmp_path / "run").words) == (weighting == "mrd")


def test_a_command_that_is_no_text(runs, tmp_path):
    shutil.copytree(runs["exact"], tmp_path / "run")
    command = ["mrd-ray", "--data.path", "caf\udce9.jsonl"]
    edit_manifest(tmp_path / "run", lambda manifest: manifest["invocations"][-1].update(command=command))
    assert "caf?.jsonl" in write(tmp_path, tmp_path / "run").words


def test_run_without_any_score(runs, tmp_path):
    shutil.copytree(runs["exact"], tmp_path / "run")
    scores = pq.read_table(runs["exact"] / "scores.parquet").filter(pc.field("mrd").is_null())
    pq.write_table(scores, tmp_path / "run" / "scores.parquet")
    assert "0 of 2 samples have a score." in write(tmp_path, tmp_path / "run").words


def test_default_place_and_exit_codes(runs, tmp_path, capsys):
    shutil.copytree(runs["before"], tmp_path / "run")
    assert cli.main(["report", str(tmp_path / "run"), "--output.include_text", "false"]) == 0
    assert str(tmp_path / "run" / "report.html") in capsys.readouterr().out.replace("\n", "")
    assert "Completeness" in (tmp_path / "run" / "report.html").read_text()
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "no" / "page.html")]) == 1
    assert "out: cannot write" in capsys.readouterr().err


def test_at_least_one_run():
    with pytest.raises(ValidationError, match="at least 1 item"):
        ReportConfig(runs=[])


class TestRefuses:
    def refused(self, *runs: Path | str) -> str:
        with pytest.raises(UserError) as refused:
            write_report(ReportConfig(runs=[str(run) for run in runs]))
        return str(refused.value)

    def test_what_is_no_run_directory(self, tmp_path):
        assert "is not a run directory" in self.refused(tmp_path / "mistyped")
        assert not (tmp_path / "mistyped").exists()

    def test_a_run_with_nothing_yet(self, runs, tmp_path):
        shutil.copy(runs["exact"] / "manifest.json", tmp_path)
        assert "nothing to report yet" in self.refused(tmp_path)

    @pytest.mark.parametrize("again", ["{}", "{}/", "{}/../exact"])
    def test_a_run_named_twice(self, runs, again):
        assert "named twice" in self.refused(runs["exact"], again.format(runs["exact"]))

    @pytest.mark.parametrize(
        ("run", "file"),
        [
            ("exact", "scores.parquet"),
            ("exact", "samples.parquet"),
            ("exact", "manifest.json"),
            ("unlearned", "metrics.jsonl"),
            ("unlearned", "scores/step-000005.parquet"),
            ("after", "figures.parquet"),
            ("after", "answers.parquet"),
        ],
    )
    def test_a_damaged_file(self, runs, tmp_path, run, file):
        shutil.copytree(runs[run], tmp_path / "run")
        (tmp_path / "run" / file).write_bytes((tmp_path / "run" / file).read_bytes()[:-100] + b"...")
        assert re.search(rf"/{file}(, line \d+,)? is damaged", self.refused(tmp_path / "run"))

    def test_a_manifest_without_the_settings_of_scoring(self, runs, tmp_path):
        shutil.copytree(runs["exact"], tmp_path / "run")
        manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
        del manifest["invocations"][-1]["config"]["scoring"]
        (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
        assert "manifest.json is damaged (no scoring in its settings)" in self.refused(tmp_path / "run")

    def test_scores_that_are_text(self, runs, tmp_path):
        shutil.copytree(runs["exact"], tmp_path / "run")
        scores = pq.read_table(tmp_path / "run" / "scores.parquet")
        index = scores.column_names.index("mrd")
        pq.write_table(scores.set_column(index, "mrd", scores["mrd"].cast("string")), tmp_path / "run/scores.parquet")
        assert "scores.parquet is damaged (column mrd is string, not double)" in self.refused(tmp_path / "run")

    def test_a_table_of_something_else(self, runs, tmp_path):
        shutil.copytree(runs["exact"], tmp_path / "run")
        scores = pq.read_table(tmp_path / "run" / "scores.parquet")
        pq.write_table(scores.drop_columns(["mrd"]), tmp_path / "run" / "scores.parquet")
        assert "no column mrd" in self.refused(tmp_path / "run")


def test_runs_of_an_earlier_version(runs, tmp_path):
    """Whose tables do not say where the samples are."""
    names = ("exact", "unlearned", "after")
    for name in names:
        shutil.copytree(runs[name], tmp_path / name)
        for file in (tmp_path / name).rglob("*.parquet"):
            table = pq.read_table(file)
            pq.write_table(table.drop_columns([column for column in PLACE if column in table.column_names]), file)
    old, new = (write(tmp_path, *(folder / name for name in names)) for folder in (tmp_path, runs["exact"].parent))
    assert old.data("samples-1") == {name: of for name, of in new.data("samples-1").items() if name != "index"}


def test_texts_share_a_budget(monkeypatch):
    """The shorter ones stay whole; the longest are cut to one length that fits."""
    monkeypatch.setattr(tables, "_TEXT_BUDGET", 100)
    table = tables.DataTable("t", "t", [tables.Column("text", ["a" * 10, "b" * 30, "c" * 500, None, "d" * 90], "text")])
    assert [len(text or "") for text in json.loads(table.json)["columns"][0]] == [10, 30, 30, 0, 30]
    assert "more than 30 characters" in table.note
