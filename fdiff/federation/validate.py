"""What a checkpoint must hold by its own configuration, and whether it does: asked before memory is taken for a model.

`checkpoint.inspect` finds out whether files are what was written; this module, whether that is a whole federation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fdiff import checkpoint, plan, registry
from fdiff.checkpoint import Damaged, Examined
from fdiff.config import KINDS as OWN_KINDS
from fdiff.config import Config, from_dict
from fdiff.errors import UserError
from fdiff.federation.compressed import kept_by_federation
from fdiff.federation.local_optimizer import STEPS
from fdiff.federation.run_files import KINDS
from fdiff.model import describe_model, frozen_parts, layout_of, part_sizes, parts_of, sizes_of

Datasets = Mapping[str, tuple[tuple[int, ...], str]]  # name: shape, dtype


def has_client_files(config: Config) -> bool:
    """Whether a client has anything of its own to save."""
    own = config.optim.ema or config.federation.keep_optimizer or config.run.keep_local or config.compression.feeds_back
    return bool(own) or config.optim.counts_steps or bool(private_parts(config))


def private_parts(config: Config) -> tuple[str, ...]:
    """The parts that never leave a client."""
    return plan.private_parts(config.method, parts_of(config), frozen_parts(config))


def shared_parts(config: Config) -> tuple[str, ...]:
    """The parts that all clients have alike."""
    return plan.shared_parts(config.method, parts_of(config), frozen_parts(config))


def find_problems(path: Path, found: Mapping[str, Examined] | None = None) -> list[str]:
    """A line for each thing that is wrong with a checkpoint, none if a run can go on from it.

    `found` is what `checkpoint.inspect` makes of it, if that is known already.
    """
    found = checkpoint.inspect(path) if found is None else found
    if damage := [problem for file in found.values() for problem in file.problems]:
        return damage
    header = found[checkpoint.GLOBAL].header
    try:
        config = check_global(path, header, found[checkpoint.GLOBAL].datasets)
        if checkpoint.round_of(path) not in (None, header["round"]):
            raise Damaged(f"{path}: holds round {header['round']}; give it its name back")
        for index in range(config.federation.clients) if has_client_files(config) else ():
            name = checkpoint.client_file(index)
            if name not in found:
                raise Damaged(f"{path / name}: is missing; use another checkpoint")
            check_client(path / name, config, found[name].datasets)
    except Damaged as error:
        return [str(error)]
    return []


def check_global(path: Path, header: Mapping[str, Any], datasets: Datasets) -> Config:
    """The configuration of a checkpoint whose global.h5 has this header and these datasets; Damaged if they misfit."""
    file = path / checkpoint.GLOBAL
    if missing := [k for k in ("config", "layout", "round", "images") if k not in header]:
        raise Damaged(f"{file}: its header has no {missing[0]}; use another checkpoint")
    try:
        config = from_dict(header["config"])
    except (UserError, TypeError, ValueError) as error:
        if str(error).startswith(tuple(f"{field}: " for field in registry.FIELDS)):  # code that is not here: not damage
            raise UserError(f"{file}: {error}") from None
        raise Damaged(f"{file}: its configuration is not valid ({error}); use the fdiff that made it") from error
    if type(header["round"]) is not int or header["round"] < 1:
        raise Damaged(f"{file}: says that it is of round {header['round']!r}; use another checkpoint")
    _check_logs(file, header)
    prints = header.get("fingerprints", [])
    if not isinstance(prints, list) or not all(isinstance(one, dict) for one in prints):
        raise Damaged(f"{file}: its fingerprints are no list of checksums; use another checkpoint")
    model = describe_model(config)
    layout, frozen = layout_of(model), layout_of(model, frozen=True)
    if header["layout"] != checkpoint.layout_table(layout) and config.model.kind not in OWN_KINDS:
        raise UserError(
            f"model.kind: {config.model.kind} has other parameters than when {file} was made; give the code of then"
        )
    if header["layout"] != checkpoint.layout_table(layout):
        raise Damaged(f"{file}: its parameters are laid out otherwise than here; use the fdiff that made it")
    sizes = part_sizes(layout)
    shared = plan.shared_parts(config.method, tuple(sizes), frozen_parts(config))
    for kind in ("parts", *(["ema"] if any(name.startswith("ema/") for name in datasets) else [])):
        for part in shared:
            _check_shape(file, f"{kind}/{part}", (sizes[part],), config, datasets)
    if header.get("frozen", []) != checkpoint.layout_table(frozen):
        raise Damaged(f"{file}: its frozen parameters are laid out otherwise than here; use the fdiff that made it")
    for name, elements in kept_by_federation(config, layout, shared).items():
        _check_shape(file, f"state/{name}", (elements,), config, datasets)
    if frozen:
        _check_shape(file, "frozen", (sum(slot.numel for slot in frozen),), config, datasets)
    return config


def _check_logs(file: Path, header: Mapping[str, Any]) -> None:
    """Damaged if there are rows of logs that are not those of rounds up to this one, or who was dropped is no table."""
    logs = header.get("logs", {})
    lists = isinstance(logs, dict) and all(isinstance(rows, list) for rows in logs.values())
    rows = [row for rows in logs.values() for row in rows] if lists else [None]
    if not all(isinstance(row, dict) and row.get("round") in range(1, header["round"] + 1) for row in rows):
        raise Damaged(f"{file}: its rows of the logs are not those of its rounds; use another checkpoint")
    metrics = header.get("metrics", {})
    if not isinstance(metrics, dict) or not KINDS["a table of text by client"](metrics.get("dropped", {})):
        raise Damaged(f"{file}: its header does not say which clients were dropped; use another checkpoint")


def check_client(file: Path, config: Config, datasets: Datasets) -> None:
    """Damaged if a client's file lacks what this configuration has it keep."""
    sizes = sizes_of(config)
    shares = plan.shared_parts(config.method, tuple(sizes), frozen_parts(config))
    for part in (part for part in sizes if part not in shares):
        _check_shape(file, f"private/{part}", (sizes[part],), config, datasets)
    moments = ("exp_avg", "exp_avg_sq") if config.federation.keep_optimizer else ()
    for name in (*(("ema",) if config.optim.ema else ()), *moments):
        _check_shape(file, name, (sum(sizes.values()),), config, datasets)
    if moments and datasets.get("step") != ((), "float32"):
        raise Damaged(f"{file}: has no number of steps; use another checkpoint")
    if config.optim.counts_steps and datasets.get(STEPS) != ((), "int64"):
        raise Damaged(f"{file}: has no number of steps taken; use another checkpoint")
    shared = sum(sizes[part] for part in shares)
    if config.compression.feeds_back:
        _check_shape(file, "left-out", (shared,), config, datasets)
    if "local" in datasets:
        _check_shape(file, "local", (shared,), config, datasets)


def _check_shape(file: Path, name: str, shape: tuple[int, ...], config: Config, datasets: Datasets) -> None:
    dtype = "float64" if config.runtime.precision == "float64" else "float32"
    if name not in datasets:
        raise Damaged(f"{file}: has no dataset {name}; use another checkpoint")
    if datasets[name] != (shape, dtype):
        held = " ".join(map(str, reversed(datasets[name])))
        raise Damaged(f"{file}: {name} is {held}, its configuration needs {dtype} {shape}; use another checkpoint")
