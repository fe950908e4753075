"""Methods, models and data sets that are not fdiff's own: registered by a caller, installed as entry points, or named
as MODULE:NAME.

Code is loaded only because the command line, an installed entry point or the Python caller names it. A configuration
file, a checkpoint or a run may hold a name, but whoever starts the command has to name it again.
"""

from __future__ import annotations

import importlib
import re
import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from fdiff.errors import UserError, first_line

# Field of the configuration: group of entry points.
FIELDS = {"method": "fdiff.methods", "model.kind": "fdiff.models", "data.dataset": "fdiff.datasets"}
BUILT_IN = {
    "method": ("full", "usplit", "ulatdec", "udec"),
    "model.kind": ("unet", "unet2d"),
    "data.dataset": ("embedded", "fashion-mnist", "celeba", "cifar10", "folder", "npz", "parquet", "silos"),
}
PARTS = ("encoder", "bottleneck", "decoder")  # of fdiff's own models, in order: methods that share them alone
_REFERENCE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_NAME = re.compile(r"[A-Za-z][\w-]{0,63}")

_registered: dict[str, dict[str, Any]] = {field: {} for field in FIELDS}
_allowed: dict[str, set[str]] = {field: set() for field in FIELDS}
_expected: dict[str, set[str]] = {field: set() for field in FIELDS}


def register_method(name: str, table: Any) -> None:
    """Have `--method NAME` mean this table, {part: who reports it}; see `fdiff.plan`. UserError for a name like a+b."""
    _register("method", name, table)


def register_model(name: str, build: Any) -> None:
    """Have `--model.kind NAME` mean what `build(shape, model, **options)` returns; see `fdiff.model`. UserError."""
    _register("model.kind", name, build)


def register_dataset(name: str, opener: Any) -> None:
    """Have `--data.dataset NAME` mean what `opener(root, split)` returns; see `fdiff.data`. UserError."""
    _register("data.dataset", name, opener)


def _register(field: str, name: str, code: Any) -> None:
    if not _is_free(field, name):
        raise UserError(f"{field}: {name!r} cannot be registered; use letters, digits, - and _, and no name of fdiff's")
    _registered[field][name] = code


def _is_free(field: str, name: str) -> bool:
    """Whether somebody else may take the name."""
    return is_name(name) and name not in BUILT_IN[field] and not (field == "method" and name in PARTS)


def is_reference(name: str) -> bool:
    """Whether it names code in a module, as MODULE:NAME."""
    return bool(_REFERENCE.fullmatch(name))


def is_name(text: str) -> bool:
    """Whether something may be called so."""
    return bool(_NAME.fullmatch(text))


def allow(field: str, reference: str, of_run: bool = False) -> None:
    """Let this MODULE:NAME be loaded for that field: a person, or the Python caller, has named it.

    With `of_run` a command was told that the run which it opens was made with it: it may be made with no other.
    """
    _allowed[field].add(reference)
    if of_run:
        _expected[field].add(reference)


def allowed(field: str) -> list[str]:
    """What `allow` was told for that field."""
    return sorted(_allowed[field])


def expected(field: str) -> list[str]:
    """What a command was told of the run that it opens."""
    return sorted(_expected[field])


def is_registered(field: str, name: str) -> bool:
    """Whether only this process knows the name."""
    return name in _registered[field]


def names(field: str) -> list[str]:
    """What is registered or installed for a field."""
    return [*_registered[field], *(point.name for point in _installed(field) if _is_free(field, point.name))]


def is_code(field: str, name: str) -> bool:
    """Whether it is none of fdiff's own, but somebody's code."""
    return is_reference(name) or name in names(field)


def check_name(field: str, name: str, also: str = "") -> None:
    """UserError unless it is one of fdiff's own, MODULE:NAME, registered or installed; nothing is loaded.

    `also` says what else would be right.
    """
    if name in BUILT_IN[field] or is_reference(name) or name in (more := names(field)):
        return
    known = ", ".join([*BUILT_IN[field], *more])
    raise UserError(f"{field}: {name!r} is not valid; choose one of {known}{also}, or your own as MODULE:NAME")


def find(field: str, name: str) -> Any:
    """The code of that name. UserError if nobody allowed it, or it cannot be loaded."""
    if name in _registered[field]:
        return _registered[field][name]
    if found := _REFERENCE.fullmatch(name):
        if name not in _allowed[field]:
            raise UserError(
                f"{field}: {name!r} is code, which is loaded only where the command line names it; add --{field} {name}"
            )
        if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
            sys.path.insert(0, here)  # as `python -m` has it
        return _load(field, name, *found.groups())
    if point := next((point for point in _installed(field) if point.name == name), None):
        return _load(field, point.value, point.module, point.attr)
    raise UserError(f"{field}: {name!r} is neither registered nor installed here")


def _installed(field: str) -> list[EntryPoint]:
    return _points(FIELDS[field], tuple(sys.path))


@lru_cache
def _points(group: str, path: tuple[str, ...]) -> list[EntryPoint]:
    """The entry points of the packages on the path: looking for them takes milliseconds, and a plan asks often."""
    return list(entry_points(group=group))


def _load(field: str, name: str, module: str, attribute: str) -> Any:
    try:
        found: Any = importlib.import_module(module)
        for step in attribute.split("."):
            found = getattr(found, step)
        return found
    except AttributeError as error:
        raise UserError(f"{field}: {name!r} cannot be used ({first_line(error)}); name what is in the module") from None
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{field}: {name!r} cannot be imported ({reason}); the module is looked for in the current folder and "
            "among those installed"
        ) from None
