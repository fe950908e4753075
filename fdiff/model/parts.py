"""What a model has to be: any nn.Module that knows its parts.

It has `forward(x, t, labels=None)`: noisy images x (B, C, S, S), timesteps t (B,) from 0, labels (B,) or None → the
predicted noise (B, C, S, S), or v under `diffusion.objective: v`. Labels are below `model.classes`; under
`model.class_dropout` some are `model.classes` itself, which stands for no class (see `labels`). Its attribute `parts`
is an ordered {name: [submodules]}: each parameter is in one part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fdiff import registry
from fdiff.errors import UserError

RESERVED = ("total", *registry.BUILT_IN["method"])  # names that mean something else where parts are named


def parameters_by_part(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each part by their names in the model, in order.

    UserError names the part or the parameter of a model that cannot be cut so.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise _refused(f"the parameter {name} has no shape yet; use layers whose sizes are given")
        if not parameter.is_floating_point():
            raise _refused(f"the parameter {name} is {parameter.dtype}; use real floats, or a buffer for a constant")
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (first := names.setdefault(id(parameter), name)) != name:
            raise _refused(f"{first} and {name} are one parameter; give each its own")
    found: dict[str, dict[str, nn.Parameter]] = {}
    part_of: dict[str, str] = {}
    for part, modules in _parts(model).items():
        found[part] = {}
        for module in modules:
            for parameter in module.parameters():
                name = names.get(id(parameter))
                if name is None:
                    raise _refused(f"the part {part} holds a parameter that is not the model's")
                if (other := part_of.setdefault(name, part)) != part or name in found[part]:
                    raise _refused(f"the parameter {name} is in the parts {other} and {part}; it must be in one, once")
                found[part][name] = parameter
        if not found[part]:
            raise _refused(f"the part {part} has no parameters; leave it out, or join it to another")
    if left := [name for name in names.values() if name not in part_of]:
        raise _refused(f"the parameter {left[0]} is in no part; put its module, a submodule of the model, into one")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise _refused("all its parameters are frozen; there is nothing to train")
    _check_buffers(model)
    return found


def freeze_all_but(model: nn.Module, trained: Sequence[str]) -> None:
    """Have only these parts of the model trained. UserError if it lacks one, or one has nothing that could be."""
    found = parameters_by_part(model)
    for part in trained:
        if part not in found:
            raise UserError(f"model.train: the model has no part {part!r}; its parts are {', '.join(found)}")
        if not any(parameter.requires_grad for parameter in found[part].values()):
            raise UserError(f"model.train: all parameters of the part {part} are frozen; there is nothing to train")
    for part, parameters in found.items():
        for parameter in parameters.values():
            parameter.requires_grad_(parameter.requires_grad and part in trained)


def _parts(model: nn.Module) -> Mapping[str, Sequence[nn.Module]]:
    parts = getattr(model, "parts", None)
    if not isinstance(parts, Mapping) or not parts:
        raise _refused("it has no attribute parts, an ordered {name: [submodules]}")
    for part, modules in parts.items():
        if not isinstance(part, str) or not registry.is_name(part) or part in RESERVED:
            raise _refused(f"{part!r} is no name of a part; use letters, digits, - and _, not {', '.join(RESERVED)}")
        if not isinstance(modules, (list, tuple)) or not all(isinstance(module, nn.Module) for module in modules):
            raise _refused(f"the part {part} is no list of submodules")
    return parts


def _check_buffers(model: nn.Module) -> None:
    """What a model keeps beside its parameters would neither be averaged nor saved."""
    saved = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in saved and (buffer.is_floating_point() or buffer.is_complex()):
            raise _refused(
                f"the buffer {name} is part of its state, and would be neither averaged nor saved; use nn.GroupNorm "
                "instead of a BatchNorm, or register_buffer(..., persistent=False) for a constant"
            )


def _refused(reason: str) -> UserError:
    return UserError(f"model.kind: the model cannot be shared: {reason}")
