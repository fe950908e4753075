"""From a command line to a call: the configuration, and the flags of the command itself.

The configuration comes from dotted flags, over `--config FILE.yaml`, over `--preset NAME`, over the defaults. The
flags are made from the configuration's dataclasses and from the signature of the command's `run`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from fdiff import registry
from fdiff.config import GROUPS, PATHS, Config, RuntimeConfig, flat, from_dict, nearest, to_dict
from fdiff.config_file import apply_config_file, as_yaml, options_in, scalar
from fdiff.errors import UserError
from fdiff.presets import PRESETS, preset
from fdiff.runtime import expand_path, launcher

COMMANDS = {
    "train": "train a federation, alone or under torchrun, mpirun or srun",
    "plan": "what a run will communicate; trains nothing",
    "partition": "how the images are split among the clients",
    "sample": "draw images from a checkpoint",
    "evaluate": "score the images of a checkpoint",
    "export": "a checkpoint's weights as safetensors, or for diffusers",
    "report": "one HTML file of one or several runs",
    "sweep": "a grid of runs, and the table of their scores and costs",
    "verify": "whether a checkpoint, or every one of a run, is sound",
    "submit": "train, or sweep, on Slurm, or in the background here; requeues itself",
    "bench": "measure a part beside its baseline or its bound",
    "doctor": "what this machine has, what is missing, and how to get it",
}

OPENS_RUNS = ("sample", "evaluate", "export", "report", "sweep", "verify")  # which may name code
CHECKED = (bool, int, float, Path)  # flags of these types: see `_in_full`
GROUP_FLAGS = {f"--{group}" for group in GROUPS}  # the parser's own, which would read files in its own way
DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
SAYS_WHAT = ("--preset", "--config", "--array", "--sweep", "--method", *(f"--{g}." for g in GROUPS if g != "runtime"))

METHOD_HELP = (
    "shared parts: full, usplit (all three), ulatdec (bottleneck and decoder), udec (decoder), parts joined by + "
    "(encoder+decoder), or your own as MODULE:NAME"
)
CODE_HELP = "your own code, MODULE:NAME, that the run was made with: it is loaded only where it is named again"
CONFIG_HELP = "diffusers' config.json, for unet2d: it becomes model.options, and dim and dim_mults mean nothing then"
CODE_FLAGS = {field.partition(".")[0] for field in registry.FIELDS}  # as the parser has them
OPTION = "--model.options."


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
    flags = _in_full(parser, flags)
    _allow_code(flags, again=name in OPENS_RUNS)
    if not _takes(run, "config"):
        values = _parse_flags(parser, flags)
        return Request(name, run, _instantiate(run, {k: v for k, v in values.items() if k not in CODE_FLAGS}))
    options, flags = _options(flags)
    base, print_config, flags = _base(flags)
    parser.set_defaults(flat(to_dict(replace(base, model=replace(base.model, options={})))))
    values = _parse_flags(parser, flags)
    file = values["model"].pop("config")
    under = base.model.options if file is None else options_in(file, values["model"]["kind"])
    values["model"] |= {"options": {**under, **options}}
    config = from_dict({group: values.pop(group) for group in ("method", *GROUPS)})
    if print_config:
        print(as_yaml(config), end="")
        sys.exit(0)
    for field in registry.FIELDS:  # better refused now than when the ranks have met
        if registry.is_code(field, chosen := flat(to_dict(config))[field]):
            registry.find(field, chosen)
    return Request(name, run, {"config": config, **values})


def _allow_code(flags: Sequence[str], again: bool) -> None:
    """Let the code be loaded that these flags name, or name `again`: then they name nothing else. UserError."""
    for name, _, value in (flag.removeprefix("--").partition("=") for flag in flags if flag.startswith("--")):
        if name in registry.FIELDS and registry.is_reference(value):
            registry.allow(name, value, of_run=again)
        elif name in registry.FIELDS and again:
            raise UserError(f"--{name}: {value!r} is not MODULE:NAME; only code has to be named again, so leave it out")


def _options(flags: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a model of the user's own among the flags, as YAML has them, and the other flags."""
    given = [flag for flag in flags if flag.startswith(OPTION)]
    options = {}
    for flag in given:
        name, equals, value = flag.removeprefix(OPTION).partition("=")
        if not equals:
            raise UserError(f"model.options.{name}: has no value; give it as {OPTION}{name} VALUE")
        options[name] = scalar(value)
    return options, [flag for flag in flags if flag not in given]


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
        over = "YAML file of fields, over the preset and under the flags"
        parser.add_argument("--config", metavar="FILE", type=Path, help=over)
        parser.add_argument("--print-config", action="store_true", help="print the resulting configuration and end")
        parser.add_argument("--method", type=str, help=METHOD_HELP)
        for group, fields in GROUPS.items():
            parser.add_class_arguments(fields, group)
        parser.add_argument("--model.config", metavar="FILE", type=Path, help=CONFIG_HELP)
    elif name in OPENS_RUNS:
        for field in registry.FIELDS:
            parser.add_argument(f"--{field}", type=str, metavar="MODULE:NAME", help=CODE_HELP)
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
        values = parser.parse_args(flags).clone(with_meta=False).as_dict()
    except ArgumentError as error:
        message = _in_our_words(str(error))
        if message.startswith("unrecognized"):
            options = [option for action in parser._actions for option in action.option_strings]
            wrong = next((word.partition("=")[0] for word in message.split() if word.startswith("--")), "")
            message += f"; {nearest(wrong, options) or f'{parser.prog} --help lists the flags'}"
        raise UserError(message) from None
    named = {k: v for k, v in values.items() if k not in ("preset", "config", "print_config")}
    return {name: _expanded(name, value) for name, value in named.items()}


