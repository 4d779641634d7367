"""The one exception that means "you can fix this", as opposed to a defect of ours."""

import traceback


class UserError(Exception):
    """Bad input or setting. The message names it, says what was expected and what to do.

    The command line prints it without a traceback and exits with 1.

    Args:
        quote: the part of the message that quotes a row, or may.
    """

    def __init__(self, message: str, quote: str = "") -> None:
        super().__init__(message)
        self.quote = quote

    @property
    def without_quote(self) -> str:
        """The message without texts of rows."""
        return str(self).replace(self.quote, "", 1) if self.quote else str(self)


class SettingsError(UserError):
    """Settings that are wrong by themselves, whatever the data and models: the command line exits with 2."""


def whole_traceback(problem: BaseException) -> str:
    """The traceback with all that led to it, also where a UserError hides a library's exception from its reader."""
    seen: BaseException | None = problem
    while seen is not None:
        seen.__suppress_context__ = seen.__cause__ is not None
        seen = seen.__cause__ or seen.__context__
    return "".join(traceback.format_exception(problem))
