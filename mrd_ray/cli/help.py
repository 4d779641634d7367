"""What `--help` prints of a command: the settings that most people need, or all."""

import shutil
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from mrd_ray.config.base import is_common
from mrd_ray.config.words import default_in, default_of, is_section, kind_of, known_part, leaves

_FLAGS = {
    "--config FILE": "YAML file of these settings; flags override it.",
    "--task TASK": "A task of `mrd-ray tasks`, or your own YAML file. Its settings become the defaults.",
    "--task_data MAP": "Local copies of the task's hub datasets: '{locuslab/TOFU: FOLDER}'.",
    "--print_config": "Print all settings as YAML and stop.",
    "--quiet": "Short for --output.quiet true.",
    "--debug": "After an error, print the whole traceback.",
}


def help_of(
    prog: str, command: str, config: Any, positional: Mapping[str, Any], of_task: bool, everything: bool
) -> str:
    """The help of one command, as wide as the terminal. everything: with the settings that few people need."""
    width = min(100, shutil.get_terminal_size().columns)
    fields = config.model_fields
    required = [f"--{name}.{inner} {inner.upper()}" for name, inner in _required(fields, positional)]
    words = [*(name.upper() + (" ..." if many else "") for name, many in positional.items()), *required, "[settings]"]
    lines = textwrap.wrap(f"usage: {prog} {command} {' '.join(words)}", width, subsequent_indent="    ")
    lines += ["", *_wrapped(config.__doc__ or "", width, "")]
    lines += [""]
    for name in positional:
        lines += _entry(name.upper(), fields[name], width)
    for flag, text in _FLAGS.items():
        if (flag.startswith("--task") and not of_task) or (flag == "--quiet" and "output" not in fields):
            continue
        lines += [f"  {flag}", *_wrapped(text, width, "      ")]
    alone = {name: field for name, field in fields.items() if not is_section(known_part(field.annotation))}
    for name, field in alone.items():
        if name not in positional:
            lines += _entry(f"--{name}", field, width)
    left_out = 0
    for name, field in fields.items():
        section = known_part(field.annotation)
        if not is_section(section):
            continue
        shown = dict(leaves(section.model_fields, f"{name}."))
        common = {flag: one for flag, one in shown.items() if is_common(one)}
        chosen = common | shown if everything else common
        left_out += len(shown) - len(chosen)
        if chosen:
            lines += ["", *_wrapped(f"{name}: {section.__doc__ or ''}".split("\n\n")[0], width, "")]
        own = None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
        for flag, one in chosen.items():
            lines += _entry(f"--{flag}", one, width, default_in(own, flag.partition(".")[2], one))
    if left_out:
        lines += ["", f"{left_out} more settings: {prog} {command} --help=all"]
    return "\n".join(lines)


def _required(fields: Mapping[str, FieldInfo], positional: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, field in fields.items():
        if is_section(field.annotation) and field.is_required() and name not in positional:
            for inner, one in field.annotation.model_fields.items():  # type: ignore[union-attr]
                if one.is_required():
                    yield name, inner


def _entry(name: str, field: FieldInfo, width: int, default: str | None = None) -> list[str]:
    default = default_of(field) if default is None else default
    type_of = kind_of(field).removesuffix(", or unset")
    about = default if default == "required" else f"default: {default}"
    head = textwrap.wrap(f"{name}  {type_of} ({about})", width - 2, subsequent_indent="      ", break_on_hyphens=False)
    return [f"  {line}" for line in head] + _wrapped(field.description or "", width, "      ")


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
