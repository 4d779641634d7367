"""The command line is the config tree: flags go over a YAML file, and a typo ends with 2 and its name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mrd_ray import UserError
from mrd_ray.cli import main as cli
from mrd_ray.cli.commands import COMMANDS, DESCRIPTION
from mrd_ray.config import DemoConfig, PlanConfig, ReportConfig, ScoreConfig, UnlearnConfig
from mrd_ray.config.renamed import same_settings
from mrd_ray.config.words import default_in, default_of, kind_of, leaves

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
SCORE = ["score", "--model.path", "m", "--data.path", "d.jsonl", "--run.dir", "r"]


def parse(*arguments) -> ScoreConfig | PlanConfig | ReportConfig | UnlearnConfig | DemoConfig:
    return cli.LINE.settings([str(argument) for argument in arguments])


def error(capsys, *arguments) -> str:
    """The error with which the command ends with 2: in our words, and after a line that names the help."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    helps, sentence = capsys.readouterr().err.split("error:")
    assert helps.endswith("--help lists the settings\n")
    assert not [
        word for word in ("pydantic", "http", "Annotated", "typing", "Literal", "Input", "None") if word in sentence
    ]
    return sentence


def test_help_of_all_commands_is_theirs():
    assert {name: str(of.__doc__).strip().splitlines()[0] for name, of in cli.LINE.commands.items()} == {
        name: command.help for name, command in COMMANDS.items()
    }
    assert cli.LINE.description == DESCRIPTION
    done = subprocess.run([sys.executable, "-m", "mrd_ray", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in cli.LINE.commands)
    line = [sys.executable, "-X", "importtime", "-m", "mrd_ray", "--help"]
    loaded = subprocess.run(line, capture_output=True, text=True, check=True).stderr
    assert "argparse" in loaded
    assert not any(name in loaded for name in ("pydantic", "jsonargparse", "numpy", "torch", "rich"))


@pytest.mark.parametrize("arguments", [["--help"], ["score", "--help"], ["score", "--scoring.sigma", "no"]])
def test_help_waits_for_no_library_that_computes(arguments):
    code = f"""
import sys
from mrd_ray.cli.main import main
if main({arguments!r}) in (0, 2):
    print(sorted({{"torch", "ray", "numpy", "pyarrow", "transformers", "datasets", "deepspeed"}} & set(sys.modules)))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"


def test_flags_alone_give_the_defaults():
    assert parse(*SCORE) == ScoreConfig(model={"path": "m"}, data={"path": "d.jsonl"}, run={"dir": "r"})


def test_flags_go_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"scoring": {"sigma": 1e-3, "num_draws": 7}, "run": {"dir": "of the file"}}))
    found = parse("score", "--config", file, *SCORE[1:], "--scoring.num_draws", 9)
    assert (found.scoring.sigma, found.scoring.num_draws, found.run.dir) == (1e-3, 9, "r")


@pytest.mark.parametrize("written", ["1e-5", "1.0e-05", "0.00001"])
def test_sigma_as_people_write_it_in_yaml(tmp_path, written):
    (tmp_path / "c.yaml").write_text(f"scoring:\n  sigma: {written}\n")
    assert parse("score", "--config", tmp_path / "c.yaml", *SCORE[1:]).scoring.sigma == 1e-5


@pytest.mark.parametrize(
    "arguments",
    [
        [*SCORE, "--scoring.sigma", "3e-7", "--data.template", "{{x}} {prompt}\n: {response}", "--ray.actors", "2"],
        [*SCORE, "--data.text", "null", "--data.prompt", "p", "--data.response", "r", "--data.score_on", "response"],
        ["plan", "--model.path", "m", "--data.path", "d", "--tflops", "0.1", "--ray.actors", "8"],
        ["report", "a", "b", "--output.include_text", "false", "--out", "o.html"],
        ["demo", "--num_draws", "3", "--ray.cpus_per_process", "0.5"],
        [
            "unlearn",
            *SCORE[1:],
            "--retain.path",
            "r",
            "--scoring.sigma",
            "1e-6",
            "--lora.rank",
            "4",
            "--ray.workers",
            "2",
        ],
    ],
)
def test_print_config_replays(tmp_path, capsys, arguments):
    assert cli.main([*arguments, "--print_config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse(arguments[0], "--config", tmp_path / "printed.yaml") == parse(*arguments)


@pytest.mark.parametrize("flag", ["--scoring.sigmaa", "--scorin.sigma", "--scoring.sig", "--sigma"])
def test_unknown_flag(capsys, flag):
    assert flag in error(capsys, *SCORE, flag, "1")


@pytest.mark.parametrize("key", ["scoring.sigmaa", "model.paths", "scorin"])
def test_unknown_key_of_a_file(tmp_path, capsys, key):
    group, _, name = key.partition(".")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({group: {name: 1} if name else 1}))
    assert key in error(capsys, "score", "--config", tmp_path / "c.yaml", *SCORE[1:])


OUT_OF_RANGE = [
    ("scoring.sigma", "-1"), ("scoring.sigma", "much"), ("scoring.num_draws", "0"), ("scoring.seed", "4294967296"),
    ("scoring.statistic", "mean"), ("model.dtype", "float16"), ("data.window_tokens", "1"), ("data.max_tokens", "0"),
    ("ray.actors", "0"), ("ray.gpus_per_actor", "-1"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE)
def test_flag_out_of_range(capsys, key, value):
    assert key in error(capsys, *SCORE, f"--{key}", value)


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE)
def test_key_of_a_file_out_of_range(tmp_path, capsys, key, value):
    group, name = key.split(".")
    (tmp_path / "c.yaml").write_text(f"{group}: {{{name}: {value}}}\n")
    assert key in error(capsys, "score", "--config", tmp_path / "c.yaml", *SCORE[1:])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--data.template", "{prompt}"], "data.template"),
        (["--data.prompt", "p"], "data.response"),
        (["--data.text", "t", "--data.score_on", "response"], "data.score_on"),
    ],
)
def test_settings_that_disagree(capsys, flags, named):
    assert named in error(capsys, *SCORE, *flags)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "command"),
        (["scores"], "scores"),
        (SCORE[:3], " --data.path, --run.dir are required"),
        (["report"], "RUNS"),
        (["score", "--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_incomplete(capsys, arguments, named):
    assert named in error(capsys, *arguments)


@pytest.mark.parametrize("command", cli.LINE.commands)
def test_help(capsys, monkeypatch, command):
    """It fits in a few screens and leads with what must be given; --help=all describes every setting."""
    monkeypatch.setenv("COLUMNS", "80")
    config, words = cli.LINE.commands[command], cli.LINE.positional[command]
    assert cli.main([command, "--help=all"]) == 0
    whole = " ".join(capsys.readouterr().out.split())
    assert cli.main([command, "-h"]) == 0
    first = capsys.readouterr().out
    assert len(first.splitlines()) <= 160
    for name, setting in leaves(config.model_fields):
        section, _, inner = name.partition(".")
        of_section = config.model_fields[section]
        own = None if of_section.is_required() or not inner else of_section.default
        default = default_of(setting) if own is None else default_in(own, inner, setting)
        entry = f"{name.upper() if name in words else '--' + name} {kind_of(setting).removesuffix(', or unset')} ("
        assert f"{entry}{'' if setting.is_required() else 'default: '}{default})" in whole
        assert " ".join((setting.description or "").split()) in whole
        if setting.is_required() and of_section.is_required():
            assert name.upper() if name in words else f"--{name} " in first.split("\n\n")[0]
    assert "Annotated" not in whole


def test_flags_are_those_that_were_decided():
    """A new flag is a decision: add it to tests/flags.txt, with --help and docs/reference in mind."""
    listed = (ROOT / "tests" / "flags.txt").read_text()
    assert listed == "".join(
        f"{command} {name}\n"
        for command, config in cli.LINE.commands.items()
        for name, _ in leaves(config.model_fields)
    )


NESTED = [
    ("sets: {a: 1}", "evaluation.sets.a: expected settings by name, not 1"),
    ("sets: {a: {path: x}}", "--evaluation.sets.a.metrics is required"),
    ("sets: {a: {path: x, metrics: [loss]}}", "evaluation.sets.a.metrics: expected one of probability, "),
    ("sets: {a: {path: x, metrics: [min_k], bar: 1}}", "evaluation.sets.a.bar: there is no such setting"),
    ("sets: {a: {path: x, metrics: [min_k, min_k]}}", "evaluation.sets.a.metrics: min_k stands more than once"),
    ("membership: {members: a}", "--evaluation.membership.non_members is required"),
    ("membership: {member: a}", "did you mean evaluation.membership.members?"),
    ("max_new_tokens: no", "evaluation.max_new_tokens: expected integer > 0, not false"),
    ("", "evaluation: expected settings by name, not unset"),
]


@pytest.mark.parametrize(("settings", "sentence"), NESTED)
def test_nested_settings_are_named(tmp_path, capsys, settings, sentence):
    line = ["evaluate", "--model.path", "m", "--run.dir", "r"]
    (tmp_path / "c.yaml").write_text(f"evaluation:\n  {settings}\n")
    assert sentence in error(capsys, *line, "--config", tmp_path / "c.yaml")
    if settings:
        assert sentence in error(capsys, *line, "--evaluation", "{" + settings + "}")


def test_everything_wrong_is_said_at_once(capsys):
    said = error(capsys, "score", "--scoring.sigma", "x", "--ray.actors", "0", "--run.dir", "r")
    assert "--model.path, --data.path are required; scoring.sigma: expected number > 0, not 'x'; ray.actors: " in said


def test_help_shows_the_default_of_the_command(capsys):
    assert cli.main(["unlearn", "--help"]) == 0
    assert "--scoring.estimator  one of monte_carlo, closed_form (default: closed_form)" in capsys.readouterr().out


def test_a_wrong_value_that_holds_credentials_is_not_shown(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("ray: {actors: 's3://AKIA:hunter2hunter2@b/x'}")
    assert cli.main([*SCORE, "--config", str(tmp_path / "c.yaml")]) == 2
    said = capsys.readouterr().err
    assert "ray.actors: a URI here holds credentials" in said
    assert "hunter2" not in said


def test_later_files_go_over_earlier_ones(tmp_path):
    (tmp_path / "a.yaml").write_text("scoring: {sigma: 1e-4, num_draws: 3}")
    (tmp_path / "b.yaml").write_text("scoring: {num_draws: 7}")
    found = parse(*SCORE, "--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml").scoring
    assert (found.sigma, found.num_draws) == (1e-4, 7)


def test_broken_yaml_is_one_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("scoring: {sigma: 1\nrun: [")
    said = error(capsys, *SCORE, "--config", tmp_path / "c.yaml")
    assert "c.yaml: line 2, column" in said
    assert said.count("\n") == 1


def test_a_task_that_is_no_task(tmp_path, capsys):
    (tmp_path / "t.yaml").write_text("data: 5")
    assert "data: expected" in error(capsys, *SCORE, "--task", tmp_path / "t.yaml")


def test_stored_settings_under_old_names_are_the_same():
    now = parse("unlearn", *SCORE[1:], "--retain.path", "d").model_dump()
    before = now | {"ray": {**now["ray"], "cpus_per_worker": now["ray"]["cpus_per_process"]}, "output": None}
    del before["ray"]["cpus_per_process"]
    assert same_settings(before, now)
    assert not same_settings(before | {"ray": {**before["ray"], "cpus_per_worker": 9.0}}, now)


@pytest.mark.parametrize("flag", ["--scoring.sigmaa", "--ray.cpus_per_proces"])
def test_a_typo_is_guessed(capsys, flag):
    assert f"did you mean {flag.removesuffix('a') if flag.endswith('aa') else flag + 's'}?" in error(
        capsys, *SCORE, flag, "1"
    )


OLD = [("score", "ray.cpus_per_actor"), ("unlearn", "ray.cpus_per_worker"), ("pipeline", "ray.cpus_per_worker")]


@pytest.mark.parametrize(("command", "old"), OLD)
def test_old_names_work_and_are_told(tmp_path, capsys, command, old):
    (tmp_path / "c.yaml").write_text(f"ray: {{{old[4:]}: 3}}")
    rest = [*SCORE[1:], *([] if command == "score" else ["--retain.path", "d"])]
    for given in (["--config", tmp_path / "c.yaml"], [f"--{old}", "3"], [f"--{old}=3"], ["--ray", f"{{{old[4:]}: 3}}"]):
        assert parse(command, *rest, *given).ray.cpus_per_process == 3
        assert (
            capsys.readouterr().err == f"{old} is now ray.cpus_per_process; the old name works in this release only\n"
        )
    flags = [command, *rest, "--config", tmp_path / "c.yaml", "--ray.cpus_per_process"]
    assert parse(*flags, "5").ray.cpus_per_process == 5  # flags go over YAML, by whatever name
    (tmp_path / "c.yaml").write_text(f"ray: {{{old[4:]}: 3, cpus_per_process: 4}}")
    capsys.readouterr()
    assert cli.main(list(map(str, flags[:-1]))) == 2
    assert f"{old}: is now ray.cpus_per_process, which is given too, as 4; give one" in capsys.readouterr().err


def test_user_error_ends_with_1_and_no_traceback(tmp_path, capsys):
    (tmp_path / "file").touch()
    code = cli.main([*SCORE[:-1], str(tmp_path / "file" / "run")])
    printed = capsys.readouterr().err
    assert code == 1
    assert printed.startswith("error: run.dir: cannot write")
    assert "Traceback" not in printed


@pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])
def test_shipped_configs(file):
    """The first word of the file's name is its command."""
    parse(file.stem.split("_")[0], "--config", file)


def a_defect(_config):
    try:
        raise KeyError("layer")
    except KeyError as problem:
        raise IndexError("index out of range in self\nand more") from problem


def a_refusal(_config):
    try:
        json.loads("{")
    except ValueError:
        raise UserError("d.json: broken") from None


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize(
    ("call", "sentence", "causes"),
    [
        (
            a_defect,
            "error: `status` was stopped by IndexError: index out of range in self. ",
            ["KeyError: 'layer'", "IndexError: index out"],
        ),
        (a_refusal, "error: d.json: broken\n", ["JSONDecodeError", "UserError: d.json: broken"]),
    ],
)
def test_an_exception_is_one_sentence_and_debug_shows_it_whole(call, sentence, causes, debug, capsys):
    assert cli.LINE.run([*debug, "status", "r"], call) == 1
    assert cli.LINE.run(["status", "r", *debug], call) == 1
    shown = capsys.readouterr().err
    assert shown.count(sentence) == 2
    assert shown.count("Traceback") == (4 if debug else 0)
    assert all((cause in shown) >= bool(debug) for cause in causes)
    if not debug:
        assert len(shown.splitlines()) == 2


def test_help_names_debug(capsys):
    assert cli.main(["score", "--help"]) == 0
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", [pytest.param("latin-1", marks=pytest.mark.slow), "ascii"])
def test_a_terminal_without_the_glyphs(encoding, tmp_path, stories_dir, qa_file):
    """Printed figures hold Greek and frames; the run is done, and so its exit code is 0."""
    command = [sys.executable, "-m", "mrd_ray", "plan", "--model.path", str(stories_dir), "--data.path", str(qa_file)]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert b"duration" in done.stdout


def test_a_reader_that_has_gone(stories_dir, qa_file):
    command = f"{sys.executable} -m mrd_ray plan --model.path {stories_dir} --data.path {qa_file} | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_plan_says_why_rows_cannot_be_scored(stories_dir, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text('{"question": "Who?", "answer": ""}\n{"question": "Who?", "answer": "He."}\n')
    code = cli.main(["plan", "--model.path", str(stories_dir), "--data.path", str(tmp_path / "d.jsonl")])
    assert code == 3
    assert "column 'answer' is empty" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RAY_ADDRESS": "127.0.0.1:1"}, "cannot join the Ray cluster at RAY_ADDRESS=127.0.0.1:1: "),
        ({"RAY_ADDRESS": "", "TMPDIR": "long"}, "is too long for its sockets; set RAY_TMPDIR=/tmp"),
        (
            {"RAY_ADDRESS": "", "RAY_TMPDIR": "left behind"},
            "run `ray stop`, or set RAY_ADDRESS=local, to start a local",
        ),
        *(
            pytest.param({"RAY_ADDRESS": "", **environment}, sentence, marks=pytest.mark.slow)
            for environment, sentence in [
                ({"RAY_ADDRESS": "http://127.0.0.1:8265"}, "Otherwise set RAY_ADDRESS to HOST:6379"),
                ({"RAY_TMPDIR": "long"}, "is too long for its sockets; set RAY_TMPDIR=/tmp"),
                (
                    {"RAY_ADDRESS": "ray://127.0.0.1:1"},
                    "cannot join the Ray cluster at RAY_ADDRESS=ray://127.0.0.1:1: ",
                ),
                ({"RAY_ADDRESS": "nonsense"}, "Otherwise set RAY_ADDRESS to HOST:6379"),
                ({"RAY_TMPDIR": "here"}, "here, is not an absolute path; set RAY_TMPDIR=/tmp"),
                ({"RAY_TMPDIR": "/dev/null"}, "is not a folder that can be written to; set RAY_TMPDIR=/tmp"),
            ]
        ),
    ],
)
def test_a_ray_that_cannot_start_is_a_sentence(environment, sentence, stories_dir, qa_file, tmp_path):
    long = tmp_path / ("a_user_of_the_cluster/" * 5)
    long.mkdir(parents=True)
    left = tmp_path / "left"
    (left / "ray").mkdir(parents=True)
    (left / "ray/ray_current_cluster").write_text("127.0.0.1:1\n")  # as a `ray start` that was killed leaves it
    folders = {"long": str(long), "left behind": str(left)}
    given = {name: folders.get(value, value) for name, value in environment.items()}
    command = [sys.executable, "-m", "mrd_ray", "score", "--model.path", str(stories_dir), "--data.path", str(qa_file)]
    command += ["--run.dir", str(tmp_path / "run")]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert sentence in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "job", ["score", *(pytest.param(job, marks=pytest.mark.slow) for job in ("unlearn", "evaluate", "pipeline"))]
)
def test_wrong_settings_end_a_job_with_2(job, tmp_path, stories_dir, qa_file):
    """A run directory in the job's copy of the working directory is one that nobody could fetch."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    folder.mkdir(parents=True)
    flags = ["--model.path", str(stories_dir), "--run.dir", "run"]
    if job == "evaluate":
        flags += ["--evaluation.sets", f"{{asked: {{path: {qa_file}, metrics: [probability]}}}}"]
    else:
        flags += ["--data.path", str(qa_file)]
    flags += ["--unlearning.method", "ga"] if job in ("unlearn", "pipeline") else []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *flags]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, "would be in the job's copy" in done.stderr) == (2, True), done.stderr
    assert not (folder / "run").exists()


def test_quiet_is_short_for_a_setting():
    runs = []
    assert cli.LINE.run(["compare", "--quiet", "a", "b"], lambda config: runs.append(config) or 0) == 0
    assert cli.LINE.run(["compare", "a", "b"], lambda config: runs.append(config) or 0) == 0
    assert [(run.output.quiet, run.output.texts) for run in runs] == [(True, False), (False, True)]


def test_a_broken_pipe_that_is_not_the_readers_is_told(capsys):
    def call(_config):
        raise BrokenPipeError(32, "Broken pipe")

    assert cli.LINE.run(["status", "r"], call) == 1
    assert "`status` was stopped by BrokenPipeError: [Errno 32] Broken pipe" in capsys.readouterr().err
