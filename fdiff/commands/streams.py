"""What is printed: it does nothing to a terminal, any encoding can say it, and a reader may leave before the end."""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
from typing import Any

from fdiff.errors import printable

# Of the letters that our own tables and help texts have; whatever else an encoding lacks is escaped.
SPELLED = {
    **{"±": "+-", "−": "-", "–": "-", "…": "...", "×": "x", "·": "*", "→": "->", "≤": "<=", "≥": ">="},
    **{"²": "^2", "³": "^3", "½": "1/2", "√": "sqrt", "Σ": "sum ", "é": "e"},
    **{"α": "alpha", "β": "beta", "γ": "gamma", "ε": "epsilon", "θ": "theta", "η": "eta", "τ": "tau"},
}


class PrintableFormatter(logging.Formatter):
    """Shows what a message brings along of a file's name or of another's text as characters, and has it do nothing."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message in one line; what follows it, a traceback, is left as it is."""
        return printable(super().formatMessage(record))


class PrintableText(io.TextIOWrapper):
    """The same for all that is printed, tables above all; a line may end, and a progress bar go back.

    What the encoding lacks is spelled, `±` as `+-`, or escaped: a command must not fail over it when its work is done.
    """

    def __init__(self, raw: Any, encoding: str, **options: Any) -> None:
        codecs.register_error("fdiff.spell", _spell)
        super().__init__(raw, encoding, "fdiff.spell", **options)

    def write(self, text: str) -> int:
        return super().write(printable(text, keep="\n\t\r"))


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """For the first of the letters that an encoding lacks, what is written for it."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    return SPELLED.get(letter, letter.encode("unicode_escape").decode("ascii")), error.start + 1


class _ReaderMayLeave(io.FileIO):
    """A stream whose reader, e.g. `head`, may have had enough: what follows goes nowhere, and changes nothing."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def take_over() -> None:
    """Make stdout and stderr streams of that kind, unless something else stands in for them, e.g. a test's capture."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__") and stream.fileno() == number:
            raw = io.BufferedWriter(_ReaderMayLeave(number, "w", closefd=False))
            buffered = stream.line_buffering or name == "stderr"
            setattr(sys, name, PrintableText(raw, stream.encoding, line_buffering=buffered))
