"""What must be in no setting, since settings are recorded in run directories and shown in reports and logs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mrd_ray.errors import UserError

_IN_URI = re.compile(
    r"://[^/@:]*:(?!\d+/)[^@]*@"  # USER:PASSWORD@, whose password may hold a slash; not HOST:8080/a@b
    r"|https?://[^/@]+@"  # a token alone; elsewhere that is a user, or a container
    r"|[?&](x-amz-signature|x-amz-security-token|x-goog-signature|signature|sig|token|access_token|api_?key|key|auth|passw(or)?d|secret)=",
    re.IGNORECASE,
)
_FLAG = re.compile(r"-(.*[-_.])?(token|secret|password|key|credentials?)", re.IGNORECASE)


def refuse_credentials(setting: str, value: Any) -> None:
    """Raises UserError if a text, or one in a mapping or list, is a URI with credentials. It does not repeat them."""
    if isinstance(value, str) and _IN_URI.search(value):
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
    for word in command:
        name, equals, _ = word.partition("=")
        if _FLAG.fullmatch(flag):
            word = "***"
        elif equals and _FLAG.fullmatch(name):
            word = f"{name}=***"
        elif _IN_URI.search(word):
            word = "***"
        found.append(word)
        flag = word
    return found
