"""YAML files of fields: of a configuration, over which they are laid, or of a sweep.

The file is data from outside: its size, its depth and its kinds of nodes are checked before anything is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fdiff.config import Config, from_dict, to_dict
from fdiff.errors import UserError

MAX_BYTES = 64 * 1024  # the output of --print-config takes 2
MAX_DEPTH = 8


def apply_config_file(base: Config, file: Path, flag: str = "--config") -> Config:
    """The base with the fields of the file; UserError names the flag and the file that cannot be used."""
    values = to_dict(base)
    lay_over(values, read_fields(file, flag))
    return from_dict(values)


def lay_over(values: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Put fields, nested as in a file, over the values, in place."""
    for name, value in fields.items():
        both = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if both else value


def read_fields(file: Path, flag: str) -> dict[str, Any]:
    """The fields of a file, nested; UserError names the flag and the file that cannot be used."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{flag}: {file} cannot be read ({error.strerror}); give a YAML file of fields") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{flag}: {file} has more than {MAX_BYTES} bytes; give a YAML file of fields")
    try:
        fields = _plain(data.decode("utf-8"))
        repr(fields)  # or no message could show it: Python refuses to write a number of thousands of digits
    except Exception as error:  # a date, a number or a tag that means nothing makes YAML's own code fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{flag}: {file} is not YAML ({reason})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{flag}: {file} has no fields; it must look like the output of --print-config")
    return fields


def _plain(text: str) -> Any:
    """The value of a document without aliases, with which a few lines can stand for gigabytes, and not deep."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1}: an alias, *{event.anchor}; write its value")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"line {event.start_mark.line + 1}: more than {MAX_DEPTH} levels deep")
    return yaml.safe_load(text)
