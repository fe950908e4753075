"""The ways in which a command ends without success; the command line turns each into one line and a status."""

import errno
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


# What the system refuses because of what was asked for, and what to do then; all else befalls a sound request.
_CHECK, _ALLOW = "check the path", "give this user the right to it, or name another"
REQUESTED = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), _ALLOW),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG), _CHECK),
    **dict.fromkeys((errno.EEXIST, errno.EROFS), "name another"),
}


def one_line(error: Exception, what: str = "") -> UserError | RunError:
    """The error as one of ours, in one line that begins with what was being done; of a long one the two ends.

    Of an error of a file the line says file, reason and remedy. What would act on a terminal is escaped.
    """
    names_file = isinstance(error, OSError) and error.filename is not None
    text = printable(" ".join((_of_file(error) if names_file else str(error))[: 100 * LINE].split()))
    if len(text) > LINE:
        text = f"{text[: LINE // 2]} ... {text[-LINE // 2 :]}"
    prefix = f"{what}: " if what else ""
    if isinstance(error, Interrupted):
        return error
    if isinstance(error, UserError) or (names_file and error.errno in REQUESTED):
        return UserError(prefix + text)
    if isinstance(error, RunError) or names_file:
        return RunError(prefix + text)
    return RunError(f"{prefix}{type(error).__name__}: {text}")


def _of_file(error: OSError) -> str:
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{names}: {error.strerror}; {REQUESTED.get(error.errno, 'see to its disk, or name another place')}"


def printable(text: str, keep: str = "") -> str:
    """The text with every character that a terminal would not show as itself escaped, ESC as \\x1b, but those kept."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shown(name: object) -> str:
    """A path or another name as a line of output has it: in that line, and escaped as above."""
    return printable(str(name))


def first_line(error: Exception) -> str:
    """The first line of a library's message, or the error's type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