def _expanded(name: str, value: Any) -> Any:
    """A path, or each of a list, that came without a flag, as a shell would expand it; anything else as it is."""
    if isinstance(value, list):
        return [_expanded(name, each) for each in value]
    return Path(expand_path(name, str(value))) if isinstance(value, Path) else value


def _in_full(parser: ArgumentParser, flags: list[str]) -> list[str]:
    """Each flag with its value in one word: `--json` as `--json=true`, a path as a shell would expand it.

    UserError for a path that cannot be, and for a number that the parser would not take as plain decimal: 1:30 is
    ninety in YAML 1.1.
    """
    kinds = {option: kind for action in parser._actions for option in action.option_strings if (kind := _kind(action))}
    words, left = [], list(flags)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        name = flag.removeprefix("--") if "." in flag else flag  # a field is named as everywhere
        takes_word = flag.startswith((OPTION, *(f"--{field}" for field in registry.FIELDS)))
        if takes_word and not equals and left and not left[0].startswith("--"):
            equals, value = "=", left.pop(0)
        if flag in GROUP_FLAGS:
            raise UserError(f"{flag}: is a group of fields; give each by itself: {parser.prog} --help lists them")
        if flag == OPTION[:-1]:
            raise UserError(f"{flag}: is a group of settings; give each by itself: {OPTION}NAME VALUE")
        if (kind := kinds.get(flag)) is None:
            words.append(flag + equals + value)
            continue
        if kind is bool and not equals and not (left and left[0].lower() in ("true", "false", "null")):
            value = "true"
        elif not equals and (not left or left[0].startswith("--")):
            words.append(flag)  # the parser says that it lacks a value
            continue
        elif not equals:
            value = left.pop(0)
        if kind in (int, float):
            _check_numbers(name, value)
        words.append(f"{flag}={expand_path(name, value) if kind is Path and value != 'null' else value}")
    return words


def _kind(action: argparse.Action) -> type | None:
    """The one of `CHECKED` of which a flag's value is, or its list's members are."""
    hint = getattr(action, "_typehint", None) or action.type
    if action.dest in PATHS:
        return Path
    return next((kind for kind in CHECKED if kind in (hint, *get_args(hint))), None)


def _check_numbers(name: str, text: str) -> None:
    for number in re.split(r"[\s,\[\]]+", text):
        if re.match(r"[-+.]?\d", number) and not DECIMAL.fullmatch(number):
            raise UserError(f"{name}: {number!r} is not valid; it must be a plain decimal number")
        if DECIMAL.fullmatch(number) and not math.isfinite(float(number)):
            raise UserError(f"{name}: {number!r} is not valid; it must be a finite number")


def _in_our_words(message: str) -> str:
    """The parser's complaint in the wording of the configuration's own."""
    message = " ".join(message.split())
    found = re.match(r'Parser key "([^"]+)": Expected an? (.+?)\. Got value: (.*)', message) or re.match(
        r'Parser key "([^"]+)": Does not validate .+? Subtypes: \[(.+?)\] Errors: .+ Given value: (.*)', message
    )
    if not found:
        return " ".join(message.split())
    name, kind, value = found.groups()
    choices = re.findall(r"'([^']*)'", kind) if "Literal" in kind else []
    right = f"choose one of {', '.join(choices)}" if choices else f"it must be of type {_type_name(kind)}"
    return f"{name}: {value!r} is not valid; {right}"


def _type_name(kind: str) -> str:
    names = re.findall(r"'([^']*)'", kind.replace("tuple[float, float]", "'list of two numbers'")) or [kind]
    return " or ".join("list of whole numbers" if n == "tuple" else n.replace("NoneType", "null") for n in names)


def _base(flags: list[str]) -> tuple[Config, bool, list[str]]:
    """The configuration under the flags: `--config` over `--preset`, or with `--resume` alone that of the run."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset")
    early.add_argument("--config", type=Path)
    early.add_argument("--print-config", action="store_true")
    try:
        given, rest = early.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    base = preset(given.preset) if given.preset else Config()
    if given.config:
        base = apply_config_file(base, given.config)
    elif not given.preset and "--resume=true" in rest and (run_dir := _run_dir(rest)):
        base = _of_run(run_dir, flags)
    return base, given.print_config, rest


def _run_dir(flags: list[str]) -> Path | None:
    folders = [flag.partition("=")[2] for flag in flags if flag.startswith("--run.dir=")]
    return Path(folders[-1]) if folders and folders[-1] != "null" else None


def _of_run(run_dir: Path, flags: list[str]) -> Config:
    """The configuration of the run in a folder, the defaults where there is none yet.

    UserError if then nothing says what to train, unless the job went no further before it was started again.
    """
    if (run_dir / "config.yaml").is_file():
        return apply_config_file(Config(), run_dir / "config.yaml", "--resume")
    what = [flag for flag in flags if flag.startswith(SAYS_WHAT) and not flag.startswith("--run.dir=")]
    if not what and not launcher.restarts():
        around = next((f"; did you mean {p}?" for p in run_dir.parents if (p / "config.yaml").exists()), "")
        raise UserError(
            f"--resume: there is no run in run.dir {str(run_dir)!r} (no config.yaml)"
            + (around or "; name a run's folder, or say by --preset, --config or flags what to train")
        )
    return Config()


def _instantiate(run: Callable[..., None], values: dict[str, Any]) -> dict[str, Any]:
    """The `runtime` group of a command without a configuration, as its dataclass."""
    return {k: RuntimeConfig(**v) if k == "runtime" else v for k, v in values.items()}
