"""A YAML file of fields laid over a configuration."""

from __future__ import annotations

from pathlib import Path

import yaml

from fdiff.config import Config, from_dict, to_dict
from fdiff.errors import UserError


def overlay(base: Config, file: Path, flag: str = "--config") -> Config:
    """The base with the fields of the file; UserError names the flag and the file that cannot be used."""
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag}: {file} cannot be read ({error.strerror}); give a YAML file of fields") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: {file} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{flag}: {file} has no fields; it must look like the output of --print-config")
    values = to_dict(base)
    for name, value in fields.items():
        both = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if both else value
    return from_dict(values)
