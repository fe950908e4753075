"""Paths as a person writes them, in a flag or in a file: a shell may not have seen them. And files to be written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fdiff.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expand_path(name: str, text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with `~`, `~USER`, `$NAME` and `${NAME}` as a shell would expand them.

    UserError names the flag or field and what it lacks: the path itself, a variable (an empty one would make another
    path of it), a user.
    """
    if not text:
        raise UserError(f"{name}: '' is not valid; name a file or folder, or leave it out")
    home, slash, rest = text.partition("/")
    if home.startswith("~"):
        if (found := os.path.expanduser(home)) == home:
            raise UserError(f"{name}: {text!r}: {home} is nobody's home; write ./{home} for a file of that name")
        home = found

    def value(match: re.Match[str]) -> str:
        variable = match[1] or match[2]
        if not environment.get(variable):
            raise UserError(f"{name}: {text!r}: the variable {variable} is not set or empty; set it, or write it out")
        return environment[variable]

    return _VARIABLE.sub(value, home + slash + rest)


def check_output(flag: str, path: Path, suffixes: Sequence[str]) -> None:
    """UserError unless a file of one of these suffixes can be written there, as far as that shows before the work.

    Folders on the way to it that do not exist count as writable: whoever writes makes them.
    """
    right = f"name a file that ends in {' or '.join(suffixes)}"
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{flag}: {path} is not valid; {right}")
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder; {right}")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{flag}: {path} cannot be written ({nearest} is no folder to write in); give another path")
