"""From a command line to a call: the configuration, and the flags of the command itself.

The configuration comes from dotted flags, over `--config FILE.yaml`, over `--preset NAME`, over the defaults. The
flags are made from the configuration's dataclasses and from the signature of the command's `run`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from fdiff.config import GROUPS, PRESETS, Config, Method, RuntimeConfig, flat, from_dict, preset, to_dict
from fdiff.config_file import apply_config_file
from fdiff.errors import UserError

COMMANDS = {
    "train": "train a federation, alone or under torchrun, mpirun or srun",
    "plan": "what a run will communicate; trains nothing",
    "partition": "how the images are split among the clients",
    "sample": "draw images from a checkpoint",
    "evaluate": "score the images of a checkpoint",
    "export": "a checkpoint's weights as safetensors, for others",
    "report": "one HTML file of one or several runs",
    "sweep": "a grid of runs, and the table of their scores and costs",
    "verify": "whether a checkpoint, or every one of a run, is sound",
    "submit": "train, or sweep, on Slurm, or in the background here; requeues itself",
    "bench": "measure a part beside its baseline or its bound",
    "doctor": "what this machine has, what is missing, and how to get it",
}

METHOD_HELP = "shared parts: full, usplit (all three), ulatdec (bottleneck and decoder), udec (decoder)"


@dataclass(frozen=True)
class Request:
    """A command ready to be called: its name and function, its configuration if it takes one, its flags."""

    name: str
    run: Callable[..., None]
    arguments: dict[str, Any]

    @property
    def collective(self) -> bool:
        """Whether all ranks work on it together."""
        return _takes(self.run, "comm")

    @property
    def meets_by_itself(self) -> bool:
        """Whether it runs on all ranks and joins them itself, so that it can say why that fails."""
        return _takes(self.run, "launch")

    @property
    def folder(self) -> Path:
        """What it works on: by this two jobs are told apart where no launcher does so."""
        config, of = self.arguments.get("config"), self.arguments.get
        return config.run_dir if config else Path(of("checkpoint") or of("out") or of("file") or ".")

    @property
    def runtime(self) -> RuntimeConfig:
        """Where and how it runs."""
        config = self.arguments.get("config")
        return config.runtime if config else self.arguments.get("runtime", RuntimeConfig())


def parse(arguments: list[str]) -> Request:
    """The request that the command line makes; UserError names what is wrong with it."""
    name, *flags = arguments
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command; choose one of {', '.join(COMMANDS)}")
    run = importlib.import_module(f"fdiff.commands.{name}").run
    parser = _parser(name, run)
    if not _takes(run, "config"):
        return Request(name, run, _instantiate(run, _parse_flags(parser, flags)))
    base, print_config, flags = _base(flags)
    parser.set_defaults(flat(to_dict(base)))
    values = _parse_flags(parser, flags)
    config = from_dict({group: values.pop(group) for group in ("method", *GROUPS)})
    if print_config:
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        sys.exit(0)
    return Request(name, run, {"config": config, **values})


def _parser(name: str, run: Callable[..., None]) -> ArgumentParser:
    """The flags of a command, from the signature of its `run` and, if that takes one, the configuration's fields."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = inspect.getmodule(run).__doc__
    parser = ArgumentParser(
        prog=f"fdiff {name}", description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_function_arguments(run, skip={"config", "comm", "device", "launch"}, as_group=False, as_positional=True)
    _let_lists_be_words(parser)
    if _takes(run, "config"):
        parser.add_argument("--preset", metavar="NAME", help=PRESETS)
        parser.add_argument("--config", metavar="FILE", help="YAML file of fields, over the preset and under the flags")
        parser.add_argument("--print-config", action="store_true", help="print the resulting configuration and end")
        parser.add_argument("--method", type=Method, help=METHOD_HELP)
        for group, fields in GROUPS.items():
            parser.add_class_arguments(fields, group)
    return parser


def _let_lists_be_words(parser: ArgumentParser) -> None:
    """Take a list without a flag as words, `fdiff report RUN RUN`; by itself the parser wants `'[RUN, RUN]'`."""
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if not action.option_strings and get_origin(hint) is list:
            action.nargs, action.metavar = "+", action.dest.removesuffix("s").upper()
            action._typehint = get_args(hint)[0]


def _takes(run: Callable[..., None], name: str) -> bool:
    return name in inspect.signature(run).parameters


def _parse_flags(parser: ArgumentParser, flags: list[str]) -> dict[str, Any]:
    try:
        values = parser.parse_args(_with_values(parser, flags)).clone(with_meta=False).as_dict()
    except ArgumentError as error:
        message = _in_our_words(str(error))
        hint = f"; {parser.prog} --help lists the flags" if message.startswith("unrecognized") else ""
        raise UserError(message + hint) from None
    return {k: v for k, v in values.items() if k not in ("preset", "config", "print_config")}


def _with_values(parser: ArgumentParser, flags: list[str]) -> list[str]:
    """Let `--json` stand for `--json true`, for every flag that is true or false."""
    switches = {o for a in parser._actions for o in a.option_strings if getattr(a, "_typehint", None) is bool}
    following = [*flags[1:], "--"]
    return [
        f"{flag}=true" if flag in switches and after.lower() not in ("true", "false") else flag
        for flag, after in zip(flags, following, strict=False)
    ]


def _in_our_words(message: str) -> str:
    """The parser's complaint in the wording of the configuration's own."""
    found = re.match(r'Parser key "([^"]+)":\s+Expected an? (.+?)\. Got value: (.*)', " ".join(message.split()))
    if not found:
        return " ".join(message.split())
    name, kind, value = found.groups()
    choices = re.findall(r"'([^']*)'", kind) if "Literal" in kind else []
    right = f"choose one of {', '.join(choices)}" if choices else f"it must be of type {_type_name(kind)}"
    return f"{name}: {value!r} is not valid; {right}"


def _type_name(kind: str) -> str:
    names = re.findall(r"'([^']*)'", kind) or [kind]
    return " or ".join("list of whole numbers" if n == "tuple" else n.replace("NoneType", "null") for n in names)


def _base(flags: list[str]) -> tuple[Config, bool, list[str]]:
    """The configuration under the flags: `--config` over `--preset`, or with `--resume` alone that of the run."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset")
    early.add_argument("--config", type=Path)
    early.add_argument("--print-config", action="store_true")
    early.add_argument("--run.dir", dest="run_dir", type=Path)
    try:
        given, rest = early.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    if given.run_dir is not None:
        rest += ["--run.dir", str(given.run_dir)]
    file = given.config
    if "--resume" in rest and given.preset is None and file is None and given.run_dir is not None:
        file = given.run_dir / "config.yaml" if (given.run_dir / "config.yaml").exists() else None
    base = preset(given.preset) if given.preset else Config()
    return (apply_config_file(base, file) if file else base), given.print_config, rest


def _instantiate(run: Callable[..., None], values: dict[str, Any]) -> dict[str, Any]:
    """The `runtime` group of a command without a configuration, as its dataclass."""
    return {k: RuntimeConfig(**v) if k == "runtime" else v for k, v in values.items()}
