"""Paths as a person writes them, in a flag or in a file: a shell may not have seen them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

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
