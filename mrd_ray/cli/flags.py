"""Command lines made from config classes: flags, YAML, tasks, and what goes wrong with them."""

import argparse
import contextlib
import functools
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jsonargparse import ArgumentParser, get_loader, set_loader
from pydantic import BaseModel, ValidationError
from rich.console import Console

from mrd_ray.cli.missing import missing_module, what_to_do
from mrd_ray.config import OutputConfig, document
from mrd_ray.config.credentials import refuse_credentials
from mrd_ray.errors import SettingsError, UserError, whole_traceback

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit codes; argparse too ends with 2 on a bad command line
SOME_WITHOUT_SCORE, STOPPED_EARLY = 3, 4
# jsonargparse has numbers as people write them, 1e-5 among them
set_loader("yaml", functools.partial(document.load, construct=get_loader("yaml")), exceptions=(ValueError,))
_DEBUG, _QUIET = "--debug", "--quiet"
_TASK_DATA = "Local copies of the task's hub datasets: '{locuslab/TOFU: FOLDER}'."


@dataclass(frozen=True)
class CommandLine:
    """Commands, each with a config class that says what its flags are.

    of_tasks: the commands that take their defaults from a task (see `data.tasks`). positional: by command, the fields
    that are no flags, with how many words each takes where it is not one.
    """

    prog: str
    description: str
    commands: Mapping[str, Any]
    of_tasks: Sequence[str]
    positional: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)

    def parser(self, task: Mapping[str, Any] | None = None, of: Collection[str] | None = None) -> ArgumentParser:
        """Of all commands, with the flags of those in `of`, all if None: each takes some hundredths of a second.

        task: settings by section, for defaults. Raises UserError if there is no such setting.
        """
        top = ArgumentParser(prog=self.prog, description=self.description, allow_abbrev=False)
        commands = top.add_subcommands(required=True, dest="command")
        for name, config in self.commands.items():
            command = ArgumentParser(description=config.__doc__, allow_abbrev=False)
            if of is None or name in of:
                self._add_flags(command, name, task or {})
            commands.add_subcommand(name, command, help=(config.__doc__ or "").strip().splitlines()[0])
        return top

    def _add_flags(self, command: ArgumentParser, name: str, task: Mapping[str, Any]) -> None:
        config = self.commands[name]
        command.add_argument(_DEBUG, action="store_true", help="After an error print the whole traceback.")
        if "output" in config.model_fields:
            command.add_argument(_QUIET, action="store_true", help="Short for --output.quiet true.")
        command.add_argument("--config", action="config", help="YAML file of these settings; flags go over it.")
        if name in self.of_tasks:
            command.add_argument("--task", type=str, help="A task of `mrd-ray tasks`, or a YAML file of your own.")
            command.add_argument("--task_data", type=dict[str, str], default={}, help=_TASK_DATA)
        positional = self.positional.get(name, {})
        for word, how_many in positional.items():
            more: dict[str, Any] = {"nargs": how_many} if how_many else {}
            command.add_argument(word, type=str, help=config.model_fields[word].description, **more)
        command.add_class_arguments(config, as_group=False, skip=set(positional))
        for section, settings in task.items():
            if name not in self.of_tasks or section not in config.model_fields:
                continue
            if isinstance(config.model_fields[section].default, dict):  # a setting by itself
                command.set_defaults({section: settings})
            else:
                defaults = {f"{section}.{setting}": value for setting, value in settings.items()}
                try:
                    command.set_defaults(defaults)
                except KeyError as problem:  # of no such setting
                    raise UserError(f"task: {problem.args[0]}") from None

    def settings(self, line: ArgumentParser, arguments: Sequence[str]) -> Any:
        """The config of the command that the arguments name. Raises pydantic.ValidationError, or UserError."""
        parsed = line.parse_args(arguments)
        for name, about in self.commands[parsed.command].model_fields.items():
            group = isinstance(about.annotation, type) and issubclass(about.annotation, BaseModel)
            given = parsed[parsed.command].get(name)
            if group and isinstance(
                given, str | int | float | list | None
            ):  # `scoring:` with nothing under it, in YAML
                raise UserError(f"{name}: {given!r:.40}; expected settings, or leave it out")
        values = line.instantiate(parsed)[parsed.command]
        others = {"config", "__path__", _DEBUG.strip("-"), _QUIET.strip("-")}
        if parsed.command in self.of_tasks:  # their settings have become defaults
            others |= {"task", "task_data"}
        ours = {key: value for key, value in values.items() if key not in others}
        return self.commands[parsed.command](**ours)

    def run(self, arguments: Sequence[str], call: Callable[[Any], int]) -> int:
        """Parse, call, and give the exit code; a UserError is printed, and is exit code 1, of the settings 2."""
        for stream in (sys.stdout, sys.stderr):  # never fail after success for want of a glyph
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        debug = _DEBUG in arguments  # of no command, and anywhere on the line
        arguments = [argument for argument in arguments if argument != _DEBUG]
        if "output" in getattr(self.commands.get(next(iter(arguments), "")), "model_fields", {}):
            arguments = ["--output.quiet=true" if argument == _QUIET else argument for argument in arguments]
        try:
            refuse_credentials("command line", arguments)
            line = self.parser(task_of(arguments), arguments[:1])
        except UserError as problem:
            return _failed(problem, REFUSED)
        try:
            config = self.settings(line, arguments)
        except UserError as problem:
            line.error(str(problem))
        except UnicodeDecodeError as problem:
            line.error(f"--config: cannot read {_config_of(arguments)}: it is not UTF-8 text ({problem.reason})")
        except ValidationError as problem:  # settings that are each in range but contradict one another
            line.error("; ".join(_named(problem.title, error) for error in problem.errors()))
        texts = getattr(config, "output", OutputConfig()).texts
        try:
            with _terminable():
                return call(config)
        except UserError as problem:
            return _failed(problem, REFUSED if isinstance(problem, SettingsError) else FAILED, debug, texts)
        except Exception as problem:  # a defect, or what a library did not foresee
            if isinstance(problem, BrokenPipeError) and _nobody_reads():
                return FAILED
            return _failed(_unforeseen(arguments[0], problem), FAILED, debug, texts)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return INTERRUPTED


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, by `ray job stop` or a node that goes away, is as ctrl-C. Ray's own handler exits with its number."""
    of_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number)) if of_main else None
    try:
        yield
    except SystemExit as stop:
        if stop.code == signal.SIGTERM:
            raise KeyboardInterrupt from None
        raise
    finally:
        if of_main:
            signal.signal(signal.SIGTERM, before)


