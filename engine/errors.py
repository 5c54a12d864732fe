"""Errors in the user's input or machine, as opposed to mistakes in the code."""


class InputError(ValueError):
    """What was given cannot be used.

    The message is one line that says what, where and what to do next. The command line
    prints it and exits with 1; a caller of the library can catch it as a ValueError.
    """


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP, after everything worth keeping has been written.

    The message says what was kept and how to continue. The command line exits with
    128 + `signum`. Like KeyboardInterrupt, it is not an Exception, so `except Exception` does
    not swallow it.
    """

    def __init__(self, message: str, signum: int = 2):
        super().__init__(message)
        self.signum = signum
