"""Command lines made from config classes: flags, YAML, tasks, and what goes wrong with them."""

import argparse
import difflib
import io
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from mrd_ray.cli.ending import DEBUG, DONE, REFUSED, called, failed
from mrd_ray.cli.help import help_of
from mrd_ray.config import document
from mrd_ray.config.credentials import refuse_credentials
from mrd_ray.config.renamed import OLD_NAMES, old_names_in, with_new_names
from mrd_ray.config.words import is_section, kind, known_part, leaves, problems, sections
from mrd_ray.errors import SettingsError, UserError

_HELP = {"-h": False, "--help": False, "--help=all": True}  # whether it shows all settings
_PRINT, _QUIET = "print_config", "quiet"


class _Arguments(argparse.ArgumentParser):
    """Raises SettingsError where argparse would exit."""

    def error(self, message: str) -> Any:
        raise SettingsError(message.removeprefix("argument "))


@dataclass(frozen=True)
class CommandLine:
    """Commands, each with a config class that says what its flags are.

    of_tasks: the commands that take their defaults from a task (see `data.tasks`). positional: by command, the fields
    that are no flags, with how many words each takes where it is not one.
    """

    prog: str
    description: str
    commands: Mapping[str, Any]
    of_tasks: Collection[str]
    positional: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)

    def settings(self, arguments: Sequence[str]) -> Any:
        """The config of the command that the arguments name. Raises UserError, mostly a SettingsError."""
        return self._parsed(arguments)[0]

    def _parsed(self, arguments: Sequence[str]) -> tuple[Any, bool]:
        """The config, and whether it is only to be printed."""
        command = self._command(arguments)
        config = self.commands[command]
        given = self._given(command, arguments[1:])
        printed = given.pop(_PRINT, False)
        settings: dict[Any, Any] = {}
        for source in [*map(_of_file, given.pop("config", [])), _tree(config, given)]:
            settings = _merged(config, settings, _with_new_names(source))
        if (task := given.get("task")) is not None:
            copies = _read("task_data", dict[str, str], given.get("task_data", "{}"))
            settings = _merged(config, self._of_task(config, task, copies, settings), settings)
        for name, about in config.model_fields.items():
            if is_section(about.annotation) and about.is_required():
                settings.setdefault(name, {})  # so that what it needs is named
        try:
            return config(**settings), printed
        except ValidationError as problem:
            raise SettingsError("; ".join(self._as_typed(command, problems(config, problem)))) from None
        except TypeError:
            raise SettingsError(f"expected settings by name, not {', '.join(map(repr, settings))}") from None

    def _command(self, arguments: Sequence[str]) -> str:
        names = ", ".join(self.commands)
        if not arguments:
            raise SettingsError(f"a command is required: one of {names}")
        if arguments[0] not in self.commands:
            raise SettingsError(f"{arguments[0]}: expected a command, one of {names}")
        return arguments[0]

    def _given(self, command: str, arguments: Sequence[str]) -> dict[str, Any]:
        """What the flags of a command say, as text, by the settings' names."""
        config = self.commands[command]
        line = _Arguments(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        positional = self.positional.get(command, {})
        for word, many in positional.items():
            line.add_argument(word, nargs="*" if many else "?")
        names = [name for name, _ in leaves(config.model_fields) if name not in positional]
        names += sections(config.model_fields)
        names += [old for old, new in OLD_NAMES.items() if new in names]
        names += ["task", "task_data"] if command in self.of_tasks else []
        for name in names:
            line.add_argument(f"--{name}", dest=name)
        line.add_argument("--config", dest="config", action="append")  # later files go over earlier ones
        for name in (_PRINT, *([_QUIET] if "output" in config.model_fields else [])):
            line.add_argument(f"--{name}", dest=name, action="store_true")
        known, others = line.parse_known_args(arguments)
        if others:
            flag = others[0].partition("=")[0]
            if not flag.startswith("-"):
                raise SettingsError(f"{flag}: unexpected word; settings are given as --NAME VALUE")
            close = difflib.get_close_matches(flag, [f"--{name}" for name in names], 1, 0.75)
            raise SettingsError(f"{flag}: there is no such flag" + (f"; did you mean {close[0]}?" if close else ""))
        given = {name: value for name, value in vars(known).items() if value != []}
        if given.pop(_QUIET, False):
            given["output.quiet"] = "true"
        return given

    def _of_task(self, config: Any, task: str, copies: dict[str, str], settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a task that the command has. Raises UserError if there is no such setting."""
        from mrd_ray.data import tasks

        unlearning = settings.get("unlearning")
        method = unlearning.get("method") if isinstance(unlearning, Mapping) else None
        sections = tasks.load(task, copies, method)
        ours = {name: section for name, section in sections.items() if name in config.model_fields}
        for name, section in ours.items():
            inner = config.model_fields[name].annotation
            for key in section if is_section(inner) else ():
                if key not in inner.model_fields:
                    raise SettingsError(f"task: {task}: {name}.{key}: there is no such setting")
        return ours

    def _as_typed(self, command: str, sentences: list[str]) -> list[str]:
        """The sentences, with settings that are required named as the flags that they are."""
        words = self.positional.get(command, {})
        required = [sentence.removesuffix(" is required") for sentence in sentences if " is required" in sentence]
        if not required:
            return sentences
        flags = [name.upper() if name in words else f"--{name}" for name in required]
        are = "is" if len(flags) == 1 else "are"
        others = [sentence for sentence in sentences if " is required" not in sentence]
        return [f"{', '.join(flags)} {are} required", *others]

    def run(self, arguments: Sequence[str], call: Callable[[Any], int]) -> int:
        """Parse, call, and return the exit code; a UserError is printed, and is exit code 1, of the settings 2."""
        for stream in (sys.stdout, sys.stderr):  # never fail after success for want of a glyph
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        debug = DEBUG in arguments  # of no command, and anywhere on the line
        arguments = [argument for argument in arguments if argument != DEBUG]
        if asked := [argument for argument in arguments if argument in _HELP]:
            print(self._help(arguments[0], everything=any(_HELP[one] for one in asked)))
            return DONE
        try:
            refuse_credentials("command line", arguments)
            config, printed = self._parsed(arguments)
        except UserError as problem:
            command = f" {arguments[0]}" if arguments and arguments[0] in self.commands else ""
            print(f"{self.prog}{command} --help lists the settings", file=sys.stderr)
            return failed(problem, REFUSED, debug)
        if printed:
            print(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True), end="")
            return DONE
        return called(config, arguments[0], call, debug)

    def _help(self, command: str, everything: bool) -> str:
        if command in self.commands:
            config, words = self.commands[command], self.positional.get(command, {})
            return help_of(self.prog, command, config, words, command in self.of_tasks, everything)
        rows = [f"  {name:10} {(one.__doc__ or '').strip().splitlines()[0]}" for name, one in self.commands.items()]
        return "\n".join([f"usage: {self.prog} COMMAND ...", "", self.description, "", *rows])


def _of_file(file: str) -> dict[str, Any]:
    """The settings of a YAML file. Raises SettingsError."""
    try:
        content = document.load(Path(file).read_text(encoding="utf-8"))
    except UnicodeDecodeError as problem:
        raise SettingsError(f"--config: cannot read {file}: it is not UTF-8 text ({problem.reason})") from None
    except OSError as problem:
        raise SettingsError(f"--config: cannot read {file}: {problem.strerror or problem}") from None
    except ValueError as problem:
        raise SettingsError(f"--config: {file}: {problem}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"--config: {file}: expected settings by section, such as `run: {{dir: RUN}}`")
    return content


def _tree(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by section, of flags. A flag of a section goes under those of its settings."""
    fields = dict(leaves(config.model_fields)) | sections(config.model_fields)
    tree: dict[str, Any] = {}
    for name in sorted(given, key=lambda name: name.count(".")):
        if name in ("task", "task_data"):
            continue
        annotation = str if name == "config" else fields[OLD_NAMES.get(name, name)].annotation
        *above, last = name.split(".")
        inner = tree
        for section in above:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise SettingsError(f"--{name}: --{section} is given too, as {inner!r:.40}")
        value = given[name]
        inner[last] = [*value] if isinstance(value, list) else _read(name, annotation, value)
    return tree


def _read(name: str, annotation: Any, text: str) -> Any:
    """The value of a flag. Words and numbers stay text, which pydantic reads by their type; the rest is YAML."""
    wanted = known_part(annotation)
    if text == "null" and "unset" in kind(annotation):
        return None
    of_numbers = get_origin(wanted) is Literal and not all(isinstance(one, str) for one in get_args(wanted))
    if is_section(wanted) or get_origin(wanted) in (dict, tuple) or of_numbers or text[:1] in ("[", "{"):
        try:
            value = document.load(text)
        except ValueError as problem:
            if text[:1] in ("[", "{") and "text" in kind(annotation).split(", "):
                return text  # a name that begins so
            raise SettingsError(f"--{name}: {problem}") from None
        as_text = isinstance(value, dict | list) and kind(annotation).removesuffix(", or unset") == "text"
        return text if as_text else value
    return text


def _merged(config: Any, below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """Settings, of which those above go over those below, section by section."""
    merged = dict(below)
    for name, value in above.items():
        field_ = config.model_fields.get(name)
        inner = None if field_ is None else known_part(field_.annotation)
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(inner, merged[name], value) if both and is_section(inner) else value
    return merged


def _with_new_names(settings: dict[Any, Any]) -> dict[Any, Any]:
    """The settings under their new names; those that had another are told."""
    for old in old_names_in(settings):
        print(f"{old} is now {OLD_NAMES[old]}; the old name works in this release only", file=sys.stderr)
    try:
        return with_new_names(settings)
    except ValueError as problem:
        raise SettingsError(str(problem)) from None
