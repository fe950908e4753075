"""YAML files of fields: of a configuration, over which they are laid, or of a sweep.

The file is data from outside: its size, its depth and its kinds of nodes are checked before anything is made of it.
Scalars are those of YAML 1.2, all numbers decimal: YAML 1.1, PyYAML's own, takes 1e-4 for a word, 012 for ten and 1:30
for ninety.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fdiff import config_unet2d
from fdiff.config import PATHS, Config, from_dict, nearest, to_dict
from fdiff.errors import UserError, first_line
from fdiff.runtime import expand_path

MAX_BYTES = 64 * 1024  # the output of --print-config takes 2
MAX_DEPTH = 8
_PREFIX = "tag:yaml.org,2002:"
_SCALARS = [
    (_PREFIX + "null", re.compile(r"(?:null|Null|NULL|)\Z")),
    (_PREFIX + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")),
    (_PREFIX + "int", re.compile(r"[-+]?[0-9]+\Z")),
    (_PREFIX + "float", re.compile(r"(?i:[-+]?(?:\.[0-9]+|[0-9]+\.?[0-9]*)(?:e[-+]?[0-9]+)?|[-+]?\.inf|\.nan)\Z")),
]


class _Loader(yaml.SafeLoader):
    """Plain data: no `~` for null, which is a home here, and no key twice."""

    yaml_implicit_resolvers = {None: _SCALARS}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As the base does, which takes the last of equal keys."""
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if (name := (key.tag, str(key.value))) in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value!r} is there twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_constructor(_PREFIX + "int", lambda loader, node: int(loader.construct_scalar(node)))
_Loader.add_constructor(
    _PREFIX + "float", lambda loader, node: float(re.sub(r"\.(?=inf|nan)", "", loader.construct_scalar(node).lower()))
)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than a string."""

    yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _SCALARS}


def scalar(text: str) -> Any:
    """The value of a word, or of a list of words in brackets, as a file has it; what is no YAML is text."""
    try:
        return _plain(text)
    except Exception:
        return text


def as_yaml(config: Config) -> str:
    """The text of a file from which `apply_config_file` makes the same configuration."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False)


def apply_config_file(base: Config, file: Path, flag: str = "--config") -> Config:
    """The base with the fields of the file; UserError names the flag and the file that cannot be used."""
    values, fields = to_dict(base), read_fields(file, flag)
    try:
        lay_over(values, fields)
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{flag}: {file}: {error}") from None


def lay_over(values: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Put fields, nested as in a file, over the values, in place; paths as a shell would expand them. UserError.

    What stands in the file `model.config` becomes `model.options`.
    """
    for name, value in fields.items():
        both = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if both else value
    for group, _, name in (path.partition(".") for path in PATHS):
        if group in fields and isinstance(given := values[group], dict) and isinstance(given.get(name), str):
            given[name] = expand_path(f"{group}.{name}", given[name])
    model = fields.get("model")
    if isinstance(model, dict) and model.get("config") is not None:
        more = model.get("options", {})
        values["model"]["options"] = more if not isinstance(more, dict) else {**_of_config(values["model"]), **more}
    if isinstance(model, dict):
        values["model"].pop("config", None)


def _of_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the file `model.config`. UserError names it."""
    file = model["config"]
    if not isinstance(file, str):
        raise UserError(f"model.config: {file!r} is not valid; it must be a path")
    return options_in(Path(expand_path("model.config", file)), str(model.get("kind")))


def options_in(file: Path, kind: str) -> dict[str, Any]:
    """What `model.options` become by --model.config FILE, diffusers' config.json, for a model of this kind. UserError.

    They are all that such a file may say, so that what it leaves out is what diffusers makes of it.
    """
    if kind != "unet2d":
        raise UserError(f"model.config: {file} is not valid with model.kind {kind}; it is for --model.kind unet2d")
    try:
        return read_unet2d(file)
    except UserError as error:
        raise UserError(f"model.config: {error}") from None


def read_unet2d(file: Path) -> dict[str, Any]:
    """The settings of a UNet2DModel in a config.json of diffusers, complete but for what data decide. UserError."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give diffusers' config.json") from None
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        given = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({first_line(error)}); give diffusers' config.json") from None
    if not isinstance(given, dict):
        raise UserError(f"{file} has no settings; give diffusers' config.json")
    if (kind := given.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise UserError(f"{file} is of a {kind}; give the config.json of a UNet2DModel")
    options = {name: value for name, value in given.items() if not name.startswith("_")}
    if unknown := [name for name in options if name not in config_unet2d.OPTIONS]:
        near = nearest(unknown[0], config_unet2d.OPTIONS)
        raise UserError(f"{file} has {unknown[0]!r}, which is no setting of UNet2DModel{near and '; '}{near}")
    return {**config_unet2d.DEFAULTS, **options}


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
    return _Loader(text).get_single_data()
