"""Settings that had another name before. The old one works in this release; take an entry out with the next."""

from collections.abc import Mapping
from typing import Any

OLD_NAMES = {
    "ray.cpus_per_actor": "ray.cpus_per_process",
    "ray.cpus_per_worker": "ray.cpus_per_process",
    "ray.cpus_per_task": "ray.cpus_per_process",
}


def old_names_in(settings: Mapping[Any, Any]) -> list[str]:
    """The old names that these settings, by section, are given by."""
    return [old for old in OLD_NAMES if (part := _section(settings, old)) is not None and _setting(old) in part]


def with_new_names(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """The settings under their new names. Raises ValueError if one is given by two names with different values."""
    renamed = dict(settings)
    for old in old_names_in(settings):
        section = old.partition(".")[0]
        renamed[section] = section_with_new_names(section, renamed[section])
    return renamed


def section_with_new_names(section: str, settings: Mapping[object, object]) -> dict[object, object]:
    """The settings of one section under their new names. Raises ValueError as `with_new_names` does."""
    found = dict(settings)
    for old, new in OLD_NAMES.items():
        if old.startswith(f"{section}.") and _setting(old) in found:
            value = found.pop(_setting(old))
            if found.setdefault(_setting(new), value) != value:
                raise ValueError(
                    f"{old}: is now {new}, which is given too, as {found[_setting(new)]}; give one of them"
                )
    return found


def same_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether stored settings mean the same run, under whatever names. What is shown, `output`, does not count."""
    return _meaning(one) == _meaning(other)


def _meaning(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in with_new_names(settings).items() if name != "output"}


def _setting(name: str) -> str:
    return name.partition(".")[2]


def _section(settings: Mapping[Any, Any], name: str) -> Mapping[Any, Any] | None:
    part = settings.get(name.partition(".")[0])
    return part if isinstance(part, Mapping) else None
