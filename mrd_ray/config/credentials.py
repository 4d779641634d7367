"""What must be in no setting, since settings are recorded in run directories and shown in reports and logs."""

import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mrd_ray.errors import UserError

# a name that holds one of the first, or one of the others between separators: "tokenizer" and "max_tokens" are none
_SECRET = re.compile(
    r".*(secret|passw|passphrase|signature|credential|authorization|bearer|token(?!iz|s|_type|_id|_length)"
    r"|(api|access|account)[-_]?key).*|(.*[-_.])?(key|sig|oauth|auth|pass|pwd)([-_.].*)?",
    re.IGNORECASE,
)
_IN_URI = re.compile(
    r"://[^/@:]*:(?!\d+/)[^@]*@"  # USER:PASSWORD@, whose password may hold a slash; not HOST:8080/a@b
    r"|https?://[^/@]+@",  # a token alone; elsewhere that is a user, or a container
    re.IGNORECASE,
)
_AFTER_PATH = re.compile(r"[?&;#]")


def _in_uri(text: str) -> bool:
    return _IN_URI.search(text) is not None or any(
        _SECRET.fullmatch(name)
        for word in (*text.split(), *urllib.parse.unquote(text).split())
        for part in _AFTER_PATH.split(word)[1:]
        for name, given, _ in [part.partition("=")]
        if given
    )


def secret_names(tree: object) -> Iterator[str]:
    """Keys, of mappings in mappings and lists, that are those of secrets and have a value."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if value and isinstance(value, str | list) and _SECRET.fullmatch(name):
                yield name
    for part in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ():
        yield from secret_names(part)


def refuse_credentials(setting: str, value: Any) -> None:
    """Raises UserError if a text, or one in a mapping or list, is a URI with credentials. It does not repeat them."""
    if isinstance(value, str) and _in_uri(value):
        raise UserError(
            f"{setting}: a URI here holds credentials, which would be recorded with the run. Leave them out of it, and "
            "set them in the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, "
            "HF_TOKEN"
        )
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for one in value:
            refuse_credentials(setting, one)


def recordable(command: Sequence[str]) -> list[str]:
    """A command line, which need not be one of ours, without what looks like a secret."""
    found = []
    flag = ""
    for given in command:
        word = given
        name, equals, _ = word.partition("=")
        if flag.startswith("-") and _SECRET.fullmatch(flag.lstrip("-")):
            word = "***"
        elif equals and _SECRET.fullmatch(name.lstrip("-")):
            word = f"{name}=***"
        elif _in_uri(word):
            word = "***"
        found.append(word)
        flag = given
    return found
