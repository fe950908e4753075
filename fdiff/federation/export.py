"""Export: a model's weights by parameter name in a safetensors file, with all that is needed to rebuild it.

`load_model` needs nothing but the file. No run, no ranks, no pickle.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fdiff import __version__, registry
from fdiff.config import Config, from_dict, to_dict
from fdiff.errors import UserError, one_line
from fdiff.federation.saved import Saved
from fdiff.federation.validate import private_parts, shared_parts
from fdiff.model import Buckets, build_model, describe_model

FORMAT = "fdiff/1"


def choose_model(saved: Saved, client: int | None, ema: bool | None) -> tuple[int | None, bool]:
    """The client (None: the global model) and whether its moving average, of a request that may leave both open.

    Then it is client 0 where each has its own model, and the moving average where there is one. UserError as
    `check_choice`.
    """
    client = 0 if client is None and private_parts(saved.config) else client
    ema = saved.has_ema if ema is None else ema
    check_choice(saved, client, ema)
    return client, ema


def model_name(client: int | None, ema: bool, round: int) -> str:
    """What a person is told was drawn or written: "client 3, round 15, moving average"."""
    whose = "the global model" if client is None else f"client {client}"
    return f"{whose}, round {round}, {'moving average' if ema else 'last weights'}"


def check_choice(saved: Saved, client: int | None, ema: bool, flag: str = "--client") -> None:
    """UserError unless the checkpoint has the model of this client (None: of all clients), or its moving average.

    `flag` is what the client was given by.
    """
    clients, own = saved.config.federation.clients, bool(private_parts(saved.config))
    if own and (client is None or not 0 <= client < clients):
        raise UserError(
            f"{flag}: {client} is not valid; with {saved.config.method} each client has its own model: 0 to "
            f"{clients - 1}"
        )
    if client is not None and not own:
        raise UserError(f"{flag}: {client} is not valid; {saved.config.method} has one model for all clients")
    if ema and not saved.has_ema:
        raise UserError(f"--ema: {saved.path} has no moving averages; train with --optim.ema, or leave it out")


def model_of(saved: Saved, client: int | None, ema: bool) -> nn.Module:
    """A model of a checkpoint, as `Saved.parameters` tells which, on the CPU in the precision of its run."""
    model = build_model(saved.config)
    dtype = torch.float64 if saved.config.runtime.precision == "float64" else torch.float32
    saved.fill(Buckets(model, shared_parts(saved.config)).to("cpu", dtype), client, ema)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters by name, each in memory of its own."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def save_model(path: Path, saved: Saved, client: int | None, ema: bool) -> None:
    """Write a model of a checkpoint, as `Saved.parameters` tells which; the file appears only when complete.

    The same model makes the same bytes. UserError if the path cannot be written.
    """
    weights = weights_of(model_of(saved, client, ema))
    metadata = {
        "format": FORMAT,
        "config": json.dumps(to_dict(saved.config)),
        "round": str(saved.round),
        "client": "global" if client is None else str(client),
        "ema": str(ema).lower(),
        "fdiff_version": __version__,
    }
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_weights(temporary, weights, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); give another file") from None


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, which must not be there yet; its owner alone may read it. OSError, SafetensorError.

    A client's own model is its owner's alone, here as in its checkpoint.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    save_file(dict(weights), path, dict(metadata))
    with path.open("r+b") as file:
        # The library has the metadata in another order each time: put back sorted, in the same place.
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        sorted_header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(sorted_header) <= size, "as long as it was, but for what it ends with to fill up eight bytes"
        file.seek(8)
        file.write(sorted_header.ljust(size))
        os.fsync(file.fileno())


def load_model(path: Path, kind: str | None = None) -> tuple[nn.Module, Config]:
    """The model, on the CPU in the precision it was saved in, and the configuration of its run.

    UserError if the file is not one of `save_model`, or does not hold the model that it describes. One of a model that
    is code, MODULE:NAME, is read only where `kind` names that again.
    """
    if kind is not None:
        registry.allow("model.kind", kind)
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, file.keys()
            found = {n: (tuple(file.get_slice(n).get_shape()), file.get_slice(n).get_dtype()) for n in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); export the checkpoint again") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: has format {metadata.get('format')}, expected {FORMAT}; make it by fdiff export")
    config = config_of(path, metadata)
    dtypes = {dtype for _, dtype in found.values()}
    described = describe_model(config)  # before memory is taken for the model
    expected = {name: tuple(parameter.shape) for name, parameter in described.named_parameters()}
    if {name: shape for name, (shape, _) in found.items()} != expected or dtypes not in ({"F32"}, {"F64"}):
        raise UserError(f"{path}: its weights are not those of the model that it describes; export it again")
    model, weights = build_model(config), load_file(path)
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"{path}: its weights are not finite (NaN or infinity); export another checkpoint")
    model.to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights, strict=False)  # buffers are constants, and not in the file
    return model, config


def config_of(path: Path, metadata: Mapping[str, str]) -> Config:
    """The configuration in an export's metadata. UserError if it is not valid."""
    try:
        return from_dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # a UserError is a ValueError
        raise UserError(f"{path}: its configuration is not valid ({one_line(error)}); export it again") from None
