"""The ways in which a command ends without success; the command line turns each into one line and a status."""

import signal


class UserError(ValueError):
    """A bad request: the message names the field or file, its value, and what would be right."""

    status = 2
    agreed = False  # whether every rank raises it, so that one says it for all


class RunError(RuntimeError):
    """A run that failed: the message names the rank, client, round or file."""

    status = 1
    agreed = False  # as above


class Interrupted(RunError):
    """A run that a signal stopped; its status is 128 plus the signal's number, as a shell has it."""

    def __init__(self, number: int, what: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{what and '; '}{what}")
        self.number, self.status = number, 128 + number


LINE = 2000  # characters; more than that nobody reads, and a value from a file may have any number


def one_line(error: Exception, what: str = "") -> UserError | RunError:
    """The error as one of ours, in one line that begins with what was being done; of a long one the two ends."""
    text = " ".join(str(error)[: 100 * LINE].split())
    if len(text) > LINE:
        text = f"{text[: LINE // 2]} ... {text[-LINE // 2 :]}"
    prefix = f"{what}: " if what else ""
    if isinstance(error, Interrupted):
        return error
    if isinstance(error, UserError):
        return UserError(prefix + text)
    if isinstance(error, RunError):
        return RunError(prefix + text)
    return RunError(f"{prefix}{type(error).__name__}: {text}")


def first_line(error: Exception) -> str:
    """The first line of a library's message, or the error's type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