def _nobody_reads() -> bool:
    """Whether the reader of stdout has gone, as of `mrd-ray status RUN | head -1`: other pipes break too."""
    try:
        sys.stdout.flush()
        return False
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return True


def _unforeseen(command: str, problem: Exception) -> UserError:
    """An exception that is not ours, as a sentence."""
    if module := missing_module(problem):
        found = UserError(what_to_do(module))
        found.__cause__ = problem
        return found
    inner: BaseException = problem
    while type(inner).__module__.startswith("ray.") and (of := getattr(inner, "cause", None) or inner.__cause__):
        inner = of  # what a worker raised
    reason = (str(inner).strip().splitlines() or ["no reason given"])[0].rstrip(".")
    where = "".join(f" {note}." for note in getattr(problem, "__notes__", []))
    quote = f": {reason}"  # which may be of a row
    found = UserError(
        f"`{command}` was stopped by {type(inner).__name__}{quote}. This is no setting of yours that mrd_ray knows "
        f"to be wrong.{where} {_DEBUG} prints the traceback; with it, please report this",
        quote,
    )
    found.__cause__ = problem
    return found


def _failed(problem: UserError, code: int, debug: bool = False, texts: bool = True) -> int:
    if debug:
        print(whole_traceback(problem), file=sys.stderr, end="")
    told = problem if texts else problem.without_quote
    Console(stderr=True).print(f"error: {told}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code


def _config_of(arguments: Sequence[str]) -> str | None:
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config")
    found: str | None = flags.parse_known_args(arguments)[0].config
    return found


def task_of(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings of the task that the command line names, which must be known before it can be parsed."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--task")
    flags.add_argument("--task_data", type=document.load, default={})
    flags.add_argument("--unlearning.method", dest="method")
    known, _ = flags.parse_known_args(arguments)
    if known.task is None:
        return {}
    from mrd_ray.data import tasks

    copies = known.task_data if isinstance(known.task_data, dict) else {}  # the real parser refuses what is none
    return tasks.load(known.task, copies, known.method)


def _named(model: str, error: Any) -> str:
    """A message of pydantic's that names the setting: ours do by themselves."""
    message = str(error["msg"])
    if message.startswith("Value error, "):
        return message.removeprefix("Value error, ")
    group = model.removesuffix("Config").lower()
    return ".".join([group, *map(str, error["loc"])]) + f": {message}, not {error['input']!r}"
