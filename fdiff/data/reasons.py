"""Why a library failed, in one line."""


def first_line(error: Exception) -> str:
    """The first line of the error's message, or its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
