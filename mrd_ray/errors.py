"""The exceptions that mean "you can fix this", not "this is a bug of mrd_ray"."""

import traceback


class UserError(Exception):
    """Bad input or a bad setting. The message names it, and says what was expected and what to do.

    The command line prints it without a traceback and exits with 1.

    Args:
        quotes: parts of the message that quote rows, or may do so.
    """

    def __init__(self, message: str, *quotes: str) -> None:
        super().__init__(message)
        self.quotes = quotes

    @property
    def without_quote(self) -> str:
        """The message without texts of rows."""
        message = str(self)
        for quote in self.quotes:
            message = message.replace(quote, "", 1)
        return message


class SettingsError(UserError):
    """Settings that are wrong with any data and model: the command line exits with 2."""


class Unfit(UserError):
    """This node cannot do what is needed, but another node may."""


def whole_traceback(problem: BaseException) -> str:
    """The traceback with all its causes, even if a UserError hides a library's exception from readers."""
    seen: BaseException | None = problem
    while seen is not None:
        seen.__suppress_context__ = seen.__cause__ is not None
        seen = seen.__cause__ or seen.__context__
    return "".join(traceback.format_exception(problem))
