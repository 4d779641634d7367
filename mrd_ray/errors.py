"""The one exception that means "you can fix this", as opposed to a defect of ours."""


class UserError(Exception):
    """Bad input or setting. The message names it, says what was expected and what to do.

    The command line prints it without a traceback and exits with 1.
    """
