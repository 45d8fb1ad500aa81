"""Errors that end the program with one sentence instead of a traceback."""


class BenchmarkError(Exception):
    """Something outside the program is missing or failed; the message says what to do."""

    exit_code = 1


class BadInput(BenchmarkError):
    """The command line asks for something that does not exist or cannot be done."""

    exit_code = 2


class MissingExtra(BenchmarkError):
    """A package of an extra, `bench` mostly, is needed and not installed."""

    def __init__(self, package: str, what: str, extra: str = "bench") -> None:
        super().__init__(f'{what} needs {package}: pip install "gradbal[{extra}]"')


class EndedElsewhere(BenchmarkError):
    """Another process has ended the run, and says why."""


def one_line(exception: BaseException) -> str:
    """The kind of the exception and its message."""
    return f"{type(exception).__name__}: {' '.join(str(exception).split())}"
